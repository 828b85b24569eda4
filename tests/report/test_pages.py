"""The page of a run and of several, as text. tests/report/test_browser.py opens it."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from recorded_run import SUMMARY, candidate, complete, failed, measured, records, write_training

from autotune import cli
from autotune.errors import ConfigError
from autotune.report.html import LARGEST, write_comparison, write_html
from autotune.runs.objective import pareto_front
from autotune.runs.read import load_run
from autotune.runs.records import TrialRecord
from autotune.units import GIB

WriteRun = Callable[..., Path]


def page_of(path: Path) -> str:
    """The page without the script of plotly, which holds any word."""
    return re.sub(r'(?s)<script type="text/plain".*?</script>', "", write_html(load_run(path)).read_text())


def titles(page: str) -> list[str]:
    return re.findall(r"<h3>(.*?)</h3>", page)


def test_the_front_is_what_no_other_beats() -> None:
    points = [(1, 10.0), (2, 9.0), (2, 12.0), (3, 12.0), (4, 15.0)]
    front = pareto_front((*point, point) for point in points)
    assert front == [(1, 10.0), (2, 12.0), (4, 15.0)]


def test_the_first_questions_are_answered_in_words(write_run: WriteRun) -> None:
    path = write_run(best=candidate(24), verdict=lambda verdict: replace(verdict, ended=True))
    page = page_of(path)
    assert "Trial 6 is the best of 7 trials: 15,049 ± 113 tokens/s, 1.50 times the baseline&#39;s speed" in page
    assert "confirmed in 2 processes." in page
    assert f'<pre id="command" tabindex="0">autotune train {path}</pre>' in page
    assert "Trial 1 (with batch 16 x 4) is 7.0% slower (14,000 ± 70 tokens/s), beyond the noise of ±0.9%." in page
    assert "trial 3 (batch 64 x 1, loss full): wanted 12.00 GiB" in page
    assert "1 crashed: &lt;script&gt;alert(1)&lt;/script&gt; [bold] of worker" in page
    assert "16.00 GiB of 24.00 GiB left" in page
    assert "micro_batch_size = 24" in page  # best.toml


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            {"tied_with": (1,)},
            "cannot be told apart from the winner (14,000 ± 70 tokens/s); the winner needs the least",
        ),
        ({"fell_through": (1,)}, "Trial 1 was better when it was searched, but its confirmation failed"),
        ({"ranking": (6, 2)}, "No other candidate ran within the limit."),
    ],
)
def test_why_the_runner_up_lost(write_run: WriteRun, edit: dict[str, object], said: str) -> None:
    assert said in page_of(write_run(best=candidate(24), verdict=lambda verdict: replace(verdict, **edit)))


def test_where_losses_are_predicted_they_decide(write_run: WriteRun) -> None:
    trials = [replace(r, predicted_loss=3.0 - r.objective / 1e5, objective=3.0 - r.objective / 1e5) if r.objective
              else r for r in records()]  # fmt: skip
    page = page_of(write_run(trials, best=candidate(24), objective="loss"))
    assert "predicted loss 2.850 at 15,049 ± 113 tokens/s, 0.050 below the baseline&#39;s;" in page
    assert "has a predicted loss of 2.860, no lower than the winner&#39;s, at 14,000 ± 70 tokens/s" in page


def test_a_search_that_runs_says_so(write_run: WriteRun) -> None:
    path = write_run(best=candidate(24))
    (path / ".spent.1.1").write_text("100.0 85.0")
    page = page_of(path)
    assert "The search is running: 3m05s of 10m00s; this is its state so far; <code>autotune report" in page


def test_every_plot_that_has_data_is_there(write_run: WriteRun) -> None:
    path = write_run(best=candidate(24), verdict=complete)
    write_training(path / "train", SUMMARY)
    assert titles(page_of(path)) == [
        "Speed against memory", "History against the budget", "What each choice costs", "What matters",
        "Where the winner&#39;s memory goes", "Where the budget went", "Learning curve",
    ]  # fmt: skip


def test_the_command_that_trains_the_winner_stays_when_it_is_trained(write_run: WriteRun) -> None:
    path = write_run(best=candidate(24))
    write_training(path / "train", SUMMARY)
    page = page_of(path)
    assert f'<pre id="command" tabindex="0">autotune train {path}</pre>' in page
    assert f'<pre id="command-2" tabindex="0">autotune sample {path}</pre>' in page


def test_a_training_shows_what_was_promised_and_what_came(write_run: WriteRun) -> None:
    path = write_run(best=candidate(24))
    write_training(path / "train", SUMMARY)
    page = page_of(path)
    assert "1,000 -&gt; 1,010 (+1.0%)" in page
    (path / "train" / "summary.json").write_text("{")
    assert "is not a readable training" in page_of(path)  # and the rest is there


def test_memory_is_predicted_unless_a_profile_lies_in_the_run(write_run: WriteRun) -> None:
    path = write_run(best=candidate(24))
    assert "Predicted by the memory model, not calibrated by trials yet" in page_of(path)
    (path / "profile").mkdir()
    profile = {"measured_peak_bytes": 5 * GIB, "peak_bytes": {"logits and loss": 5 * GIB, "unexplained": 0}}
    (path / "profile" / "profile.json").write_text(json.dumps({**profile, "peak_phase": "loss", "peak_seconds": 1.0}))
    assert "Recorded by autotune profile. Together 5.00 GiB" in page_of(path)


def test_nothing_measured(write_run: WriteRun) -> None:
    page = page_of(write_run([]))
    assert "Nothing has been measured yet." in page
    assert titles(page) == []


def test_nothing_feasible_shows_the_failures(write_run: WriteRun) -> None:
    page = page_of(write_run([record for record in records() if record.result.status != "ok"]))
    assert "No candidate is feasible: none of 3 trials ran within 24.00 GiB." in page
    assert "wanted 12.00 GiB" in page
    assert "Speed against memory" in titles(page)


def test_the_ends_of_failed_trials_logs_are_in_the_table(write_run: WriteRun) -> None:
    path = write_run(best=candidate(24))
    (path / "logs").mkdir()
    (path / "logs" / "trial-0005.log").write_text("\n".join(f"line {n} <b>" for n in range(40)) + "\n\x1b[31mlast\n")
    page = page_of(path)
    assert "line 39 &lt;b&gt;\n\\x1b[31mlast</pre>" in page
    assert "line 20 " not in page
    assert f"{path / 'logs' / 'trial-0003.log'}: No such file" in page


def test_the_page_is_self_contained_and_escaped(write_run: WriteRun) -> None:
    path = write_run(best=candidate(24), name="<i>run & co")
    page = page_of(path)
    assert "<i>" not in page
    assert "<script>alert" not in page
    assert "Test &lt;Card&gt;" in page
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    assert "http://" not in page
    assert "https://" not in page
    assert page.count('class="best"') == 1


def test_the_page_cannot_be_turned_around(write_run: WriteRun) -> None:
    trials = records()
    trials[5] = replace(trials[5], result=replace(trials[5].result, message="\u202e<b>\x1b[2J"))
    page = page_of(write_run(trials))
    assert r"\u202e&lt;b&gt;\x1b[2J" in page
    assert not set(page) & set("\u202e\x1b")


def test_a_page_that_cannot_be_written_is_one_line(write_run: WriteRun) -> None:
    path = write_run(best=candidate(24))
    (path / "report.html").mkdir()
    with pytest.raises(ConfigError, match=r"report.html cannot be written"):
        write_html(load_run(path))


def test_columns_that_are_the_same_in_all_trials_are_a_line(write_run: WriteRun) -> None:
    page = page_of(write_run(best=candidate(24)))
    assert "The same in all: layers 6, heads 6, width 384, block 1024" in page
    assert "Not known in any: predicted loss, MFU %" in page
    headers = re.findall(r'data-name="(.*?)"', page)
    assert headers[:4] == ["trial", "role", "status", "tokens/s"]
    assert "layers" not in headers
    assert headers[-1] == "reason"


def test_five_thousand_trials_stay_below_5_mb_and_what_is_left_out_is_said(write_run: WriteRun) -> None:
    first = records()[0]
    trials = [first]
    for number in range(1, 5000):
        micro = 1 + number % 64
        result = measured(0, 10_000.0 + number, 5 + micro / 8)
        message = "RuntimeError: " + "words and words " * 30
        if number % 3 == 0:
            result = failed(0, "crashed", message)
        record = TrialRecord(
            trial=number, role="search", candidate=candidate(micro), result=result,
            objective=result.tokens_per_second, predicted_peak_bytes=6 * GIB,
        )  # fmt: skip
        trials.append(record)
    path = write_run(trials, best=candidate(24))
    (path / "logs").mkdir()
    for number in range(3, 5000, 3):
        (path / "logs" / f"trial-{number:04d}.log").write_text(f"trial {number}: {'words and ' * 9}\n" * 40)
    page = write_html(load_run(path))
    assert page.stat().st_size < LARGEST
    text = page.read_text()
    assert text.count("<tr id=") == 5000
    (count,) = re.findall(r"the logs of (\d+) failed trials are left out; they are in ", text)
    assert text.count("see logs/trial-") == int(count) > 1000
    assert text.count("words and words") > 5000  # reasons, and the logs that are there


def test_several_runs_on_one_page(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    slower = [replace(r, result=replace(r.result, tokens_per_second=r.result.tokens_per_second * 0.9)) if r.objective
              else r for r in records()]  # fmt: skip
    slower = [replace(r, objective=r.objective and r.objective * 0.9) for r in slower]
    paths = [write_run(name="a", best=candidate(24)), write_run(slower, name="b<b>", device_name="Other")]
    assert cli.run(["report", *map(str, paths), "--html"]) == 0
    out, err = capsys.readouterr()
    assert f"wrote {paths[0].parent / 'comparison.html'}" in err
    page = (paths[0].parent / "comparison.html").read_text()
    for text in (out, page):
        assert "0.900x ± 0.0" in text
        assert ", beyond the noise" in text
        assert "4: 0.900x" in text or "3: 0.900x" in text  # candidates in common
        assert "device_name" in text
        assert "different machines" in text
    assert "b&lt;b&gt;" in page
    assert "b<b>" not in page


def test_a_run_beside_itself_is_within_the_noise(write_run: WriteRun) -> None:
    run = load_run(write_run(best=candidate(24)))
    page = write_comparison([run, run]).read_text()
    assert "memory_limit 24.00 GiB, " in page
    assert "do not differ beyond the noise" in page
    assert "Neither settings, nor the machine, nor the winner." in page


def test_the_page_says_what_made_it(write_run: WriteRun) -> None:
    path = write_run(best=candidate(24))
    text = (path / "search.toml").read_text()
    command = 'command = "autotune search --seed 7 --name x"'
    (path / "search.toml").write_text(text.replace('command = ""', command))
    assert "<dt>command</dt><dd>autotune search --seed 7 --name x</dd>" in page_of(path)
    assert "secret" not in page_of(path)

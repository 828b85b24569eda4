"""What a terminal shows."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from recorded_run import RECIPE, candidate, measured, records

from autotune.config.candidate import Plan, Shape
from autotune.measure.types import MemoryView, TrialResult
from autotune.report.compare import comparison
from autotune.report.facts import trial_facts
from autotune.report.html import write_html
from autotune.report.run import run_report
from autotune.report.table import print_text
from autotune.runs.read import load_run
from autotune.runs.verdict import Neighbour, Verdict
from autotune.search.space import in_words
from autotune.units import GIB

WriteRun = Callable[..., Path]


def shown(capsys: pytest.CaptureFixture[str], content: object, width: int | None = None) -> str:
    print_text(content, width)  # type: ignore[arg-type]
    return capsys.readouterr().out


def test_a_run(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    *others, final = records()
    cached = replace(final, result=replace(final.result, compile_cache_hits=4, compile_cache_misses=2))
    path = write_run([*others, cached], best=candidate(24), verdict=lambda verdict: replace(verdict, ended=True))
    text = shown(capsys, run_report(load_run(path), top=10))
    speed = "15,049 ± 113 tokens/s"  # of both measurements
    assert f"best: trial 6, confirmed in 2 processes: {speed}, peak 8.00 GiB, 4 of 6 graphs from the compile" in text
    assert "baseline: trial 0: 10,001 ± 107 tokens/s, peak 10.00 GiB" in text
    assert "gain: 1.50x ± 0.02 the baseline's tokens/s at 0.80x its peak memory" in text
    assert "not ended" not in text
    lines = text.splitlines()
    marked = [line for line in lines if line.startswith("*")]
    assert len(marked) == 1
    assert marked[0].split()[1:3] == ["6", "final"]
    assert "All of these: model 6x6x384, T 1024, 30.3M, attention sdpa, recompute none" in text
    assert "MFU" not in text  # unknown in all of them
    assert lines[-1] == f"next: autotune train {path}"


def test_failures_with_their_reasons_and_markup_taken_literally(
    write_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, run_report(load_run(write_run()), top=10))
    assert "wanted 12.00 GiB" in text
    assert "3, 4" in text
    assert "<script>alert(1)</script> [bold] of worker" in text


def test_top_limits_the_table_and_counts_the_rest(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(best=candidate(24))
    text = shown(capsys, run_report(load_run(path), top=1))
    assert "15,100" not in text
    assert f"3 more in {path / 'trials.csv'}, or with --top 4." in text


def test_unknown_is_a_dash_never_zero(capsys: pytest.CaptureFixture[str]) -> None:
    result = TrialResult(status="ok", phase="done", memory={"steady": MemoryView()})
    model, text = shown(capsys, trial_facts(result, Shape(vocab_size=65))).split("\n", 1)
    assert "12x12x768, block size 1024, vocabulary 65, 85,7" in model
    assert text.split().count("-") == 11
    assert not set(text) & set("0123456789")


def test_a_trial_that_failed(capsys: pytest.CaptureFixture[str]) -> None:
    view = MemoryView(allocated_bytes=GIB, num_alloc_retries=0)
    result = TrialResult(status="oom", phase="warmup", message="wanted 3.00 GiB [more]", memory={"first_step": view})
    text = shown(capsys, trial_facts(result, Shape()))
    assert "oom in phase warmup" in text
    assert "wanted 3.00 GiB [more]" in text
    assert text.rstrip().splitlines()[-1].split() == ["first_step", "1.00", "GiB", "-", "-", "0"]


def test_nothing_feasible_names_a_remedy(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run([record for record in records() if record.result.status != "ok"])
    text = shown(capsys, run_report(load_run(path), top=10))
    assert "No candidate is feasible: give more memory, a longer budget or a smaller model." in text
    assert "baseline: not measured" in text
    assert "the search has not ended; this is its state so far" in text
    assert text.splitlines()[-1] == f"next: autotune search --resume {path}"


def test_a_failed_baseline_shows_its_status(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = records()
    broken = [type(first)(trial=0, role="baseline", candidate=first.candidate, result=others[2].result), *others]
    text = shown(capsys, run_report(load_run(write_run(broken, best=candidate(24))), top=10))
    assert "baseline: trial 0: oom: wanted 12.00 GiB" in text
    assert "gain" not in text


def test_a_baseline_that_is_the_best_is_no_gain(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, run_report(load_run(write_run(records()[:1], best=candidate(8, "full"))), top=10))
    assert "gain: none, the baseline is the best candidate found" in text


def test_a_best_toml_of_another_candidate_is_reported(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, run_report(load_run(write_run(best=candidate(4))), top=10))
    assert "warning: best.toml is not the best trial: repair it with `autotune report --rebuild`" in text


def test_every_part_of_the_verdict_is_shown(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(best=candidate(24), verdict=concluded)
    text = shown(capsys, run_report(load_run(path), top=10))
    assert "tie: trial 1 cannot be distinguished from the best" in text
    assert "trial 2 was better, but its confirmation failed" in text
    assert "warning: the baseline's confirmation ran at 0.90x the speed of its trial" in text
    assert "the ranking is corrected for it" in text
    assert "without drift" in text
    assert "99,000" in text  # trial 1, first of those that are not the best
    assert (
        "time: 10m00s: compiling 50%, warming up 0%, measuring 40%, between trials 3%, starting trials 7%; "
        "harness overhead 10%, 60 trials an hour"
    ) in text
    assert "note: the budget ended early" in text
    told = [line.split() for line in text.splitlines()]
    assert ["micro_batch_size", "24", "->", "16", "1", "-7.3%", "-25.0%"] in told
    assert ["compile", "62%"] in told
    front = [line for line in told if line[1:2] == ["GiB"]]
    assert [line[:3] for line in front] == [["6.00", "GiB", "1"], ["8.00", "GiB", "6"]]


def concluded(verdict: Verdict) -> Verdict:
    return replace(
        verdict,
        tied_with=(1,),
        fell_through=(2,),
        drift=0.9,
        drift_corrected={"1": 99_000.0},
        notes=("the budget ended early",),
        spent_seconds=600.0,
        trials=10,
        seconds={"start": 30.0, "build": 12.0, "compile": 300.0, "measure": 240.0, "idle": 18.0},
        neighbours=(Neighbour(knob="micro_batch_size", value="16", winner="24", trial=1, objective=-0.073, peak=0.75),),
        importance={"compile": 0.62, "dtype": 0.38},
    )


def test_several_runs_side_by_side(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [write_run(best=candidate(24), name="a"), write_run([], name="b", device_name="Other")]
    text = shown(capsys, comparison([load_run(path) for path in paths]))
    assert "1.50x" in text
    assert "different machines" in text
    assert f"next: autotune train {paths[0]}" in text
    assert "nan" not in text.lower()


def test_another_vocabulary_size_is_shown_with_the_shape(
    write_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(candidate(8), recipe=replace(RECIPE, shape=replace(RECIPE.shape, vocab_size=65)))
    run = load_run(write_run([replace(record, candidate=small) for record in records()[:1]], best=small))
    shape = "model 6x6x384, T 1024, vocab 65, 11.0M"
    assert shape in shown(capsys, run_report(run, top=10))
    assert shape.removeprefix("model ") in shown(capsys, comparison([run, run]))
    assert "<td class=n>65" in write_html(run).read_text()
    assert in_words(small).startswith("6x6x384 block 1024 vocab 65,")
    assert "vocab" not in in_words(candidate(8))


def test_every_field_of_the_plan_is_shown_everywhere(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    """Trials that differ in one field only must differ in every table."""
    changes: dict[str, object] = {
        "micro_batch_size": 4, "attention": "sdpa_math", "loss": "auto_chunker", "loss_chunk_tokens": 77,
        "activation_checkpointing": "every_3", "compile": "off", "dtype": "tfloat32",
        "allocator": "expandable_segments",
    }  # fmt: skip
    for name, kind in get_type_hints(Plan).items():  # knobs of later versions: another value of theirs
        if name not in changes:
            changes[name] = get_args(kind)[-1] if get_args(kind) else kind(3)
    first = records()[0]
    chunked = replace(first, candidate=candidate(8))
    for number, (name, value) in enumerate(changes.items()):
        changed = replace(chunked.candidate, plan=replace(chunked.candidate.plan, **{name: value}))
        faster = replace(chunked, trial=1, candidate=changed, result=measured(1, 12_000, 9), objective=12_000.0)
        trials = [chunked, faster]
        run = load_run(write_run(trials, best=changed, name=f"run-{number}"))
        for text in (shown(capsys, run_report(run, top=10)), shown(capsys, comparison([run, run])),
                     write_html(run).read_text(), in_words(changed)):  # fmt: skip
            assert str(value) in text or ((name, value) == ("compile", "off") and "eager" in text), name


def test_a_field_that_the_plan_gains_is_in_every_place(tmp_path: Path) -> None:
    """In a process in which the plan has one more field from the start."""
    code = f"""
import dataclasses, sys
from pathlib import Path
from typing import get_args, get_type_hints
import autotune.config.candidate as home
home.Plan = dataclasses.make_dataclass("Plan", [("knob", float, 0.5)], bases=(home.Plan,), frozen=True, kw_only=True)
home.Plan.__module__ = home.__name__
home.Candidate.__annotations__["plan"] = home.Plan
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from recorded_run import candidate, records, write_run
from autotune.report.html import write_html
from autotune.report.compare import comparison
from autotune.report.run import run_report
from autotune.report.table import print_text
from autotune.runs.read import load_run
from autotune.search.space import in_words
one = dataclasses.replace(candidate(8), plan=home.Plan(micro_batch_size=8, knob=0.125))
trials = [dataclasses.replace(record, candidate=one) for record in records()[:1]]
run = load_run(write_run(Path({str(tmp_path)!r}), trials, best=one))
assert run.rows[0]["knob"] == 0.125
print_text(run_report(run, 10))
print("next place")
print_text(comparison([run, run]))
print("next place")
print(write_html(run).read_text().partition("<tbody>")[2])
print("next place")
print(in_words(one))
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    report, several, page, words = told.stdout.split("next place")
    assert "knob 0.125." in report  # below the table of a run
    assert "winner's knob 0.125" in several
    assert "<td>0.125" in page
    assert words.rstrip().endswith("knob 0.125")


def test_a_narrow_terminal_gets_every_number(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = load_run(write_run(best=candidate(24), verdict=lambda verdict: replace(verdict, ended=True)))
    text = shown(capsys, run_report(run, top=10), width=80)
    rows = [line for line in text.splitlines() if any(f" {role} " in line for role in ("baseline", "search", "final"))]
    assert len(rows) == 4
    assert max(map(len, rows)) <= 80
    assert "15,100 ± 76" in rows[1]


def test_several_runs_fit_a_narrow_terminal(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [write_run(best=candidate(24), name=name, device_name=name * 20) for name in ("first", "second")]
    text = shown(capsys, comparison([load_run(path) for path in paths]), width=80)
    tables = text.partition("These runs are of different machines")[0]
    assert max(map(len, tables.splitlines())) <= 80
    assert "15,049 ± 113" in tables

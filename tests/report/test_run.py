"""A run directory read back: types, best, baseline and gain, failures, and everything that is no run."""

import csv
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import recorded_run
from recorded_run import candidate, records

from autotune import cli
from autotune.errors import ConfigError
from autotune.report.run import as_json, cells, next_command, verdict_lines
from autotune.runs.read import load_run
from autotune.runs.records import COLUMNS
from autotune.runs.verdict import Verdict
from autotune.units import GIB

WriteRun = Callable[..., Path]


def test_every_column_comes_back_with_its_type(write_run: WriteRun) -> None:
    rows = load_run(write_run()).rows
    first, oom = rows[0], rows[3]
    assert set(first) == set(COLUMNS)
    assert (first["trial"], first["tokens_per_second"], first["activation_checkpointing"]) == (0, 10_000.0, "none")
    assert [type(first[name]) for name in ("trial", "tokens_per_second", "role")] == [int, float, str]
    assert first["peak_device_bytes"] == 10 * GIB
    assert (oom["tokens_per_second"], oom["peak_device_bytes"], first["mfu"]) == (None, None, None)
    assert (first["message"], oom["message"]) == ("", "wanted 12.00 GiB")


@pytest.mark.parametrize("word", ["none", "null", "NA", "nan", "None", "-"])
def test_words_for_nothing_stay_words(write_run: WriteRun, word: str) -> None:
    trials = records()
    trials[3] = replace(trials[3], result=replace(trials[3].result, message=word))
    assert load_run(write_run(trials)).rows[3]["message"] == word


@pytest.mark.parametrize("message", ["=1+1", "\t-", "\r@", "'=", "it's", "a\rb", 'a "b"\nc'])
def test_what_was_made_safe_for_spreadsheets_comes_back(write_run: WriteRun, message: str) -> None:
    trials = records()
    trials[3] = replace(trials[3], result=replace(trials[3].result, message=message))
    found = load_run(write_run(trials)).rows
    assert len(found) == len(trials)
    assert found[3]["message"] == message


def test_a_file_of_an_older_version_lacks_columns(write_run: WriteRun) -> None:
    path = write_run(best=candidate(24))
    with (path / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    old = [name for name in COLUMNS if name not in ("vocab_size", "loss_chunk_tokens")]
    with (path / "trials.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, old, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    run = load_run(path)
    assert {(row["vocab_size"], row["loss_chunk_tokens"]) for row in run.rows.values()} == {(None, None)}
    assert cells(run, run.rows[6])["model"] == "6x6x384, T 1024, 30.3M"
    assert cells(run, run.rows[6])["chunk tokens"] == "-"


def test_the_verdict_is_rendered_and_not_computed_again(write_run: WriteRun) -> None:
    """Figures of the verdict that contradict trials.csv are shown as they are."""

    def edited(verdict: Verdict) -> Verdict:
        assert verdict.gain is not None
        return replace(verdict, ranking=(0, 6), gain=replace(verdict.gain, speed=7.0), trade_offs=(), failures=())

    run = load_run(write_run(verdict=edited))
    assert [row["trial"] for row in run.select(run.verdict.ranking)] == [0, 6]
    assert any(line.startswith("gain: 7.00x") for line in verdict_lines(run))


def test_a_run_on_a_stand_in_is_not_called_measured(write_run: WriteRun) -> None:
    run = load_run(write_run(device_name="Card (stand-in)"))
    assert (run.verdict.status, run.verdict.confirmed) == ("stand-in", False)
    lines = verdict_lines(run)
    assert any("computes nothing" in line and line.startswith("warning: ") for line in lines)
    assert any(line.startswith("best: trial 6, not measured") for line in lines)


def test_a_verdict_of_the_last_version_names_the_command_that_rewrites_it(write_run: WriteRun) -> None:
    path = write_run(best=candidate(24))
    (path / "verdict.json").write_text('{"confirmed": true, "at_first_speed": {}, "steps": []}')
    run = load_run(path)
    assert len(run.rows) == len(records())
    assert next_command(run) == f"repair it with `autotune report --rebuild {path}`"


def test_a_verdict_names_only_trials_that_have_a_row(write_run: WriteRun) -> None:
    path = write_run(verdict=lambda verdict: replace(verdict, ranking=(99, 6)))
    run = load_run(path)
    assert run.verdict.ranking == (6,)
    assert run.damage == ("verdict.json: it names trial 99, which has no row (it is left out)",)


def test_the_winner_is_shown_without_its_row(write_run: WriteRun) -> None:
    path = write_run(best=candidate(24))
    (path / "trials.csv").write_text("")
    run = load_run(path)
    assert sorted(run.rows) == [0, 6]
    assert run.rows[6]["tokens_per_second"] == 15_000.0
    lines = verdict_lines(run)
    assert lines[0].startswith("damaged: trials.csv: No columns")
    assert any(line.startswith("best: trial 6, confirmed") for line in lines)
    json.dumps(as_json(run), allow_nan=False)


@pytest.mark.parametrize("content", [b"", b"not a database", b"SQLite format 3\0" + bytes(4096)])
def test_a_damaged_study_is_said_and_the_rest_is_shown(tmp_path: Path, content: bytes) -> None:
    path = local_run(tmp_path)
    assert load_run(path).damage == ()
    (path / "study.db").write_bytes(content)
    run = load_run(path)
    assert len(run.rows) == len(records())
    assert run.damage[0].startswith("study.db: ")
    assert "the search cannot be resumed" in run.damage[0]


def local_run(parent: Path) -> Path:
    """A run whose study would be in study.db."""
    path = recorded_run.write_run(parent, best=candidate(24))
    settings = (path / "search.toml").read_text().splitlines()
    (path / "search.toml").write_text("\n".join(line for line in settings if not line.startswith("storage")))
    return path


def test_a_search_that_runs_shows_its_state(write_run: WriteRun) -> None:
    path = write_run(best=candidate(24))
    (path / "logs").mkdir()
    (path / "logs" / "trial-0006.log").touch()
    (path / "logs" / "trial-0007.log").touch()
    (path / ".spent.1.1").write_text("100.0 85.0")
    run = load_run(path)
    assert run.searching == 185.0
    state = "the search is running: 3m05s of 10m00s, trial 7 is being measured; this is its state so far"
    assert state in verdict_lines(run)
    os.utime(path / ".spent.1.1", (0, 0))  # its process was killed
    run = load_run(path)
    assert run.searching is None
    assert "the search has not ended; this is its state so far" in verdict_lines(run)


def test_nothing_measured_yet_and_running_names_no_second_search(write_run: WriteRun) -> None:
    path = write_run([])
    (path / ".spent.1.1").write_text("- 5.0")
    assert next_command(load_run(path)) == f"autotune report {path}"


def test_the_next_command(write_run: WriteRun) -> None:
    failed = [record for record in records() if record.result.status != "ok"]
    path = write_run(failed)
    assert next_command(load_run(path)) == f"autotune search --resume {path}"
    run = load_run(write_run(failed, name="b", verdict=lambda verdict: replace(verdict, budget_wanted="2h")))
    assert next_command(run) == f"autotune search --resume {run.path} --budget 2h"
    run = load_run(write_run(failed, name="c", verdict=lambda verdict: replace(verdict, remedy="install g++")))
    assert next_command(run) == "install g++"


def test_a_search_that_has_no_trial_yet(write_run: WriteRun) -> None:
    assert load_run(write_run([])).rows == {}


def test_json_is_one_object_without_nan(write_run: WriteRun) -> None:
    path = write_run(best=candidate(24))
    (path / "train").mkdir()
    (path / "train" / "summary.json").write_text('{"tokens_per_second": 14900.0}')
    text = json.dumps(as_json(load_run(path)), allow_nan=False)
    assert "secret" not in text
    told = json.loads(text)
    assert told["best"]["trial"] == 6
    assert told["baseline"]["trial"] == 0
    assert told["verdict"]["gain"]["speed"] == pytest.approx(1.5, rel=0.01)
    assert told["verdict"]["status"] == "confirmed"
    assert told["training"] == {"tokens_per_second": 14900.0}
    assert told["trials"][3]["tokens_per_second"] is None
    assert told["next_command"] == f"autotune sample {path}"  # it is trained already


def damage(path: Path, name: str, content: bytes | None) -> None:
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)


DAMAGED = [
    ("trials.csv", None, "trials.csv: it does not exist"),
    ("trials.csv", b"", "trials.csv: No columns"),
    ("trials.csv", b"a,b\n1,2\n", "trials.csv: it has no column 'trial'"),
    ("trials.csv", ",".join(COLUMNS).encode() + b"\nzero,\n", "trials.csv: "),
    ("trials.csv", b"\xff\xfe\x00", "trials.csv: "),
    ("trials.csv", b'trial,"role\n1,2', "trials.csv: "),
    ("environment.json", None, "environment.json: does not exist"),
    ("environment.json", b"{", "environment.json: cannot be read: it is not JSON"),
    ("environment.json", b"[]", "environment.json: is damaged: it holds [], not an object"),
    ("environment.json", b'{"dveice": "cpu"}', "environment.json: environment.dveice is not a known key"),
    ("verdict.json", None, "verdict.json: "),
    ("verdict.json", b"[]", "verdict.json: is damaged"),
    ("verdict.json", b'{"winner": 3}', "verdict.winner = 3 is not a table"),
    ("best.toml", b"[modle]", "[modle] is not a known table"),
]


@pytest.mark.parametrize(("name", "content", "said"), DAMAGED)
def test_what_is_left_of_a_damaged_run_is_shown(
    write_run: WriteRun, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, said: str
) -> None:
    path = write_run(best=candidate(24))
    damage(path, name, content)
    (line,) = load_run(path).damage
    assert said in line
    assert cli.run(["report", str(path), "--html"]) == 1
    out, err = capsys.readouterr()
    assert ("15,049" in out) == (name != "verdict.json")  # of the winner
    assert said in err.splitlines()[-1]
    assert err.splitlines()[-1].endswith(f"repair it with `autotune report --rebuild {path}`")
    assert "Damaged:" in (path / "report.html").read_text()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "search.toml does not exist; give the directory of a run"),
        (b"[", "search.toml is not valid TOML"),
        (b"\xff\xfe", "search.toml cannot be read"),
    ],
)
def test_without_its_settings_it_is_no_run(write_run: WriteRun, content: bytes | None, said: str) -> None:
    path = write_run(best=candidate(24))
    damage(path, "search.toml", content)
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_or_a_missing_path_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "missing"):
        with pytest.raises(ConfigError, match="is not a directory; give a run"):
            load_run(path)

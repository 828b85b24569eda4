"""What was measured against what came of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from recorded_run import MEASURED, RECIPE, SUMMARY, TRAIN_HEADER, TRAIN_ROWS, candidate, write_run, write_training

from autotune import cli
from autotune.config.toml import CandidateFile, format_candidate
from autotune.errors import ConfigError
from autotune.report.training import load_training


def test_an_ended_training_beside_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, best=candidate(24))
    write_training(run / "train", SUMMARY)
    assert cli.run(["report", str(run)]) == 0
    told = capsys.readouterr().out
    assert "next: autotune" in told
    line = told.strip().splitlines()[-1]
    assert str(run / "train") in line
    assert "1,000 -> 1,010 (+1.0%)" in line
    assert "1.00 GiB -> 2.00 GiB (+100.0%)" in line
    assert "5.000 -> 4.500 (-10.0%)" in line


def test_a_running_training_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = write_training(tmp_path / "mine")
    assert cli.run(["report", str(out)]) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert "20 of 30, not ended" in line
    assert "5.000 -> 5.250 (+5.0%)" in line
    assert cli.run(["report", str(out), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["trainings"]
    assert (told["ended"], told["found"]["train_loss"], told["found"]["seconds"]) == (False, 4.5, 120.5)


def test_a_training_of_given_time_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = write_training(tmp_path / "mine")
    timed = replace(candidate(8), recipe=replace(RECIPE, max_iters=30, train_seconds=180.0))
    (out / "recipe.toml").write_text(format_candidate(CandidateFile(candidate=timed, measured=MEASURED)))
    assert cli.run(["report", str(out)]) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert "20 of 30 planned, not ended" in line
    assert "2m00s of 3m00s" in line


def test_a_damaged_training_does_not_hide_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, best=candidate(24))
    out = write_training(run / "train", SUMMARY)
    (out / "train_log.csv").write_text(TRAIN_HEADER + "garbage\n")
    assert cli.run(["report", str(run), "--html"]) == 1
    told = capsys.readouterr()
    assert "best: trial 6" in told.out
    assert "train_log.csv, line 2 is not a row of it" in told.err.splitlines()[-1]
    assert "train_log.csv, line 2 is not a row of it" in (run / "report.html").read_text()


def test_a_damaged_training_is_one_line(tmp_path: Path) -> None:
    out = write_training(tmp_path / "mine")
    (out / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match="mine is not a readable training"):
        load_training(out)


@pytest.mark.parametrize(
    "line", ["garbage", "a,b,c", "x,,,,,,,,,,,", "10,1,1,1,1,1,1,1,1,1,1,inf", "10,1", "\0", "," * 30]
)
def test_a_line_of_garbage_in_the_log_is_named(line: str, tmp_path: Path) -> None:
    out = write_training(tmp_path / "mine")
    (out / "train_log.csv").write_text(TRAIN_HEADER + TRAIN_ROWS.replace("\n20,", f"\n{line}\n20,"))
    with pytest.raises(ConfigError, match=r"train_log\.csv, line 3 is not a row of it"):
        load_training(out)


@pytest.mark.parametrize("value", ["x", None, [], {}, True, 10**400])
def test_a_summary_of_another_type_is_one_line(value: object, tmp_path: Path) -> None:
    out = write_training(tmp_path / "mine", SUMMARY | {"iterations": value})
    with pytest.raises(ConfigError, match=r"summary\.json") as caught:
        load_training(out)
    assert len(str(caught.value)) < 400

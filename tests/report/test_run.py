"""A run directory read back: types, best, baseline and gain, failures, and everything that is no run."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from recorded_run import candidate, records

from autotune.errors import ConfigError
from autotune.report.run import (
    as_json,
    baseline_trial,
    best_trial,
    failures,
    gain,
    load_run,
    next_command,
    peak_view,
    ranked,
)
from autotune.report.table import cells
from autotune.runs.records import COLUMNS
from autotune.units import GIB

WriteRun = Callable[..., Path]


def test_every_column_comes_back_with_its_type(write_run: WriteRun) -> None:
    first, *_, oom, _, _, _ = load_run(write_run()).trials
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
    assert load_run(write_run(trials)).trials[3]["message"] == word


@pytest.mark.parametrize("message", ["=1+1", "\t-", "\r@", "'=", "it's", "a\rb", 'a "b"\nc'])
def test_what_was_made_safe_for_spreadsheets_comes_back(write_run: WriteRun, message: str) -> None:
    trials = records()
    trials[3] = replace(trials[3], result=replace(trials[3].result, message=message))
    found = load_run(write_run(trials)).trials
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
    assert {(row["vocab_size"], row["loss_chunk_tokens"]) for row in run.trials} == {(None, None)}
    best = best_trial(run)
    assert best is not None
    assert cells(run, best)["model"] == "6x6x384, T 1024, 30.3M"
    assert cells(run, best)["chunk tokens"] == "-"


def test_the_confirmation_is_the_best_and_stands_first(write_run: WriteRun) -> None:
    run = load_run(write_run(best=candidate(24)))
    best = best_trial(run)
    assert best is not None
    assert best["trial"] == 6
    assert [row["trial"] for row in ranked(run)] == [6, 2, 1, 0]


def test_lower_is_better_for_the_loss(write_run: WriteRun) -> None:
    path = write_run(best=candidate(8, "full"), objective="loss")
    assert [row["trial"] for row in ranked(load_run(path))] == [0, 1, 6, 2]


def test_gain_over_the_baseline(write_run: WriteRun) -> None:
    run = load_run(write_run(best=candidate(24)))
    best, baseline = best_trial(run), baseline_trial(run)
    assert best is not None
    assert baseline is not None
    gained = gain(run, best, baseline)
    assert (gained.speed, gained.memory, gained.loss) == (1.5, 0.8, None)
    assert gained.speed_ci95 == pytest.approx(1.5 * 0.005 * 2**0.5)


def test_views_are_compared_with_themselves(write_run: WriteRun) -> None:
    run = load_run(write_run())
    best, baseline = run.trials[2], dict(run.trials[0])
    assert peak_view([best, baseline]) == "peak_device_bytes"
    baseline["peak_device_bytes"] = None
    assert peak_view([best, baseline]) == "peak_allocated_bytes"
    assert gain(run, best, baseline).memory == pytest.approx(7 / 9)


def test_failures_are_grouped_by_reason_whatever_their_numbers(write_run: WriteRun) -> None:
    found = failures(load_run(write_run()))
    assert [(f.status, f.trials) for f in found] == [("oom", (3, 4)), ("crashed", (5,))]
    assert found[0].reason == "wanted 12.00 GiB"


def test_nothing_feasible(write_run: WriteRun) -> None:
    run = load_run(write_run([record for record in records() if record.result.status != "ok"]))
    assert (best_trial(run), baseline_trial(run), ranked(run)) == (None, None, [])
    assert next_command(run) == f"autotune search --resume {run.path}"


def test_a_search_that_has_no_trial_yet(write_run: WriteRun) -> None:
    assert load_run(write_run([])).trials == ()


def test_json_is_one_object_without_nan(write_run: WriteRun) -> None:
    path = write_run(best=candidate(24))
    (path / "train").mkdir()
    (path / "train" / "summary.json").write_text('{"tokens_per_second": 14900.0}')
    text = json.dumps(as_json(load_run(path)), allow_nan=False)
    assert "secret" not in text
    told = json.loads(text)
    assert told["best"]["trial"] == 6
    assert told["gain"]["speed"] == 1.5
    assert told["training"] == {"tokens_per_second": 14900.0}
    assert told["trials"][3]["tokens_per_second"] is None
    assert told["next_command"] == f"autotune sample {path}"  # it is trained already


def damage(path: Path, name: str, content: bytes | None) -> None:
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("search.toml", None, "search.toml does not exist; give the directory of a run"),
        ("search.toml", b"[", "search.toml is not valid TOML"),
        ("search.toml", b"\xff\xfe", "search.toml cannot be read"),
        ("trials.csv", None, "trials.csv: it does not exist"),
        ("trials.csv", b"", "trials.csv: No columns"),
        ("trials.csv", b"a,b\n1,2\n", "trials.csv: it has no column 'trial'"),
        ("trials.csv", ",".join(COLUMNS).encode() + b"\nzero,\n", "trials.csv: "),
        ("trials.csv", b"\xff\xfe\x00", "trials.csv: "),
        ("trials.csv", b'trial,"role\n1,2', "trials.csv: "),
        ("environment.json", None, "environment.json does not exist"),
        ("environment.json", b"{", "environment.json: "),
        ("environment.json", b"[]", "environment.json is damaged: it holds [], not an object"),
        ("environment.json", b'{"dveice": "cpu"}', "environment.dveice is not a known key"),
        ("best.toml", b"[modle]", "[modle] is not a known table"),
    ],
)
def test_what_is_no_run_is_told_in_one_line(write_run: WriteRun, name: str, content: bytes | None, said: str) -> None:
    path = write_run(best=candidate(24))
    damage(path, name, content)
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_and_nothing_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "missing"):
        with pytest.raises(ConfigError, match="is not a directory; give a run"):
            load_run(path)

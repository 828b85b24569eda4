"""`autotune race` on a machine made of formulas: equal time and tokens, seeds, mistakes, interruption."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_machine import CPU
from fake_race import Slow, Track

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.config.toml import CandidateFile, format_candidate
from autotune.data.shards import write_shard
from autotune.errors import ConfigError, DataError, InterruptedByUser
from autotune.measure.types import RungRequest, RungResult
from autotune.report.race import as_json, race_report, standings, write_curves
from autotune.runs.races import interval95
from autotune.search.user_race import RaceSettings, UserRace, read_candidates, run_race

LIMIT = 8 << 30


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "a_val_000000.bin", np.arange(40_000))
    write_shard(tmp_path / "data" / "a_train_000001.bin", np.arange(60_000) % 50_000)
    return tmp_path / "data"


def file(path: Path, data: Path | str, **recipe: object) -> Path:
    values = {"shape": Shape(n_layer=2, n_head=2, n_embd=64, block_size=64), "global_batch_size": 16, **recipe}
    candidate = Candidate(recipe=Recipe(data=str(data), **values), plan=Plan(dtype="float32"))  # type: ignore[arg-type]
    path.write_text(format_candidate(CandidateFile(candidate=candidate)))
    return path


@pytest.fixture
def files(tmp_path: Path, text: Path) -> list[Path]:
    nanogpt = tmp_path / "mine.py"
    nanogpt.write_text(
        "batch_size = 8\ngradient_accumulation_steps = 2\nblock_size = 32\nn_layer = 2\nn_head = 2\nn_embd = 64\n"
        "learning_rate = 1e-3\nmax_iters = 500\nlr_decay_iters = 500\nwarmup_iters = 10\ndataset = 'data'\n"
    )
    return [file(tmp_path / "muon.toml", text, optimizer="muon"), file(tmp_path / "adamw.toml", text), nanogpt]


def go(settings: RaceSettings, out: Path, track: Track, **more: object) -> UserRace:
    told: list[str] = []
    words = {"seeds": 2, "budget_seconds": None, "measure": track.machine.measure, "train_rung": track.train,
             "say": told.append, "clock": track.machine.clock, "memory_limit_bytes": LIMIT, **more}  # fmt: skip
    return run_race(settings, out, **words)  # type: ignore[arg-type]


def read(files: list[Path], data: Path) -> dict[str, Candidate]:
    return read_candidates(files, data, CPU)


def test_equal_time_is_by_each_candidate_s_speed(tmp_path: Path, text: Path, files: list[Path]) -> None:
    track = Track(Slow())
    settings = RaceSettings(candidates=read(files, text), device="cpu", seconds=60.0)
    race = go(settings, tmp_path / "out", track)
    assert [rival.name for rival in race.rivals] == ["muon", "adamw", "mine"] * 2
    for request, rival in zip(track.requests, race.rivals, strict=True):
        speed = race.trials[rival.name].tokens_per_second
        assert speed
        assert request.target_tokens == pytest.approx(60.0 * speed, rel=0.02)
        assert request.memory_limit_bytes == LIMIT
        assert request.evaluations > 1
        assert request.candidate.recipe.lr_decay_iters == request.candidate.recipe.max_iters
    seeds = [rival.candidate.recipe.seed for rival in race.rivals]
    assert seeds[:3] == [seeds[0]] * 3
    assert seeds[3:] == [seeds[0] + 1] * 3
    assert track.requests[2].candidate.recipe.schedule == "cosine"  # the user's own
    order = [one.name for one in standings(race.rivals, race.readings)]
    assert order[0] == "muon"
    with (tmp_path / "out" / "races.csv").open(newline="") as rows:
        assert [row["name"] for row in csv.DictReader(rows)] == ["muon", "adamw", "mine"] * 2


def test_equal_tokens(tmp_path: Path, text: Path, files: list[Path]) -> None:
    track = Track(Slow())
    go(RaceSettings(candidates=read(files, text), device="cpu", tokens=300_000), tmp_path / "out", track)
    assert {round(request.target_tokens, -4) for request in track.requests} == {300_000}


def test_the_same_command_continues_and_more_seeds_are_added(tmp_path: Path, text: Path, files: list[Path]) -> None:
    track, out = Track(Slow()), tmp_path / "out"
    settings = RaceSettings(candidates=read(files, text), device="cpu", seconds=60.0)

    def interrupted(request: RungRequest, log: Path) -> RungResult:
        if len(track.requests) == 2:
            raise KeyboardInterrupt
        return track.train(request, log)

    with pytest.raises(InterruptedByUser, match="2 trainings are kept"):
        go(settings, out, track, train_rung=interrupted, seeds=1)
    measured = len(track.machine.requests)
    assert len(go(settings, out, track, seeds=1).readings) == 3
    assert len(track.requests) == 3
    race = go(settings, out, track, seeds=3)
    assert len(race.readings) == len(track.requests) == 9
    assert len(track.machine.requests) == measured == 3
    with pytest.raises(ConfigError, match="holds another race"):
        go(replace(settings, seconds=30.0), out, track)


def test_the_budget_is_kept_and_what_is_missing_is_named(tmp_path: Path, text: Path, files: list[Path]) -> None:
    track, out = Track(Slow()), tmp_path / "out"
    settings = RaceSettings(candidates=read(files, text), device="cpu", seconds=60.0)
    race = go(settings, out, track, budget_seconds=250.0)
    assert track.machine.now <= 250.0
    assert 0 < len(race.readings) < 6
    assert "are missing; the same command goes on" in race.told[0]
    assert len(go(settings, out, track).readings) == 6


def test_one_that_diverges_costs_only_its_own_time(tmp_path: Path, text: Path, files: list[Path]) -> None:
    track = Track(Slow())
    track.fails = {0: RungResult(status="incorrect", phase="measure", message="diverged: the training loss is nan")}
    settings = RaceSettings(candidates=read(files, text), device="cpu", seconds=60.0)
    race = go(settings, tmp_path / "out", track, seeds=1)
    found = as_json(race.rivals, race.readings, race.told)
    assert [one["name"] for one in found["standings"]] == ["adamw", "mine"]
    assert "diverged" in found["failures"]["muon, seed 1337"]
    json.dumps(found, allow_nan=False)
    write_curves(tmp_path / "curves.png", race.rivals, race.readings)
    assert (tmp_path / "curves.png").stat().st_size > 1000
    race_report(race.rivals, race.readings, race.told)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda files, data: files[0].write_text(files[0].read_text().replace(str(data), "")), ConfigError,
         "names no data"),
        (lambda files, data: files.append(Path("mine.toml")), ConfigError, "mine.toml does not exist"),
        (lambda files, data: file(files[0], data.parent / "other"), ConfigError, "is not a directory of tokens"),
        (lambda files, data: files.append(files[0]), ConfigError, "two candidates are called muon"),
        (lambda files, data: file(files[0], data, global_batch_size=4096), DataError, "muon: 60000 training tokens"),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    text: Path, files: list[Path], change: Callable[[list[Path], Path], object], error: type[Exception], said: str
) -> None:
    files.pop()  # the config file, whose dataset is not here
    change(files, text)
    with pytest.raises(error, match=said):
        read_candidates(files, None, CPU)


def test_candidates_with_different_data_are_refused(tmp_path: Path, text: Path, files: list[Path]) -> None:
    (tmp_path / "b").mkdir()
    write_shard(tmp_path / "b" / "a_val_000000.bin", np.arange(5_000))
    write_shard(tmp_path / "b" / "a_train_000001.bin", np.arange(50_000))
    files[2] = file(tmp_path / "other.toml", tmp_path / "b")
    with pytest.raises(ConfigError, match="different data"):
        read_candidates(files, None, CPU)
    assert len(read(files, text)) == 3


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.706), (3, 4.303), (4, 3.182), (6, 2.571), (11, 2.228)])
def test_intervals_over_seeds_are_student_s(count: int, quantile: float) -> None:
    values = [1.0, *[0.0] * (count - 1)]
    sd = (sum((v - 1 / count) ** 2 for v in values) / (count - 1)) ** 0.5
    mean, half = interval95(values)
    assert mean == pytest.approx(1 / count)
    assert half == pytest.approx(quantile * sd / count**0.5, rel=0.01)
    assert interval95([3.0]) == (3.0, None)

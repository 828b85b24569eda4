"""Run directories as a search leaves them, written by the project's own writers."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.config.search_settings import Objective, SearchSettings, write_settings
from autotune.config.toml import CandidateFile, format_candidate
from autotune.environment import Environment
from autotune.measure.types import MemoryView, TrialResult
from autotune.runs.records import TrialRecord, write_csv
from autotune.runs.verdict import Neighbour, Verdict, write_verdict
from autotune.search.conclude import conclude
from autotune.search.space import build_space
from autotune.units import GIB

ENVIRONMENT = Environment(
    device="cuda:0",
    device_name="Test <Card>",
    device_memory_bytes=24 * GIB,
    torch="2.13.0",
    python="3.11.9",
    autotune="0.1.0",
    cpu_count=2,
    platform="Linux x86_64",
)
RECIPE = Recipe(shape=Shape(n_layer=6, n_head=6, n_embd=384), global_batch_size=64)


def candidate(micro: int, loss: str = "chunked") -> Candidate:
    return Candidate(recipe=RECIPE, plan=Plan(micro_batch_size=micro, loss=loss))


def measured(trial: int, tokens_per_second: float, gib: float) -> TrialResult:
    return TrialResult(
        status="ok",
        phase="done",
        tokens_per_second=tokens_per_second,
        tokens_per_second_ci95=tokens_per_second / 200,
        memory={"steady": MemoryView(allocated_bytes=int(gib * GIB), device_bytes=int((gib + 1) * GIB))},
        trial_seconds=50.0,
        started_at=f"2025-01-01T00:{trial:02d}:00+00:00",
    )


def failed(trial: int, status: str, message: str) -> TrialResult:
    return TrialResult(
        status=status,  # type: ignore[arg-type]
        phase="compile",
        message=message,
        trial_seconds=9.0,
        started_at=f"2025-01-01T00:{trial:02d}:00+00:00",
    )


def records() -> list[TrialRecord]:
    """A baseline, three that ran, one of them confirmed, and three that did not fit."""
    best = candidate(24)
    return [
        TrialRecord(
            trial=0,
            role="baseline",
            candidate=candidate(8, "full"),
            result=measured(0, 10_000, 9),
            objective=10_000.0,
        ),
        TrialRecord(trial=1, role="search", candidate=candidate(16), result=measured(1, 14_000, 5), objective=14_000.0),
        TrialRecord(trial=2, role="search", candidate=best, result=measured(2, 15_100, 7), objective=15_100.0),
        TrialRecord(
            trial=3,
            role="search",
            candidate=candidate(64, "full"),
            result=failed(3, "oom", "wanted 12.00 GiB"),
            predicted_peak_bytes=30 * GIB,
        ),
        TrialRecord(
            trial=4,
            role="search",
            candidate=candidate(48, "full"),
            result=failed(4, "oom", "wanted 9.50 GiB"),
            predicted_peak_bytes=26 * GIB,
        ),
        TrialRecord(
            trial=5,
            role="search",
            candidate=candidate(32),
            result=failed(5, "crashed", "<script>alert(1)</script> [bold] of worker"),
        ),
        TrialRecord(trial=6, role="final", candidate=best, result=measured(6, 15_000, 7), objective=15_000.0),
    ]


def write_run(
    parent: Path,
    trials: list[TrialRecord] | None = None,
    best: Candidate | None = None,
    name: str = "run",
    device_name: str = ENVIRONMENT.device_name,
    objective: Objective = "throughput",
    verdict: Callable[[Verdict], Verdict] = lambda verdict: verdict,
) -> Path:
    """A run directory of these trials; `best` is the candidate of best.toml, `verdict` edits what was concluded."""
    path, trials = parent / name, records() if trials is None else trials
    path.mkdir()
    write_csv(path / "trials.csv", trials)
    settings = SearchSettings(
        name=name,
        device="cuda:0",
        budget_seconds=600.0,
        objective=objective,
        memory_limit_bytes=24 * GIB,
        train_seconds=3600.0,
        recipe=RECIPE,
        search_shape=objective == "loss",
        baseline=Plan(),
        storage="postgresql://me:secret@host/db",
    )
    write_settings(path / "search.toml", settings)
    machine = replace(ENVIRONMENT, device_name=device_name)
    concluded = conclude(trials, settings, machine, build_space(settings, machine))
    write_verdict(path / "verdict.json", verdict(concluded))
    (path / "environment.json").write_text(json.dumps({**asdict(machine), "fingerprint": machine.fingerprint}))
    if best is not None:
        cached = {"compile_cache_hits": 4, "compile_cache_misses": 2}
        (path / "best.toml").write_text(format_candidate(CandidateFile(candidate=best, measured=cached)))
    return path


def complete(verdict: Verdict) -> Verdict:
    """The verdict of an ended search, with a neighbour, importance and times."""
    near = Neighbour(knob="micro_batch_size", value="16", winner="24", trial=1, objective=-0.073, peak=0.75)
    return replace(
        verdict, ended=True, neighbours=(near,), importance={"dtype": 0.6, "loss": 0.4}, spent_seconds=600.0,
        seconds={"compile": 400.0, "measure": 150.0, "idle": 50.0},
    )  # fmt: skip


TRAIN_HEADER = (
    "iteration,tokens,train_loss,validation_loss,lr,grad_norm,tokens_per_second,mfu,data_wait_seconds,"
    "peak_allocated_bytes,peak_device_bytes,seconds\n"
)
TRAIN_ROWS = (
    "10,655360,5.5,5.25,0.1,1.0,980.0,,0.0,1000,2000,60.5\n20,1310720,4.5,,0.1,1.0,990.0,,0.0,1000,2000,120.5\n30,1"
)
MEASURED = {"tokens_per_second": 1000.0, "peak_reserved_bytes": 1, "peak_device_bytes": GIB, "predicted_loss": 5.0}
SUMMARY = {
    "iterations": 30, "tokens": 1966080, "tokens_per_second": 1010.0, "peak_device_bytes": 2 * GIB,
    "validation_loss": 4.5, "seconds": 180.0,
}  # fmt: skip


def write_training(path: Path, summary: dict[str, object] | None = None) -> Path:
    """The directory of a training, ended where a summary is given."""
    path.mkdir()
    trained = replace(candidate(8), recipe=replace(RECIPE, max_iters=30))
    (path / "recipe.toml").write_text(format_candidate(CandidateFile(candidate=trained, measured=MEASURED)))
    (path / "train_log.csv").write_text(TRAIN_HEADER + TRAIN_ROWS)
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    return path

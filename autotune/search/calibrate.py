"""The offset of a scaling law for the user's own data: two small pilots are trained, and their losses compared."""

import json
import math
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from autotune.config.candidate import Candidate, Shape
from autotune.config.search_settings import SearchSettings
from autotune.config.toml import CandidateFile, format_candidate
from autotune.config.train_settings import SUMMARY
from autotune.environment import child_command, worker_environment
from autotune.errors import AutotuneError, ConfigError
from autotune.files import write_atomically
from autotune.measure.types import TrialRequest, TrialResult
from autotune.model.compile_cache import compile_cache_dir
from autotune.runs.law import raw_loss, unlimited
from autotune.runs.objective import finish_candidate, law_of
from autotune.search.budget import Budget
from autotune.units import format_duration

SHARE = 0.2
"""Fraction of the budget for both pilots."""
FEWEST_SECONDS = 60.0
"""Shortest pilot; the loss of a shorter one depends on its warm-up more than on the data."""

Train = Callable[[Path, str, float], Mapping[str, Any]]
"""Trains a candidate file on a device for at most so many seconds; returns the summary."""


def train_pilot(file: Path, device: str, seconds: float) -> Mapping[str, Any]:
    """Train with `autotune train`, in a process that dies with this one. Raises AutotuneError."""
    out = file.with_suffix("")
    words = ["train", str(file), "--out", str(out), "--device", device, "--max-time", f"{0.9 * seconds:.0f}s"]
    command = child_command("autotune", *words)
    log = file.with_suffix(".log")
    with log.open("w") as output:
        try:
            subprocess.run(
                command, stdout=output, stderr=output, check=True, timeout=seconds,
                env=worker_environment(compile_cache_dir()),
            )  # fmt: skip
        except subprocess.SubprocessError as error:
            raise AutotuneError(f"--calibrate-loss: a pilot failed ({error}); see {log}") from None
    found = json.loads((out / SUMMARY).read_text())
    assert isinstance(found, dict)
    return found


def calibrate_law(
    settings: SearchSettings,
    run_dir: Path,
    budget: Budget,
    measure: Callable[[TrialRequest, Path], TrialResult],
    train: Train = train_pilot,
) -> tuple[SearchSettings, str]:
    """The settings with the law's offset and band, and a note on them. The pilots take SHARE of the budget.

    Where the two disagree by more than the law's own band, it does not hold at their size, and no offset is set.
    Raises ConfigError where there is no time or data for it, AutotuneError where a pilot fails.
    """
    each = SHARE * budget.seconds / 2
    if each < FEWEST_SECONDS:
        raise ConfigError(
            f"--calibrate-loss trains two pilots in {SHARE:.0%} of the budget, "
            f"{format_duration(budget.seconds)} leaves {format_duration(each)} for each; "
            f"give --budget {format_duration(2 * FEWEST_SECONDS / SHARE)} or more"
        )
    (run_dir / "pilots").mkdir(exist_ok=True)
    shifts = []
    for number, shape in enumerate(pilot_shapes(settings.recipe.shape)):
        ends = budget.elapsed() + each
        file = run_dir / "pilots" / f"pilot-{number}.toml"
        candidate = Candidate(recipe=replace(settings.recipe, shape=shape), plan=settings.baseline)
        request = TrialRequest(
            candidate=candidate, device=settings.device, result_path="", measure_seconds=1.0, timeout_seconds=each / 2,
            memory_limit_bytes=settings.memory_limit_bytes,
        )  # fmt: skip
        result = measure(request, file.with_suffix(".trial.log"))
        if result.status != "ok" or result.tokens_per_second is None:
            why = f"{result.status} ({result.message or result.phase})"
            raise AutotuneError(f"--calibrate-loss: the pilot of {shape.parameters:,} parameters ended as {why}")
        left = ends - budget.elapsed()
        pilot = finish_candidate(candidate, 0.7 * left * result.tokens_per_second)
        write_atomically(file, format_candidate(CandidateFile(candidate=pilot)))
        summary = train(file, settings.device, left)
        predicted = raw_loss(law_of(settings), shape, summary["tokens"])
        shifts.append(unlimited(summary["validation_loss"], shape) - predicted)
    offset, spread, band = sum(shifts) / 2, abs(shifts[0] - shifts[1]) / 2, law_of(settings).band
    note = f"two pilots lie {shifts[0]:+.2f} and {shifts[1]:+.2f} nats from the law {settings.law!r}"
    if not spread <= band:
        return settings, f"{note}: they disagree by more than its band of {band:.2f}, so it was not moved"
    # Two points estimate their spread poorly; the law's own error within a recipe stays.
    moved = replace(settings, law_offset=offset, law_band=max(0.05, 2 * spread))
    return moved, f"{note}: it was moved by {offset:+.2f}, its band is now {moved.law_band:.2f}"


def pilot_shapes(shape: Shape) -> tuple[Shape, Shape]:
    """The shape itself, and one of half its depth and width with heads of the same size."""
    heads = max(1, math.ceil(shape.n_head / 2))
    return replace(shape, n_layer=max(1, shape.n_layer // 2), n_head=heads, n_embd=heads * shape.head_size), shape

"""Trainings, read back from their directories: what was predicted and measured before, and what came of it."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.config.tables import read_json
from autotune.config.toml import CandidateFile, read_candidate
from autotune.config.train_settings import LOG, RECIPE, SUMMARY, TRAINING
from autotune.errors import ConfigError, one_line, shown
from autotune.report.table import Listing, make_table
from autotune.runs.directory import SEARCH_TOML
from autotune.units import format_bytes, format_count, format_duration

_FIGURES = (
    "iteration", "tokens", "tokens_per_second", "peak_allocated_bytes", "peak_device_bytes", "train_loss",
    "validation_loss", "seconds",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A training, running or ended."""

    path: Path
    file: CandidateFile
    """recipe.toml: what is trained, and what was measured of it."""
    ended: bool
    found: Mapping[str, float | None]
    """Of the whole training where it has ended, else as of the last row of its log. None: not known."""


def is_training(path: Path) -> bool:
    """Whether `path` is a training's directory, and not a search's."""
    return (path / RECIPE).exists() and not (path / SEARCH_TOML).exists()


def trainings_of(paths: Sequence[Path]) -> list[TrainedRun]:
    """Those among the directories, and those inside of them. Raises ConfigError for a damaged one."""
    places = [place for path in paths for place in (path, path / TRAINING) if is_training(place)]
    return [load_training(place) for place in places]


def load_training(path: Path) -> TrainedRun:
    """Read a training's directory. Raises ConfigError where a file of it is damaged."""
    log, summary, ended = path / LOG, path / SUMMARY, False
    try:
        found = _last_row(log) if log.exists() else {}
        if summary.exists():
            told = _figures(read_json(summary))
            ended = (told["iteration"] or 0) >= (found.get("iteration") or 0)  # else of before a --resume that runs now
            if ended:
                found = told
    except (ConfigError, OSError, ValueError, csv.Error) as error:
        why = one_line(str(error))
        raise ConfigError(f"{path} is not a readable training: {why}; go on with `autotune train --resume`") from None
    return TrainedRun(path=path, file=read_candidate(path / RECIPE), ended=ended, found=found)


def _last_row(log: Path) -> dict[str, float | None]:
    """The last whole row, and the last validation loss of any row. Raises ValueError for a line that is no row."""
    lines = log.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line break is being written
    rows, last = list(csv.DictReader(lines)), dict[str, float | None]()
    for number, row in enumerate(rows, 2):
        try:
            if None in row or None in row.values() or not row["iteration"]:  # too many cells, too few, none
                raise ValueError
            here = {name: _finite(row[name]) if row[name] else None for name in _FIGURES}
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{log.name}, line {number} is no row of it") from None
        last = here | {"validation_loss": here["validation_loss"] or last.get("validation_loss")}
    return last


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _figures(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """Those of summary.json. Raises ConfigError for one that is no number."""
    figures = {name: summary.get("iterations" if name == "iteration" else name) for name in _FIGURES}
    for name, value in figures.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30):
            raise ConfigError(f"summary.json: {name} = {shown(value)} is not a number")
    if figures["iteration"] is None:
        raise ConfigError("summary.json: iterations is missing")
    return figures


def training_table(trainings: Sequence[TrainedRun]) -> Listing:
    """A line each: what was predicted and measured, an arrow, what the training does."""
    return make_table([_line(one) for one in trainings])


def _line(one: TrainedRun) -> dict[str, str]:
    measured, found, recipe = one.file.measured, one.found, one.file.candidate.recipe
    done = int(found.get("iteration") or 0)
    view = "peak_device_bytes" if measured.get("peak_reserved_bytes") else "peak_allocated_bytes"
    return {
        "training": str(one.path),
        "iterations": f"{done:,}" if one.ended else f"{done:,} of {recipe.max_iters:,}, not ended",
        "tokens": format_count(int(found.get("tokens") or 0)),
        "time": format_duration(found.get("seconds")),
        "tokens/s": _both(measured.get("tokens_per_second"), found.get("tokens_per_second"), "{:,.0f}".format),
        "peak": _both(measured.get(view), found.get(view), format_bytes),
        "validation loss": _both(measured.get("predicted_loss"), found.get("validation_loss"), "{:.3f}".format),
    }


def _both(before: float | None, after: float | None, shown: Any) -> str:
    """`1,000 -> 990 (-1.0%)`; - for what is not known."""
    texts = " -> ".join("-" if value is None else shown(value) for value in (before, after))
    return f"{texts} ({after / before - 1:+.1%})" if before and after else texts


def as_json(one: TrainedRun) -> dict[str, Any]:
    """In bytes, seconds and tokens; unknown values are null."""
    return {
        "training": str(one.path), "ended": one.ended, "measured": dict(one.file.measured), "found": dict(one.found)
    }  # fmt: skip

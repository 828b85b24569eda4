"""Trainings, read back from their directories: predicted and measured figures against those of the training."""

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
    """recipe.toml: the candidate, and what the search measured of it."""
    ended: bool
    figures: Mapping[str, float | None]
    """Figures of the ended training, else those of the last row of its log. None: unknown."""
    rows: Sequence[Mapping[str, float | None]]
    """The log."""


def is_training(path: Path) -> bool:
    """Whether `path` is the directory of a training and not of a search."""
    return (path / RECIPE).exists() and not (path / SEARCH_TOML).exists()


def trainings_of(paths: Sequence[Path]) -> tuple[list[TrainedRun], list[str]]:
    """Trainings among the directories and inside them, and a line for each that is damaged."""
    found, damaged = [], []
    for place in [place for path in paths for place in (path, path / TRAINING) if is_training(place)]:
        try:
            found.append(load_training(place))
        except ConfigError as error:
            damaged.append(str(error))
    return found, damaged


def load_training(path: Path) -> TrainedRun:
    """Read the directory of a training. Raises ConfigError if one of its files is damaged."""
    log, summary, ended = path / LOG, path / SUMMARY, False
    try:
        rows = _rows(log) if log.exists() else []
        figures = _last(rows)
        if summary.exists():
            final = _figures(read_json(summary))
            ended = (final["iteration"] or 0) >= (figures.get("iteration") or 0)  # else it is older than a --resume
            if ended:
                figures = final
    except (ConfigError, OSError, ValueError, csv.Error) as error:
        why = one_line(str(error))
        raise ConfigError(f"{path} is not a readable training: {why}; go on with `autotune train --resume`") from None
    return TrainedRun(path=path, file=read_candidate(path / RECIPE), ended=ended, figures=figures, rows=rows)


def _rows(log: Path) -> list[dict[str, float | None]]:
    """All complete rows. Raises ValueError for a malformed line."""
    lines = log.read_text(encoding="utf-8").split("\n")[:-1]  # a line without its line break is still being written
    rows = []
    for number, row in enumerate(csv.DictReader(lines), 2):
        try:
            if None in row or None in row.values() or not row["iteration"]:  # too many cells, too few, or an empty one
                raise ValueError
            rows.append({name: _finite(row[name]) if row[name] else None for name in _FIGURES})
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{log.name}, line {number} is not a row of it") from None
    return rows


def _last(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The last row, with the last validation loss of any row."""
    seen = [loss for row in rows if (loss := row["validation_loss"]) is not None]
    return {**rows[-1], "validation_loss": seen[-1] if seen else None} if rows else {}


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _figures(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """Figures of summary.json. Raises ConfigError for one that is not a number."""
    figures = {name: summary.get("iterations" if name == "iteration" else name) for name in _FIGURES}
    for name, value in figures.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30):
            raise ConfigError(f"summary.json: {name} = {shown(value)} is not a number")
    if figures["iteration"] is None:
        raise ConfigError("summary.json: iterations is missing")
    return figures


def training_table(trainings: Sequence[TrainedRun]) -> Listing:
    """One line per training: predicted or measured value, arrow, value of the training."""
    return make_table(list(map(line, trainings)))


def line(run: TrainedRun) -> dict[str, str]:
    """Texts of a training by column header."""
    measured, figures, recipe = run.file.measured, run.figures, run.file.candidate.recipe
    done = int(figures.get("iteration") or 0)
    # only the allocated bytes of trial and training are comparable on the CPU, where nothing is reserved
    planned = " planned" if recipe.train_seconds else ""
    view = "peak_device_bytes" if measured.get("peak_reserved_bytes") else "peak_allocated_bytes"
    return {
        "training": str(run.path),
        "iterations": f"{done:,}" if run.ended else f"{done:,} of {recipe.max_iters:,}{planned}, not ended",
        "tokens": format_count(int(figures.get("tokens") or 0)),
        "time": format_duration(figures.get("seconds"))
        + (f" of {format_duration(recipe.train_seconds)}" if recipe.train_seconds else ""),
        "tokens/s": _both(measured.get("tokens_per_second"), figures.get("tokens_per_second"), "{:,.0f}".format),
        "peak": _both(measured.get(view), figures.get(view), format_bytes),
        "validation loss": _both(measured.get("predicted_loss"), figures.get("validation_loss"), "{:.3f}".format),
    }


def _both(before: float | None, after: float | None, shown: Any) -> str:
    """`1,000 -> 990 (-1.0%)`; - for an unknown value."""
    texts = " -> ".join("-" if value is None else shown(value) for value in (before, after))
    return f"{texts} ({after / before - 1:+.1%})" if before and after else texts


def as_json(run: TrainedRun) -> dict[str, Any]:
    """The training in bytes, seconds and tokens; unknown values are null."""
    return {
        "training": str(run.path), "ended": run.ended, "measured": dict(run.file.measured), "found": dict(run.figures),
        "train_seconds": run.file.candidate.recipe.train_seconds or None,
    }  # fmt: skip

"""trials.csv: one row per trial, columns in a fixed order."""

import csv
import functools
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from autotune import terminal
from autotune.config.candidate import Candidate, Plan
from autotune.files import write_atomically
from autotune.measure.types import PEAK_VIEWS, TrialResult

Role = Literal["baseline", "guide", "search", "race", "final"]

PLAN_FIELDS = tuple(field.name for field in fields(Plan))
_SHOWN_FIRST = ("micro_batch_size", "attention", "loss", "activation_checkpointing", "compile", "dtype")
"""Plan fields with a fixed position; all others follow the optimizer, so that a new field gets its column by itself."""

COLUMNS = (
    "trial", "role", "status", "phase", "objective", "tokens_per_second", "tokens_per_second_ci95", "mfu",
    "step_seconds_p50", "peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes", "predicted_peak_bytes",
    "num_alloc_retries", "predicted_loss", "parameters", "n_layer", "n_head", "n_embd", "block_size", "vocab_size",
    "micro_batch_size", "gradient_accumulation_steps", "global_batch_size", "attention", "loss",
    "activation_checkpointing", "compile", "dtype", "optimizer",
    *(name for name in PLAN_FIELDS if name not in _SHOWN_FIRST),
    "compile_seconds", "trial_seconds", "first_loss", "started_at", "candidate_id", "message",
)  # fmt: skip
OPTIONAL_COLUMNS = ("vocab_size", *(name for name in PLAN_FIELDS if name not in _SHOWN_FIRST))
"""Columns that files of older versions may lack."""


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial: candidate, result, and the search's predictions."""

    trial: int
    role: Role
    candidate: Candidate
    result: TrialResult
    objective: float | None = None
    """Tokens/s (`throughput`) or predicted loss (`loss`); None if the trial is not feasible."""
    predicted_peak_bytes: int | None = None
    """Prediction of the memory model, made before the trial."""
    predicted_loss: float | None = None
    """Prediction of the scaling law, from the measured tokens/s."""

    @functools.cached_property
    def csv_line(self) -> str:
        """Line of trials.csv, formatted once although the file is rewritten after every trial."""
        return csv_line(map(csv_cell, row(self).values()))


def row(record: TrialRecord) -> dict[str, object]:
    """Values of trials.csv by column; unknown values are None."""
    candidate, result = record.candidate, record.result
    values = {
        **vars(candidate.shape), **vars(candidate.plan), **vars(result), **vars(record),
        **{f"peak_{view}": result.peak(view) for view in PEAK_VIEWS},
        "num_alloc_retries": result.num_alloc_retries,
        "parameters": candidate.shape.parameters,
        "gradient_accumulation_steps": candidate.gradient_accumulation_steps,
        "global_batch_size": candidate.recipe.global_batch_size,
        "optimizer": candidate.recipe.optimizer,
        "candidate_id": candidate.id,
    }
    return {column: values[column] for column in COLUMNS}


def write_csv(path: Path, records: Iterable[TrialRecord]) -> None:
    """Replace trials.csv atomically. Unknown values are empty cells; bytes, seconds and tokens are plain numbers."""
    write_atomically(path, csv_line(COLUMNS), *(record.csv_line for record in records), durable=False)


def csv_line(cells: Iterable[object]) -> str:
    """One line of CSV."""
    # csv.writer quotes a carriage return only if it is part of the line terminator; readers would end the line there.
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(cells)
    return text.getvalue().removesuffix("\r\n") + "\n"


def csv_cell(value: object) -> object:
    """A value as it is written: unknown ones are empty."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return _neutral(value)
    return "" if value is None else value


_FORMULA = re.compile(r"'*(\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n])")
"""Signs that start a formula, also in full width, which spreadsheets treat alike."""


def _neutral(text: str) -> str:
    """The text such that no spreadsheet evaluates it (OWASP, CSV injection) and no terminal executes it."""
    shown = terminal.visible(text, keep="\t\r\n")
    return f"'{shown}" if _FORMULA.match(shown) else shown


def read_text(cell: str) -> str:
    """Original text of a cell of trials.csv."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell

"""trials.csv: one row a trial, in a frozen order of columns."""

import csv
import functools
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from autotune.config.candidate import Candidate
from autotune.config.toml import write_atomically
from autotune.measure.types import TrialResult

Role = Literal["baseline", "guide", "search", "final"]

COLUMNS = (
    "trial", "role", "status", "phase", "objective", "tokens_per_second", "tokens_per_second_ci95", "mfu",
    "step_seconds_p50", "peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes", "predicted_peak_bytes",
    "num_alloc_retries", "predicted_loss", "parameters", "n_layer", "n_head", "n_embd", "block_size",
    "micro_batch_size", "gradient_accumulation_steps", "global_batch_size", "attention", "loss",
    "activation_checkpointing", "compile", "dtype", "optimizer", "allocator", "compile_seconds", "trial_seconds",
    "first_loss", "started_at", "candidate_id", "message",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A candidate, what became of it, and what the search thought of it."""

    trial: int
    role: Role
    candidate: Candidate
    result: TrialResult
    objective: float | None = None
    """Tokens/s (`throughput`) or predicted loss (`loss`); None where the trial is not feasible."""
    predicted_peak_bytes: int | None = None
    """A prediction, made before the trial."""
    predicted_loss: float | None = None
    """A scaling law's, from the measured tokens/s."""

    @functools.cached_property
    def csv_line(self) -> str:
        """Its line of trials.csv: written once, though the file is replaced as a whole after each trial."""
        text = io.StringIO()
        values = {key: _cell(value) for key, value in row(self).items()}
        csv.DictWriter(text, COLUMNS, lineterminator="\n").writerow(values)
        return text.getvalue()


def row(record: TrialRecord) -> dict[str, object]:
    """One line of trials.csv, by column; unknown values are None."""
    candidate, result = record.candidate, record.result
    values = {
        **vars(candidate.shape),
        **vars(candidate.plan),
        **vars(result),
        "trial": record.trial,
        "role": record.role,
        "objective": record.objective,
        "peak_allocated_bytes": result.peak("allocated_bytes"),
        "peak_reserved_bytes": result.peak("reserved_bytes"),
        "peak_device_bytes": result.peak("device_bytes"),
        "predicted_peak_bytes": record.predicted_peak_bytes,
        "num_alloc_retries": result.num_alloc_retries,
        "predicted_loss": record.predicted_loss,
        "parameters": candidate.shape.parameters,
        "gradient_accumulation_steps": candidate.gradient_accumulation_steps,
        "global_batch_size": candidate.recipe.global_batch_size,
        "optimizer": candidate.recipe.optimizer,
        "candidate_id": candidate.id,
    }
    return {column: values[column] for column in COLUMNS}


def write_csv(path: Path, records: Iterable[TrialRecord]) -> None:
    """Replace trials.csv as a whole. Unknown values are empty cells; bytes, seconds and tokens are plain numbers."""
    header = io.StringIO()
    csv.DictWriter(header, COLUMNS, lineterminator="\n").writeheader()
    write_atomically(path, header.getvalue(), *(record.csv_line for record in records))


def _cell(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else value

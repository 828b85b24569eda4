"""train_log.csv: the curve of a training, without gaps or duplicates however often it was resumed."""

import csv
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from autotune.config.toml import write_atomically


@dataclass(frozen=True, kw_only=True)
class LogRow:
    """One row. Floats are written with all their digits; None is an empty cell."""

    iteration: int
    """Optimizer steps done."""
    tokens: int
    train_loss: float
    """Of this step, over the global batch."""
    validation_loss: float | None
    lr: float
    grad_norm: float
    """Before clipping."""
    tokens_per_second: float | None
    """Over the steps since the row before."""
    mfu: float | None
    data_wait_seconds: float
    """That steps waited for their batch since the row before."""
    peak_allocated_bytes: int | None
    """So far, in this process."""
    peak_device_bytes: int | None
    seconds: float
    """Wall clock so far, over all resumptions."""


def keep_rows(log: Path, iteration: int) -> None:
    """Make the log, or drop what was logged after `iteration` and the half row that a killed process has left."""
    lines = log.read_text().splitlines(keepends=True)[1:] if log.exists() else []
    kept = [line for line in lines if line.endswith("\n") and int(line.partition(",")[0]) <= iteration]
    write_atomically(log, ",".join(field.name for field in fields(LogRow)) + "\n", *kept)


def append_row(log: Path, row: LogRow) -> None:
    """In one write: whoever reads the file meanwhile sees the row whole."""
    cells = ("" if value is None else repr(value) for value in astuple(row))
    with log.open("a") as file:
        file.write(",".join(cells) + "\n")


def read_rows(log: Path) -> list[dict[str, Any]]:
    """The rows: numbers by column, None for an empty cell."""
    with log.open(newline="") as file:
        return [{name: float(cell) if cell else None for name, cell in row.items()} for row in csv.DictReader(file)]

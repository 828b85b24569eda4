"""train_log.csv: the curve of a training, without gaps or duplicates however often it was resumed."""

from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from autotune.files import write_atomically


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


_NAMES = tuple(field.name for field in fields(LogRow))


def keep_rows(log: Path, iteration: int) -> int:
    """Make the log, or drop what was logged after `iteration` and the half row that a killed process has left.
    Returns how many other lines were no rows and are dropped too."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    *lines, _half = text.split("\n")
    rows = [(line, _row(line)) for line in lines[1:]]
    kept = [f"{line}\n" for line, row in rows if row is not None and (row["iteration"] or 0) <= iteration]
    write_atomically(log, ",".join(_NAMES) + "\n", *kept)
    return sum(row is None for _, row in rows)


def _row(line: str) -> dict[str, float | None] | None:
    """Numbers by column, None for an empty cell; None for a line that is no row."""
    cells = line.split(",")
    try:
        row = {name: float(cell) if cell else None for name, cell in zip(_NAMES, cells, strict=True)}
    except ValueError:
        return None
    return row if row["iteration"] is not None else None


def append_row(log: Path, row: LogRow) -> None:
    """In one write: whoever reads the file meanwhile sees the row whole."""
    cells = ("" if value is None else repr(value) for value in astuple(row))
    with log.open("a") as file:
        file.write(",".join(cells) + "\n")


def read_rows(log: Path) -> list[dict[str, Any]]:
    """The rows: numbers by column, None for an empty cell. What is no row is left out: `keep_rows` has said so."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")[1:-1]
    return [row for line in lines if (row := _row(line)) is not None]

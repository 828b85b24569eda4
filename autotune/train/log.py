"""train_log.csv: the curve of a training, without gaps or duplicates however often it was resumed."""

import csv
import io
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

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


_COLUMNS = tuple(field.name for field in fields(LogRow))


class TrainLog:
    """An open train_log.csv."""

    def __init__(self, path: Path, iteration: int) -> None:
        """Keep the rows up to `iteration`, drop what a killed process logged after its last checkpoint."""
        self.path = path
        self._begin(iteration)

    def rewind(self, iteration: int) -> None:
        """Drop the rows after `iteration`: the training goes back to there."""
        self._file.close()
        self._begin(iteration)

    def _begin(self, iteration: int) -> None:
        kept = [line for line in _lines(self.path) if _iteration(line) <= iteration]
        write_atomically(self.path, "".join([",".join(_COLUMNS) + "\n", *kept]))
        self.last = _row(kept[-1]) if kept else None
        self._file = self.path.open("a", newline="")

    def write(self, row: LogRow) -> None:
        """Append one row; whoever reads the file meanwhile sees it whole."""
        line = io.StringIO()
        values = (getattr(row, name) for name in _COLUMNS)
        csv.writer(line, lineterminator="\n").writerow(repr(v) if isinstance(v, float) else v for v in values)
        self._file.write(line.getvalue())
        self._file.flush()
        self.last = row

    def sync(self) -> None:
        """Have all rows on the disk, before the checkpoint that follows them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _lines(path: Path) -> list[str]:
    text = path.read_text() if path.exists() else ""
    return [line for line in text.splitlines(keepends=True)[1:] if line.endswith("\n")]  # the last may be half written


def _iteration(line: str) -> int:
    return int(line.partition(",")[0])


def read_log(path: Path) -> list[LogRow]:
    """The rows of a train_log.csv, of a running training too; empty where there is none."""
    return [_row(line) for line in _lines(path)]


def _row(line: str) -> LogRow:
    hints: dict[str, Any] = get_type_hints(LogRow)
    cells = dict(zip(_COLUMNS, line.rstrip("\n").split(","), strict=True))
    whole = {name for name, hint in hints.items() if hint in (int, int | None)}
    values: dict[str, Any] = {n: None if not c else int(c) if n in whole else float(c) for n, c in cells.items()}
    return LogRow(**values)

"""How a training shows itself on stderr: a live line on a terminal, plain lines otherwise."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from autotune.train.log import LogRow
from autotune.units import format_bytes, format_duration


class TrainProgress:
    """`with TrainProgress(total) as progress: progress.row(...)`."""

    def __init__(self, total: int, quiet: bool = False) -> None:
        """total: iterations. quiet: say nothing at all."""
        self._total = total
        self._console = Console(stderr=True, quiet=quiet, soft_wrap=True, highlight=False, markup=False)
        columns = (
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(24),
            TextColumn("{task.description}"),
        )
        self._live = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._live.add_task("the first step compiles", total=total)

    def __enter__(self) -> "TrainProgress":
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.stop()

    def step(self, iteration: int) -> None:
        """Optimizer steps done."""
        self._live.update(self._task, completed=iteration)

    def row(self, row: LogRow, eta_seconds: float | None) -> None:
        """What was just logged, and how long the rest will take."""
        text = _row_text(row, eta_seconds)
        if self._console.is_terminal:
            self._live.update(self._task, completed=row.iteration, description=text)
        if not self._console.is_terminal or row.validation_loss is not None:
            self._console.print(f"iteration {row.iteration}/{self._total}  {text}")

    def note(self, text: str) -> None:
        self._console.print(text)


def _row_text(row: LogRow, eta_seconds: float | None) -> str:
    parts = [f"loss {row.train_loss:.4f}"]
    if row.validation_loss is not None:
        parts.append(f"validation {row.validation_loss:.4f}")
    if row.tokens_per_second is not None:
        parts.append(f"{row.tokens_per_second:,.0f} tokens/s")
    if row.mfu is not None:
        parts.append(f"MFU {row.mfu:.1%}")
    parts += [f"peak {format_bytes(row.peak_allocated_bytes)}", f"ETA {format_duration(eta_seconds)}"]
    return "  ".join(parts)

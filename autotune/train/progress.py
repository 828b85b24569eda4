"""How a training shows itself on stderr: a live line on a terminal, plain lines otherwise."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from autotune.terminal import visible
from autotune.train.log import LogRow
from autotune.units import format_bytes, format_duration


class TrainProgress(Progress):
    """`with TrainProgress(total) as progress: progress.row(...)`."""

    def __init__(self, total: int, quiet: bool = False) -> None:
        """total: iterations. quiet: say nothing at all."""
        console = Console(stderr=True, quiet=quiet, soft_wrap=True, highlight=False, markup=False)
        done = TextColumn("{task.completed:,.0f}/{task.total:,.0f}")
        # a narrow terminal gets a second line, not half of the first
        text = TextColumn("{task.description}", table_column=Column(no_wrap=False, overflow="fold"))
        columns = (done, BarColumn(24), text)
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self._total, self._bar = total, self.add_task("the first step compiles", total=total)

    def step(self, iteration: int) -> None:
        """Optimizer steps done."""
        self.update(self._bar, completed=iteration)

    def row(self, row: LogRow, eta_seconds: float | None) -> None:
        """What was just logged, and how long the rest will take."""
        parts = [f"loss {row.train_loss:.4f}"]
        if row.validation_loss is not None:
            parts.append(f"validation {row.validation_loss:.4f}")
        if row.tokens_per_second is not None:
            parts.append(f"{row.tokens_per_second:,.0f} tokens/s")
        if row.mfu is not None:
            parts.append(f"MFU {row.mfu:.1%}")
        parts += [f"peak {format_bytes(row.peak_allocated_bytes)}", f"ETA {format_duration(eta_seconds)}"]
        text = "  ".join(parts)
        self.update(self._bar, completed=row.iteration, description=text)
        if self.disable or row.validation_loss is not None:
            self.note(f"iteration {row.iteration}/{self._total}  {text}")

    def note(self, text: str) -> None:
        self.console.print(visible(text))

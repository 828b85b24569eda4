"""What a training writes: train_log.csv, loss.png, summary.json, trackers and progress. Importable without torch.

Trackers (Weights & Biases, TensorBoard) get what nanoGPT logs under nanoGPT's names and units, so that the curves of
both can be compared.
"""

import importlib.util
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from autotune.config.candidate import Candidate, Tracking
from autotune.config.train_settings import CURVE, LOG, SUMMARY
from autotune.errors import ConfigError, suggest
from autotune.files import sync, write_atomically
from autotune.terminal import visible
from autotune.units import format_bytes, format_count, format_duration

SPEED_TOLERANCE = 0.02
PEAK_TOLERANCE = 0.01
CURVE_SECONDS = 60.0
"""Shortest time between two plots of the curve."""
_NANOGPT = {"iteration": "iter", "train_loss": "train/loss", "validation_loss": "val/loss"}
"""nanoGPT's names of our columns; `lr` and `mfu` are the same."""
_WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")

StoppedBy = Literal["max_iters", "max_time", "train_time"]


@dataclass(frozen=True, kw_only=True)
class LogRow:
    """One row of train_log.csv. Floats are written with all digits, None as an empty cell."""

    iteration: int
    """Optimizer steps done."""
    tokens: int
    train_loss: float
    """Loss of this step over the global batch."""
    validation_loss: float | None
    lr: float
    grad_norm: float
    """Before clipping."""
    tokens_per_second: float | None
    """Over the steps since the previous row."""
    mfu: float | None
    data_wait_seconds: float
    """Time that steps waited for their batch since the previous row."""
    peak_allocated_bytes: int | None
    """So far, in this process."""
    peak_device_bytes: int | None
    seconds: float
    """Wall clock so far, over all resumptions."""


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """How a training ended; summary.json has the same fields. None: not known."""

    out: str
    checkpoint: str
    """The last one."""
    stopped_by: StoppedBy
    iterations: int
    tokens: int
    """Tokens of all iterations, those in the race included."""
    processes: int
    """Processes started by torchrun; 1 without it."""
    train_loss: float | None
    """Loss of the last step."""
    validation_loss: float | None
    """After the last step."""
    best_validation_loss: float | None
    best_iteration: int | None
    tokens_per_second: float | None
    """From the median of this process's warm steps, without evaluations and checkpoints."""
    tokens_per_second_ci95: float | None
    """Half width of the 95 % interval."""
    mfu: float | None
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    peak_device_bytes: int | None
    seconds: float
    """Wall clock, over all resumptions."""
    data_wait_seconds: float
    """Time that this process's steps waited for their batches."""
    raced_iterations: int = 0
    """Iterations that the race had done before."""
    train_seconds: float | None = None
    """Wall clock that was asked for; None: the length was given in steps."""
    planned_tokens: int | None = None
    """Tokens expected in that time, from the measured speed."""
    schedule: float | None = None
    """Fraction of the schedule that was done in that time."""
    comparison: tuple[str, ...] = ()
    """One line a figure: the search's measurement and the training's."""
    warnings: tuple[str, ...] = ()
    """Lines of `comparison` whose figures differ by more than promised, and what else was not reached."""


def summary_text(summary: TrainSummary) -> str:
    """The summary for people, a few lines."""
    speed = "-" if summary.tokens_per_second is None else f"{summary.tokens_per_second:,.0f}"
    mfu = "" if summary.mfu is None else f", MFU {summary.mfu:.1%}"
    train, validation, best = (
        "-" if value is None else f"{value:.4f}"
        for value in (summary.train_loss, summary.validation_loss, summary.best_validation_loss)
    )
    asked, planned = summary.train_seconds, summary.planned_tokens
    lines = [
        f"trained {summary.iterations:,} iterations, {format_count(summary.tokens)} tokens "
        f"in {format_duration(summary.seconds)}"
        + (f" of {format_duration(asked)} asked" if asked else "")
        + (f", {summary.raced_iterations:,} iterations of them before, in the race" if summary.raced_iterations else "")
        + (", stopped by --max-time" * (summary.stopped_by == "max_time")),
        f"loss: training {train}, validation {validation}"
        + (f", best {best} at iteration {summary.best_iteration}" if summary.best_iteration else ""),
        f"speed: {speed} tokens/s{mfu}, {summary.data_wait_seconds:.1f}s waited for data",
        f"peak memory: {format_bytes(summary.peak_allocated_bytes)} allocated, "
        f"{format_bytes(summary.peak_device_bytes)} on the device",
        *(f"warning: {line}" if line in summary.warnings else line for line in summary.comparison),
        f"checkpoint: {summary.checkpoint}",
    ]
    if planned and summary.stopped_by == "train_time" and abs(summary.tokens / planned - 1) > SPEED_TOLERANCE:
        counts = f"planned {format_count(planned)} tokens, trained {format_count(summary.tokens)} in the time asked"
        lines.insert(1, f"{counts} ({summary.tokens / planned - 1:+.1%})")
    return "\n".join(lines)


def compare(measured: Mapping[str, Any], trained: Mapping[str, Any], device: str) -> Iterator[tuple[str, bool]]:
    """A line for each figure that the search measured and the training has too, and whether they agree.

    Tokens/s: within 2 %, or within the combined 95 % intervals (the search's for one more process, the training's own)
    where those are wider. Peaks: within 1 %, in both directions. On the CPU the device's view is left out: the
    resident size is mostly the program's libraries.
    """
    ci95 = measured.get("training_tokens_per_second_ci95") or measured.get("tokens_per_second_ci95") or 0.0
    both = math.hypot(ci95, trained.get("tokens_per_second_ci95") or 0.0)
    speed_tolerance = max(SPEED_TOLERANCE, both / (measured.get("tokens_per_second") or math.inf))
    figures: list[tuple[str, str, Callable[[Any], str], float]] = [
        ("tokens/s", "tokens_per_second", "{:,.0f}".format, speed_tolerance),
        ("peak memory, allocated", "peak_allocated_bytes", format_bytes, PEAK_TOLERANCE),
        ("peak memory, device", "peak_device_bytes", format_bytes, PEAK_TOLERANCE),
    ]
    for name, key, show, allowed in figures[: 2 if device == "cpu" else 3]:
        before, now = measured.get(key), trained.get(key)
        if before and now is not None:
            change = now / before - 1
            text = f"{name}: {show(before)} measured, {show(now)} in training"
            yield f"{text} ({change:+.1%}, expected within ±{100 * allowed:.2g}%)", abs(change) <= allowed


class TrainProgress(Progress):
    """Progress on stderr: a live line on a terminal, plain lines otherwise."""

    def __init__(self, total: int, quiet: bool = False) -> None:
        """total: iterations. quiet: print nothing."""
        console = Console(stderr=True, quiet=quiet, soft_wrap=True, highlight=False, markup=False)
        done = TextColumn("{task.completed:,.0f}/{task.total:,.0f}")
        # folds on a narrow terminal instead of being cut
        text = TextColumn("{task.description}", table_column=Column(no_wrap=False, overflow="fold"))
        super().__init__(done, BarColumn(24), text, console=console, disable=not console.is_terminal)
        self._total, self._bar = total, self.add_task("the first step compiles", total=total)

    def step(self, iteration: int) -> None:
        """iteration: optimizer steps done."""
        self.update(self._bar, completed=iteration)

    def expect(self, total: int) -> None:
        """total: iterations, as now expected."""
        self._total = total
        self.update(self._bar, total=total)

    def row(self, row: LogRow, eta_seconds: float | None) -> None:
        """Show the row that was just logged, and the time that is left."""
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
        """Print one line."""
        self.console.print(visible(text))


class Output:
    """Writes the log, the curve, the summary and the trackers of one training."""

    def __init__(
        self, out: Path, candidate: Candidate, iteration: int, progress: TrainProgress, stack: ExitStack
    ) -> None:
        """iteration: rows after it are dropped from an existing log. stack: closes the trackers."""
        self.out, self.log, self.progress = out, out / LOG, progress
        self.trackers = open_trackers(candidate, out, iteration, stack)
        self._plotted_at = monotonic()
        if invalid := keep_rows(self.log, iteration):
            progress.note(f"warning: {self.log} had {invalid} invalid lines; they are dropped")

    def row(self, row: LogRow, eta_seconds: float | None) -> None:
        """Log one row, send it to the trackers and show it."""
        append_row(self.log, row)
        for track in self.trackers:
            track(row)
        self.progress.row(row, eta_seconds)

    def flush(self) -> None:
        """Sync the log to disk before the checkpoint that follows it; plot the curve once a minute."""
        sync(self.log)
        if monotonic() - self._plotted_at >= CURVE_SECONDS:
            self.plot()

    def rewind(self, iteration: int) -> None:
        """Drop the rows after `iteration`."""
        keep_rows(self.log, iteration)

    def last_row(self) -> Mapping[str, Any]:
        """The last row; empty before the first."""
        return rows[-1] if (rows := read_rows(self.log)) else {}

    def finish(self, summary: TrainSummary, trained: bool) -> None:
        """Write the summary and the final curve. trained: this process has done at least one step."""
        path = self.out / SUMMARY
        if trained or not path.exists():
            write_atomically(path, json.dumps(asdict(summary), indent=1) + "\n")
            self.plot()
        else:
            more = "a longer --train-time" if summary.train_seconds else "--max-tokens or raise training.max_iters"
            self.progress.note(f"nothing left to do; give {more} to train longer")
        for warning in summary.warnings:
            self.progress.note(f"warning: {warning}")

    def plot(self) -> None:
        """Replace loss.png: both losses against tokens. Raises OSError."""
        from matplotlib.figure import Figure

        rows, picture = read_rows(self.log), self.out / CURVE
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([row["tokens"] for row in rows], [row["train_loss"] for row in rows], lw=1, label="training")
        seen = [row for row in rows if row["validation_loss"] is not None]
        axes.plot([r["tokens"] for r in seen], [r["validation_loss"] for r in seen], "o-", ms=3, label="validation")
        axes.set(xlabel="tokens", ylabel="loss (nats per token)")
        axes.legend()
        axes.grid(alpha=0.3)
        temporary = picture.with_name(f".{picture.name}.tmp")
        figure.savefig(temporary, format="png", dpi=120)
        temporary.replace(picture)
        self._plotted_at = monotonic()


_COLUMNS = tuple(field.name for field in fields(LogRow))


def keep_rows(log: Path, iteration: int) -> int:
    """Create the log, or drop the rows after `iteration` and the partial row that a killed process left.
    Returns the number of other invalid lines, which are dropped too."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    *lines, _partial = text.split("\n")
    rows = [(line, _parsed(line)) for line in lines[1:]]
    kept = [f"{line}\n" for line, row in rows if row is not None and (row["iteration"] or 0) <= iteration]
    write_atomically(log, ",".join(_COLUMNS) + "\n", *kept)
    return sum(row is None for _, row in rows)


def _parsed(line: str) -> dict[str, float | None] | None:
    """Numbers by column, None for an empty cell; None for an invalid line."""
    try:
        pairs = zip(_COLUMNS, line.split(","), strict=True)
        row = {name: float(cell) if cell else None for name, cell in pairs}
    except ValueError:
        return None
    return row if row["iteration"] is not None else None


def append_row(log: Path, row: LogRow) -> None:
    """Append the row in one write, so that readers never see a part of it."""
    cells = ("" if value is None else repr(value) for value in astuple(row))
    with log.open("a") as file:
        file.write(",".join(cells) + "\n")


def read_rows(log: Path) -> list[dict[str, Any]]:
    """The rows: numbers by column, None for an empty cell. Invalid lines are skipped; `keep_rows` reports them."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")[1:-1]
    return [row for line in lines if (row := _parsed(line)) is not None]


def check_trackers(tracking: Tracking) -> None:
    """Raise ConfigError for trackers that cannot work here."""
    if problems := _tracker_problems(tracking):
        raise ConfigError("; ".join(problems))


def tracker_notes(tracking: Tracking) -> tuple[str, ...]:
    """The same problems as notes for a search: it uses no tracker, its training will."""
    return tuple(f"the search runs, but `autotune train` will not: {line}" for line in _tracker_problems(tracking))


def _tracker_problems(tracking: Tracking) -> list[str]:
    problems = [
        f"training.{key} = true needs the package {package}; run `pip install nanogpt-autotune[{package}]`, "
        "or set it to false"
        for key, package in (("wandb_log", "wandb"), ("tensorboard", "tensorboard"))
        if getattr(tracking, key) and not _installed(package)
    ]
    mode = os.environ.get("WANDB_MODE") or "online"
    if tracking.wandb_log and mode not in _WANDB_MODES:
        problems.append(f"WANDB_MODE = {mode!r} is not known to wandb; {suggest(mode, _WANDB_MODES)}")
    return problems


def _installed(package: str) -> bool:
    """Whether the package is installed; a folder of its name in the working directory (wandb makes one) is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


Tracker = Callable[[LogRow], object]


def open_trackers(candidate: Candidate, out: Path, iteration: int, stack: ExitStack) -> list[Tracker]:
    """The wanted trackers, closed by `stack`; each continues its curves after `iteration`."""
    trackers = [_wandb(candidate, out, stack)] if candidate.tracking.wandb_log else []
    return [*trackers, _tensorboard(out, iteration, stack)] if candidate.tracking.tensorboard else trackers


def _wandb(candidate: Candidate, out: Path, stack: ExitStack) -> Tracker:
    """wandb finds its key itself (WANDB_API_KEY, .netrc); WANDB_MODE=offline keeps the rows in `out`.
    Raises ConfigError if it does not start, for lack of a key or network."""
    import wandb

    id_file = out / "wandb_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8])
    try:
        run = wandb.init(
            project=candidate.tracking.wandb_project,
            name=candidate.tracking.wandb_run_name or None,
            id=id_file.read_text(),
            resume="allow",
            dir=out,
            config=asdict(candidate),
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.errors.Error as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"training.wandb_log = true, but wandb does not start: {reason}; run `wandb login`, or set "
            "WANDB_MODE=offline, and continue with --resume"
        ) from None
    stack.callback(run.finish)
    return lambda row: run.log(named(row), step=row.iteration)


def _tensorboard(out: Path, iteration: int, stack: ExitStack) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(out / "tensorboard", purge_step=iteration + 1)
    stack.callback(writer.close)

    def write(row: LogRow) -> None:
        for name, value in named(row).items():
            writer.add_scalar(name, value, row.iteration)
        writer.flush()

    return write


def named(row: LogRow) -> dict[str, float]:
    """The known values of a row by the names that trackers show; `mfu` in percent, as in nanoGPT."""
    values = {_NANOGPT.get(name, name): value for name, value in asdict(row).items() if value is not None}
    return values if row.mfu is None else values | {"mfu": 100 * row.mfu}

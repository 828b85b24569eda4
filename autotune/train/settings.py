"""What a training is asked (TrainSettings) and what it answers (TrainSummary). Readable without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from autotune.config.candidate import at_least
from autotune.config.toml import CandidateFile
from autotune.errors import ConfigError
from autotune.units import format_bytes, format_count, format_duration

RECIPE, LOG, CHECKPOINTS, SUMMARY = "recipe.toml", "train_log.csv", "checkpoints", "summary.json"
CURVE = "loss.png"
"""The files of a training directory."""

StoppedBy = Literal["max_iters", "max_time"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One training: a candidate, where it goes, and when it ends."""

    file: CandidateFile
    out: Path
    """Directory of the training; `locate` gives the default."""
    device: str = "auto"
    """`cpu`, `cuda:0`, or `auto`: the first CUDA device, else the CPU."""
    resume: bool = False
    """Go on from the newest good checkpoint in `out`."""
    init_from: Path | None = None
    """Weights to begin with, instead of the recipe's init_from."""
    max_tokens: int | None = None
    """Instead of the recipe's max_iters; rounded up to whole steps."""
    max_seconds: float | None = None
    """Wall clock of this process after which no step begins; a later --resume goes on."""

    def __post_init__(self) -> None:
        if self.resume and self.init_from is not None:
            raise ConfigError("--resume and --init-from exclude each other; a checkpoint has weights of its own")
        if self.max_tokens is not None and self.max_seconds is not None:
            raise ConfigError("--max-tokens and --max-time exclude each other; give the one that shall stop it")
        if self.max_tokens is not None:
            at_least("--max-tokens", self.max_tokens, 1)
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise ConfigError(f"--max-time {self.max_seconds:g} leaves no time; give for example 30m or 24h")


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """How a training ended; summary.json holds the same. None: not known."""

    out: str
    checkpoint: str
    """The last one."""
    stopped_by: StoppedBy
    iterations: int
    tokens: int
    processes: int
    """As torchrun started them; 1 without."""
    train_loss: float | None
    """Of the last step."""
    validation_loss: float | None
    """After the last step."""
    best_validation_loss: float | None
    best_iteration: int | None
    tokens_per_second: float | None
    """From the median of this process's warm steps; evaluations and checkpoints aside."""
    tokens_per_second_ci95: float | None
    """Half width of the 95 % interval."""
    mfu: float | None
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    peak_device_bytes: int | None
    seconds: float
    """Wall clock, over all resumptions."""
    data_wait_seconds: float
    """Of this process's steps, for their batches."""
    comparison: tuple[str, ...] = ()
    """One line a number: what was measured before, what the training did."""
    warnings: tuple[str, ...] = ()
    """Those of `comparison` that differ by more than was promised."""


def locate(path: Path) -> tuple[Path, Path]:
    """RUN, a training directory or a TOML file -> the candidate's file, and the training directory by default.

    `results/x` and `results/x/best.toml` -> `results/x/train`; a training directory or its recipe.toml -> itself;
    any other `y.toml` -> `results/y/train`. Nothing is read; the file may not exist.
    """
    if path.is_dir():
        return (path / RECIPE, path) if (path / RECIPE).exists() else (path / "best.toml", path / "train")
    if path.name == RECIPE:
        return path, path.parent
    return path, (path.parent if path.name == "best.toml" else Path("results") / path.stem) / "train"


def summary_text(summary: TrainSummary) -> str:
    """The summary for people, a few lines."""
    speed = "-" if summary.tokens_per_second is None else f"{summary.tokens_per_second:,.0f}"
    mfu = "" if summary.mfu is None else f", MFU {summary.mfu:.1%}"
    lines = [
        f"trained {summary.iterations:,} iterations, {format_count(summary.tokens)} tokens "
        f"in {format_duration(summary.seconds)}" + (", stopped by --max-time" * (summary.stopped_by == "max_time")),
        f"loss: training {_loss(summary.train_loss)}, validation {_loss(summary.validation_loss)}, "
        f"best {_loss(summary.best_validation_loss)} at iteration {summary.best_iteration}",
        f"speed: {speed} tokens/s{mfu}, {summary.data_wait_seconds:.1f}s waited for data",
        f"peak memory: {format_bytes(summary.peak_allocated_bytes)} allocated, "
        f"{format_bytes(summary.peak_device_bytes)} on the device",
        *(f"warning: {line}" if line in summary.warnings else line for line in summary.comparison),
        f"checkpoint: {summary.checkpoint}",
    ]
    return "\n".join(lines)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"

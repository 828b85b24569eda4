"""The settings of one training run, and the files in its directory."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from autotune.config.candidate import at_least
from autotune.config.toml import BEST_TOML, CandidateFile
from autotune.errors import ConfigError

RECIPE, LOG, CHECKPOINTS, SUMMARY = "recipe.toml", "train_log.csv", "checkpoints", "summary.json"
CURVE = "loss.png"
"""Files of a training directory."""
TRAINING = "train"
"""Folder of a run for the training of its best.toml."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """A candidate, its directory, and when to stop."""

    file: CandidateFile
    out: Path
    """Directory of the training; `locate` gives the default."""
    device: str = "auto"
    """`cpu`, `cuda:0`, or `auto`: the first CUDA device, else the CPU."""
    resume: bool = False
    """Continue from the newest undamaged checkpoint in `out`."""
    init_from: Path | None = None
    """Initial weights; replaces the candidate file's init_from."""
    race: Path | None = None
    """Checkpoints of the race's winner, from which the training continues; None: it begins at iteration 0."""
    train_seconds: float | None = None
    """Replaces the recipe's train_seconds: the schedule ends with this time."""
    max_tokens: int | None = None
    """Replaces the recipe's max_iters and train_seconds; rounded up to whole steps."""
    max_seconds: float | None = None
    """Wall clock of this process after which no step starts, wherever the schedule is; --resume continues later."""
    started: float = field(default_factory=time.monotonic)
    """Start of the process by `time.monotonic`: its time counts from here."""

    def __post_init__(self) -> None:
        if self.resume and self.init_from is not None:
            raise ConfigError("--resume and --init-from exclude each other; a checkpoint has weights of its own")
        for flag, value in (("--max-time", self.max_seconds), ("--train-time", self.train_seconds)):
            if value is not None and self.max_tokens is not None:
                raise ConfigError(f"--max-tokens and {flag} exclude each other; give one of them")
            if value is not None and value <= 0:
                raise ConfigError(f"{flag} {value:g} leaves no time; give for example 30m or 24h")
        if self.max_tokens is not None:
            at_least("--max-tokens", self.max_tokens, 1)


def train_command(what: object, processes: int) -> str:
    """The command that trains a run or candidate file in so many processes."""
    launcher = f"torchrun --standalone --nproc-per-node {processes} -m " if processes > 1 else ""
    return f"{launcher}autotune train {what}"


def locate(path: Path) -> tuple[Path, Path]:
    """RUN, a training directory or a TOML file -> the candidate file, and the default training directory.

    `results/x` and `results/x/best.toml` -> `results/x/train`; a training directory or its recipe.toml -> itself;
    any other `y.toml` -> `results/y/train`. Nothing is read; the file may not exist.
    """
    if path.is_dir():
        return (path / RECIPE, path) if (path / RECIPE).exists() else (path / BEST_TOML, path / TRAINING)
    if path.name == RECIPE:
        return path, path.parent
    return path, (path.parent if path.name == BEST_TOML else Path("results") / path.stem) / TRAINING

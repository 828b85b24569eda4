"""The settings of one training run, and the files in its directory."""

from dataclasses import dataclass
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
    max_tokens: int | None = None
    """Replaces the recipe's max_iters; rounded up to whole steps."""
    max_seconds: float | None = None
    """Wall clock of this process after which no step starts; --resume continues later."""

    def __post_init__(self) -> None:
        if self.resume and self.init_from is not None:
            raise ConfigError("--resume and --init-from exclude each other; a checkpoint has weights of its own")
        if self.max_tokens is not None and self.max_seconds is not None:
            raise ConfigError("--max-tokens and --max-time exclude each other; give one of them")
        if self.max_tokens is not None:
            at_least("--max-tokens", self.max_tokens, 1)
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise ConfigError(f"--max-time {self.max_seconds:g} leaves no time; give for example 30m or 24h")


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

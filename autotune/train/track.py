"""The rows of a training, sent to Weights & Biases or written for TensorBoard, where the recipe says so.

What nanoGPT logs too has nanoGPT's names and units, so that curves of both lie over each other.
"""

import importlib.util
import os
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from autotune.config.candidate import Candidate, Recipe
from autotune.errors import ConfigError, suggest
from autotune.train.log import LogRow

Track = Callable[[LogRow], object]

_NANOGPT = {"iteration": "iter", "train_loss": "train/loss", "validation_loss": "val/loss"}
"""Its names of our columns; `lr` and `mfu` are the same."""
_WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")


def check_trackers(recipe: Recipe) -> None:
    """Raise ConfigError for trackers that cannot work here."""
    if missing := _missing(recipe):
        raise ConfigError("; ".join(missing))


def tracker_notes(recipe: Recipe) -> tuple[str, ...]:
    """The same as notes for a search, which needs no tracker: its training will."""
    return tuple(f"the search does without, `autotune train` will not: {line}" for line in _missing(recipe))


def _missing(recipe: Recipe) -> list[str]:
    wanted = [(key, name) for key, name in (("wandb_log", "wandb"), ("tensorboard", "tensorboard"))
              if getattr(recipe, key)]  # fmt: skip
    missing = [
        f"training.{key} = true needs the package {package}; run `pip install nanogpt-autotune[{package}]`, "
        "or set it to false"
        for key, package in wanted
        if not _installed(package)
    ]
    mode = os.environ.get("WANDB_MODE") or "online"
    if recipe.wandb_log and mode not in _WANDB_MODES:
        missing.append(f"WANDB_MODE = {mode!r} is not known to wandb; {suggest(mode, _WANDB_MODES)}")
    return missing


def _installed(package: str) -> bool:
    """Not a folder of that name in the working directory, where wandb keeps its runs."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def open_trackers(candidate: Candidate, out: Path, iteration: int, stack: ExitStack) -> list[Track]:
    """What the recipe asks for, until `stack` closes; a training that goes on from `iteration` goes on there too."""
    found = [_wandb(candidate, out, stack)] if candidate.recipe.wandb_log else []
    return [*found, _tensorboard(out, iteration, stack)] if candidate.recipe.tensorboard else found


def _wandb(candidate: Candidate, out: Path, stack: ExitStack) -> Track:
    """The key stays where wandb has it (WANDB_API_KEY, .netrc); WANDB_MODE=offline keeps the rows here.
    Raises ConfigError where wandb does not start: no key, no network."""
    import wandb

    name = out / "wandb_id"
    if not name.exists():
        name.write_text(uuid.uuid4().hex[:8])
    try:
        run = wandb.init(
            project=candidate.recipe.wandb_project,
            name=candidate.recipe.wandb_run_name or None,
            id=name.read_text(),
            resume="allow",
            dir=out,
            config=asdict(candidate),
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.errors.Error as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"training.wandb_log = true, but wandb does not start: {reason}; run `wandb login`, or set "
            "WANDB_MODE=offline, and go on with --resume"
        ) from None
    stack.callback(run.finish)
    return lambda row: run.log(named(row), step=row.iteration)


def _tensorboard(out: Path, iteration: int, stack: ExitStack) -> Track:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(out / "tensorboard", purge_step=iteration + 1)
    stack.callback(writer.close)

    def write(row: LogRow) -> None:
        for name, value in named(row).items():
            writer.add_scalar(name, value, row.iteration)
        writer.flush()

    return write


def named(row: LogRow) -> dict[str, float]:
    """What is known of a row, by the names that trackers show; `mfu` in percent, as nanoGPT logs it."""
    values = {_NANOGPT.get(name, name): value for name, value in asdict(row).items() if value is not None}
    return values if row.mfu is None else values | {"mfu": 100 * row.mfu}

"""The rows of a training, sent to Weights & Biases or written for TensorBoard, where the recipe says so."""

import importlib.util
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from autotune.config.candidate import Candidate, Recipe
from autotune.errors import ConfigError

Track = Callable[[Mapping[str, float], int], object]
"""Takes the known values of a row, and its iteration."""


def check_trackers(recipe: Recipe) -> None:
    """Raise ConfigError for one whose package is missing."""
    for key, package in (("wandb_log", "wandb"), ("tensorboard", "tensorboard")):
        if getattr(recipe, key) and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"training.{key} = true needs the package {package}; "
                f"run `pip install nanogpt-autotune[{package}]`, or set it to false"
            )


def open_trackers(candidate: Candidate, out: Path, iteration: int, stack: ExitStack) -> list[Track]:
    """What the recipe asks for, until `stack` closes; a training that goes on from `iteration` goes on there too."""
    found = [_wandb(candidate, out, stack)] if candidate.recipe.wandb_log else []
    return [*found, _tensorboard(out, iteration, stack)] if candidate.recipe.tensorboard else found


def _wandb(candidate: Candidate, out: Path, stack: ExitStack) -> Track:
    """The key stays where wandb has it (WANDB_API_KEY, .netrc); WANDB_MODE=offline keeps the rows here."""
    import wandb

    name = out / "wandb_id"
    if not name.exists():
        name.write_text(uuid.uuid4().hex[:8])
    run = wandb.init(
        project=candidate.recipe.wandb_project,
        name=candidate.recipe.wandb_run_name or None,
        id=name.read_text(),
        resume="allow",
        dir=out,
        config=asdict(candidate),
        settings=wandb.Settings(console="off", silent=True),
    )
    stack.callback(run.finish)
    return lambda values, iteration: run.log(dict(values), step=iteration)


def _tensorboard(out: Path, iteration: int, stack: ExitStack) -> Track:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(out / "tensorboard", purge_step=iteration + 1)
    stack.callback(writer.close)

    def write(values: Mapping[str, float], iteration: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, iteration)
        writer.flush()

    return write

"""The rows of a training, sent to Weights & Biases or written for TensorBoard, where the recipe says so."""

import importlib.util
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from autotune.config.candidate import Candidate, Recipe
from autotune.errors import ConfigError
from autotune.train.log import LogRow


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """Somewhere else that rows go."""

    write: Callable[[LogRow], object]
    close: Callable[[], object]


def check_trackers(recipe: Recipe) -> None:
    """Raise ConfigError for one whose package is missing."""
    for key, package in (("wandb_log", "wandb"), ("tensorboard", "tensorboard")):
        if getattr(recipe, key) and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"training.{key} = true needs the package {package}; "
                f"run `pip install nanogpt-autotune[{package}]`, or set it to false"
            )


def open_trackers(candidate: Candidate, out: Path, iteration: int) -> list[Tracker]:
    """What the recipe asks for; a training that goes on from `iteration` goes on there too."""
    recipe = candidate.recipe
    found = [_wandb(candidate, out)] if recipe.wandb_log else []
    return [*found, _tensorboard(out, iteration)] if recipe.tensorboard else found


def _wandb(candidate: Candidate, out: Path) -> Tracker:
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
    return Tracker(write=lambda row: run.log(dict(_values(row)), step=row.iteration), close=run.finish)


def _tensorboard(out: Path, iteration: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(out / "tensorboard", purge_step=iteration + 1)

    def write(row: LogRow) -> None:
        for name, value in _values(row).items():
            writer.add_scalar(name, value, row.iteration)
        writer.flush()

    return Tracker(write=write, close=writer.close)


def _values(row: LogRow) -> Mapping[str, float]:
    return {name: value for name, value in asdict(row).items() if value is not None and name != "iteration"}

"""Where a training begins: at the start, or where its newest good checkpoint left off."""

from dataclasses import asdict
from pathlib import Path

import torch

from autotune.config.candidate import Recipe
from autotune.data.batches import fingerprint
from autotune.errors import CheckpointError
from autotune.model.checkpoint import Checkpoint, TrainState, checkpoints, clean, latest_good, set_aside
from autotune.model.step import TrainStep
from autotune.train.processes import Processes
from autotune.train.progress import TrainProgress
from autotune.train.settings import CHECKPOINTS, RECIPE, TrainSettings

_SAME_LEARNING = {
    "max_iters", "eval_interval", "eval_iters", "eval_batch_size", "log_interval", "checkpoint_interval",
    "always_save_checkpoint", "init_from", "tensorboard", "wandb_log", "wandb_project", "wandb_run_name",
}  # fmt: skip
"""Keys of a recipe that may change on resume: they say when to stop and to look, not what is learned."""


def restore(settings: TrainSettings, group: Processes, step: TrainStep, progress: TrainProgress) -> TrainState:
    """The state to begin from: with --resume the newest good checkpoint's, put into `step`; else iteration 0.

    Raises CheckpointError where that is of another training, with nothing changed.
    """
    directory, candidate = settings.out / CHECKPOINTS, settings.file.candidate
    if group.first:
        clean(directory)
    else:
        group.largest(0)  # the first one tidies up before the others look
    data_fingerprint = fingerprint(Path(candidate.recipe.data))
    if settings.resume and checkpoints(directory):
        found, damages = latest_good(directory)
        _check_same_training(found.state, candidate.recipe, data_fingerprint, settings.out)
        for damage in damages:
            progress.note(f"warning: {damage}")
        if damages:
            progress.note(f"going back to {found.path}; the damaged ones are renamed damaged_*")
        set_aside(directory, found.state.iteration)
        progress.note(f"going on from iteration {found.state.iteration}")
        state = _put(found, step, group)
    else:
        if settings.resume:
            progress.note(f"{settings.out} has no checkpoint yet: it begins again at iteration 0")
        state = TrainState(iteration=0, tokens=0, candidate=candidate, data_fingerprint=data_fingerprint)
    if group.first:
        group.largest(0)
    return state


def go_back(directory: Path, step: TrainStep, group: Processes) -> TrainState:
    """Put the newest good checkpoint into a running training. Raises CheckpointError where none is whole."""
    return _put(latest_good(directory)[0], step, group)


def _put(found: Checkpoint, step: TrainStep, group: Processes) -> TrainState:
    found.restore(step)
    if not group.first:  # a checkpoint holds the first one's random state; dropout shall differ
        torch.manual_seed(found.state.candidate.recipe.seed + found.state.iteration * group.count + group.rank)
    return found.state


def _check_same_training(state: TrainState, recipe: Recipe, data_fingerprint: str, out: Path) -> None:
    """Raise CheckpointError, saying what differs, unless the checkpoint is of this recipe and data and not beyond."""
    was, now = _learning(state.candidate.recipe), _learning(recipe)
    different = [f"{key} = {now[key]!r} (checkpoint: {was[key]!r})" for key in now if now[key] != was[key]]
    if state.data_fingerprint != data_fingerprint:
        prints = f"{data_fingerprint[:10]}, {state.data_fingerprint[:10]}"
        different.append(f"the tokens in {recipe.data} (fingerprint {prints})")
    if different:
        raise CheckpointError(
            f"{out} holds another training: {', '.join(different)}; go on with {out / RECIPE}, or give another --out"
        )
    if recipe.max_iters < state.iteration:
        raise CheckpointError(
            f"{out} is at iteration {state.iteration} already, beyond training.max_iters = {recipe.max_iters}; "
            "raise it or --max-tokens, or give another --out"
        )


def _learning(recipe: Recipe) -> dict[str, object]:
    """What must be equal for a checkpoint to be of this training; the data are compared by their fingerprint."""
    table = asdict(recipe)
    shape = {f"model.{key}": value for key, value in table.pop("shape").items()}
    return shape | {f"training.{k}": v for k, v in table.items() if k not in _SAME_LEARNING | {"data"}}

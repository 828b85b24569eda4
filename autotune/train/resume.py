"""Where a training starts or returns to: iteration 0, or a checkpoint; and the loss spikes that make it return."""

import math
import statistics
from collections import deque
from dataclasses import replace
from pathlib import Path

import torch

from autotune.config.candidate import Recipe
from autotune.config.train_settings import CHECKPOINTS, RECIPE, TrainSettings
from autotune.data.batches import fingerprint
from autotune.errors import CheckpointError
from autotune.model.checkpoint import Checkpoint, TrainState, checkpoints, clean, latest_good, set_aside
from autotune.model.distributed import DistributedContext
from autotune.model.step import TrainStep
from autotune.train.output import TrainProgress
from autotune.units import format_count

WINDOW = 32
"""Steps whose losses define the usual loss."""
SUSTAINED = 4
"""Consecutive high losses that make a spike; fewer may be an odd batch."""
SPIKE_NATS = 1.0
RATE_TOLERANCE = 0.1
"""Largest relative difference between the learning rates of a race and of the training that continues from it: the rule
follows the measured speed, and is rounded to two digits."""
SPIKE_DEVIATIONS = 5
"""A high loss exceeds the median by both: this many nats, and this many times the median absolute deviation."""


def restore(
    settings: TrainSettings, context: DistributedContext, step: TrainStep, progress: TrainProgress
) -> TrainState:
    """The state to start from: with --resume the newest undamaged checkpoint, put into `step`; else iteration 0.

    Raises CheckpointError, with nothing changed, if the checkpoint belongs to another training.
    """
    directory, candidate = settings.out / CHECKPOINTS, settings.file.candidate
    if context.is_main:
        clean(directory)
    else:
        context.barrier()  # until the main process has cleaned and restored
    data_fingerprint = fingerprint(Path(candidate.recipe.data))
    if settings.resume and checkpoints(directory):
        checkpoint, damages = latest_good(directory)
        _check_same_training(checkpoint.state, candidate.recipe, data_fingerprint, settings.out)
        for damage in damages:
            progress.note(f"warning: {damage}")
        if damages:
            progress.note(f"going back to {checkpoint.path}; damaged checkpoints are renamed damaged_*")
        set_aside(directory, checkpoint.state.iteration)
        progress.note(f"resuming at iteration {checkpoint.state.iteration}")
        state = _load(checkpoint, step, context)
    else:
        if settings.resume:
            where = "" if settings.race else " at iteration 0"
            progress.note(f"{settings.out} has no checkpoint yet: starting again{where}")
        state = TrainState(iteration=0, tokens=0, candidate=candidate, data_fingerprint=data_fingerprint)
        if settings.race is not None:
            state = _after_race(settings.race, state, step, context, progress)
    if context.is_main:
        context.barrier()
    return state


def _after_race(
    race: Path, new: TrainState, step: TrainStep, context: DistributedContext, progress: TrainProgress
) -> TrainState:
    """The state of the level phase that the race has trained, put into `step`; `new` where it is another's."""
    recipe = new.candidate.recipe
    try:
        checkpoint = latest_good(race)[0]
        raced = checkpoint.state
        was = raced.candidate.recipe
        alike = replace(
            recipe, max_iters=was.max_iters, lr_decay_iters=was.lr_decay_iters, warmup_iters=was.warmup_iters,
            train_seconds=was.train_seconds, learning_rate=was.learning_rate, min_lr=was.min_lr, data=was.data,
        )  # fmt: skip
        another = not math.isclose(recipe.learning_rate, was.learning_rate, rel_tol=RATE_TOLERANCE)
        if another or alike != was or raced.data_fingerprint != new.data_fingerprint:
            raise CheckpointError(f"{race} has another recipe or other data")
        if not recipe.warmup_iters <= raced.iteration < (1.0 - recipe.decay_share) * recipe.max_iters:
            raise CheckpointError(f"iteration {raced.iteration} of {race} is not in the level phase")
        _load(checkpoint, step, context)
    except CheckpointError as error:
        progress.note(f"what the race has trained is trained again: {error}")
        return new
    count, tokens = raced.iteration, raced.iteration * recipe.tokens_per_step
    progress.note(f"continuing from the race: {count:,} iterations, {format_count(tokens)} tokens, are trained already")
    return replace(
        new, iteration=count, tokens=tokens, raced_iterations=count, recent_losses=raced.recent_losses,
        schedule=count / (count + recipe.max_iters) if recipe.train_seconds else 0.0,
    )  # fmt: skip


def roll_back(directory: Path, step: TrainStep, context: DistributedContext) -> TrainState:
    """Load the newest undamaged checkpoint into a running training. Raises CheckpointError if there is none."""
    return _load(latest_good(directory)[0], step, context)


def _load(checkpoint: Checkpoint, step: TrainStep, context: DistributedContext) -> TrainState:
    checkpoint.restore(step)
    state = checkpoint.state
    if not context.is_main:  # a checkpoint has the main process's random state, but dropout must differ by rank
        torch.manual_seed(state.candidate.recipe.seed + state.iteration * context.world_size + context.rank)
    return state


def _check_same_training(state: TrainState, recipe: Recipe, data_fingerprint: str, out: Path) -> None:
    """Raise CheckpointError, naming the differences, unless the checkpoint has this recipe and data, and is not beyond
    its last iteration."""
    was = state.candidate.recipe
    now = replace(recipe, max_iters=was.max_iters, data=was.data)  # it may be longer, and its data may have moved
    if was.train_seconds and now.train_seconds:
        now = replace(now, train_seconds=was.train_seconds)
    different = [
        f"{table}.{key} = {value!r} (checkpoint: {vars(before)[key]!r})"
        for table, before, after in (("model", was.shape, now.shape), ("training", was, now))
        for key, value in vars(after).items()
        if key != "shape" and value != vars(before)[key]
    ]
    if state.data_fingerprint != data_fingerprint:
        prints = f"{data_fingerprint[:10]}, {state.data_fingerprint[:10]}"
        different.append(f"the tokens in {recipe.data} (fingerprint {prints})")
    if different:
        raise CheckpointError(
            f"{out} holds another training: {', '.join(different)}; continue with {out / RECIPE}, or give another --out"
        )
    if recipe.max_iters < state.iteration and not recipe.train_seconds:
        raise CheckpointError(
            f"{out} is at iteration {state.iteration} already, beyond training.max_iters = {recipe.max_iters}; "
            "raise it or --max-tokens, or give another --out"
        )


def loss_spike(recent: deque[float], loss: float, grad_norm: float) -> str:
    """A description of a NaN or a loss spike after a step; empty if there is none.

    recent: losses of the last WINDOW steps, oldest first; a finite `loss` is appended.
    """
    if not math.isfinite(loss):
        return f"the training loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"the gradient norm is {grad_norm}"
    recent.append(loss)
    usual, last = list(recent)[:-SUSTAINED], list(recent)[-SUSTAINED:]
    if len(usual) < WINDOW // 2:
        return ""
    median = statistics.median(usual)
    deviation = statistics.median(abs(value - median) for value in usual)
    if min(last) <= median + max(SPIKE_NATS, SPIKE_DEVIATIONS * deviation):
        return ""
    return f"the training loss has jumped from {median:.2f} to {loss:.2f}"

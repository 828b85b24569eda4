"""`train`: train a candidate to completion with the same step that was measured. Imports torch only when called."""

import os
import sys
from dataclasses import replace
from pathlib import Path

from autotune import places
from autotune.config.candidate import Plan
from autotune.config.toml import CandidateFile
from autotune.config.train_settings import CHECKPOINTS, LOG, RECIPE, TrainSettings
from autotune.data.vocabulary import check_ids
from autotune.environment import worker_environment
from autotune.errors import CheckpointError, ConfigError
from autotune.model.compile_cache import compile_cache_dir, make_cache
from autotune.model.distributed import distributed_context
from autotune.train.output import TrainSummary, check_trackers


def train(settings: TrainSettings) -> TrainSummary | None:
    """Train `settings.file` in `settings.out` until its max_iters, or for its train_seconds.

    Call it from the main thread: Ctrl-C, SIGTERM and SIGHUP save a checkpoint and raise InterruptedByUser. Progress and
    notes go to stderr. Under torchrun all processes train one model; only rank 0 writes, prints and returns the
    summary, the others return None.

    Raises ConfigError, UnsupportedError or DataError for what cannot be trained; CheckpointError if --resume finds no
    undamaged checkpoint or another training, or if a checkpoint cannot be written; AutotuneError if loss spikes
    persist or the device runs out of memory. Checkpoints written before stay intact.
    """
    file, notes = _resolved(settings)
    recipe, context = file.candidate.recipe, distributed_context()
    if not recipe.data:
        raise ConfigError(
            "training.data is empty, a training needs text; write a data directory there, "
            "or make one with `autotune data prepare`"
        )
    here = replace(file.candidate, plan=replace(file.candidate.plan, processes=context.world_size))
    file = replace(file, candidate=here)
    check_trackers(file.candidate.tracking)
    if context.is_main:
        _check_directory(settings)
        check_ids(Path(recipe.data), recipe.shape.vocab_size)
    _prepare_process(file.candidate.plan)
    from autotune.train.training_loop import run  # loads torch, after its environment variables are set

    return run(replace(settings, file=file), context, notes)


def _resolved(settings: TrainSettings) -> tuple[CandidateFile, tuple[str, ...]]:
    """The candidate file with --init-from, --train-time and --max-tokens put into it, and notes for the user."""
    candidate = settings.file.candidate
    notes: tuple[str, ...] = ()
    if settings.init_from is not None:
        initial = replace(candidate.checkpointing, init_from=str(settings.init_from.resolve()))
        candidate = replace(candidate, checkpointing=initial)
    per_step = candidate.recipe.tokens_per_step
    if (seconds := settings.train_seconds) is not None:
        speed = settings.file.measured.get("tokens_per_second")
        steps = max(1, round(speed * seconds / per_step)) if speed else candidate.recipe.max_iters
        candidate = replace(candidate, recipe=replace(candidate.recipe, train_seconds=seconds, max_iters=steps))
    if (tokens := settings.max_tokens) is not None:
        steps = -(-tokens // per_step)
        candidate = replace(candidate, recipe=replace(candidate.recipe, max_iters=steps, train_seconds=0.0))
        notes = (f"--max-tokens {tokens:,} is {steps:,} whole steps of {per_step:,}: {steps * per_step:,} tokens",)
    return replace(settings.file, candidate=candidate), notes


def _check_directory(settings: TrainSettings) -> None:
    """Refuse to overwrite a training without --resume, and to start one with it."""
    out = settings.out
    exists = any((out / name).exists() for name in (RECIPE, LOG, CHECKPOINTS))
    if exists and not settings.resume:
        raise ConfigError(f"{out} already holds a training; continue it with --resume, or give another --out")
    if settings.resume and not exists:
        raise CheckpointError(f"{out} holds no training to resume; leave --resume out, or give the right --out")


def _prepare_process(plan: Plan) -> None:
    """Set the environment variables that a trial's worker has."""
    places.settle(os.environ)
    if plan.compile != "off":
        make_cache(compile_cache_dir())
    variables = worker_environment(compile_cache_dir(), plan.allocator)
    allocator = "PYTORCH_ALLOC_CONF"
    if "torch" in sys.modules and variables.get(allocator) != os.environ.get(allocator):
        raise ConfigError(
            f"plan.allocator = {plan.allocator!r} must be set before torch loads; "
            f"start this process with {allocator}={variables[allocator]}"
        )
    for name in (allocator, "TORCHINDUCTOR_CACHE_DIR", "GOMP_SPINCOUNT", "PYTHONPATH", "PYTHONSAFEPATH"):
        if name in variables:
            os.environ[name] = variables[name]
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silences lines that torch's profiler prints

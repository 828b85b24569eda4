"""`train`: a candidate to completion, by the very step that was measured. Imports torch only when called."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from autotune import files, places
from autotune.config.candidate import Plan
from autotune.config.toml import CandidateFile
from autotune.data.vocabulary import check_ids
from autotune.environment import worker_environment
from autotune.errors import CheckpointError, ConfigError
from autotune.model.compile_cache import compile_cache_dir, make_cache
from autotune.train.processes import processes
from autotune.train.settings import CHECKPOINTS, LOG, RECIPE, TrainSettings, TrainSummary
from autotune.train.track import check_trackers


def train(settings: TrainSettings) -> TrainSummary | None:
    """Train `settings.file` in `settings.out` until its max_iters, --max-tokens or --max-time.

    Call it from the main thread: Ctrl-C, SIGTERM and SIGHUP save a checkpoint and raise InterruptedByUser. Progress and
    notes go to stderr. Under torchrun all processes train one model; only the first writes, prints and answers,
    the others return None. Raises ConfigError, UnsupportedError or DataError for what cannot be trained,
    CheckpointError where --resume finds nothing whole or another training, or where a checkpoint cannot be
    written, AutotuneError when the loss stays bad or the device runs out of memory. Every checkpoint written
    before stays whole.
    """
    file, notes = _resolved(settings)
    recipe, group = file.candidate.recipe, processes()
    if not recipe.data:
        raise ConfigError(
            "training.data is empty, a training needs text; write a data directory there, "
            "or make one with `autotune data prepare`"
        )
    if recipe.global_batch_size < group.count:
        raise ConfigError(
            f"training.global_batch_size = {recipe.global_batch_size} is less than one sequence for each of "
            f"{group.count} processes; start fewer"
        )
    check_trackers(recipe)
    if group.first:
        _check_directory(settings)
        check_ids(Path(recipe.data), recipe.shape.vocab_size)
    _prepare_process(file.candidate.plan)
    from autotune.train.loop import run  # torch loads here, after what it reads from the environment is set

    return run(replace(settings, file=file), group, notes)


def _resolved(settings: TrainSettings) -> tuple[CandidateFile, tuple[str, ...]]:
    """The candidate file with --init-from, and --max-tokens as max_iters, and what to say about it."""
    recipe = settings.file.candidate.recipe
    notes: tuple[str, ...] = ()
    if settings.init_from is not None:
        recipe = replace(recipe, init_from=str(settings.init_from.resolve()))
    if (asked := settings.max_tokens) is not None:
        each = recipe.tokens_per_step
        steps = -(-asked // each)
        recipe = replace(recipe, max_iters=steps)
        notes = (f"--max-tokens {asked:,} is {steps:,} whole steps of {each:,}: {steps * each:,} tokens",)
    return replace(settings.file, candidate=replace(settings.file.candidate, recipe=recipe)), notes


def _check_directory(settings: TrainSettings) -> None:
    """Nothing is overwritten without --resume, and nothing begins by accident with it."""
    out = settings.out
    begun = any((out / name).exists() for name in (RECIPE, LOG, CHECKPOINTS))
    if begun and not settings.resume:
        raise ConfigError(f"{out} already holds a training; go on with --resume, or give another --out")
    if settings.resume and not begun:
        raise CheckpointError(f"{out} holds no training to resume; leave --resume out, or give the right --out")


def _prepare_process(plan: Plan) -> None:
    """The same environment that a trial's worker has."""
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
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler writes lines of its own


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make the training directory, and keep other processes out of it for the block's duration.

    Raises ConfigError where it cannot be written or another process trains in it.
    """
    taken = ConfigError(f"another process trains in {out}; wait for it, or give another --out")
    with ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.locked(out / ".lock", taken))
        except OSError as error:
            raise ConfigError(f"--out {out} cannot be written: {error.strerror}; give another directory") from None
        yield

"""One rung of a race, in a process of its own: a candidate trained to a length by the trainer's own step.

    python -m autotune.train.rung < request.json

With the schedule `wsd`, the level phase is saved before the rate decays, and the next rung continues from there: only
decays are trained again. Other schedules depend on the length from their first step on, so each rung starts again.
"""

import math
import sys
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from autotune.config.candidate import Candidate, Recipe
from autotune.data.batches import fingerprint, open_batches
from autotune.errors import CheckpointError
from autotune.measure.memory import MemoryMeter
from autotune.measure.ran import check_ran
from autotune.measure.timing import Stopwatch, summarise
from autotune.measure.types import RungRequest, RungResult, Stage
from autotune.measure.worker import Outcome, TrialEnded, limit_memory, main, stop_if_over_limit
from autotune.model.checkpoint import TrainState, checkpoints, clean, latest_good, save_checkpoint
from autotune.model.compile_cache import compile_cache
from autotune.model.distributed import DistributedContext
from autotune.model.optim import learning_rate
from autotune.model.step import COMPILING_STEPS, TrainStep, build
from autotune.train.prefetch import Prefetcher
from autotune.train.resume import WINDOW, loss_spike

CHECKED_EVERY = 8
"""Steps between two looks at losses and speed."""
FIRST_STEPS = COMPILING_STEPS + 1
"""Steps of a process that compile or are profiled, and so are not timed."""
WARM_UP = 0.1
"""Largest fraction of the first rung that warms up; the rungs after it continue from there."""


def run(request: RungRequest, outcome: Outcome) -> None:
    """Train and evaluate as `request` says. Exceptions become a status in `main`."""
    device, directory = torch.device(request.device), Path(request.checkpoints)
    outcome.enter(phase="build")
    outcome.meter = meter = MemoryMeter(device, lambda: step.state_bytes())  # before the CUDA context
    limit_memory(request, device, meter)
    step = build(request.candidate, device)
    state = _restored(step, directory) if request.checkpoints else _new(step.candidate)
    recipe, rows = request.candidate.recipe, request.chunk_tokens // request.candidate.shape.block_size
    source = open_batches(
        Path(recipe.data), seed=recipe.seed, global_batch_size=recipe.global_batch_size,
        block_size=recipe.shape.block_size, vocab_size=recipe.shape.vocab_size, piece_tokens=request.chunk_tokens,
    )  # fmt: skip
    by_chunk = replace(request.candidate, evaluation=replace(request.candidate.evaluation, eval_batch_size=rows))
    with closing(Prefetcher(source, DistributedContext(), by_chunk, device)) as batches:
        rung = Rung(request, outcome, step, meter, batches, state)
        if recipe.schedule == "wsd":
            rung.train_level_and_decay()
        else:
            rung.train_whole()
        rung.finish()


def _new(candidate: Candidate) -> TrainState:
    return TrainState(iteration=0, tokens=0, candidate=candidate)


def _restored(step: TrainStep, directory: Path) -> TrainState:
    """The state of the level phase so far, put into `step`; a new one where there is none, or only a damaged one."""
    clean(directory)
    if not checkpoints(directory):
        return _new(step.candidate)
    try:
        checkpoint = latest_good(directory)[0]
    except CheckpointError as error:
        print(f"{error}; training again from the start", file=sys.stderr)
        return _new(step.candidate)
    checkpoint.restore(step)
    return checkpoint.state


@dataclass
class Rung:
    """A rung in progress."""

    request: RungRequest
    outcome: Outcome
    step: TrainStep
    meter: MemoryMeter
    batches: Prefetcher
    state: TrainState
    """As in the level phase's checkpoint."""
    taken: int = 0
    """Steps of this process."""
    seconds: list[float] = field(default_factory=list)
    """Seconds of its steps, but for the first ones."""
    pending: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Losses and gradient norms since the last look at them; on the device."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """Tokens and validation loss."""

    def __post_init__(self) -> None:
        recipe = self.request.candidate.recipe
        self.iteration, self.per_step = self.state.iteration, recipe.tokens_per_step
        self.watch, self.timers = Stopwatch(self.step.device), list[Callable[[], float]]()
        self.recent = deque(self.state.recent_losses, maxlen=WINDOW)
        if self.iteration:
            warm_up = self.state.candidate.recipe.warmup_iters
        else:
            warm_up = min(recipe.warmup_iters, max(1, int(WARM_UP * self.length())))
        self.recipe = replace(recipe, warmup_iters=warm_up)

    @property
    def speed(self) -> float | None:
        """Tokens/s of this process's steps; None before any was timed."""
        return self.per_step / summarise(self.seconds).median if self.seconds else None

    def length(self) -> int:
        """Optimizer steps of the training at its end."""
        seconds, speed = self.request.target_seconds, self.speed
        tokens = self.request.target_tokens if seconds is None or speed is None else seconds * speed
        return max(1, round(tokens / self.per_step))

    def train_level_and_decay(self) -> None:
        """The level phase, its checkpoint, and the decay. Where a training is given a time, its length follows the
        speed until the decay begins."""
        level = replace(self.recipe, schedule="constant")
        share = 1.0 - self.recipe.decay_share
        while self.iteration < (end := int(share * self.length())):
            self._train(level, min(end, self.iteration + CHECKED_EVERY))
        if self.request.checkpoints and self.iteration > self.state.iteration:
            self._save_level()
        end = max(self.iteration + 1, round(self.iteration / share) if share else self.length())
        self._train(replace(self.recipe, lr_decay_iters=end), end)

    def train_whole(self) -> None:
        """The whole schedule, scaled to end at the given length."""
        end = round(self.request.target_tokens / self.per_step) or 1
        self._train(replace(self.recipe, lr_decay_iters=end), end)

    def _train(self, recipe: Recipe, end: int) -> None:
        """Steps up to iteration `end`, with a look at losses and speed now and then."""
        every = self.length() / self.request.evaluations
        while self.iteration < end:
            stage: Stage = "first_step" if self.taken < COMPILING_STEPS else "steady"
            stop = self.iteration + (1 if self.taken < FIRST_STEPS else CHECKED_EVERY)
            with self._measured(stage):
                while self.iteration < min(stop, end):
                    self._step(recipe)
            self._check()
            if self.taken == COMPILING_STEPS:
                self._compiled()
            if self.taken == FIRST_STEPS:
                check_ran(self.step.candidate.plan, self.meter.ran, self.step.device)
            if self.iteration >= (len(self.curve) + 1) * every and len(self.curve) + 1 < self.request.evaluations:
                self._evaluate()

    def _compiled(self) -> None:
        hits, misses = compile_cache() or (None, None)
        self.outcome.enter(
            phase="measure", compile_cache_hits=hits, compile_cache_misses=misses, memory=self.meter.views()
        )
        stop_if_over_limit(self.request, self.outcome.result)

    def _measured(self, stage: Stage) -> AbstractContextManager[None]:
        """Records peaks of the stage: on CUDA always, on the CPU, by a profiler, once."""
        seen = stage in self.meter.views() and self.taken >= COMPILING_STEPS
        return nullcontext() if self.step.device.type == "cpu" and seen else self.meter.stage(stage)

    def _step(self, recipe: Recipe) -> None:
        if not self.taken:
            self.outcome.enter(phase="compile")
        batch, rate = self.batches.batch(self.iteration), learning_rate(recipe, self.iteration)

        def work() -> None:
            self.pending.append(self.step.step(batch, rate))

        self.timers.append(self.watch.time(work))
        self.iteration += 1
        self.taken += 1

    def _check(self) -> None:
        """Read timers and losses. Raises TrialEnded for a training that diverges."""
        self.watch.synchronise()
        first = self.taken - len(self.pending)
        for number, timer in enumerate(self.timers, first):
            if number >= FIRST_STEPS:
                self.seconds.append(timer())
        self.timers.clear()
        scaled = self.step.scaler.is_enabled()  # the scaler skips steps whose gradients are not finite
        for loss, norm in self.pending:
            if problem := loss_spike(self.recent, loss.item(), 0.0 if scaled else norm.item()):
                raise TrialEnded("incorrect", f"diverged: {problem} before iteration {self.iteration}")
        self.pending.clear()

    def _save_level(self) -> None:
        """Replace the checkpoint of the level phase. Where the disk is full, the next rung trains it again."""
        state = replace(
            self.state, iteration=self.iteration, tokens=self.iteration * self.per_step,
            candidate=replace(self.step.candidate, recipe=self.recipe), recent_losses=tuple(self.recent),
            data_fingerprint=fingerprint(Path(self.recipe.data)), best_iteration=self.iteration,
        )  # fmt: skip
        directory = Path(self.request.checkpoints)
        try:
            with self._measured("checkpoint"):
                save_checkpoint(directory, self.step, state)
        except CheckpointError as error:
            self.outcome.enter(message=f"the level phase was not saved: {error}")
            return
        self.state = state
        self.outcome.enter(level_iterations=self.iteration)

    def _evaluate(self) -> list[float]:
        """Losses of the validation chunks."""
        losses = []
        with self._measured("evaluation"):
            for index in range(self.request.chunks):
                parts = [self.step.evaluate(x, y) * share for x, y, share in self.batches.validation(index)]
                losses.append(torch.stack(parts).sum())
        found = [loss.item() for loss in losses]
        self.curve.append((self.iteration * self.per_step, sum(found) / len(found)))
        return found

    def finish(self) -> None:
        """Evaluate, and write the result."""
        losses = self._evaluate()
        if not all(map(math.isfinite, losses)):
            raise TrialEnded("incorrect", f"the validation loss is {sum(losses)} at iteration {self.iteration}")
        timing = summarise(self.seconds) if self.seconds else None
        speed = self.per_step / timing.median if timing else None
        self.outcome.enter(
            phase="done", status="ok", memory=self.meter.views(), tokens_per_second=speed,
            tokens_per_second_ci95=speed * timing.ci95 / timing.median if timing and speed else None,
            step_seconds_p50=timing.median if timing else None, steps="whole", measured_steps=len(self.seconds),
            iterations=self.iteration, stepping_seconds=self.taken * timing.median if timing else 0.0,
            chunk_losses=tuple(losses), curve_tokens=tuple(tokens for tokens, _ in self.curve),
            curve_losses=tuple(loss for _, loss in self.curve),
        )  # fmt: skip
        stop_if_over_limit(self.request, self.outcome.result)


if __name__ == "__main__":
    sys.exit(main(run, RungRequest, RungResult))

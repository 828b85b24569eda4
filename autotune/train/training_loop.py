"""The training loop: stretches of steps, and between them evaluation, logging and checkpoints."""

import gc
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from autotune import files
from autotune.config.toml import format_candidate
from autotune.config.train_settings import CHECKPOINTS, RECIPE, TrainSettings, train_command
from autotune.data.batches import open_batches
from autotune.environment import NOT_MEASURED, Environment, describe, differences, part_of_one, refuse_stand_in
from autotune.errors import AutotuneError, ConfigError, InterruptedByUser
from autotune.files import write_atomically
from autotune.measure.memory import MemoryMeter, out_of_memory
from autotune.measure.ran import check_ran
from autotune.measure.timing import Stopwatch, summarise
from autotune.measure.types import EVALUATION_CODE, Stage, cache_text, largest_peak
from autotune.model.checkpoint import BEST, TrainState, checkpoints, gather, save_checkpoint
from autotune.model.compile_cache import compile_cache
from autotune.model.distributed import DistributedContext, process_group
from autotune.model.optim import learning_rate
from autotune.model.step import COMPILING_STEPS, TrainStep, build
from autotune.train.deadline import APART, EVALUATION_SHARE, UNKNOWN, Deadline, Work
from autotune.train.exchange import load_initial
from autotune.train.output import LogRow, Output, StoppedBy, TrainProgress, TrainSummary, compare
from autotune.train.prefetch import Prefetcher
from autotune.train.prefetch import Work as Forward
from autotune.train.resume import WINDOW, loss_spike, restore, roll_back
from autotune.units import format_duration

MAX_ROLLBACKS = 3
"""How often a process returns to a checkpoint before it gives up."""
WARM_AFTER = 3
"""First steps of a process that are left out of its speed: the first compiles, the second is profiled on the CPU."""
SAME_SIGNAL_SECONDS = 5.0
"""Signals this close together count as one: a closed terminal sends two."""
_CONTINUE, _TIME_OVER, _INTERRUPTED = range(3)


def run(settings: TrainSettings, context: DistributedContext, notes: tuple[str, ...]) -> TrainSummary | None:
    """Open the data, build or restore the step, and train; see `trainer.train`."""
    candidate = settings.file.candidate
    recipe, shape = candidate.recipe, candidate.shape
    by_rank = context.world_size > 1 and settings.device != "cpu" and torch.cuda.is_available()
    machine = part_of_one(
        describe(f"cuda:{context.local_rank}" if by_rank else settings.device), context.local_world_size
    )
    refuse_stand_in(settings.file.environment, machine, "the candidate")
    data = open_batches(
        Path(recipe.data), seed=recipe.seed, global_batch_size=recipe.global_batch_size,
        block_size=shape.block_size, vocab_size=shape.vocab_size,
    )  # fmt: skip
    device = torch.device(machine.device)
    meter = MemoryMeter(device, lambda: step.state_bytes())  # before this process has a CUDA context
    step = build(candidate, device)
    initial = candidate.checkpointing.init_from
    if initial and not (settings.resume and checkpoints(settings.out / CHECKPOINTS)):
        notes += load_initial(Path(initial), step.model)
    if machine.stand_in:
        notes += (f"warning: {NOT_MEASURED}",)
    if different := "; ".join(differences(settings.file.environment, machine)):
        notes += (
            f"warning: the candidate was measured on another machine ({different}); "
            "its speed and memory may differ here, `autotune search` measures them",
        )
    with ExitStack() as stack:
        if context.is_main:
            stack.enter_context(locked(settings.out))
        stack.enter_context(process_group(context))
        progress = stack.enter_context(TrainProgress(recipe.max_iters, quiet=not context.is_main))
        for note in notes:
            progress.note(note)
        stack.enter_context(step.over_processes(context.world_size))
        state = restore(settings, context, step, progress)
        output = None
        if context.is_main:
            write_atomically(settings.out / RECIPE, format_candidate(settings.file))
            output = Output(settings.out, candidate, state.iteration, progress, stack)
        batches = stack.enter_context(closing(Prefetcher(data, context, candidate, step.device)))
        return Training(settings, context, machine, step, meter, batches, progress, output, state).run()


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Create the training directory, and keep other processes out of it for the block's duration.

    Raises ConfigError if it cannot be written or another process trains in it.
    """
    taken = ConfigError(f"another process trains in {out}; wait for it, or give another --out")
    with ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.locked(out / ".lock", taken))
        except OSError as error:
            raise ConfigError(f"--out {out} cannot be written: {error.strerror}; give another directory") from None
        yield


@dataclass
class Training:
    """One training in progress."""

    settings: TrainSettings
    context: DistributedContext
    machine: Environment
    step: TrainStep
    meter: MemoryMeter
    batches: Prefetcher
    progress: TrainProgress
    output: Output | None
    """None in all processes but the main one."""
    state: TrainState
    """As in the newest checkpoint."""
    rollbacks: int = 0
    stop_requested_at: float | None = None
    saving: bool = False
    previous_step: torch.cuda.Event | None = None
    waited_before: float = 0.0
    """Time that steps waited for data up to the last row."""
    step_seconds: list[float] = field(default_factory=list)
    """Seconds of all steps up to the last row."""
    readings: list[Callable[[], float]] = field(default_factory=list)
    """Timers of the steps since."""
    steps_left: int = UNKNOWN
    """In a training of given time: 1 if the next step is the last."""
    evaluates_compiled: bool = True
    """Evaluations run compiled code; False where there is no time to compile it."""
    rehearsed: bool = False
    """What its end costs was measured."""
    said_rarer: bool = False

    def __post_init__(self) -> None:
        self.candidate, self.recipe = self.step.candidate, self.step.candidate.recipe
        self.checkpoints, self.stopwatch = self.settings.out / CHECKPOINTS, Stopwatch(self.step.device)
        self.first, self.started, self.seconds_before = self.state.iteration, self.settings.started, self.state.seconds
        self.best_loss, self.best_iteration = self.state.best_validation_loss, self.state.best_iteration
        self.eval_iters = self.candidate.evaluation.eval_iters
        self.deadline: Deadline | None = None
        if asked := self.recipe.train_seconds:
            # until it is measured, the end is expected to take as long as the start did: both load libraries
            self.deadline = Deadline(asked, lambda: self.seconds, min(self.process_seconds, 0.1 * asked))
            self.eval_iters = min(self.eval_iters, self.state.candidate.evaluation.eval_iters)
            complete = self.state.schedule == 1 and asked <= self.state.candidate.recipe.train_seconds
            if self.first:  # else there is one step at least
                self.steps_left = 0 if complete else self._steps_left()
        self.set_state(self.state)

    def set_state(self, state: TrainState) -> None:
        """Continue from the checkpoint that holds `state`."""
        self.state, self.iteration, self.skipped = state, state.iteration, state.skipped_batches
        self.schedule = state.schedule
        self.recent = deque(state.recent_losses, maxlen=WINDOW)
        self.pending: list[tuple[Tensor, Tensor, float]] = []  # loss, gradient norm, lr; on the device, unchecked

    @property
    def process_seconds(self) -> float:
        """Wall clock of this process's part of the training, its start included."""
        return time.monotonic() - self.started

    @property
    def seconds(self) -> float:
        """Wall clock so far, over all resumptions."""
        return self.seconds_before + self.process_seconds

    def run(self) -> TrainSummary | None:
        """Train to the end and write the summary."""
        stopped_by: StoppedBy = self._end
        try:
            with self._stop_on_signals():
                if not self.finished:
                    stopped_by = self._train()
        except KeyboardInterrupt:
            raise self._interrupted() from None
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise AutotuneError(
                f"the device ran out of memory at iteration {self.iteration}: {str(error).splitlines()[0]}; "
                "free some, or lower plan.micro_batch_size, and continue with --resume"
            ) from error
        views = ("allocated_bytes", "reserved_bytes", "device_bytes")
        peaks = {f"peak_{view}": self.context.max(self._peak(view) or 0) or None for view in views}  # the fullest's
        if self.output is None:
            return None
        summary = self._summary(self.output, stopped_by, peaks)
        self.output.finish(summary, trained=self.iteration > self.first)
        return summary

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """Within the block, SIGINT, SIGTERM and SIGHUP request a stop after the current step. They raise
        KeyboardInterrupt if nothing is unsaved (as while the first step compiles), or at a second request some seconds
        later, except while a checkpoint is written."""

        def request(_number: int, _frame: FrameType | None) -> None:
            now, asked = time.monotonic(), self.stop_requested_at
            if asked is None and (self.saving or self.iteration > self.state.iteration):
                self.stop_requested_at = now
            elif not self.saving and (asked is None or now - asked > SAME_SIGNAL_SECONDS):
                raise KeyboardInterrupt

        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        heeded = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores some
        before = {number: signal.signal(number, request) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _train(self) -> StoppedBy:
        while True:
            compiling = self.iteration < self.first + COMPILING_STEPS
            stage: Stage = "first_step" if compiling else "steady"
            boundary, stop = self._boundary(stage), _CONTINUE
            with self._measured(stage):
                while self.iteration < boundary and stop == _CONTINUE and not self.finished:
                    self._step()
                    stop = self._stop()
            compiled = compile_cache() if self.candidate.plan.compile != "off" else None
            if self.iteration == self.first + COMPILING_STEPS and compiled:
                self.progress.note(f"compiled, with {cache_text(*compiled)} from the compile cache")
            if self.iteration == self.first + COMPILING_STEPS + 1:
                check_ran(self.candidate.plan, self.meter.ran, self.step.device)
            losses = self._checked_losses()
            if losses is None:
                continue
            self._evaluate_log_save(losses[-1], self.finished or stop == _TIME_OVER)
            if self.finished:
                return self._end
            if stop == _TIME_OVER:
                return "max_time"
            if stop == _INTERRUPTED:
                if self.iteration > self.state.iteration:
                    self._save()
                raise self._interrupted()
            if self.deadline:
                if not self.rehearsed and self.deadline.step_seconds:
                    self._rehearse_end(self.deadline)
                self.steps_left = self._steps_left()
                if self.finished:  # what was done between steps took longer than ever before
                    if self.iteration > self.state.iteration:
                        self._save()
                    return self._end

    @property
    def finished(self) -> bool:
        """The last step is done."""
        return self.steps_left == 0 if self.deadline else self.iteration >= self.recipe.max_iters

    @property
    def _end(self) -> StoppedBy:
        return "train_time" if self.deadline else "max_iters"

    def _steps_left(self) -> int:
        """Steps in the time asked, the same in all processes: as many as the slowest can make."""
        assert self.deadline
        return -self.context.max(-self.deadline.steps_left(self.candidate.evaluation.eval_interval))

    def _rehearse_end(self, deadline: Deadline) -> None:
        """Measure early what the end of the training costs, and limit the size of evaluations to their share."""
        together, compiling = self.context.world_size, EVALUATION_CODE * self.step_seconds[0]
        if self.candidate.plan.compile != "off" and self.context.max(int(APART * compiling > deadline.left)):
            self.evaluates_compiled = False
            self.progress.note(
                f"evaluations are not compiled: that would take about {format_duration(compiling)} of the "
                f"{format_duration(deadline.left)} left"
            )
        self._validation_loss(together)  # the first may compile
        started = time.monotonic()
        self._validation_loss(together)
        seconds = time.monotonic() - started
        affordable = together * max(1, int(EVALUATION_SHARE * deadline.seconds / seconds))
        affordable = -self.context.max(-affordable)
        if affordable < self.eval_iters:
            self.progress.note(
                f"evaluations have {affordable} batches instead of {self.eval_iters}, which would take more than "
                f"{EVALUATION_SHARE:.0%} of {format_duration(deadline.seconds)}"
            )
            self.eval_iters = affordable
        deadline.took("evaluation", seconds * self.eval_iters / together)
        self._save()
        if self.output:
            with deadline.timed("summary"):
                self.output.plot()
        self.rehearsed = True

    def _timed(self, work: Work) -> AbstractContextManager[None]:
        return self.deadline.timed(work) if self.deadline else nullcontext()

    def _affordable(self, *works: Work) -> bool:
        """Whether they are worth their time before the end; the same in all processes."""
        if self.deadline is None:
            return True
        soon, late = self.deadline.too_soon(*works), self.deadline.too_late(*works)
        if soon and not late and self.rehearsed and not self.said_rarer:
            self.said_rarer = True
            self.progress.note(
                f"warning: {works[0]}s take {format_duration(self.deadline.seconds_of(*works))}, so not all of them "
                f"happen: they are {APART} times that apart"
            )
        return self.context.max(int(soon or late or not self.rehearsed)) == 0

    def _boundary(self, stage: Stage) -> int:
        """The iteration at which something other than a step is due."""
        if stage == "first_step" or stage not in self.meter.views():
            return self.iteration + 1
        if self.deadline and not self.rehearsed:
            return self.iteration + 1
        one, end = self.candidate, UNKNOWN if self.deadline else self.recipe.max_iters
        intervals = one.tracking.log_interval, one.evaluation.eval_interval, one.checkpointing.checkpoint_interval
        return min(end, *((self.iteration // interval + 1) * interval for interval in intervals))

    def _measured(self, stage: Stage) -> AbstractContextManager[None]:
        """Records peaks of the stage: on CUDA always, as it costs nothing; on the CPU, by a profiler, once a stage."""
        if self.step.device.type == "cuda" or stage not in self.meter.views():
            return self.meter.stage(stage)
        return nullcontext()

    def _step(self) -> None:
        """One optimizer step; the next batch is loaded meanwhile."""
        lr = self._learning_rate()

        def work() -> None:
            number = self.iteration + self.skipped
            loss = self._retry_smaller("step", lambda: self.step.gradients(self.batches.batch(number)))
            self.pending.append((loss, self.step.optimizer_step(lr), lr))

        self.readings.append(self.stopwatch.time(work))
        self._wait_for_device()
        self.iteration += 1
        self.progress.step(self.iteration)
        if self.deadline:
            self.deadline.stepped(warm=self.iteration - self.first > WARM_AFTER)
            self.steps_left = 0 if self.steps_left == 1 else self._steps_left()

    def _learning_rate(self) -> float:
        """The next step's. In a training of given time, what is left of the schedule is divided among the steps that
        are left, so that it is complete with the last one however fast they are."""
        if self.deadline is None:
            return learning_rate(self.recipe, self.iteration)
        self.schedule = 1.0 - (1.0 - self.schedule) * (1.0 - 1.0 / self.steps_left)
        return learning_rate(self.recipe, self.schedule * self.recipe.lr_decay_iters)

    def _retry_smaller(self, kind: Forward, work: Callable[[], Tensor]) -> Tensor:
        """The result of `work`, retried with half as many sequences a forward while it runs out of memory.
        The batch stays the same, and so does what is learned from it."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                # with several processes the others wait in their backward, so one cannot retry alone
                if not out_of_memory(error) or self.context.world_size > 1 or not self.batches.shrink(kind):
                    raise
                reason = str(error).splitlines()[0]
            # outside of `except`, as the traceback would keep the failed step's tensors alive
            self.step.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
            self.progress.note(
                f"warning: out of memory in iteration {self.iteration + 1} ({reason}); continuing with "
                f"{self.batches.sizes[kind]} sequences a forward in each {kind}, what is learned stays the same"
            )

    def _wait_for_device(self) -> None:
        """Keep the host at most one step ahead of a CUDA device; otherwise a stop would take minutes."""
        if self.step.device.type != "cuda":
            return
        if self.previous_step is not None:
            self.previous_step.synchronize()
        self.previous_step = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.previous_step.record()

    def _stop(self) -> int:
        """_TIME_OVER, _INTERRUPTED or _CONTINUE, the same in all processes."""
        limit = self.settings.max_seconds
        over = limit is not None and self.process_seconds >= limit
        interrupted = self.stop_requested_at is not None
        return self.context.max(_INTERRUPTED if interrupted else _TIME_OVER if over else _CONTINUE)

    def _checked_losses(self) -> list[tuple[float, float, float]] | None:
        """Loss, gradient norm and lr of the steps since the last check; None after a rollback for a bad one."""
        losses: list[float] = self.context.sum(torch.stack([loss for loss, _, _ in self.pending])).tolist()
        first = self.iteration - len(self.pending)
        values = [(loss, norm.item(), lr) for loss, (_, norm, lr) in zip(losses, self.pending, strict=True)]
        self.pending.clear()
        scaled = self.step.scaler.is_enabled()  # the scaler skips steps whose gradients are not finite
        for number, (loss, norm, _) in enumerate(values, first + 1):
            if problem := loss_spike(self.recent, loss, 0.0 if scaled else norm):
                self._roll_back(number, f"{problem} at iteration {number}")
                return None
        return values

    def _roll_back(self, bad: int, problem: str) -> None:
        """Return to the newest checkpoint, and skip the data up to the bad iteration."""
        advice = "lower training.learning_rate or choose plan.dtype = 'float32'"
        if not checkpoints(self.checkpoints):
            raise AutotuneError(f"{problem}, there is no checkpoint to go back to; {advice}")
        if self.rollbacks == MAX_ROLLBACKS:
            raise AutotuneError(
                f"{problem}, after {MAX_ROLLBACKS} rollbacks that skipped data; the newest checkpoint is of "
                f"iteration {self.state.iteration}; {advice}, and check the data"
            )
        self.rollbacks += 1
        batches = self.skipped + bad  # up to the bad one
        self.set_state(roll_back(self.checkpoints, self.step, self.context))
        self.skipped = batches - self.iteration
        self.readings.clear()
        if self.deadline:
            self.steps_left = max(1, self._steps_left())
        if self.output:
            self.output.rewind(self.iteration)
        self.progress.note(
            f"warning: {problem}; going back to iteration {self.iteration} and skipping the data since "
            f"(rollback {self.rollbacks} of at most {MAX_ROLLBACKS})"
        )

    def _evaluate_log_save(self, last: tuple[float, float, float], ending: bool) -> None:
        """Whatever is due. last: loss, gradient norm and lr of the last step."""
        improved, validation = False, None
        if self._evaluation_due(ending):
            with self._timed("evaluation"):
                validation = self._validation_loss(self.eval_iters)
            improved = self.best_loss is None or validation < self.best_loss
            if improved:
                self.best_loss, self.best_iteration = validation, self.iteration
        if validation is not None or self.iteration == 1 or self.iteration % self.candidate.tracking.log_interval == 0:
            self._log(*last, validation)
        saving = self.candidate.checkpointing
        due = saving.always_save_checkpoint and self.iteration % saving.checkpoint_interval == 0
        if improved or ending or (due and self._affordable("checkpoint")):
            self._save()

    def _evaluation_due(self, ending: bool) -> bool:
        if ending:  # one that was never timed may take longer than the training
            return self.deadline is None or self.rehearsed
        due = self.iteration % self.candidate.evaluation.eval_interval == 0
        return due and self._affordable("evaluation", "checkpoint")

    def _validation_loss(self, batches: int) -> float:
        """Mean loss over the same validation batches each time, divided among the processes."""

        def batch_loss(index: int) -> Tensor:
            evaluate = partial(self.step.evaluate, compiled=self.evaluates_compiled)
            return torch.stack([evaluate(x, y) * share for x, y, share in self.batches.validation(index)]).sum()

        total, together = torch.zeros((), device=self.step.device), self.context.world_size
        with self._measured("evaluation"):
            for index in range(self.context.rank, -(-batches // together) * together, together):
                loss = self._retry_smaller("evaluation", lambda: batch_loss(index % batches))  # noqa: B023 - called at once
                if index < batches:  # each process has as many, as divided weights are gathered by all together
                    total += loss
        return float(self.context.sum(total)) / batches

    def _log(self, loss: float, norm: float, lr: float, validation_loss: float | None) -> None:
        self.stopwatch.synchronise()
        seconds = [reading() for reading in self.readings]
        self.readings.clear()
        warm = seconds[max(0, WARM_AFTER - len(self.step_seconds)) :]
        self.step_seconds += seconds
        if self.output is None:
            return
        mean = sum(warm) / len(warm) if warm else None
        speed = None if mean is None else self.recipe.tokens_per_step / mean
        waited, self.waited_before = self.batches.waited_seconds - self.waited_before, self.batches.waited_seconds
        row = LogRow(
            iteration=self.iteration, tokens=self.iteration * self.recipe.tokens_per_step, train_loss=loss,
            validation_loss=validation_loss, lr=lr, grad_norm=norm, tokens_per_second=speed, mfu=self._mfu(speed),
            data_wait_seconds=waited, peak_allocated_bytes=self._peak("allocated_bytes"),
            peak_device_bytes=self._peak("device_bytes"), seconds=self.seconds,
        )  # fmt: skip
        if self.deadline and self.steps_left < UNKNOWN:
            self.progress.expect(self.iteration + self.steps_left)
        self.output.row(row, self._eta(mean))

    def _eta(self, step_seconds: float | None) -> float | None:
        if step_seconds is None:
            return None
        left = self.deadline.left if self.deadline else (self.recipe.max_iters - self.iteration) * step_seconds
        limit = self.settings.max_seconds
        return max(0.0, left if limit is None else min(left, limit - self.process_seconds))

    def _mfu(self, tokens_per_second: float | None) -> float | None:
        if tokens_per_second is None or self.machine.peak_flops is None:
            return None
        peak = self.machine.peak_flops * self.context.world_size
        return tokens_per_second * self.candidate.shape.flops_per_token / peak

    def _peak(self, view: str) -> int | None:
        return largest_peak(self.meter.views(), view)

    def _save(self) -> None:
        evaluation = replace(self.candidate.evaluation, eval_iters=self.eval_iters)
        state = replace(
            self.state, iteration=self.iteration, tokens=self.iteration * self.recipe.tokens_per_step,
            candidate=replace(self.candidate, evaluation=evaluation), seconds=self.seconds, schedule=self.schedule,
            best_validation_loss=self.best_loss, best_iteration=self.best_iteration, skipped_batches=self.skipped,
            recent_losses=tuple(self.recent),
        )  # fmt: skip
        self.saving = True
        with self._timed("checkpoint"):
            with self._measured("checkpoint"):
                held = gather(self.step)
                if self.output:
                    self.output.flush()
                    save_checkpoint(self.checkpoints, self.step, state, held)
                del held  # what was gathered does not outlive the stage
            self.context.barrier()  # torchrun kills all processes when one exits, so none may before it is written
        self.state, self.saving = state, False

    def _interrupted(self) -> InterruptedByUser:
        saved, recipe = checkpoints(self.checkpoints), self.settings.out / RECIPE
        where = f"the newest checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        return InterruptedByUser(
            f"stopped after iteration {self.iteration}; {where}; "
            f"continue with `{train_command(recipe, self.context.world_size)} --resume`"
        )

    def _overfitted(self, validation: float | None) -> list[str]:
        """A warning where the validation loss rose while the text was repeated."""
        state, passes = self.state, self.state.tokens / self.batches.source.train_tokens
        best = state.best_validation_loss
        if passes <= 1 or best is None or validation is None or validation <= best:
            return []
        return [
            f"the validation loss was lowest at iteration {state.best_iteration}, {best:.4f}, and rose as the text was "
            f"repeated, {passes:.1f} times in all; {self.checkpoints / BEST} holds that model; prepare more text, or "
            "train for less time"
        ]

    def _summary(self, output: Output, stopped_by: StoppedBy, peaks: Mapping[str, int | None]) -> TrainSummary:
        timing = summarise(warm) if (warm := self.step_seconds[WARM_AFTER:]) else None
        speed = self.recipe.tokens_per_step / timing.median if timing else None
        figures: dict[str, Any] = {
            "tokens_per_second": speed,
            "tokens_per_second_ci95": speed * timing.ci95 / timing.median if speed and timing else None,
            **peaks,
        }
        alike = self.settings.file.environment.get("processes", 1) == self.context.world_size
        measured = self.settings.file.measured if alike else {}  # else not comparable
        compared = list(compare(measured, figures, self.step.device.type))
        last, asked = output.last_row(), self.recipe.train_seconds
        state = self.state
        warnings = [text for text, within in compared if not within]
        if asked and self.schedule < 1 and stopped_by == "train_time":
            warnings.append(
                f"{format_duration(asked)} were over at {self.schedule:.0%} of the schedule: start, compilation and "
                "evaluation took too much of them; give more --train-time"
            )
        warnings += self._overfitted(last.get("validation_loss"))
        return TrainSummary(
            out=str(self.settings.out), checkpoint=str(checkpoints(self.checkpoints)[-1]), stopped_by=stopped_by,
            iterations=state.iteration, tokens=state.tokens, processes=self.context.world_size,
            train_loss=last.get("train_loss"), validation_loss=last.get("validation_loss"),
            best_validation_loss=state.best_validation_loss, best_iteration=state.best_iteration,
            mfu=self._mfu(speed), seconds=self.seconds, data_wait_seconds=self.batches.waited_seconds,
            train_seconds=asked or None, schedule=self.schedule if asked else None,
            planned_tokens=self.recipe.max_tokens + state.raced_iterations * self.recipe.tokens_per_step
            if asked and measured.get("tokens_per_second") else None, raced_iterations=state.raced_iterations,
            comparison=tuple(text for text, _ in compared), warnings=tuple(warnings), **figures,
        )  # fmt: skip

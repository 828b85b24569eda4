"""The loop of a training: steps in stretches, and between them evaluation, log and checkpoint."""

import gc
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from autotune.config.toml import format_candidate
from autotune.data.batches import open_batches
from autotune.environment import describe
from autotune.errors import AutotuneError, InterruptedByUser
from autotune.files import write_atomically
from autotune.measure.memory import MemoryMeter
from autotune.measure.ran import check_ran
from autotune.measure.types import Stage, cache_text
from autotune.measure.worker import COMPILING_STEPS, out_of_memory
from autotune.model.checkpoint import TrainState, checkpoints, save_checkpoint
from autotune.model.compile_cache import compile_cache
from autotune.model.optim import learning_rate
from autotune.model.step import build
from autotune.train.compare import other_machine
from autotune.train.exchange import load_initial
from autotune.train.feed import Feed, Work
from autotune.train.health import WINDOW, complaint_of
from autotune.train.processes import Processes, joined
from autotune.train.progress import TrainProgress
from autotune.train.record import Record
from autotune.train.resume import go_back, restore
from autotune.train.settings import CHECKPOINTS, RECIPE, StoppedBy, TrainSettings, TrainSummary
from autotune.train.trainer import locked

SETBACKS = 3
"""How often a process goes back to a checkpoint before it gives up."""
SAME_SIGNAL_SECONDS = 5.0
"""A signal that follows another one so soon means the same: a closed terminal is told twice."""
_GO_ON, _TIME_OVER, _ASKED = range(3)


def run(settings: TrainSettings, group: Processes, notes: tuple[str, ...]) -> TrainSummary | None:
    """Open, build, restore, and train; see `trainer.train`."""
    candidate = settings.file.candidate
    recipe, shape = candidate.recipe, candidate.shape
    own_card = group.count > 1 and settings.device != "cpu" and torch.cuda.is_available()
    machine = describe(f"cuda:{group.local_rank}" if own_card else settings.device)
    data = open_batches(
        Path(recipe.data),
        seed=recipe.seed,
        global_batch_size=recipe.global_batch_size,
        block_size=shape.block_size,
        vocab_size=shape.vocab_size,
    )
    device = torch.device(machine.device)
    meter = MemoryMeter(device, lambda: step.state_bytes())  # before this process holds anything of the card
    step = build(candidate, device)
    if recipe.init_from and not (settings.resume and checkpoints(settings.out / CHECKPOINTS)):
        notes += load_initial(Path(recipe.init_from), step.model)
    if different := other_machine(settings.file.environment, machine):
        notes += (
            f"warning: the candidate was measured on another machine ({different}); "
            "its speed and memory may differ here, `autotune search` measures them",
        )
    with ExitStack() as stack:
        if group.first:
            stack.enter_context(locked(settings.out))
        stack.enter_context(joined(group))
        progress = stack.enter_context(TrainProgress(recipe.max_iters, quiet=not group.first))
        for note in notes:
            progress.note(note)
        state = restore(settings, group, step, progress)
        if group.first:
            write_atomically(settings.out / RECIPE, format_candidate(settings.file))
        if group.count > 1:
            step.over_processes()
        feed = stack.enter_context(closing(Feed(data, group, candidate, step.device)))
        return Training(Record(settings, group, machine, step, meter, feed, state, progress, stack), state).run()


class Training:
    """One training in progress."""

    def __init__(self, record: Record, state: TrainState) -> None:
        self.record, self.settings, self.group, self.step = record, record.settings, record.group, record.step
        self.feed, self.progress, self.recipe = record.feed, record.progress, record.recipe
        self.device, self.checkpoints = self.step.device, self.settings.out / CHECKPOINTS
        self.first = state.iteration
        self.adopt(state)
        self.setbacks = 0
        self.asked_at: float | None = None  # when a signal asked to stop
        self.saving = False
        self.values: list[tuple[float, float, float]] = []  # loss, gradient norm, rate of the steps last looked at
        self.best_loss, self.best_iteration = state.best_validation_loss, state.best_iteration
        self.ahead: torch.cuda.Event | None = None

    def adopt(self, state: TrainState) -> None:
        """Stand where the newest checkpoint stands."""
        self.state, self.iteration, self.skipped = state, state.iteration, state.skipped_batches
        self.recent = deque(state.recent_losses, maxlen=WINDOW)
        self.pending: list[tuple[Tensor, Tensor, float]] = []  # loss, gradient norm, rate of steps not looked at yet

    def run(self) -> TrainSummary | None:
        """Step until the end, then say how it went."""
        stopped_by: StoppedBy = "max_iters"
        try:
            with self._signals():
                if self.iteration < self.recipe.max_iters:
                    stopped_by = self._train()
        except KeyboardInterrupt:
            raise self._interrupted() from None
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise AutotuneError(
                f"the device ran out of memory at iteration {self.iteration}: {str(error).splitlines()[0]}; "
                "free some, or lower plan.micro_batch_size, and go on with --resume"
            ) from error
        return self.record.finish(stopped_by, self.state, self.iteration - self.first)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Within the block, Ctrl-C, SIGTERM and a terminal that is closed ask to stop. KeyboardInterrupt where nothing
        is unsaved (while the first step compiles, say), and at a second one after a while, unless that is spent in
        writing the checkpoint."""

        def ask(_number: int, _frame: FrameType | None) -> None:
            now = time.monotonic()
            if self.asked_at is None and (self.saving or self.iteration > self.state.iteration):
                self.asked_at = now
            elif not self.saving and (self.asked_at is None or now - self.asked_at > SAME_SIGNAL_SECONDS):
                raise KeyboardInterrupt

        numbers = [
            number
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(number) is not signal.SIG_IGN  # as nohup asks
        ]
        before = {number: signal.signal(number, ask) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _train(self) -> StoppedBy:
        while True:
            stage: Stage = "first_step" if self.iteration < self.first + COMPILING_STEPS else "steady"
            boundary, stop = self._boundary(stage), _GO_ON
            with self.record.measured(stage):
                while self.iteration < boundary and stop == _GO_ON:
                    self._one_step()
                    stop = self._stop()
            if self.iteration == self.first + COMPILING_STEPS and (compiled := compile_cache()):
                self.progress.note(f"compiled, with {cache_text(*compiled)} from the compile cache")
            if self.iteration == self.first + COMPILING_STEPS + 1:
                check_ran(self.step.candidate.plan, self.record.meter.ran, self.device)
            if self._went_bad():
                continue
            finished = self.iteration >= self.recipe.max_iters
            self._look(finished or stop == _TIME_OVER)
            if finished:
                return "max_iters"
            if stop == _TIME_OVER:
                return "max_time"
            if stop == _ASKED:
                if self.iteration > self.state.iteration:
                    self._save()
                raise self._interrupted()

    def _one_step(self) -> None:
        """One optimizer step, while the batch of the next one is fetched."""
        lr = learning_rate(self.recipe, self.iteration)

        def work() -> None:
            loss = self._with_room("step", lambda: self.step.gradients(self.feed.batch(self.iteration + self.skipped)))
            self.pending.append((loss, self.step.optimizer_step(lr), lr))

        self.record.time(work)
        self._wait_for_device()
        self.iteration += 1
        self.progress.step(self.iteration)

    def _with_room(self, kind: Work, work: Callable[[], Tensor]) -> Tensor:
        """The result of `work`, repeated with half as many sequences a forward while memory runs out in it.
        The batch is the same one, so is what is learned from it."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                # one of several processes cannot do it alone: the others wait inside their backward
                if not out_of_memory(error) or self.group.count > 1 or not self.feed.halve(kind):
                    raise
                reason = str(error).splitlines()[0]
            # not inside `except`: the traceback would keep the failed step's tensors alive
            self.step.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
            self.progress.note(
                f"warning: out of memory in iteration {self.iteration + 1} ({reason}); going on with "
                f"{self.feed.sizes[kind]} sequences a forward in each {kind}, what is learned stays the same"
            )

    def _wait_for_device(self) -> None:
        """Keep the host at most one step ahead of a CUDA device, or it would stop minutes after it was asked to."""
        if self.device.type != "cuda":
            return
        if self.ahead is not None:
            self.ahead.synchronize()
        self.ahead = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.ahead.record()

    def _stop(self) -> int:
        """_TIME_OVER, _ASKED or _GO_ON, the same in all processes."""
        limit = self.settings.max_seconds
        over = limit is not None and self.record.here >= limit
        return self.group.largest(_ASKED if self.asked_at is not None else _TIME_OVER if over else _GO_ON)

    def _boundary(self, stage: Stage) -> int:
        """The iteration up to which nothing but steps is to be done."""
        if stage == "first_step" or stage not in self.record.meter.views():
            return self.iteration + 1
        intervals = (self.recipe.log_interval, self.recipe.eval_interval, self.recipe.checkpoint_interval)
        return min(self.recipe.max_iters, *((self.iteration // interval + 1) * interval for interval in intervals))

    def _went_bad(self) -> bool:
        """Look at the steps since the last look. After a bad one: back to the newest checkpoint, and past its data."""
        losses: list[float] = self.group.total(torch.stack([loss for loss, _, _ in self.pending])).tolist()
        first = self.iteration - len(self.pending)
        self.values = [(loss, norm.item(), lr) for loss, (_, norm, lr) in zip(losses, self.pending, strict=True)]
        self.pending.clear()
        scaled = self.step.scaler.is_enabled()  # such a step leaves the weights alone where the norm is no number
        for number, (loss, norm, _) in enumerate(self.values, first + 1):
            if complaint := complaint_of(self.recent, loss, 0.0 if scaled else norm):
                self._go_back(number, f"{complaint} at iteration {number}")
                return True
        return False

    def _go_back(self, bad: int, complaint: str) -> None:
        advice = "lower training.learning_rate or choose plan.dtype = 'float32'"
        if not checkpoints(self.checkpoints):
            raise AutotuneError(f"{complaint}, there is no checkpoint to go back to; {advice}")
        if self.setbacks == SETBACKS:
            raise AutotuneError(
                f"{complaint}, after {SETBACKS} times of going back and skipping data; the newest checkpoint is of "
                f"iteration {self.state.iteration}; {advice}, and look at the data"
            )
        self.setbacks += 1
        batches = self.skipped + bad  # up to the bad one
        self.adopt(go_back(self.checkpoints, self.step, self.group))
        self.skipped = batches - self.iteration
        self.record.go_back(self.iteration)
        self.progress.note(
            f"warning: {complaint}; going back to iteration {self.iteration} and past the data of the steps since "
            f"(setback {self.setbacks} of at most {SETBACKS})"
        )

    def _look(self, stop: bool) -> None:
        """Evaluate, log and save, whatever is due."""
        improved, validation = False, None
        if stop or self.iteration % self.recipe.eval_interval == 0:
            validation = self._evaluate()
            improved = self.best_loss is None or validation < self.best_loss
            if improved:
                self.best_loss, self.best_iteration = validation, self.iteration
        if validation is not None or self.iteration == 1 or self.iteration % self.recipe.log_interval == 0:
            self.record.row(self.iteration, *self.values[-1], validation)
        due = self.recipe.always_save_checkpoint and self.iteration % self.recipe.checkpoint_interval == 0
        if improved or stop or due:
            self._save()

    def _evaluate(self) -> float:
        """Mean loss over the same eval_iters validation batches each time, shared out over the processes."""

        def batch_loss(index: int) -> Tensor:
            parts = [self.step.evaluate(x, y) * share for x, y, share in self.feed.validation(index)]
            return torch.stack(parts).sum()

        total = torch.zeros((), device=self.device)
        with self.record.measured("evaluation"):
            for index in range(self.group.rank, self.recipe.eval_iters, self.group.count):
                total += self._with_room("evaluation", lambda: batch_loss(index))  # noqa: B023 - called at once
        return float(self.group.total(total)) / self.recipe.eval_iters

    def _save(self) -> None:
        state = replace(
            self.state,
            iteration=self.iteration,
            tokens=self.iteration * self.recipe.tokens_per_step,
            candidate=self.step.candidate,
            seconds=self.record.seconds,
            best_validation_loss=self.best_loss,
            best_iteration=self.best_iteration,
            skipped_batches=self.skipped,
            recent_losses=tuple(self.recent),
        )
        self.saving = True
        self.record.save()
        if self.group.first:
            with self.record.measured("checkpoint"):
                save_checkpoint(self.checkpoints, self.step, state)
        self.group.largest(0)  # torchrun ends all processes as soon as one leaves: none does before it is written
        self.state, self.saving = state, False

    def _interrupted(self) -> InterruptedByUser:
        kept, recipe = checkpoints(self.checkpoints), self.settings.out / RECIPE
        where = f"the newest checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        return InterruptedByUser(
            f"stopped after iteration {self.iteration}; {where}; go on with `autotune train {recipe} --resume`"
        )

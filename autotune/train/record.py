"""What a training leaves to read while it runs and afterwards: rows, a curve, a summary."""

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from typing import Any

from matplotlib.figure import Figure

from autotune.environment import Environment
from autotune.files import sync, write_atomically
from autotune.measure.memory import MemoryMeter
from autotune.measure.timing import Stopwatch, summarise
from autotune.measure.types import Stage
from autotune.model.checkpoint import TrainState, checkpoints
from autotune.model.step import TrainStep
from autotune.train.compare import compare
from autotune.train.feed import Feed
from autotune.train.log import LogRow, append_row, keep_rows, read_rows
from autotune.train.processes import Processes
from autotune.train.progress import TrainProgress
from autotune.train.settings import CHECKPOINTS, CURVE, LOG, SUMMARY, StoppedBy, TrainSettings, TrainSummary
from autotune.train.track import Track, open_trackers

WARM_AFTER = 3
"""Steps of a process that say nothing about its speed: the first compiles, on the CPU the second is profiled."""
CURVE_SECONDS = 60.0
"""Between two drawings of the curve, at the least."""


class Record:
    """The readable side of one training. Only the first of several processes writes."""

    def __init__(
        self, settings: TrainSettings, group: Processes, machine: Environment, step: TrainStep,
        meter: MemoryMeter, feed: Feed, state: TrainState, progress: TrainProgress, stack: ExitStack,
    ) -> None:  # fmt: skip
        self.settings, self.group, self.machine, self.step, self.feed = settings, group, machine, step, feed
        self.recipe, self.progress, self.log = step.candidate.recipe, progress, settings.out / LOG
        self.started, self.seconds_before = time.monotonic(), state.seconds
        self.meter, self.watch = meter, Stopwatch(step.device)
        self.step_seconds: list[float] = []
        self.readings: list[Callable[[], float]] = []  # of steps since the last row
        self.waited_before = self.drawn = 0.0
        self.trackers: list[Track] = []
        if group.first:
            self.trackers = open_trackers(step.candidate, settings.out, state.iteration, stack)
            if strange := keep_rows(self.log, state.iteration):
                progress.note(f"warning: {self.log} had {strange} lines that are no rows; they are dropped")

    @property
    def here(self) -> float:
        """Wall clock of this process's part of the training."""
        return time.monotonic() - self.started

    @property
    def seconds(self) -> float:
        """Wall clock of the training, over all resumptions."""
        return self.seconds_before + self.here

    def measured(self, stage: Stage) -> AbstractContextManager[None]:
        """Peaks of every stretch on CUDA, where they cost nothing; of each stage once on the CPU: it is profiled."""
        if self.step.device.type == "cuda" or stage not in self.meter.views():
            return self.meter.stage(stage)
        return nullcontext()

    def time(self, work: Callable[[], object]) -> None:
        """Do the work of one step."""
        self.readings.append(self.watch.time(work))

    def row(self, iteration: int, loss: float, norm: float, lr: float, validation_loss: float | None) -> None:
        """Log what the steps since the last row have come to."""
        self.watch.synchronise()
        seconds = [reading() for reading in self.readings]
        self.readings.clear()
        warm = seconds[max(0, WARM_AFTER - len(self.step_seconds)) :]
        self.step_seconds += seconds
        mean = sum(warm) / len(warm) if warm else None
        speed = None if mean is None else self.recipe.tokens_per_step / mean
        waited = self.feed.waited_seconds
        row = LogRow(
            iteration=iteration,
            tokens=iteration * self.recipe.tokens_per_step,
            train_loss=loss,
            validation_loss=validation_loss,
            lr=lr,
            grad_norm=norm,
            tokens_per_second=speed,
            mfu=self._mfu(speed),
            data_wait_seconds=waited - self.waited_before,
            peak_allocated_bytes=self._peak("allocated_bytes"),
            peak_device_bytes=self._peak("device_bytes"),
            seconds=self.seconds,
        )
        self.waited_before = waited
        if self.group.first:
            append_row(self.log, row)
            for track in self.trackers:
                track(row)
            self.progress.row(row, self._eta(iteration, mean))

    def save(self) -> None:
        """Have the rows on the disk before the checkpoint that follows them, and redraw the curve now and then."""
        if self.group.first:
            sync(self.log)
            if self.here - self.drawn >= CURVE_SECONDS:
                self._draw()

    def go_back(self, iteration: int) -> None:
        """Drop what was logged after `iteration`."""
        self.readings.clear()
        if self.group.first:
            keep_rows(self.log, iteration)

    def finish(self, stopped_by: StoppedBy, state: TrainState, done_here: int) -> TrainSummary | None:
        """Write the summary and the last curve; None in other processes than the first.
        done_here: steps of this process, 0 for a training that had ended before."""
        if not self.group.first:
            return None
        summary, path = self._summary(stopped_by, state), self.settings.out / SUMMARY
        if done_here or not path.exists():
            write_atomically(path, json.dumps(asdict(summary), indent=1) + "\n")
            self._draw()
        else:
            self.progress.note(
                "nothing was left to do; --max-tokens, or a larger training.max_iters, goes on from here"
            )
        for warning in summary.warnings:
            self.progress.note(f"warning: {warning}")
        return summary

    def _draw(self) -> None:
        """loss.png: the losses against the tokens; replaced as a whole. Raises OSError."""
        rows, picture = read_rows(self.log), self.settings.out / CURVE
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([row["tokens"] for row in rows], [row["train_loss"] for row in rows], lw=1, label="training")
        seen = [row for row in rows if row["validation_loss"] is not None]
        axes.plot([r["tokens"] for r in seen], [r["validation_loss"] for r in seen], "o-", ms=3, label="validation")
        axes.set(xlabel="tokens", ylabel="loss (nats a token)")
        axes.legend()
        axes.grid(alpha=0.3)
        temporary = picture.with_name(f".{picture.name}.tmp")
        figure.savefig(temporary, format="png", dpi=120)
        temporary.replace(picture)
        self.drawn = self.here

    def _eta(self, iteration: int, step_seconds: float | None) -> float | None:
        if step_seconds is None:
            return None
        left = (self.recipe.max_iters - iteration) * step_seconds
        limit = self.settings.max_seconds
        return left if limit is None else max(0.0, min(left, limit - self.here))

    def _mfu(self, tokens_per_second: float | None) -> float | None:
        if tokens_per_second is None or self.machine.peak_flops is None:
            return None
        peak = self.machine.peak_flops * self.group.count
        return tokens_per_second * self.step.candidate.shape.flops_per_token / peak

    def _peak(self, view: str) -> int | None:
        known = [value for stage in self.meter.views().values() if (value := getattr(stage, view)) is not None]
        return max(known, default=None)

    def _summary(self, stopped_by: StoppedBy, state: TrainState) -> TrainSummary:
        timing = summarise(warm) if (warm := self.step_seconds[WARM_AFTER:]) else None
        speed = self.recipe.tokens_per_step / timing.median if timing else None
        figures: dict[str, Any] = {
            "tokens_per_second": speed,
            "tokens_per_second_ci95": speed * timing.ci95 / timing.median if speed and timing else None,
            **{f"peak_{v}": self._peak(v) for v in ("allocated_bytes", "reserved_bytes", "device_bytes")},
        }
        # The verdict is of one process: several are another machine.
        measured = self.settings.file.measured if self.group.count == 1 else {}
        compared = list(compare(measured, figures, self.step.device.type))
        last = rows[-1] if (rows := read_rows(self.log)) else {}
        return TrainSummary(
            out=str(self.settings.out),
            checkpoint=str(checkpoints(self.settings.out / CHECKPOINTS)[-1]),
            stopped_by=stopped_by,
            iterations=state.iteration,
            tokens=state.tokens,
            processes=self.group.count,
            train_loss=last.get("train_loss"),
            validation_loss=last.get("validation_loss"),
            best_validation_loss=state.best_validation_loss,
            best_iteration=state.best_iteration,
            mfu=self._mfu(speed),
            seconds=self.seconds,
            data_wait_seconds=self.feed.waited_seconds,
            comparison=tuple(text for text, _ in compared),
            warnings=tuple(text for text, within in compared if not within),
            **figures,
        )

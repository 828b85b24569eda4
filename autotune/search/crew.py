"""Trials and rungs at the same time: one in each slot (a card, or a part of the cores), in one process and one thread.

Measuring is waiting for worker processes, so a loop that looks at each in turn is enough, and nothing is shared.
"""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from autotune.config.candidate import Candidate
from autotune.environment import Slot, on_cores
from autotune.measure.runner import POLL_SECONDS, Measure, Running, TrainRung
from autotune.measure.types import RungRequest, TrialRequest, TrialResult
from autotune.memory.model import Prediction
from autotune.runs.records import Role
from autotune.search.budget import Allowance
from autotune.search.study_trials import OpenTrial


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A trial or a rung that a slot is to run, or runs."""

    slot: Slot
    role: Role
    candidate: Candidate
    request: TrialRequest
    allowance: Allowance
    """What the request's timeout was at first."""
    answer: TrialResult | None = None
    """The result, where nothing needs to run."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrialJob(Job):
    """A trial."""

    trial: OpenTrial
    prediction: Prediction


J = TypeVar("J", bound=Job)


class Crew:
    """The slots that are left, and what runs in them."""

    def __init__(
        self, slots: Sequence[Slot], measure: Measure, train_rung: TrainRung, pause: Callable[[], None] | None = None
    ) -> None:
        """`pause`: passes the time until something may have ended."""
        self.slots = list(slots)
        self._measure, self._train_rung, self._pause = measure, train_rung, pause or _pause
        self._running: dict[Slot, tuple[Any, Running[TrialResult]]] = {}
        self._ended: list[tuple[Any, TrialResult]] = []

    @property
    def jobs(self) -> list[Job]:
        """What is not recorded yet."""
        return [*(job for job, _ in self._running.values()), *(job for job, _ in self._ended)]

    def work(
        self, choose: Callable[[Slot], J | None], record: Callable[[J, TrialResult], object],
        watch: Callable[[], None] = lambda: None, *, at_once: int | None = None,
    ) -> None:  # fmt: skip
        """Keep the slots busy with what `choose` gives and `record` what ends, until nothing is given and nothing runs.
        `watch` is called at every look. `at_once`: the number of slots to use; None: all."""
        asked = False
        while True:
            for slot in [] if asked else self.slots[:at_once]:
                with on_cores(slot.cores):  # proposing must not disturb the others, and processes inherit the cores
                    while slot not in self._running and slot in self.slots and (job := choose(slot)) is not None:
                        self._start(job)
                        self._record(record)
            asked = True
            if not self._running:
                return
            self._pause()
            watch()
            self.look()
            asked = not self._record(record)

    def _start(self, job: Job) -> None:
        request, log = job.request, Path(job.request.result_path).with_suffix(".log")
        started = self._train_rung(request, log) if isinstance(request, RungRequest) else None
        found = job.answer or started or self._measure(request, log)
        if isinstance(found, Generator):
            self._running[job.slot] = job, found
            self._advance(job.slot)  # a generator starts at its first `next`
        else:
            self._ended.append((job, found))

    def look(self) -> list[tuple[Job, TrialResult]]:
        """What has ended and is not recorded yet."""
        for slot in list(self._running):
            self._advance(slot)
        return self._ended

    def _advance(self, slot: Slot) -> None:
        job, running = self._running[slot]
        try:
            next(running)
        except StopIteration as end:
            del self._running[slot]
            self._ended.append((job, end.value))

    def _record(self, record: Callable[[J, TrialResult], object]) -> bool:
        """Whether something had ended."""
        some = bool(self._ended)
        while self._ended:
            job, result = self._ended[0]
            try:
                record(job, result)
            finally:
                self._ended = [ended for ended in self._ended if ended[0] is not job]
        return some

    def leave(self, slot: Slot) -> bool:
        """Use the slot no more, unless it is the last one: False."""
        others = [other for other in self.slots if other != slot]
        self.slots = others or self.slots
        return bool(others)

    def stop(self) -> list[Job]:
        """Kill what runs, and return it."""
        stopped = [job for job, _ in self._running.values()]
        for _, running in self._running.values():
            running.close()
        self._running, self._ended = {}, []
        return stopped


def _pause() -> None:
    time.sleep(POLL_SECONDS)

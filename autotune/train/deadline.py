"""A training that ends at a given time: how many steps are left, and what else it can afford."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Work = Literal["evaluation", "checkpoint", "summary"]

RECENT = 32
"""Steps whose mean duration predicts the next ones."""
ENOUGH = 3
"""Fewest of them for a prediction."""
APART = 9
"""Evaluations are this many times their own duration apart, and checkpoints: each takes a tenth of the time at most."""
EVALUATION_SHARE = 0.05
"""Largest fraction of the time for one evaluation."""
GRACE = 0.02
"""Fraction of the time by which a last step, which completes the schedule, may exceed it."""
UNKNOWN = 2**31
"""Steps left while their duration is not known."""


class Deadline:
    """The end of a training of given time. Costs of other work are kept in steps, so that they grow with the steps when
    the machine becomes busy. Importable without torch."""

    def __init__(self, seconds: float, elapsed: Callable[[], float], closing_seconds: float = 0.0) -> None:
        """seconds: time asked. elapsed: returns the wall clock so far, over all resumptions. closing_seconds: cost of
        the end while it is not measured."""
        self.seconds, self.elapsed, self._closing = seconds, elapsed, closing_seconds
        self.costs: dict[Work, float] = {}
        """Last measured cost, in steps."""
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._ended: dict[Work, float] = {}
        self._mark = elapsed()

    @property
    def left(self) -> float:
        """Seconds left, below 0 when the time is over."""
        return self.seconds - self.elapsed()

    @property
    def step_seconds(self) -> float | None:
        """Mean wall clock of the last steps, with all that happens between them; None: not known yet."""
        return sum(self._recent) / len(self._recent) if len(self._recent) >= ENOUGH else None

    def stepped(self, warm: bool) -> None:
        """A step has ended. warm: its duration counts, as nothing was compiled or profiled in it."""
        now = self.elapsed()
        if warm:
            self._recent.append(now - self._mark)
        self._mark = now

    @contextmanager
    def timed(self, work: Work) -> Iterator[None]:
        """Measure the cost of the block, which is no part of a step."""
        begin = self.elapsed()
        yield
        self.took(work, self.elapsed() - begin)

    def took(self, work: Work, seconds: float) -> None:
        """`work`, which has just ended, took so long."""
        if step := self.step_seconds:
            self.costs[work] = seconds / step
        self._ended[work] = self._mark = self.elapsed()

    def steps_left(self, interval: int) -> int:
        """Steps that can still be made, so that the last evaluation and checkpoint end in time; 1: the next one is the
        last, 0: there is no time for one.

        interval: steps between evaluations, each with a checkpoint.
        """
        step = self.step_seconds
        if step is None:
            return UNKNOWN if self.left > self._closing else 0
        free = self.left / step - sum(self.costs.values())
        if free < 1:
            return int(free + GRACE * self.seconds / step >= 1)
        each = self.seconds_of("evaluation", "checkpoint") / step
        spaced = max(interval, APART * each)
        # steps + each * (steps - APART * each) / spaced = free, as none happens shortly before the end
        steps = (free + APART * each**2 / spaced) / (1 + each / spaced) if free > APART * each else free
        return max(1, int(steps))

    def seconds_of(self, *works: Work) -> float:
        """Time that they take together at the present speed."""
        return (self.step_seconds or 0.0) * sum(self.costs.get(work, 0.0) for work in works)

    def too_soon(self, *works: Work) -> bool:
        """Whether the first of them was so recently that they would take more than their share of the time."""
        return self.elapsed() - self._ended.get(works[0], 0.0) < APART * self.seconds_of(*works)

    def too_late(self, *works: Work) -> bool:
        """Whether the end, which includes them, comes shortly after."""
        return self.left - self.seconds_of(*self.costs) < APART * self.seconds_of(*works)

"""The hard limit of wall clock: how long the next trial may take, and the reserve for confirming finalists."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autotune.config.search_settings import SearchSettings
from autotune.measure.types import Steps
from autotune.runs.objective import best_first, maximised
from autotune.runs.records import TrialRecord
from autotune.search.decide import searched, unconfirmed

CLOSING_SECONDS = 3.0
"""Least time kept free at the end, to kill the last worker, write the files and draw the report."""

_RESERVED_SHARE = 0.3
"""Largest fraction of the budget reserved for finalists, unless one of them needs more."""

_PATIENCE_SECONDS = 60.0
"""A trial shorter than this is never considered to hang..."""
_FIRST_PATIENCE_SECONDS = 150.0
"""...nor is a first one, which finds nothing compiled: that takes a minute on two slow cores."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Wall clock since `started`; `clock` counts seconds."""

    seconds: float
    started: float
    clock: Callable[[], float] = time.monotonic
    closing_seconds: float = CLOSING_SECONDS
    """Kept free at the end."""

    def elapsed(self) -> float:
        return self.clock() - self.started

    def remaining(self) -> float:
        """Seconds left for measuring."""
        return self.seconds - self.closing_seconds - self.elapsed()


def begin(seconds: float, started: float | None, clock: Callable[[], float]) -> Budget:
    """A budget that runs since `started` by `clock`, or from now on. On a busy machine closing takes long, about as
    long as the start did until here: both load libraries."""
    now = clock()
    since = now if started is None else started
    closing = min(max(CLOSING_SECONDS, now - since), 0.1 * seconds)
    return Budget(seconds=seconds, started=since, clock=clock, closing_seconds=closing)


def measure_seconds(budget: Budget) -> float:
    """Upper bound of the timed part of a search trial: 5 s of an hour, proportionally less below ten minutes."""
    return min(5.0, max(0.5, budget.seconds / 120))


def final_seconds(record: TrialRecord, budget: Budget, steps: Steps = "whole") -> float:
    """Expected wall clock of confirming `record`: its trial again with its code from the compile cache, the timed part
    twice as long, and at least six optimizer steps where those are timed whole."""
    again = (record.result.trial_seconds or 0.0) - record.result.saved_by_cache
    if record.role == "race":
        again -= record.result.phase_seconds.get("measure", 0.0)  # a training
    whole = 6 * (record.result.step_seconds_p50 or 0.0) if steps == "whole" else 0.0
    return 1.1 * again + max(measure_seconds(budget), whole)


def final_steps(record: TrialRecord, budget: Budget) -> Steps:
    """How a final of `record` is timed: by whole steps, unless only composed ones fit in the time left."""
    return "whole" if final_seconds(record, budget) <= budget.remaining() else "composed"


def reserve(budget: Budget, records: Sequence[TrialRecord], settings: SearchSettings, at_once: int = 1) -> float:
    """Seconds to keep back for the finalists that are not confirmed yet, of which so many run `at_once`: at least for
    one. Nothing while nothing is feasible, and where even that one would not fit any more: then only a faster candidate
    can be confirmed."""
    ranked = best_first(searched(records), maximised(settings))
    if not ranked:
        return 0.0
    waiting = unconfirmed(records, settings) or ranked[:1]  # should the next trial win, it is a finalist too
    first = final_seconds(waiting[0], budget, final_steps(waiting[0], budget))
    if first > budget.remaining():
        return 0.0
    wanted = sum(final_seconds(record, budget, final_steps(record, budget)) for record in waiting) / at_once
    return max(min(wanted, _RESERVED_SHARE * budget.seconds), first)


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """Time that the next trial may take."""

    seconds: float
    ends_budget: bool
    """The timeout is the end of the budget, so running into it is not the candidate's fault."""


def allow(left: float, patience: float) -> Allowance:
    """Allowance of `left` seconds, of which a trial may take `patience` before it is considered to hang."""
    return Allowance(seconds=min(left, patience), ends_budget=left < patience)


def next_allowance(
    budget: Budget, records: Sequence[TrialRecord], settings: SearchSettings, ahead: float = 0.0, *, at_once: int = 1
) -> Allowance | None:
    """How long the next search trial may take; None: it could not finish before the reserve. `ahead`: seconds that
    pass before it can begin."""
    left = budget.remaining() - ahead - reserve(budget, records, settings, at_once)
    ran = [record.result for record in searched(records)]
    lasted = sorted(result.trial_seconds or 0.0 for result in ran)
    if len(ran) == 1:  # the process of the next one starts beforehand
        lasted = [lasted[0] - ran[0].phase_seconds.get("start", 0.0)]
    if left <= 0 or (lasted and left < lasted[len(lasted) // 2]):
        return None
    # While nothing has worked yet: half of what is left, so that there is time for another if this one hangs.
    patience = max(_PATIENCE_SECONDS, 4 * lasted[-1]) if lasted else max(_FIRST_PATIENCE_SECONDS, left / 2)
    return allow(left, patience)

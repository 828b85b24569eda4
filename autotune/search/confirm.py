"""The last phase of a search: the best candidates and the baseline run again, in fresh processes."""

from autotune.config.candidate import Candidate
from autotune.environment import Slot
from autotune.measure.types import TrialResult
from autotune.runs.records import TrialRecord
from autotune.search.advice import enough_for
from autotune.search.budget import allow, final_seconds, final_steps
from autotune.search.crew import TrialJob
from autotune.search.decide import searched, unconfirmed
from autotune.search.outliers import suspected_outliers
from autotune.search.pool import by_candidate
from autotune.search.state import State
from autotune.search.trials import Trials
from autotune.units import format_duration


class Confirmation:
    """Which candidate is confirmed next, and which are not."""

    def __init__(self, state: State, trials: Trials) -> None:
        self._state, self._trials = state, trials
        self._skipped: dict[str, str] = {}  # notes by candidate id

    def run(self) -> list[str]:
        """Confirm as time permits. Returns notes."""
        self._skipped = {}
        self._trials.work(self._next, self._record, self._trials.side_by_side)
        return list(self._skipped.values())

    def _next(self, slot: Slot) -> TrialJob | None:
        """What a slot confirms next; None where nothing is left to do."""
        budget = self._state.budget
        self._state.read_peers()
        while (record := self._most_urgent()) is not None:
            candidate, steps, left = record.candidate, final_steps(record, budget), budget.remaining()
            needed = final_seconds(record, budget, steps)
            if left < needed:
                took = f"that takes about {format_duration(needed)}, {format_duration(max(left, 0.0))} were left"
                self._skip(candidate, took, needed)
                continue
            allowance = allow(left, patience=max(60.0, 4 * needed))
            if (job := self._trials.begin(slot, "final", candidate, allowance, steps=steps)) is not None:
                return job
            self._state.read_peers()
            if candidate.id not in self._running():
                return None  # it has just been confirmed elsewhere
        return None

    def _most_urgent(self) -> TrialRecord | None:
        """The best finalist first, should there be time for one only; then the trial that was most likely disturbed,
        unless it was run again; then the other finalists."""
        state = self._state
        again = {record.candidate.id for record in state.records if record.role == "final"}
        found = [] if state.lineup else suspected_outliers(state.space.choices, searched(state.records), state.settings)
        suspects = [record for record in found[:1] if record.candidate.id not in again]
        finalists = unconfirmed(state.records, state.settings, state.elected())
        leading = finalists[: 0 if again else 1]
        waiting = [*leading, *suspects, *finalists[len(leading) :]]
        passed = self._running() | self._skipped.keys()
        return next((record for record in waiting if record.candidate.id not in passed), None)

    def _running(self) -> set[str]:
        return {candidate.id for candidate in self._trials.pending(final=True)}

    def _record(self, job: TrialJob, result: TrialResult) -> None:
        result = self._trials.record(job, result)
        if result.status == "interrupted":
            self._skip(job.candidate, "the budget ended first", result.trial_seconds or 0.0)

    def _skip(self, candidate: Candidate, why: str, seconds: float) -> None:
        """Note that a candidate, which takes so many seconds, was not confirmed."""
        measured = [record for record in self._state.records if record.candidate.id == candidate.id]
        again = any(record.role == "final" for record in measured)
        missing = "measured once more, to settle its figure" if again else "confirmed"
        number = by_candidate(measured).get(candidate.id, measured[0]).trial
        advice = f"go on with --resume and --budget {enough_for(seconds)}"
        self._skipped[candidate.id] = f"trial {number} was not {missing}: {why}; {advice}"

"""The first phase of a search: the baseline, the guide's row, then what the sampler proposes."""

from collections.abc import Callable, Sequence

from autotune.config.candidate import Candidate
from autotune.environment import Slot
from autotune.runs.records import Role
from autotune.search import study_trials
from autotune.search.budget import Allowance, next_allowance
from autotune.search.crew import TrialJob
from autotune.search.pool import by_candidate
from autotune.search.propose import Proposer
from autotune.search.space import baseline, guide_candidate
from autotune.search.state import State
from autotune.search.trials import Trials

_RECENT_SECONDS = 2.0
"""Age of what is known of other machines, shorter than nearly any trial, at which a proposal may begin."""


class Exploration:
    """What is measured next, until the budget's reserve for the finalists and the race."""

    def __init__(self, state: State, trials: Trials, proposer: Proposer, race_seconds: Callable[[], float]) -> None:
        """`race_seconds`: part of the budget that is kept for the race, as far as is known by then."""
        self._state, self._trials, self._proposer, self._race_seconds = state, trials, proposer, race_seconds
        self._first: dict[Role, Candidate | None] = {}  # what comes before the proposals
        self._why: list[str] = []  # nothing is left to do
        self._proposing_seconds = 0.0  # at most, so far

    def run(self) -> list[str]:
        """Measure as long as there is time and no race has begun. Returns notes."""
        if self._state.lineup is not None:
            return []
        settings = self._state.settings
        guided = guide_candidate(settings, self._state.environment)
        self._first, self._why = {"baseline": baseline(settings), "guide": guided}, []
        self._trials.work(self._next, self._trials.record)
        return self._why

    def _next(self, slot: Slot) -> TrialJob | None:
        """What a slot measures next; None, with the reason in `_why`, where nothing is left to do."""
        while True:
            self._state.read_peers(older_than=_RECENT_SECONDS)
            pending = self._trials.pending(final=False)
            known = by_candidate(self._state.records).keys() | {candidate.id for candidate in pending}
            role: Role = next(
                (role for role, c in self._first.items() if c is not None and c.id not in known), "search"
            )
            candidate, trial = self._first.pop(role, None), None  # once is enough, even if it is interrupted
            if candidate is None:
                if (proposal := self._propose(pending)) is None:
                    return None
                trial, candidate = proposal
            # proposing has taken its time from it
            allowance = self._allowance(self._race_seconds() if role == "search" else 0.0)
            if allowance is None:
                if trial is not None:
                    study_trials.withdraw(self._state.study, trial)
                self._why = [] if role == "search" else [f"the budget ended before the {role} was measured"]
                return None
            if (job := self._trials.begin(slot, role, candidate, allowance, trial)) is not None:
                return job

    def _propose(self, pending: Sequence[Candidate]) -> tuple[study_trials.OpenTrial | None, Candidate] | None:
        """A candidate, with Optuna's trial where that has begun; None where no time or no candidate is left."""
        if self._allowance(self._proposing_seconds + self._race_seconds()) is None:
            return None
        budget, records = self._state.budget, self._state.records
        before, peers = budget.elapsed(), self._state.peers
        taken = None if peers is None else peers.begun_since
        proposal = self._proposer.propose(records, self._state.model, pending, taken)
        self._proposing_seconds = max(self._proposing_seconds, budget.elapsed() - before)
        if proposal is None and not pending:
            count = len(by_candidate(records))
            self._why = [f"all {count} candidates of the space were measured before the budget's end"]
        return proposal

    def _allowance(self, ahead: float) -> Allowance | None:
        state, at_once = self._state, self._trials.side_by_side
        return next_allowance(state.budget, state.records, state.settings, ahead, at_once=at_once)

"""Asking the study's sampler for candidates whose answers are not known yet."""

import random
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from autotune.config.candidate import Candidate
from autotune.config.search_settings import SearchSettings
from autotune.environment import Environment
from autotune.memory.model import MemoryModel
from autotune.runs.records import TrialRecord
from autotune.search import study as studies
from autotune.search.pool import CandidateProblem, dominated_by_oom
from autotune.search.space import Space, baseline, candidate_at, distributions, guide_candidate, parameters_of
from autotune.search.start import STARTS, card_of, starts

if TYPE_CHECKING:
    import optuna

REPEATS = 10
"""Known candidates in a row that a sampler may propose before one is drawn at random."""


class Proposer:
    """The only one who asks the study for trials: proposed ones, and given ones that it enqueues."""

    def __init__(
        self, study: "optuna.Study", space: Space, settings: SearchSettings, environment: Environment, priors: bool,
        start: bool = True,
    ) -> None:  # fmt: skip
        """Gives the study the sampler that the settings name. `start`: the default sampler's first proposals are
        those of `autotune.search.start`. Raises ConfigError."""
        from autotune.search.samplers import GuardedSampler, make_sampler

        trials = study.get_trials(deepcopy=False)
        known = {name: kind for trial in trials for name, kind in trial.distributions.items()}
        others = [c for c in (baseline(settings), guide_candidate(settings, environment)) if c is not None]
        kinds = {name: known.get(name, kind) for name, kind in distributions(space, *others).items()}
        self._study, self._space, self._settings, self._kinds = study, space, settings, kinds
        self._problem = CandidateProblem(space, settings, kinds, priors=priors)
        self._repeated, self._card = False, card_of(environment)
        self._start = start and settings.sampler == "additive"
        sampler = make_sampler(settings.sampler, (settings.seed + len(trials)) % 2**32, self._problem)
        self._guard = None if settings.sampler == "additive" else GuardedSampler(sampler, space, settings.seed)
        study.sampler = self._guard or sampler

    @property
    def notes(self) -> list[str]:
        """Mistakes of the sampler, one line each."""
        name = self._settings.sampler
        repeated = f"the sampler {name} proposed known candidates {REPEATS} times in a row; random ones were taken"
        return [*(self._guard.notes if self._guard else []), *([repeated] if self._repeated else [])]

    def propose(
        self, records: Iterable[TrialRecord], model: MemoryModel | None
    ) -> "tuple[optuna.Trial, Candidate] | None":
        """A running trial and its candidate, whose answer does not follow from the records; None where none is left.
        A proposal whose answer is known is answered from its record. `model`: None: memory is not considered."""
        problem = self._problem
        problem.update(records, model)
        if not problem.left.candidates:
            return None
        if (first := self._first(model)) is not None:
            return self.enqueue(first, {}), first
        for _ in range(REPEATS):
            trial = self._study.ask(self._kinds)
            candidate = candidate_at(self._space, trial.params)
            answer = problem.known.get(candidate.id) or dominated_by_oom(candidate, problem.known)
            if answer is None:
                return trial, candidate
            studies.repeat(self._study, trial, answer, self._settings.memory_limit_bytes)
        self._repeated = True
        candidate = random.Random(f"{self._settings.seed} {len(problem.known)}").choice(problem.left.candidates)
        return self.enqueue(candidate, {}), candidate

    def _first(self, model: MemoryModel | None) -> Candidate | None:
        """The next start whose answer is not known, while there are few answers."""
        known = self._problem.known
        if not self._start or len(known) > STARTS:
            return None
        found = starts(self._space, self._settings, self._card, model)  # again: each trial moves the memory model
        left = (c for c in found if c.id not in known and dominated_by_oom(c, known) is None)
        return next(left, None)

    def enqueue(self, candidate: Candidate, attributes: Mapping[str, object]) -> "optuna.Trial":
        """A running trial with the parameters of a given candidate."""
        parameters = parameters_of(self._space, candidate, self._kinds)
        self._study.enqueue_trial(parameters, user_attrs=dict(attributes))
        return self._study.ask(self._kinds)

    def withdraw(self, trial: "optuna.Trial | None") -> None:
        """End a trial for which there is no time."""
        import optuna

        if trial is not None:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)

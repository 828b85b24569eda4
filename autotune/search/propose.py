"""Asking the study's sampler for candidates whose answers are not known yet."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from autotune.config.candidate import Candidate
from autotune.config.search_settings import SearchSettings
from autotune.environment import Environment
from autotune.memory.model import MemoryModel
from autotune.runs.records import TrialRecord
from autotune.search import study_trials
from autotune.search.gp import Array
from autotune.search.pool import CandidateProblem, dominated_by_oom
from autotune.search.space import Space, baseline, candidate_at, distributions, guide_candidate, parameters_of
from autotune.search.start import STARTS, card_of, pace_of, starts

if TYPE_CHECKING:
    import optuna

REPEATS = 10
"""Known candidates in a row that a sampler may propose before one is drawn at random."""


_ERROR = 0.1
"""Relative error of values by which machines differ: small beside the differences that matter."""


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What proposals may use beyond the measured speeds; `scripts/replay` leaves parts out."""

    priors: bool = True
    """Prior means of speed and trial seconds (`autotune.search.priors`)."""
    start: bool = True
    """The default sampler's first candidates from predicted speeds (`autotune.search.start`)."""
    memory_model: bool = True
    """Predicted peaks: their probability to fit, and skipping what is predicted not to."""


EVERYTHING = Knowledge()

class Proposer:
    """The only one who begins trials in the study: of proposed candidates, and of given ones."""

    def __init__(
        self, study: "optuna.Study", space: Space, settings: SearchSettings, environment: Environment,
        knowledge: Knowledge = EVERYTHING,
    ) -> None:  # fmt: skip
        """Gives the study the sampler that the settings name. Raises ConfigError."""
        from autotune.search.samplers import GuardedSampler, make_sampler

        trials = study.get_trials(deepcopy=False)
        known = {name: kind for trial in trials for name, kind in trial.distributions.items()}
        others = [c for c in (baseline(settings), guide_candidate(settings, environment)) if c is not None]
        kinds = {name: known.get(name, kind) for name, kind in distributions(space, *others).items()}
        self._study, self._space, self._settings, self._kinds = study, space, settings, kinds
        self._problem = CandidateProblem(space, settings, kinds, priors=knowledge.priors)
        self._repeated, self._card = False, card_of(environment)
        self.knowledge = knowledge
        self._start = knowledge.start and settings.sampler == "additive"
        self._dice = np.random.default_rng()
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
        self, records: Iterable[TrialRecord], model: MemoryModel, pending: Sequence[Candidate] = (),
        taken: Callable[[], set[str]] | None = None,
    ) -> tuple[study_trials.OpenTrial | None, Candidate] | None:
        """A candidate whose answer does not follow from the records and which is not `pending`; None where none is
        left. With Optuna's trial, which runs, where an Optuna sampler proposed it. A proposal whose answer is known is
        answered from its record. `taken`: ids of the candidates that machines have begun with since the records and
        `pending` were read, asked for as late as possible."""
        from autotune.search.sampler import choose

        problem, used = self._problem, model if self.knowledge.memory_model else None
        problem.update(records, used, pending)
        if not problem.left.candidates:
            return None
        runs = {candidate.id for candidate in pending}
        if (first := self._first(used, runs, taken)) is not None:
            return None, first
        if self._guard is None:
            row = choose(problem, None if taken is None else partial(self._apart, taken))
            assert row is not None
            return None, problem.left.candidates[row]
        for _ in range(REPEATS):
            trial, parameters = study_trials.ask(self._study, self._kinds)
            candidate = candidate_at(self._space, parameters)
            answer = problem.known.get(candidate.id) or dominated_by_oom(candidate, problem.known)
            if answer is not None:
                study_trials.repeat(self._study, trial, answer, self._settings.memory_limit_bytes)
            elif candidate.id in runs:
                study_trials.withdraw(self._study, trial)
            else:
                return trial, candidate
        self._repeated = True
        drawn = random.Random(f"{self._settings.seed} {len(problem.known)} {len(runs)}").choice(problem.left.candidates)
        return None, drawn

    def _apart(self, taken: Callable[[], set[str]], values: Array) -> Array:
        """Values with which machines that propose at the same moment seldom take the same candidate."""
        begun = taken()
        left = np.array([candidate.id not in begun for candidate in self._problem.left.candidates])
        return np.asarray(values * left * np.exp(_ERROR * self._dice.standard_normal(len(values))))

    def _first(
        self, model: MemoryModel | None, runs: set[str], taken: Callable[[], set[str]] | None
    ) -> Candidate | None:
        """The next start whose answer is not known and which does not run, while there are few answers; beside other
        machines, which begin with the same list, any of them."""
        known = self._problem.known
        if not self._start or len(known) > STARTS:
            return None
        begun = runs if taken is None else runs | taken()
        faster = pace_of(known.values(), self._card)
        compiling = max((record.result.compiling_seconds for record in known.values()), default=0.0)
        # each trial moves the models
        found = starts(self._space, self._settings, self._card, model, pace=faster, compiling_seconds=compiling)
        left = [c for c in found if c.id not in known and c.id not in begun]
        left = [c for c in left if dominated_by_oom(c, known) is None]
        if not left:
            return None
        return left[0] if taken is None else left[int(self._dice.integers(len(left)))]

    def claim(
        self, candidate: Candidate, attributes: Mapping[str, object], trial: study_trials.OpenTrial | None = None
    ) -> study_trials.OpenTrial:
        """The running trial of a candidate: the one that Optuna's sampler proposed, or a new one."""
        if trial is None:
            return study_trials.claim(
                self._study, parameters_of(self._space, candidate, self._kinds), self._kinds, attributes
            )
        study_trials.claim_asked(self._study, trial, attributes)
        return trial

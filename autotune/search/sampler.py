"""An Optuna sampler: cost-aware expected improvement under an additive Gaussian process (`acquisition`, `gp`).

    study = optuna.create_study(sampler=AdditiveGPSampler(seed=0))

In a study of anybody's own it knows parameters, values, constraints and durations. `autotune search` gives it a
`CandidateProblem` (`autotune.search.pool`), which adds what is known about candidates: prior means, the recorded speed
and seconds, and a model of the memory that each one needs.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from autotune.search import acquisition, gp
from autotune.search.acquisition import Choices, Fitted, Observed, Pending
from autotune.search.gp import Array

_DRAWN, _LEADERS, _CHANGED = 256, 4, 64
"""Numbers of random choices, of the best trials, and of choices that differ from each of those in one parameter."""


class Problem(Protocol):
    """What a proposal is computed from: m finished trials and n choices, as numbers."""

    distributions: Mapping[str, BaseDistribution]

    def fitted(self) -> Fitted: ...
    def pending(self) -> Pending | None: ...
    def choices(self) -> Choices: ...
    def objective(self, answers: Array) -> Array:
        """What is maximised, (n,), from the answers (n,) of the choices."""

    def best(self) -> float | None:
        """The largest objective so far; None while nothing is feasible."""

    def p_fits(self, rows: list[int]) -> Array:
        """Probability that each of these choices needs no more than the limit."""

    def parameters(self, row: int) -> dict[str, Any]:
        """Optuna's parameters of a choice."""


class AdditiveGPSampler(optuna.samplers.BaseSampler):
    """Samples parameters of trials that are expensive and have many knobs, most of whose effects add up.

    Args:
        problem: what is known beyond the study; None: the study alone counts.
        seed: of the random choices; None: a random one.
        n_startup_trials: finished trials before which parameters are drawn at random; without a problem only.

    The same study gives the same proposal. A proposal takes about as long after a thousand trials as after a hundred.
    """

    def __init__(self, problem: Problem | None = None, *, seed: int | None = None, n_startup_trials: int = 5) -> None:
        self._problem = problem
        self._seed = random.randrange(2**32) if seed is None else seed
        self._startup = n_startup_trials
        self._space = optuna.search_space.IntersectionSearchSpace(include_pruned=True)

    def reseed_rng(self) -> None:
        self._seed = random.randrange(2**32)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        if self._problem is not None:
            return dict(self._problem.distributions)
        return {name: kind for name, kind in self._space.calculate(study).items() if not kind.single()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._raise_error_if_multi_objective(study)
        problem = self._problem
        if problem is None:
            trials = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
            trials = [t for t in trials if search_space.keys() <= t.params.keys()]
            if not search_space or len(trials) < self._startup:
                return {}
            maximize = study.direction == optuna.study.StudyDirection.MAXIMIZE
            rng = random.Random(self._seed + trial.number)
            problem = StudyProblem(search_space, trials, rng, maximize=maximize)
        row = choose(problem)
        return {} if row is None else problem.parameters(row)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return draw(random.Random(f"{self._seed} {trial.number} {param_name}"), param_distribution)


def choose(problem: Problem, revise: Callable[[Array], Array] | None = None) -> int | None:
    """Index of the most valuable choice; None where there is none. `revise`: changes the values (n,) before."""
    choices = problem.choices()
    if not len(choices.parameters):
        return None
    values = acquisition.value(problem.fitted(), choices, problem.objective, problem.best(), problem.pending())
    return acquisition.most_valuable(values if revise is None else revise(values), problem.p_fits)


class StudyProblem:
    """A study of which nothing more is known: no prior means, no memory model."""

    def __init__(
        self, distributions: Mapping[str, BaseDistribution], trials: Sequence[FrozenTrial], rng: random.Random,
        *, maximize: bool,
    ) -> None:  # fmt: skip
        """`trials`: finished ones that have all parameters."""
        self.distributions = distributions
        sign = 1.0 if maximize else -1.0
        values = np.array([sign * t.value if _feasible(t) and t.value is not None else math.nan for t in trials])
        ranked = np.argsort(-values, kind="stable")[: int((~np.isnan(values)).sum())].tolist()  # NaN comes last
        rows = acquisition.subset(ranked, len(trials))
        self._trials, self._values = [trials[i] for i in rows], values[rows]
        names = list(distributions)
        self._points = [{name: draw(rng, kind) for name, kind in distributions.items()} for _ in range(_DRAWN)]
        for leader in [trials[i].params for i in ranked[:_LEADERS]]:
            for name in rng.choices(names, k=_CHANGED):
                self._points.append({**{n: leader[n] for n in names}, name: draw(rng, distributions[name])})

    def fitted(self) -> Fitted:
        kinds = self.distributions.values()
        return acquisition.fit(self._observed(), np.array([isinstance(k, CategoricalDistribution) for k in kinds]))

    def pending(self) -> None:
        return None

    def _observed(self) -> Observed:
        known = self._values[~np.isnan(self._values)]
        centre, spread = (float(np.median(known)), float(known.std()) or 1.0) if len(known) else (0.0, 1.0)
        # Durations below a second are mostly the proposal's own.
        seconds = [max(t.duration.total_seconds(), 1.0) if t.duration else math.nan for t in self._trials]
        self._best = float(known.max() - centre) * gp.PRIOR_SCALE / spread if len(known) else None
        return Observed(
            parameters=self._encoded([trial.params for trial in self._trials]),
            answers=(self._values - centre) * gp.PRIOR_SCALE / spread,
            log_seconds=np.log(seconds),
            failed=np.isnan(self._values),
            prior=np.zeros((len(self._trials), 2)),
        )

    def choices(self) -> Choices:
        return Choices(parameters=self._encoded(self._points), prior=np.zeros((len(self._points), 2)))

    def objective(self, answers: Array) -> Array:
        return answers

    def best(self) -> float | None:
        return self._best

    def p_fits(self, rows: list[int]) -> Array:
        return np.ones(len(rows))

    def parameters(self, row: int) -> dict[str, Any]:
        return self._points[row]

    def _encoded(self, points: Sequence[Mapping[str, Any]]) -> Array:
        """(n, k)."""
        columns = [[_number(kind, point[name]) for point in points] for name, kind in self.distributions.items()]
        return np.array(columns, dtype=float).T


def _feasible(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.COMPLETE and all(violation <= 0 for violation in trial.constraints.values())


def _number(kind: BaseDistribution, value: Any) -> float:
    """A parameter as the process sees it: log2 of an integer or of what is searched on a log scale, another number
    scaled to 0 to 4, a category's index."""
    if isinstance(kind, CategoricalDistribution):
        return float(kind.to_internal_repr(value))
    assert isinstance(kind, IntDistribution | FloatDistribution)
    if kind.log or (isinstance(kind, IntDistribution) and kind.low > 0):
        return math.log2(float(value))
    return float(4.0 * (value - kind.low) / (kind.high - kind.low))


def draw(rng: random.Random, kind: BaseDistribution) -> Any:
    """A random value of a distribution, on a log scale where it has one."""
    if isinstance(kind, CategoricalDistribution):
        return rng.choice(kind.choices)
    assert isinstance(kind, IntDistribution | FloatDistribution)
    if kind.log:
        value = math.exp(rng.uniform(math.log(kind.low), math.log(kind.high)))
    else:
        value = rng.uniform(kind.low, kind.high)
    if kind.step is not None:
        value = kind.low + round((value - kind.low) / kind.step) * kind.step
    value = min(max(value, kind.low), kind.high)
    return int(value) if isinstance(kind, IntDistribution) else float(value)

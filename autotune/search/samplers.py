"""Which sampler proposes candidates: ours, one of Optuna's, or the user's own, and a guard around it.

A sampler may be wrong without ending the search: what it raises, and values outside the space, become a note, and the
value is drawn at random.
"""

import importlib
import importlib.util
import inspect
import random
from typing import TYPE_CHECKING, Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from autotune.errors import ConfigError, one_line, shown
from autotune.search.sampler import AdditiveGPSampler, Problem
from autotune.search.space import Space, contains, snapped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

_STARTUP = 8
"""Random trials of Optuna's samplers."""
_MOST_NOTES = 5


def make_sampler(name: str, seed: int, problem: Problem) -> optuna.samplers.BaseSampler:
    """The sampler of `--sampler`. Raises ConfigError."""
    if name == "additive":
        return AdditiveGPSampler(problem, seed=seed)
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "gp":
        if missing := [module for module in ("scipy", "torch") if importlib.util.find_spec(module) is None]:
            raise ConfigError(f"--sampler gp needs {' and '.join(missing)}; install it, or use additive or tpe")
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=_STARTUP, warn_independent_sampling=False)
    return _own_sampler(name, seed)


def _own_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """A class of an installed package, made with `seed` if it takes one."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # anything may happen while somebody's module is imported
        raise ConfigError(
            f"--sampler {shown(name)} cannot be imported: {_reason(error)}; install its package, or name its folder in "
            "PYTHONPATH"
        ) from None
    if not (isinstance(found, type) and issubclass(found, optuna.samplers.BaseSampler)):
        raise ConfigError(f"--sampler {shown(name)} is not a class derived from optuna.samplers.BaseSampler; name one")
    try:
        takes_seed = "seed" in inspect.signature(found).parameters
        arguments = {"seed": seed} if takes_seed else {}
        sampler: optuna.samplers.BaseSampler = found(**arguments)
    except Exception as error:
        raise ConfigError(f"--sampler {shown(name)} cannot be made: {_reason(error)}; use another") from None
    return sampler


class GuardedSampler(optuna.samplers.BaseSampler):
    """Another sampler, whose values are moved to the choices of a space and whose mistakes end nothing."""

    def __init__(self, sampler: optuna.samplers.BaseSampler, space: Space, seed: int) -> None:
        self.notes: list[str] = []
        """One line for each kind of mistake."""
        self._sampler, self._space = sampler, space
        self._rng = random.Random(seed)
        self._name = type(sampler).__name__

    def reseed_rng(self) -> None:
        self._sampler.reseed_rng()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        nothing: dict[str, BaseDistribution] = {}
        found = self._try(lambda: dict(self._sampler.infer_relative_search_space(study, trial)), nothing)
        return {name: kind for name, kind in found.items() if name in self._space.choices}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        nothing: dict[str, Any] = {}
        values = self._try(lambda: dict(self._sampler.sample_relative(study, trial, search_space)), nothing)
        if unknown := values.keys() - search_space.keys():  # Optuna raises for them
            self._note(f"proposed a value for {shown(min(unknown))}, which its own search space lacks")
        return {name: self._checked(name, values[name], kind) for name, kind in search_space.items() if name in values}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        sample = self._sampler.sample_independent
        value = self._try(lambda: sample(study, trial, param_name, param_distribution), self._random(param_name))
        return self._checked(param_name, value, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._try(lambda: self._sampler.before_trial(study, trial), None)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: "Sequence[float] | None"
    ) -> None:
        self._try(lambda: self._sampler.after_trial(study, trial, state, values), None)

    def _checked(self, name: str, value: Any, kind: BaseDistribution) -> Any:
        if not contains(kind, value):
            self._note(f"proposed {shown(value)} for {name}, which is outside the space")
            return self._random(name)
        return snapped(self._space, {name: value})[name]

    def _random(self, name: str) -> Any:
        return self._rng.choice(self._space.choices[name])

    def _try(self, work: "Callable[[], T]", otherwise: T) -> T:
        try:
            return work()
        except Exception as error:  # somebody else's code: whatever it raises must not end the search
            self._note(f"failed: {_reason(error)}")
            return otherwise

    def _note(self, mistake: str) -> None:
        note = f"the sampler {self._name} {mistake}; a random value was taken"
        if note not in self.notes and len(self.notes) < _MOST_NOTES:
            self.notes.append(note)


def _reason(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")[:200]

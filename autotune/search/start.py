"""The first candidates of a search: the fastest by the roofline among those that fit by the memory model.

What a roofline says least about is which kernels and which way of compiling are best, and in a large micro batch speeds
hardly differ: so each further start differs in that way of running, each with the amounts that make it fastest. Where
shapes are searched, all starts have the one whose predicted objective is best; where a race follows, the others are of
other widths, and a budget for few trials compiles one block of them.
"""

import itertools
import math
import operator
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from autotune.config import cards
from autotune.config.candidate import Candidate
from autotune.config.cards import Card
from autotune.config.search_settings import SearchSettings
from autotune.environment import Environment
from autotune.memory.model import MemoryModel, Prediction, predictions
from autotune.runs.objective import maximised, score
from autotune.runs.records import TrialRecord
from autotune.search.roofline import log_speed
from autotune.search.space import Space, Value, candidate_at, values_of

STARTS = 4
"""With the baseline, the first five trials."""
_LEAST_CHANCE = 0.5
"""Probability of fitting below which a candidate is no start."""
_VALUE = operator.itemgetter(0)
_WAYS = ("loss", "compile", "dtype", "activation_checkpointing")
_AMOUNTS = ("micro_batch_size", "loss_chunk_tokens")
_SHAPES = ("n_layer", "n_embd", "head_size", "block_size")
_HURRIED_SHARE = 0.05
"""Share of the budget that compiling one step takes, above which the budget is for few trials: a convention."""
_QUICK: Mapping[str, Value] = {"compile": "block"}
_QUICK_ON_CPU: Mapping[str, Value] = {**_QUICK, "loss": "chunked", "loss_chunk_tokens": 512}
"""What compiles in half the time, and runs at least as fast where a small model's logits take most of it
(docs/race.md#the-time-of-a-rung)."""


def card_of(environment: Environment) -> Card | None:
    """The card whose rates stand for this machine's, the nearest one for an unknown card; None for a CPU."""
    if environment.device == "cpu":
        return None
    return cards.of_device(environment.device_name) or cards.nearest(
        environment.capability, environment.device_memory_bytes
    )


def pace_of(records: Iterable[TrialRecord], card: Card | None) -> float:
    """How much faster than predicted the machine is, by what was measured. Predictions for a CPU are for comparison
    only; a card's are not corrected."""
    found = ((record.candidate, record.result.tokens_per_second) for record in records if record.objective is not None)
    ratios = [speed / math.exp(log_speed(candidate, None)) for candidate, speed in found if speed and card is None]
    return statistics.median(ratios) if ratios else 1.0


def starts(
    space: Space, settings: SearchSettings, card: Card | None, model: MemoryModel | None, count: int = STARTS,
    pace: float = 1.0, compiling_seconds: float = 0.0,
) -> list[Candidate]:  # fmt: skip
    """At most `count` candidates, the best first, no two of which have one shape and run in the same way. None is
    predicted to exceed the limit; one that may exceed it ranks lower. `model`: None: memory is not considered. `pace`:
    factor of the predicted speeds. `compiling_seconds`: time that compiling a step takes here."""
    ranking = _Ranking(settings, card, model, pace)
    if not settings.search_shape:
        found = ranking.best(space, _WAYS, count)
    elif settings.race == "off":
        found = _ways(ranking, space, count)
    elif compiling_seconds > _HURRIED_SHARE * settings.budget_seconds:
        quick = _only(space, _allowed(space, _QUICK_ON_CPU if card is None else _QUICK))
        found = _shapes(ranking, quick, _ways(ranking, quick, 1))
    else:
        ways = _ways(ranking, space, 2)
        shapes = _shapes(ranking, space, ways)
        found = [*shapes[:1], *ways[1:], *shapes[1:]]
    return [candidate for _, candidate in found[:count]]


def _ways(ranking: "_Ranking", space: Space, count: int) -> list[tuple[float, Candidate]]:
    """The best ways of running the shape that is best in the baseline's way."""
    plain = {name: value for name, value in vars(space.plan).items() if name in _WAYS}
    best = ranking.best(_only(space, _allowed(space, plain)), _SHAPES, 1)
    return ranking.best(_only(space, _part(space, best[0][1], _SHAPES)), _WAYS, count) if best else []


def _shapes(
    ranking: "_Ranking", space: Space, ways: Sequence[tuple[float, Candidate]]
) -> list[tuple[float, Candidate]]:
    """The best shape of each width, run in the first of the ways."""
    if not ways:
        return []
    alike = _part(space, ways[0][1], (*_WAYS, "head_size"))
    widths = (_only(space, {**alike, "n_embd": width}) for width in space.choices["n_embd"])
    return sorted((best for one in widths for best in ranking.best(one, _SHAPES, 1)), key=_VALUE, reverse=True)


def _allowed(space: Space, values: Mapping[str, Value]) -> dict[str, Value]:
    """Those of the values that the space has."""
    return {name: value for name, value in values.items() if value in space.choices.get(name, ())}


def _part(space: Space, candidate: Candidate, names: tuple[str, ...]) -> dict[str, Value]:
    return {name: value for name, value in values_of(space, candidate).items() if name in names}


def _only(space: Space, values: Mapping[str, Value]) -> Space:
    """The space with one choice for each of `values`."""
    fixed = {name: (value,) for name, value in values.items() if name in space.choices}
    return replace(space, choices={**space.choices, **fixed})


class _Ranking:
    """Candidates by their predicted objective at the expected speed: the predicted one, times the probability that the
    candidate fits."""

    def __init__(self, settings: SearchSettings, card: Card | None, model: MemoryModel | None, pace: float) -> None:
        self.settings, self._card, self._model, self._pace = settings, card, model, pace

    def value(self, candidate: Candidate, p_fits: float = 1.0) -> float:
        """Larger is better."""
        found = score(self.settings, candidate, p_fits * self._pace * math.exp(log_speed(candidate, self._card)))
        return found if maximised(self.settings) else -found

    def fitting(self, candidates: Sequence[Candidate]) -> list[tuple[float, Candidate]]:
        """The candidates that may fit, each with its value."""
        if self._model is None:
            return [(self.value(c), c) for c in candidates]
        pairs = zip(candidates, predictions(self._model, candidates), strict=True)
        chances = [(_p_fits(found, self.settings.memory_limit_bytes), c) for c, found in pairs]
        return [(self.value(c, p), c) for p, c in chances if p >= _LEAST_CHANCE]

    def best(self, space: Space, names: tuple[str, ...], count: int) -> list[tuple[float, Candidate]]:
        """The best that differ in `names`, each with its best amounts and its value; what else there is to choose is
        the first."""
        fixed = {name: choices[0] for name, choices in space.choices.items()}
        varied = {name: choices for name, choices in space.choices.items() if name in names}
        amounts = {name: choices for name, choices in space.choices.items() if name in _AMOUNTS}
        ways = [{**fixed, **dict(zip(varied, values, strict=True))} for values in itertools.product(*varied.values())]
        most = {name: choices[-1] for name, choices in amounts.items()}
        # least amounts need least memory, and the largest are about the fastest
        least = {candidate_at(space, way): way for way in ways}
        possible = [least[candidate] for _, candidate in self.fitting(list(least))]
        limits = [(self.value(candidate_at(space, {**way, **most})), way) for way in possible]
        found: list[tuple[float, Candidate]] = []
        for limit, way in sorted(limits, key=_VALUE, reverse=True):
            if len(found) == count and limit <= found[-1][0]:
                break
            values = (dict(zip(amounts, chosen, strict=True)) for chosen in itertools.product(*amounts.values()))
            candidates = {c.plan: c for v in values for c in [candidate_at(space, {**way, **v})]}
            best = max(self.fitting(list(candidates.values())), key=_VALUE)
            found = sorted([*found, best], key=_VALUE, reverse=True)[:count]
        return found


def _p_fits(found: Prediction, limit_bytes: int) -> float:
    """Among peaks whose whole interval fits, the speed alone decides."""
    return 1.0 if found.high_device_bytes <= limit_bytes else found.p_within(limit_bytes)

"""The first candidates of a search: the fastest by the roofline among those that fit by the memory model.

What a roofline says least about is which kernels and which way of compiling are best, and in a large micro batch speeds
hardly differ: so each further start differs in that way of running, each with the amounts that make it fastest. Where
shapes are searched, all starts have the one whose predicted objective is best.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from autotune.config import cards
from autotune.config.candidate import Candidate
from autotune.config.cards import Card
from autotune.config.search_settings import SearchSettings
from autotune.environment import Environment
from autotune.memory.model import MemoryModel, predictions
from autotune.runs.objective import maximised, score
from autotune.search.roofline import log_speed
from autotune.search.space import Space, candidate_at, values_of

STARTS = 4
"""With the baseline, the first five trials."""
_WAYS = ("loss", "compile", "dtype", "activation_checkpointing")
_AMOUNTS = ("micro_batch_size", "loss_chunk_tokens")
_SHAPES = ("n_layer", "n_embd", "head_size", "block_size")
_BLOCK = 64
"""Peaks that are predicted at once."""


def card_of(environment: Environment) -> Card | None:
    """The card whose rates stand for this machine's, the nearest one for an unknown card; None for a CPU."""
    if environment.device == "cpu":
        return None
    return cards.of_device(environment.device_name) or cards.nearest(
        environment.capability, environment.device_memory_bytes
    )


def starts(
    space: Space, settings: SearchSettings, card: Card | None, model: MemoryModel | None, count: int = STARTS
) -> list[Candidate]:
    """At most `count` candidates, the best first, no two of which run in the same way. All fit by the upper bound of
    their predicted peaks; if nothing does, by the predicted peaks themselves. `model`: None: memory is not considered.
    Empty where shapes are searched on a CPU, whose speeds are predicted for comparison only."""
    if settings.search_shape and card is None:
        return []
    if settings.search_shape:
        plain = {name: (value,) for name, value in vars(space.plan).items() if name in _WAYS and name in space.choices}
        best = _first(_candidates(replace(space, choices=space.choices | plain), _SHAPES), settings, card, model, 1)
        if not best:
            return []
        own = {name: (value,) for name, value in values_of(space, best[0]).items() if name in _SHAPES}
        space = replace(space, choices=space.choices | own)
    return _first(_candidates(space, _WAYS), settings, card, model, count)


def _first(
    candidates: Iterable[Candidate], settings: SearchSettings, card: Card | None, model: MemoryModel | None, count: int
) -> list[Candidate]:
    """The best by their predicted objective, of different ways, that fit."""
    sign = -1.0 if maximised(settings) else 1.0
    ranked = sorted(candidates, key=lambda c: sign * score(settings, c, math.exp(log_speed(c, card))))
    if model is None:
        return _different(ranked, count)
    for bound in ("high_device_bytes", "peak_device_bytes"):
        if found := _different(_fitting(ranked, model, settings.memory_limit_bytes, bound), count):
            return found
    return []


def _candidates(space: Space, names: tuple[str, ...]) -> Iterator[Candidate]:
    """All values of `names` with all amounts; whatever else there is to choose has its first choice."""
    varied = {name: choices for name, choices in space.choices.items() if name in (*names, *_AMOUNTS)}
    fixed = {name: choices[0] for name, choices in space.choices.items() if name not in varied}
    found = (
        candidate_at(space, {**fixed, **dict(zip(varied, values, strict=True))})
        for values in itertools.product(*varied.values())
    )
    return iter({(candidate.recipe, candidate.plan): candidate for candidate in found}.values())


def _fitting(ranked: Sequence[Candidate], model: MemoryModel, limit_bytes: int, bound: str) -> Iterator[Candidate]:
    for start in range(0, len(ranked), _BLOCK):
        block = ranked[start : start + _BLOCK]
        for candidate, found in zip(block, predictions(model, block), strict=True):
            if getattr(found, bound) <= limit_bytes:
                yield candidate


def _different(ranked: Sequence[Candidate] | Iterator[Candidate], count: int) -> list[Candidate]:
    """The first of each way."""
    found: dict[tuple[object, ...], Candidate] = {}
    for candidate in ranked:
        if len(found) == count:
            break
        found.setdefault(tuple(getattr(candidate.plan, name) for name in _WAYS), candidate)
    return list(found.values())

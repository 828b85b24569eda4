"""Which candidate to measure next: a Gaussian process over what was measured, numpy only.

Trials are dear and few, knobs many. What a knob does to the logarithm of the speed mostly adds up, and where it
does not, two knobs interact: so the kernel is a sum over single knobs and over pairs of them (Duvenaud,
Nickisch and Rasmussen, Additive Gaussian Processes, NeurIPS 2011). It is fitted to three answers: how fast, how
long the trial took, and whether it worked at all; how much memory a candidate needs is the memory model's matter.
Next is the candidate with the largest expected improvement a second (Snoek, Larochelle and Adams, Practical
Bayesian Optimization of Machine Learning Algorithms, NeurIPS 2012), times its chance to work and to fit. Before
anything is measured, the expectation is that of somebody who knows nanoGPT: `_EXPECTED`.

Nothing is remembered between calls: the same records give the same candidate.
"""

import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.config.candidate import Candidate, Plan
from autotune.config.search import SearchSettings
from autotune.measure.records import TrialRecord
from autotune.search.memory_model import MemoryModel, calibrate, predict
from autotune.search.objective import best_first, maximised, score
from autotune.search.space import Space, candidate_at, every_candidate, reads_chunks, values_of

Array = NDArray[np.floating[Any]]

_KNOBS = (*(field.name for field in fields(Plan)), "n_layer", "n_embd", "head_size", "block_size")
"""All that a search can vary."""

_EXPECTED: dict[tuple[str, str], tuple[float, float]] = {
    ("compile", "off"): (-0.30, -0.7),
    ("compile", "full"): (0.0, 0.3),
    ("activation_checkpointing", "none"): (0.25, 0.0),
    ("dtype", "float32"): (-0.20, 0.0),
    ("dtype", "bfloat16_residual"): (0.02, 0.0),
    ("attention", "sdpa_math"): (-0.20, 0.0),
    ("loss", "chunked"): (-0.02, 0.0),
}
"""Of a value, before any trial: the difference in log speed, and in the log of the trial's seconds."""

_HALF_SPEED_TOKENS = {"cpu": 64.0, "cuda": 2048.0}
"""A micro batch of so many tokens reaches half the speed of a large one."""

_SHARED = 0.2
"""Of the kernel: weight of what all candidates have in common."""

_PRIOR_SCALE, _PRIOR_WEIGHT = 0.3, 4.0
"""How far knobs move an answer (its logarithm), as sure as that many measurements would make it."""

_LENGTHS, _PAIRS, _NOISES, _WEIGHTS = (1.0, 3.0), (0.1, 0.3, 1.0), (0.01, 0.03, 0.1), (0.1, 1.0, 10.0)
"""What a kernel is chosen from."""

_DOUBT = 0.01
"""Improvement, in standard deviations, that is expected of every candidate: where the model sees none, what surely
fails must not look better than what surely works."""

_POOL = 4096
"""Spaces up to this size are looked through whole; of larger ones..."""
_DRAWN, _LEADERS = 256, 4
"""...so many candidates by chance, and all neighbours of the best few."""

_SURPRISE = 2.0
"""A trial so many standard deviations slower than all others say may have been disturbed."""


@dataclass(frozen=True, kw_only=True)
class _Kernel:
    """How much the answers of two candidates have to do with each other."""

    weights: tuple[float, ...]
    """Of each knob."""
    length: float
    """Distance over which the likeness falls to 1/e, in units of `_distances`."""
    pairs: float
    """Weight of all pairs of knobs, against single ones."""
    noise: float
    """Standard deviation of an answer's own error."""


def propose(space: Space, known: Mapping[str, TrialRecord], settings: SearchSettings) -> Candidate | None:
    """The candidate to measure next: of those whose answer does not follow from the `known` ones (by candidate id);
    None when none is left."""
    pool, records = unknown(space, known, settings), list(known.values())
    if not pool:
        return None
    everything = [record.candidate for record in records] + pool
    apart = _distances(space.choices, everything, len(records))
    kind = settings.device.partition(":")[0]
    expected = np.array([_expected(candidate, kind) for candidate in everything])  # (measured + pool, 2)
    speed = _fit(apart, *_logarithms([r.result.tokens_per_second for r in records]), expected[:, 0])
    seconds, _ = _fit(apart, *_logarithms([r.result.trial_seconds for r in records]), expected[:, 1])
    value = _improvement(pool, *speed, records, settings) * _works(apart, records) / np.exp(seconds)
    model = calibrate(kind, [(record.candidate, record.result) for record in records])
    best, chosen = -1.0, pool[0]
    for i in np.argsort(-value, kind="stable"):
        if value[i] <= best:  # nothing further down can be better, however little memory it takes
            break
        worth = value[i] * _fits(model, pool[i], settings.memory_limit_bytes)
        if worth > best:
            best, chosen = worth, pool[i]
    return chosen


def unknown(space: Space, known: Mapping[str, TrialRecord], settings: SearchSettings) -> list[Candidate]:
    """Candidates whose answer is not known: all in a small space; in a large one some by chance, and what differs
    from the best in one knob."""
    if space.size <= _POOL:
        pool = every_candidate(space)
    else:
        rng = random.Random(settings.seed + len(known))
        drawn = [{name: rng.choice(choices) for name, choices in space.choices.items()} for _ in range(_DRAWN)]
        for record in best_first(list(known.values()), maximised(settings))[:_LEADERS]:
            here = values_of(space, record.candidate)
            drawn += [{**here, name: choice} for name, choices in space.choices.items() for choice in choices]
        pool = {c.id: c for values in drawn for c in [candidate_at(space, values)]}
    return [candidate for candidate in pool.values() if implied(candidate, known) is None]


def implied(candidate: Candidate, known: Mapping[str, TrialRecord]) -> TrialRecord | None:
    """The record that answers for `candidate`: its own, or that of one which ran out of memory although it
    needs no more of it in any respect."""
    if candidate.id in known:
        return known[candidate.id]
    full = (record for record in known.values() if record.result.status in ("oom", "over_limit"))
    return next((record for record in full if _needs_no_more(record.candidate, candidate)), None)


def _needs_no_more(small: Candidate, large: Candidate) -> bool:
    """Whether `small` surely fits where `large` does. Only what is certain counts: kernels, compilation and
    allocators are not compared, they must be the same."""
    a, b = small.plan, large.plan
    same = all(getattr(a, name) == getattr(b, name) for name in ("attention", "loss", "compile", "dtype", "allocator"))
    whole_blocks = a.recomputed_every is not None and b.activation_checkpointing == "none"
    return (
        same
        and a.micro_batch_size * small.shape.block_size <= b.micro_batch_size * large.shape.block_size
        and a.loss_chunk_tokens <= b.loss_chunk_tokens
        and (a.activation_checkpointing == b.activation_checkpointing or whole_blocks)
        and all(
            getattr(small.shape, name) <= getattr(large.shape, name)
            for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
        )
    )


def doubted(names: Iterable[str], known: Sequence[TrialRecord], settings: SearchSettings) -> list[TrialRecord]:
    """Trials that would be the best of all had they been as fast as all others say (`_left_out`), the likeliest
    first. Another program that takes
    the device for as long as a trial is timed leaves no other trace."""
    timed = [record for record in known if record.objective is not None and record.result.tokens_per_second]
    if not timed:
        return []
    sign = 1.0 if maximised(settings) else -1.0
    answers = np.log([record.result.tokens_per_second or 1.0 for record in timed])
    others, sd = _left_out(names, [record.candidate for record in timed], answers, settings)
    above = answers - others
    at_best = np.exp(answers - above + sd).tolist()
    best = max(sign * (record.objective or 0.0) for record in timed)
    slow = np.flatnonzero(above < -_SURPRISE * sd)
    worth = {i: sign * score(settings, timed[i].candidate, at_best[i]) for i in slow}
    return [timed[i] for i in sorted(worth, key=lambda i: -worth[i]) if worth[i] > best]


def expected_speeds(
    candidates: Sequence[Candidate], log_speeds: Sequence[float], settings: SearchSettings
) -> list[tuple[float, float]]:
    """What all other candidates make the model expect of each one's log speed: mean and standard deviation. Where
    nothing differs between them there is nothing to learn from: the speed itself, with an infinite deviation."""
    names = [name for name in _KNOBS if len({_knob(candidate, name) for candidate in candidates}) > 1]
    if len(candidates) < 3 or not names:
        return [(value, math.inf) for value in log_speeds]
    mean, sd = _left_out(names, candidates, np.array(log_speeds), settings)
    return list(zip(mean.tolist(), sd.tolist(), strict=True))


def _left_out(
    names: Iterable[str], candidates: Sequence[Candidate], log_speeds: Array, settings: SearchSettings
) -> tuple[Array, Array]:
    """Mean (n,) and standard deviation (n,) of each of `log_speeds` (n,) given all others (leave-one-out by the
    inverse of the covariance: Rasmussen and Williams, Gaussian Processes for Machine Learning, 5.4.2)."""
    kind = settings.device.partition(":")[0]
    apart = _distances(names, candidates, len(candidates))
    rest = log_speeds - np.array([_expected(candidate, kind)[0] for candidate in candidates])
    rest -= np.median(rest)
    lower, _, scale = _likeliest(apart, rest)[1]
    whitened = np.linalg.inv(lower)
    precision = (whitened**2).sum(0)
    residual = whitened.T @ (whitened @ rest) / precision
    return log_speeds - residual, np.sqrt(scale / precision)


def _distances(names: Iterable[str], candidates: Sequence[Candidate], measured: int) -> Array:
    """(names, measured, all): octaves apart, or 2 for different words."""
    layers = []
    for name in names:
        column = [_knob(candidate, name) for candidate in candidates]
        if isinstance(column[0], str):
            codes = np.unique(np.array(column), return_inverse=True)[1]
            layers.append(2.0 * (codes[:measured, None] != codes[None, :]))
        else:
            numbers = np.array(column, dtype=float)
            layers.append(np.abs(numbers[:measured, None] - numbers[None, :]))
    return np.array(layers)


def _knob(candidate: Candidate, name: str) -> float | str:
    """Numbers count by their octaves. The micro batch and the loss's chunk are measured in the tokens that a
    kernel sees: a loss without chunks is one whose chunk is the whole micro batch."""
    shape, plan = candidate.shape, candidate.plan
    tokens = plan.micro_batch_size * shape.block_size
    value: int | str = getattr(plan if hasattr(plan, name) else shape, name)
    if name == "micro_batch_size":
        value = tokens
    elif name == "loss_chunk_tokens":
        value = min(plan.loss_chunk_tokens, tokens) if reads_chunks(plan) else tokens
    return value if isinstance(value, str) else math.log2(value)


def _expected(candidate: Candidate, kind: str) -> tuple[float, float]:
    """Log speed and log seconds of the trial before anything is measured, up to a constant each."""
    tokens = candidate.plan.micro_batch_size * candidate.shape.block_size
    busy = math.log(tokens / (tokens + _HALF_SPEED_TOKENS[kind])) - math.log(candidate.shape.flops_per_token)
    effects = [effect for (name, value), effect in _EXPECTED.items() if getattr(candidate.plan, name) == value]
    return busy + sum(speed for speed, _ in effects), sum(seconds for _, seconds in effects)


def _logarithms(values: Sequence[float | None]) -> tuple[list[int], Array]:
    """Of those that are known, and where they stand."""
    rows = [i for i, value in enumerate(values) if value]
    return rows, np.log([value for value in values if value])


def _fit(
    apart: Array, rows: Sequence[int], answers: Array, expected: Array, offset: float | None = None
) -> tuple[Array, Array]:
    """Mean and standard deviation of the pool's answers, (n,) each, given `answers` (m,), those of the measured
    `rows`. `expected` (measured + n,) is the mean before them, but for a constant: `offset`, or where that is None
    the answers' own."""
    measured = apart.shape[1]
    rest = answers - expected[rows]
    constant = offset if offset is not None else float(np.median(rest)) if rows else 0.0
    rest, mean = rest - constant, expected[measured:] + constant
    if not rows:
        return mean, np.full(len(mean), _PRIOR_SCALE)
    kernel, (lower, half, scale) = _likeliest(apart[:, rows][:, :, rows], rest)
    to_pool = np.exp(-apart[:, rows, measured:] / kernel.length)
    across = np.linalg.solve(lower, _covariance(kernel, to_pool))  # (m, pool)
    alone = _covariance(kernel, np.ones((len(apart), 1, 1)))[0, 0]
    variance = scale * np.maximum(alone - (across**2).sum(0), 1e-6)
    return mean + across.T @ half, np.sqrt(variance)


def _likeliest(apart: Array, rest: Array) -> tuple[_Kernel, tuple[Array, Array, float]]:
    """The kernel under which `rest` is the most probable, and its `_solved`: the best of a few, then one knob's
    weight after another."""
    alike = {length: np.exp(-apart / length) for length in _LENGTHS}

    def probability(kernel: _Kernel) -> float:
        lower, _, scale = _solved(kernel, alike[kernel.length], rest)
        unusual = sum(math.log(weight) ** 2 for weight in kernel.weights) / (2 * 1.5**2)  # log-normal
        return float(-np.log(np.diag(lower)).sum() - 0.5 * (_PRIOR_WEIGHT + len(rest)) * math.log(scale) - unusual)

    even = (1.0,) * len(apart)
    grid = itertools.product(_LENGTHS, _PAIRS, _NOISES)
    best = max((_Kernel(weights=even, length=n, pairs=p, noise=s) for n, p, s in grid), key=probability)
    for knob in range(len(apart)):
        options = [(*best.weights[:knob], weight, *best.weights[knob + 1 :]) for weight in _WEIGHTS]
        best = max((replace(best, weights=weights) for weights in options), key=probability)
    return best, _solved(best, alike[best.length], rest)


def _solved(kernel: _Kernel, alike: Array, rest: Array) -> tuple[Array, Array, float]:
    """Cholesky factor of the covariance, its solution for `rest`, and the scale (squared) that `rest` asks for."""
    noise = (kernel.noise / _PRIOR_SCALE) ** 2 * np.eye(len(rest))
    lower = np.linalg.cholesky(_covariance(kernel, alike) + noise)
    half = np.linalg.solve(lower, rest)
    scale = (_PRIOR_WEIGHT * _PRIOR_SCALE**2 + float(half @ half)) / (_PRIOR_WEIGHT + len(rest))
    return lower, half, scale


def _covariance(kernel: _Kernel, alike: Array) -> Array:
    """From the likeness in each knob, (knobs, m, n), 1 where equal: mean over single knobs, `pairs` times the mean
    over pairs of them, and what all candidates share."""
    weighted = np.array(kernel.weights)[:, None, None] * alike
    count, single = len(alike), weighted.sum(0)
    # the sum over pairs from two sums over knobs, by Newton's identity
    double = (single**2 - (weighted**2).sum(0)) / max(count * (count - 1), 1)
    return np.asarray(single / count + kernel.pairs * double + _SHARED)


def _improvement(
    pool: Sequence[Candidate], speed: Array, sd: Array, known: Sequence[TrialRecord], settings: SearchSettings
) -> Array:
    """Expected improvement over the best so far; over the worst of the pool while nothing is feasible. `speed` and
    `sd`: logarithms."""
    sign = 1.0 if maximised(settings) else -1.0

    def objective(log_speeds: Array) -> Array:
        speeds = zip(pool, np.exp(log_speeds).tolist(), strict=True)
        return sign * np.array([score(settings, candidate, speed) for candidate, speed in speeds])

    mean = objective(speed)
    sd = np.maximum((objective(speed + sd) - objective(speed - sd)) / 2, 1e-12)
    feasible = [sign * record.objective for record in known if record.objective is not None]
    z = (mean - max(feasible, default=float(mean.min()))) / sd
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return np.asarray(sd * (z * _normal(z) + density + _DOUBT))


def _works(apart: Array, known: Sequence[TrialRecord]) -> Array:
    """The chance that a candidate is feasible, by those that were and were not, for whatever reason."""
    failed = np.array([0.0 if record.objective is not None else 1.0 for record in known])
    if not failed.any():
        return np.ones(apart.shape[2] - apart.shape[1])
    mean, sd = _fit(apart, range(len(known)), failed, np.zeros(apart.shape[2]), offset=0.0)
    return _normal((0.5 - mean) / np.hypot(sd, 0.1))


def _fits(model: MemoryModel, candidate: Candidate, limit_bytes: int) -> float:
    """The chance that a candidate stays within the limit, by the memory model."""
    found = predict(model, candidate)
    sd = (found.high_device_bytes - found.low_device_bytes) / (2 * 1.96)
    return float(_normal(np.array([(limit_bytes - found.peak_device_bytes) / sd]))[0])


def _normal(z: Array) -> Array:
    """The standard normal's distribution function."""
    return np.array([0.5 * (1.0 + math.erf(value / math.sqrt(2))) for value in z])

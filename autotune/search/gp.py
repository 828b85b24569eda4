"""An additive Gaussian process, numpy only: the numerics of `autotune.search.sampler`.

What a knob does mostly adds up, and where it does not, two knobs interact: so the kernel is a sum over single knobs
and over pairs of them (Duvenaud, Nickisch and Rasmussen, Additive Gaussian Processes, NeurIPS 2011).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

SHARED = 0.2
"""Weight in the kernel of what all points have in common."""

PRIOR_SCALE, _PRIOR_WEIGHT = 0.3, 4.0
"""How far knobs move an answer (its logarithm), as sure as that many measurements would make it."""

_LENGTHS, _PAIRS, _NOISES, _WEIGHTS = (1.0, 3.0), (0.1, 0.3, 1.0), (0.01, 0.03, 0.1), (0.1, 1.0, 10.0)
"""What a kernel is chosen from."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernel:
    """How much the answers at two points have to do with each other."""

    weights: Array
    """(knobs,): of each knob."""
    length: float
    """Distance over which the likeness falls to 1/e, in units of `distances`."""
    pairs: float
    """Weight of all pairs of knobs, against single ones."""
    noise: float
    """Standard deviation of an answer's own error."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """Points to predict at. Each knob has few values, its levels: a covariance with the pool is one with the levels of
    each knob, summed up by a matrix product."""

    levels: Array
    """(levels,): the values of the first knob, then of the second..."""
    knob: NDArray[np.intp]
    """(levels,): whose value it is."""
    has: Array
    """(levels, n): 1 where the point has that value."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Process:
    """A Gaussian process with zero mean, given the answers at m points."""

    kernel: Kernel
    points: Array
    """(m, knobs)."""
    whitened: Array
    """(m, m): the inverse of the covariance's Cholesky factor."""
    half: Array
    """(m,): `whitened` times the answers."""
    scale: float
    """Of the covariance, squared."""


def pool(points: Array) -> Pool:
    """Of points (n, knobs)."""
    found = [np.unique(column, return_inverse=True) for column in points.T]
    has = [np.eye(len(values))[:, inverse] for values, inverse in found]  # (levels of the knob, n)
    knob = np.repeat(np.arange(len(found)), [len(values) for values, _ in found])
    return Pool(levels=np.concatenate([values for values, _ in found]), knob=knob, has=np.concatenate(has))


def distances(one: Array, other: Array, words: NDArray[np.bool_]) -> Array:
    """Between two arrays of values of the same knobs: octaves apart, or 2 for different words."""
    return np.where(words, 2.0 * (one != other), np.abs(one - other))


def fit(points: Array, words: NDArray[np.bool_], answers: Array) -> Process:
    """The process under which `answers` (m,) at `points` (m, knobs) are the most probable."""
    kernel = likeliest(points, words, answers)
    return given(kernel, points, words, answers)


def given(kernel: Kernel, points: Array, words: NDArray[np.bool_], answers: Array) -> Process:
    """The process of that kernel, given `answers` (m,) at `points` (m, knobs)."""
    alike = np.exp(-_between(points, words) / kernel.length)
    covariance = _covariance(kernel.weights[None], np.array([kernel.pairs]), alike)[0]
    lower = np.linalg.cholesky(covariance + _variance(kernel.noise) * np.eye(len(points)))
    whitened = np.linalg.inv(lower)
    half = whitened @ answers
    scale = (_PRIOR_WEIGHT * PRIOR_SCALE**2 + float(half @ half)) / (_PRIOR_WEIGHT + len(points))
    return Process(kernel=kernel, points=points, whitened=whitened, half=half, scale=scale)


def predict(process: Process, words: NDArray[np.bool_], at: Pool) -> tuple[Array, Array]:
    """Mean and standard deviation at the pool's points, (n,) each, without an answer's own error."""
    kernel = process.kernel
    apart = distances(process.points[:, at.knob], at.levels, words[at.knob])  # (m, levels)
    weighted = kernel.weights[at.knob] * np.exp(-apart / kernel.length)
    single, squares = weighted @ at.has, weighted**2 @ at.has  # (m, n): sums over knobs
    across = process.whitened @ _combined(single, squares, kernel.pairs, len(kernel.weights))
    variance = process.scale * np.maximum(prior_variance(kernel) - (across**2).sum(0), 1e-6)
    return across.T @ process.half, np.sqrt(variance)


def prior_variance(kernel: Kernel) -> float:
    """Of any point before there are answers, in units of the scale."""
    single, squares = kernel.weights.sum(), (kernel.weights**2).sum()
    return float(_combined(single, squares, kernel.pairs, len(kernel.weights)))


def likeliest(points: Array, words: NDArray[np.bool_], answers: Array) -> Kernel:
    """The kernel under which the answers are the most probable: the best of a few, then one knob's weight after
    another."""
    apart = _between(points, words)  # (knobs, m, m)
    even = np.ones(len(apart))
    grid = [(pairs, noise) for pairs in _PAIRS for noise in _NOISES]
    found: list[tuple[float, Kernel]] = []
    for length in _LENGTHS:
        kernels = [Kernel(weights=even, length=length, pairs=pairs, noise=noise) for pairs, noise in grid]
        found += zip(_probabilities(kernels, np.exp(-apart / length), answers), kernels, strict=True)
    best = max(found, key=lambda pair: pair[0])[1]
    alike = np.exp(-apart / best.length)
    for knob in range(len(apart)):
        kernels = [_reweighted(best, knob, weight) for weight in _WEIGHTS]
        best = kernels[int(np.argmax(_probabilities(kernels, alike, answers)))]
    return best


def _reweighted(kernel: Kernel, knob: int, weight: float) -> Kernel:
    weights = kernel.weights.copy()
    weights[knob] = weight
    return Kernel(weights=weights, length=kernel.length, pairs=kernel.pairs, noise=kernel.noise)


def _between(points: Array, words: NDArray[np.bool_]) -> Array:
    """(knobs, m, m)."""
    return distances(points.T[:, :, None], points.T[:, None, :], words[:, None, None])


def _probabilities(kernels: Sequence[Kernel], alike: Array, answers: Array) -> list[float]:
    """Logarithms, up to a constant, of the answers' probability under kernels of one length, and of the kernels' own:
    `alike` (knobs, m, m) is the likeness in each knob, 1 where equal."""
    m = len(answers)
    weights = np.array([kernel.weights for kernel in kernels])  # (kernels, knobs)
    # A last row, beyond what the corner lets through: its Cholesky factor is the solution for the answers.
    bordered = np.zeros((len(kernels), m + 1, m + 1))
    bordered[:, :m, :m] = _covariance(weights, np.array([kernel.pairs for kernel in kernels]), alike)
    bordered[:, range(m), range(m)] += [[_variance(kernel.noise)] for kernel in kernels]
    bordered[:, m, :m] = answers
    bordered[:, m, m] = 1.0 + 1e9 * float(answers @ answers)
    lower = np.linalg.cholesky(bordered)
    half = lower[:, m, :m]
    scale = (_PRIOR_WEIGHT * PRIOR_SCALE**2 + (half**2).sum(1)) / (_PRIOR_WEIGHT + m)
    logs = np.log(lower[:, range(m), range(m)]).sum(1)
    unusual = (np.log(weights) ** 2).sum(1) / (2 * 1.5**2)  # log-normal
    return [float(p) for p in -logs - 0.5 * (_PRIOR_WEIGHT + m) * np.log(scale) - unusual]


def _covariance(weights: Array, pairs: Array, alike: Array) -> Array:
    """(kernels, m, m): from weights (kernels, knobs), pairs (kernels,) and the likeness (knobs, m, m)."""
    knobs, m = len(alike), alike.shape[1]
    flat = alike.reshape(knobs, -1)
    single, squares = weights @ flat, weights**2 @ flat**2
    return np.asarray(_combined(single, squares, pairs[:, None], knobs)).reshape(len(weights), m, m)


def _combined(single: Any, squares: Any, pairs: Any, knobs: int) -> Any:
    """Mean over single knobs, `pairs` times the mean over pairs of them, and what all points share. The sum over pairs
    comes from two sums over knobs, by Newton's identity."""
    return single / knobs + pairs * (single**2 - squares) / max(knobs * (knobs - 1), 1) + SHARED


def _variance(noise: float) -> float:
    return (noise / PRIOR_SCALE) ** 2


def normal(z: Array) -> Array:
    """The standard normal's distribution function."""
    return np.array([0.5 * (1.0 + math.erf(value)) for value in (z / math.sqrt(2)).tolist()])

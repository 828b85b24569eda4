"""An additive Gaussian process in numpy: the numerics of `autotune.search.sampler`.

Effects of single parameters mostly add up; where they do not, two parameters interact. So the kernel is a sum over
single parameters and over pairs of them (Duvenaud, Nickisch and Rasmussen, Additive Gaussian Processes, NeurIPS 2011).

Shapes: m observed points, n points to predict at, k parameters, g kernels that are compared at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]

BIAS_WEIGHT = 0.2
"""Weight in the kernel of what all points have in common."""

PRIOR_SCALE, _PRIOR_WEIGHT = 0.3, 4.0
"""Prior standard deviation of an answer, and its weight in pseudo-observations. Answers are logarithms."""

_LENGTHS, _PAIRS, _NOISES, _WEIGHTS = (1.0, 3.0), (0.1, 0.3, 1.0), (0.01, 0.03, 0.1), (0.1, 10.0)
"""Hyperparameters that are tried; each parameter's weight is 1 or one of `_WEIGHTS`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernel:
    """Covariance of the answers at two points, in units of the process's scale."""

    weights: Array
    """(k,): relative weight of each parameter."""
    length: float
    """Distance at which the similarity in one parameter falls to 1/e, in units of `distances`."""
    pairs: float
    """Weight of the pairs of parameters relative to single ones."""
    noise: float
    """Standard deviation of an observation's own error."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """Points to predict at. Each parameter has few distinct values, its levels, so the covariance with all points is
    the covariance with the levels, summed up by a matrix product."""

    levels: Array
    """(levels,): distinct values of the first parameter, then of the second, ..."""
    parameter: NDArray[np.intp]
    """(levels,): index of the parameter that has this level."""
    has: Array
    """(levels, n): 1 where the point has that level."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Process:
    """A zero-mean Gaussian process conditioned on m observations."""

    kernel: Kernel
    observed: Array
    """(m, k)."""
    whitening: Array
    """(m, m): inverse of the covariance's Cholesky factor."""
    whitened: Array
    """(m,): `whitening` times the answers."""
    variance: float
    """Scale of the covariance."""


def points(values: Array) -> Points:
    """Points to predict at, from their values (n, k)."""
    columns = [np.unique(column, return_inverse=True) for column in values.T]
    has = [np.eye(len(levels))[:, inverse] for levels, inverse in columns]  # (levels of the parameter, n)
    parameter = np.repeat(np.arange(len(columns)), [len(levels) for levels, _ in columns])
    levels = np.concatenate([values for values, _ in columns])
    return Points(levels=levels, parameter=parameter, has=np.concatenate(has))


def distances(one: Array, other: Array, categorical: Mask) -> Array:
    """Distance of values of the same parameters: their difference, or 2 for different categories."""
    return np.where(categorical, 2.0 * (one != other), np.abs(one - other))


def fit(observed: Array, categorical: Mask, answers: Array) -> Process:
    """The process under whose kernel `answers` (m,) at `observed` (m, k) are most likely."""
    apart = _between(observed, categorical)
    kernel = _most_likely(apart, answers)
    similarity = np.exp(-apart / kernel.length)
    single, squares = (np.tensordot(kernel.weights**power, similarity**power, 1) for power in (1, 2))
    covariance = _combined(single, squares, kernel.pairs, len(apart))
    chol = np.linalg.cholesky(covariance + _variance(kernel.noise) * np.eye(len(observed)))
    whitening = np.linalg.inv(chol)
    whitened = whitening @ answers
    scale = (_PRIOR_WEIGHT * PRIOR_SCALE**2 + float(whitened @ whitened)) / (_PRIOR_WEIGHT + len(observed))
    return Process(kernel=kernel, observed=observed, whitening=whitening, whitened=whitened, variance=scale)


def believe(process: Process, categorical: Mask, values: Array) -> Process:
    """The process after answers at `values` (n, k) that are exactly its means: they change no mean, but take away the
    deviation there. (The kriging believer of Ginsbourger, Le Riche and Carraro, 2010.)"""
    kernel, count = process.kernel, len(process.kernel.weights)
    mean, _ = predict(process, categorical, points(values))
    observed = np.concatenate([process.observed, values])
    similarity = np.exp(-_between(observed, categorical) / kernel.length)
    single, squares = (np.tensordot(kernel.weights**power, similarity**power, 1) for power in (1, 2))
    covariance = _combined(single, squares, kernel.pairs, count) + _variance(kernel.noise) * np.eye(len(observed))
    whitening = np.linalg.inv(np.linalg.cholesky(covariance))
    answers = np.concatenate([np.linalg.inv(process.whitening) @ process.whitened, mean])
    return replace(process, observed=observed, whitening=whitening, whitened=whitening @ answers)


def predict(process: Process, categorical: Mask, at: Points) -> tuple[Array, Array]:
    """Mean and standard deviation at n points, (n,) each, without the noise of an observation."""
    kernel = process.kernel
    apart = distances(process.observed[:, at.parameter], at.levels, categorical[at.parameter])  # (m, levels)
    similarity = kernel.weights[at.parameter] * np.exp(-apart / kernel.length)
    count = len(kernel.weights)
    k_star = _combined(similarity @ at.has, similarity**2 @ at.has, kernel.pairs, count)  # (m, n)
    k_self = _combined(kernel.weights.sum(), (kernel.weights**2).sum(), kernel.pairs, count)
    explained = process.whitening @ k_star  # (m, n)
    variance = process.variance * np.maximum(k_self - (explained**2).sum(0), 1e-6)
    return explained.T @ process.whitened, np.sqrt(variance)


def leave_one_out(process: Process) -> tuple[Array, Array]:
    """For each observation its residual against the prediction from all others, and the standard deviation of that,
    (m,) each (Rasmussen and Williams, Gaussian Processes for Machine Learning, 5.4.2)."""
    precision = (process.whitening**2).sum(0)
    return process.whitening.T @ process.whitened / precision, np.sqrt(process.variance / precision)


def noise_sd(process: Process) -> float:
    """Standard deviation of one observation's own error."""
    return process.kernel.noise / PRIOR_SCALE * math.sqrt(process.variance)


def _most_likely(apart: Array, answers: Array) -> Kernel:
    """The most likely kernel for distances (k, m, m): the best of a grid with equal weights, then the weight of one
    parameter after the other."""
    count = len(apart)
    even = Kernel(weights=np.ones(count), length=1.0, pairs=1.0, noise=1.0)
    best, highest = even, -math.inf
    for length in _LENGTHS:
        similarity = np.exp(-apart / length)
        single, squares = similarity.sum(0), (similarity**2).sum(0)
        kernels = [replace(even, length=length, pairs=pairs, noise=noise) for pairs in _PAIRS for noise in _NOISES]
        by_pairs = [_combined(single, squares, pairs, count) for pairs in _PAIRS]
        covariances = np.repeat(by_pairs, len(_NOISES), axis=0)
        best, highest = _better(best, highest, kernels, covariances, answers)
    similarity = np.exp(-apart / best.length)
    single, squares = similarity.sum(0), (similarity**2).sum(0)
    for parameter, own in enumerate(similarity):
        changes = [(single + (weight - 1) * own, squares + (weight**2 - 1) * own**2) for weight in _WEIGHTS]
        covariances = np.array([_combined(*change, best.pairs, count) for change in changes])
        kernels = [replace(best, weights=_with(best.weights, parameter, weight)) for weight in _WEIGHTS]
        best, highest = _better(best, highest, kernels, covariances, answers)
        if best in kernels:
            single, squares = changes[kernels.index(best)]
    return best


def _with(weights: Array, parameter: int, weight: float) -> Array:
    changed = weights.copy()
    changed[parameter] = weight
    return changed


def _better(
    best: Kernel, highest: float, kernels: Sequence[Kernel], covariances: Array, answers: Array
) -> tuple[Kernel, float]:
    """The most likely of the kernels, with its log likelihood, where that exceeds `highest`; else `best` again.
    `covariances` (g, m, m): without noise."""
    likelihoods = _log_likelihoods(kernels, covariances, answers)
    first = int(np.argmax(likelihoods))
    return (kernels[first], float(likelihoods[first])) if likelihoods[first] > highest else (best, highest)


def _between(values: Array, categorical: Mask) -> Array:
    """Distances of all pairs of points in each parameter, (k, m, m)."""
    return distances(values.T[:, :, None], values.T[:, None, :], categorical[:, None, None])


def _log_likelihoods(kernels: Sequence[Kernel], covariances: Array, answers: Array) -> Array:
    """Log marginal likelihood of the answers (m,) and log prior of each kernel, (g,), up to one constant."""
    m = len(answers)
    # One more row, larger than the rest can explain: the last row of the Cholesky factor is then the whitened answers.
    bordered = np.zeros((len(kernels), m + 1, m + 1))
    bordered[:, :m, :m] = covariances
    bordered[:, range(m), range(m)] += [[_variance(kernel.noise)] for kernel in kernels]
    bordered[:, m, :m] = answers
    bordered[:, m, m] = 1.0 + 1e9 * float(answers @ answers)
    chol = np.linalg.cholesky(bordered)
    whitened = chol[:, m, :m]
    scale = (_PRIOR_WEIGHT * PRIOR_SCALE**2 + (whitened**2).sum(1)) / (_PRIOR_WEIGHT + m)
    log_determinant = np.log(chol[:, range(m), range(m)]).sum(1)
    weights = np.array([kernel.weights for kernel in kernels])
    log_prior = -(np.log(weights) ** 2).sum(1) / (2 * 1.5**2)  # log-normal
    return np.asarray(log_prior - log_determinant - 0.5 * (_PRIOR_WEIGHT + m) * np.log(scale))


def _combined(single: Any, squares: Any, pairs: Any, count: int) -> Any:
    """Mean over single parameters, `pairs` times the mean over pairs of them, and the bias. The sum over pairs comes
    from two sums over parameters, by Newton's identity."""
    return single / count + pairs * (single**2 - squares) / max(count * (count - 1), 1) + BIAS_WEIGHT


def _variance(noise: float) -> float:
    return (noise / PRIOR_SCALE) ** 2


def normal_cdf(z: Array) -> Array:
    """Distribution function of the standard normal."""
    return np.array([0.5 * math.erfc(value) for value in (z / -math.sqrt(2)).tolist()])

"""Bayesian linear regression where only the largest of several sums is observed. Arrays only.

A candidate has p points; point j holds exact_j + sizes_j . coefficients bytes, and the largest of them is measured.
Coefficients are normal variables (Bishop, Pattern Recognition and Machine Learning, 3.3).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ROUNDS = 12
"""Most iterations; each looks again which point is the largest."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Normal:
    """A normal distribution of k coefficients."""

    means: Array
    """(k,)."""
    covariance: Array
    """(k, k)."""


def fit(means: Array, prior_sd: Array, exact: Array, sizes: Array, measured: Array, sd: Array) -> Normal:
    """The posterior of coefficients that are independent before, with `means` (k,) and `prior_sd` (k,).

    exact: (n, p) bytes. sizes: (n, p, k). measured: (n,) bytes, the largest sums. sd: (n,) standard deviations of them.
    """
    precision, start, rows = np.diag(prior_sd**-2), means / prior_sd**2, np.arange(len(measured))
    chosen = (exact + sizes @ means).argmax(1)  # (n,)
    for _ in range(ROUNDS):
        scaled = sizes[rows, chosen] / sd[:, None]  # (n, k)
        known = precision + scaled.T @ scaled
        update = np.linalg.solve(known, start + scaled.T @ ((measured - exact[rows, chosen]) / sd))
        before, chosen = chosen, (exact + sizes @ update).argmax(1)
        if np.array_equal(before, chosen):
            means = update
            break
        means = 0.5 * (means + update)  # damped: two points of equal size would otherwise alternate
        chosen = (exact + sizes @ means).argmax(1)
    return Normal(means=means, covariance=np.linalg.inv(known))


def largest(known: Normal, exact: Array, sizes: Array) -> tuple[Array, Array]:
    """Bytes of the largest sum of each candidate, and their standard deviation from the coefficients': (n,) each."""
    totals = exact + sizes @ known.means  # (n, p)
    chosen, rows = totals.argmax(1), np.arange(len(exact))
    top = sizes[rows, chosen]  # (n, k)
    return totals[rows, chosen], np.sqrt(((top @ known.covariance) * top).sum(1))

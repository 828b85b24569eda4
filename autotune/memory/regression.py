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

    def part(self, held: NDArray[np.intp]) -> "Normal":
        """The distribution of the coefficients `held`."""
        return Normal(means=self.means[held], covariance=self.covariance[np.ix_(held, held)])

    def moved(self, held: NDArray[np.intp], new: "Normal") -> "Normal":
        """This distribution after measurements that involve the coefficients `held` only, which are `new` since; the
        others follow by their covariance."""
        old = self.part(held)
        gain = np.linalg.solve(old.covariance, self.covariance[held]).T  # (k, held)
        return Normal(
            means=self.means + gain @ (new.means - old.means),
            covariance=self.covariance + gain @ (new.covariance - old.covariance) @ gain.T,
        )


def fit(before: Normal, exact: Array, sizes: Array, measured: Array, sd: Array) -> Normal:
    """The coefficients after measurements.

    exact: (n, p) bytes. sizes: (n, p, k). measured: (n,) bytes, the largest sums. sd: (n,) standard deviations of them.
    """
    precision, means, rows = np.linalg.inv(before.covariance), before.means, np.arange(len(measured))
    start, chosen = precision @ means, (exact + sizes @ means).argmax(1)  # (k,), (n,)
    for _ in range(ROUNDS):
        scaled = sizes[rows, chosen] / sd[:, None]  # (n, k)
        known = precision + scaled.T @ scaled
        update = np.linalg.solve(known, start + scaled.T @ ((measured - exact[rows, chosen]) / sd))
        last, chosen = chosen, (exact + sizes @ update).argmax(1)
        if np.array_equal(last, chosen):
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

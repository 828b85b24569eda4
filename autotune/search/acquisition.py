"""What measuring a candidate next is worth: expected improvement a second, times the probability that it runs.

Snoek, Larochelle and Adams, Practical Bayesian Optimization of Machine Learning Algorithms, NeurIPS 2012. Three
processes are fitted: to the answer (log speed), to the log of a trial's seconds, and to whether a trial failed.

Shapes: m finished trials, n candidates, k parameters.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autotune.search import gp
from autotune.search.gp import Array, Mask

FITTED = 96
"""Trials that the processes are fitted to; the time this takes grows with its cube."""

_IMPROBABLE = 1e-3
"""Probability that no better pending trial is feasible below which worse ones are ignored."""
_EI_FLOOR = 0.01
"""Improvement, in standard deviations, that every candidate is credited with: where the model expects none, what is
bound to fail must not look better than what is bound to run."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Observed:
    """m finished trials."""

    parameters: Array
    """(m, k)."""
    answers: Array
    """(m,): log speed, or whatever else is modelled; NaN where there is none."""
    log_seconds: Array
    """(m,): NaN where unknown."""
    failed: Mask
    """(m,): infeasible, for whatever reason."""
    prior: Array
    """(m, 2): prior means of `answers` and `log_seconds`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Choices:
    """n candidates to choose from."""

    parameters: Array
    """(n, k)."""
    prior: Array
    """(n, 2): as in Observed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pending:
    """n trials that run."""

    choices: Choices
    fits: Array
    """(n,): their probabilities to need no more memory than the limit."""
    objective: Callable[[Array], Array]
    """Maps answers (n,) to what is maximised."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """The processes of finished trials. They serve every proposal until another trial ends."""

    categorical: Mask
    """(k,): parameters whose values have no order."""
    answers: gp.Process
    answer: float
    """Median of what is left of the answers beside their prior means."""
    log_seconds: gp.Process
    log_second: float
    """As `answer`."""
    failed: gp.Process | None
    """None where none has failed."""


def fit(observed: Observed, categorical: Mask) -> Fitted:
    """The most likely processes."""
    answers, answer = _fit(observed, 0, observed.answers, categorical)
    log_seconds, log_second = _fit(observed, 1, observed.log_seconds, categorical)
    some = observed.failed.any()
    failed = gp.fit(observed.parameters, categorical, observed.failed.astype(float)) if some else None
    return Fitted(
        categorical=categorical, answers=answers, answer=answer, log_seconds=log_seconds, log_second=log_second,
        failed=failed,
    )  # fmt: skip


def value(
    fitted: Fitted, choices: Choices, objective: Callable[[Array], Array], best: float | None,
    pending: Pending | None = None,
) -> Array:  # fmt: skip
    """Value of each choice, (n,). `objective` maps answers (n,) of the choices to what is maximised; `best`: the
    largest so far, None while nothing is feasible."""
    at, process, categorical = gp.points(choices.parameters), fitted.answers, fitted.categorical
    bests: list[tuple[float | None, float]] = [(best, 1.0)]
    if pending is not None:
        there = gp.points(pending.choices.parameters)
        expected, _ = gp.predict(process, categorical, there)
        reached = pending.objective(pending.choices.prior[:, 0] + fitted.answer + expected)
        bests = _bests(best, reached, pending.fits * _p_runs(fitted, there))
        process = gp.believe(process, categorical, pending.choices.parameters)
    mean, sd = gp.predict(process, categorical, at)
    improvement = _expected_improvement(choices.prior[:, 0] + fitted.answer + mean, sd, objective, bests)
    mean, _ = gp.predict(fitted.log_seconds, categorical, at)
    seconds = np.exp(choices.prior[:, 1] + fitted.log_second + mean)
    return np.asarray(improvement * _p_runs(fitted, at) / seconds)


def _bests(best: float | None, reached: Array, p_runs: Array) -> list[tuple[float | None, float]]:
    """What the best may be once the pending trials have ended, each with its probability: the largest objective
    `reached` (n,) by a feasible one, else the best so far. `p_runs` (n,): probability that each is feasible."""
    found, left = list[tuple[float | None, float]](), 1.0
    for place in np.argsort(-reached, kind="stable"):
        if left < _IMPROBABLE or (best is not None and reached[place] <= best):
            break
        found.append((float(reached[place]), left * float(p_runs[place])))
        left *= 1.0 - float(p_runs[place])
    return [*found, (best, left)]


def _fit(observed: Observed, which: int, answers: Array, categorical: Mask) -> tuple[gp.Process, float]:
    """What is left of the known answers (m,) beside column `which` of the prior means: a process, and a constant."""
    known = ~np.isnan(answers)
    residuals = answers[known] - observed.prior[known, which]
    constant = float(np.median(residuals)) if known.any() else 0.0
    return gp.fit(observed.parameters[known], categorical, residuals - constant), constant


def _expected_improvement(
    mean: Array, sd: Array, objective: Callable[[Array], Array], bests: Sequence[tuple[float | None, float]]
) -> Array:
    """(n,): over each of the bests, weighted with its probability; over the worst choice while nothing is feasible."""
    centre = objective(mean)
    spread = np.maximum((objective(mean + sd) - objective(mean - sd)) / 2, 1e-12)
    found = np.zeros(len(mean))
    for best, probability in bests:
        z = (centre - (float(centre.min()) if best is None else best)) / spread
        density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
        found += probability * (z * gp.normal_cdf(z) + density)
    return np.asarray(spread * (found + _EI_FLOOR))


def _p_runs(fitted: Fitted, at: gp.Points) -> Array:
    """Probability that each of n points is feasible, (n,), from the trials that were and were not."""
    if fitted.failed is None:
        return np.ones(at.has.shape[1])
    mean, sd = gp.predict(fitted.failed, fitted.categorical, at)
    return gp.normal_cdf((0.5 - mean) / np.hypot(sd, 0.1))


def most_valuable(values: Array, p_fits: Callable[[list[int]], Array], block: int = 16) -> int:
    """Index of the largest value (n,) times the probability `p_fits` that the choice stays within the limit, which is
    computed for `block` choices at a time, the most valuable first."""
    best, chosen = -1.0, 0
    order = np.argsort(-values, kind="stable")
    for start in range(0, len(order), block):
        rows = order[start : start + block]
        if values[rows[0]] <= best:  # no probability can make one of the rest better
            break
        likely = values[rows] * p_fits(rows.tolist())
        if likely.max() > best:
            best, chosen = float(likely.max()), int(rows[likely.argmax()])
    return chosen


def subset(best_first: list[int], count: int) -> list[int]:
    """At most FITTED of `count` trials, by index: half of them the best, a quarter the latest others, which lie where
    the search looks now, and a quarter spread over all earlier ones, whose failures warn."""
    if count <= FITTED:
        return list(range(count))
    best = best_first[: FITTED // 2]
    others = sorted(set(range(count)) - set(best))
    earlier, latest = others[: -FITTED // 4], others[-FITTED // 4 :]
    wanted = min(len(earlier), FITTED - len(best) - len(latest))
    return sorted([*best, *latest, *(earlier[i * len(earlier) // wanted] for i in range(wanted))])

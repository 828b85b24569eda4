"""Posterior of losses: a scaling law whose constants are uncertain, and what trainings to completion have shown.

Everything is normal; the law is linearised at its posterior mean (Bishop, Pattern Recognition and Machine Learning,
4.5). What is believed before any training is `curves.json`, with its provenance.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autotune.config.candidate import Recipe
from autotune.config.tables import read_json, read_table
from autotune.runs.law import (
    CURVES,
    REFERENCE_PARAMETERS,
    REFERENCE_TOKENS,
    best_log_batch,
    bounded,
    context_loss,
    learned_loss,
)

Array = NDArray[np.float64]
EARLY_STEPS = 64
_COMMON_LENGTH = math.log(4.0)
"""Trainings whose tokens differ by this factor share 0.6 of the common deviation: a convention."""
_ROUNDS = 50
_STEP = 1e-4


@dataclass(frozen=True, kw_only=True)
class Belief:
    """A constant of the law: mean and standard deviation."""

    mean: float
    sd: float


@dataclass(frozen=True, kw_only=True)
class Priors:
    """What is expected of trainings of about some length before any."""

    tokens: float
    """The length, by order of magnitude."""
    constants: Mapping[str, Belief]
    """By the names in `law_loss`."""
    common_sd: float
    """Deviation from the law that all trainings with one optimizer and of about one length share, in nats."""
    shape_sd: float
    """Deviation that trainings of one shape share."""
    own_sd: float
    """Deviation of one recipe at its full length, in nats."""
    own_slope_sd: float
    """Its change per factor e of tokens."""
    noise_sd: float
    """Scatter of one training around its recipe's curve."""
    early_sd: float
    """Further scatter of a training of EARLY_STEPS steps; it falls with their number: the first ones follow no law."""
    text_sd: float = 0.0
    """Deviation that all trainings share, because their text is another than that of the records."""
    widening: float = 1.0
    """Factor of predicted standard deviations, with which intervals held what they should on held-out trainings."""
    provenance: str


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training to completion, done or not."""

    recipe: Recipe
    tokens: float
    rival: int | str
    """Trainings of one rival share their deviation from the law."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Posterior:
    """Joint distribution of losses."""

    means: Array
    """(n,) nats."""
    covariance: Array
    """(n, n), without the scatter of one training."""
    scatter: Array
    """(n,): variance of one training around its curve."""
    widening: float
    """Factor of `sd`."""

    @property
    def sd(self) -> Array:
        """(n,): of the loss that such a training will show."""
        sd: Array = self.widening * np.sqrt(np.diag(self.covariance) + self.scatter)
        return sd


def priors(tokens: float) -> Priors:
    """The package's own for the length that is nearest."""
    return min(_every_priors(), key=lambda known: abs(math.log(known.tokens / tokens)))


@functools.cache
def _every_priors() -> tuple[Priors, ...]:
    return tuple(read_table(Priors, table, name) for name, table in read_json(CURVES).items())


def predict(known: Priors, shown: Sequence[tuple[Training, float]], wanted: Sequence[Training]) -> Posterior:
    """Losses of `wanted`, given trainings and their losses."""
    every, n = [*(training for training, _ in shown), *wanted], len(shown)
    means, constants_part, _ = _linear(known, _constants(known, shown), every)
    joint = constants_part + _deviations(known, every)  # (all, all)
    scatter = _scatter(known, every)
    gain = np.linalg.solve(joint[:n, :n] + np.diag(scatter[:n]), joint[:n, n:])
    losses = np.array([loss for _, loss in shown])
    return Posterior(
        means=means[n:] + gain.T @ (losses - means[:n]),
        covariance=joint[n:, n:] - joint[n:, :n] @ gain,
        scatter=scatter[n:],
        widening=known.widening,
    )


def learn(known: Priors, shown: Sequence[tuple[Training, float]]) -> dict[str, Belief]:
    """The law's constants after trainings and their losses."""
    if not shown:
        return dict(known.constants)
    constants, trainings = _constants(known, shown), [training for training, _ in shown]
    _, joint, cross = _linear(known, constants, trainings)
    seen = joint + _deviations(known, trainings) + np.diag(_scatter(known, trainings))
    variance = _variance(known) - (cross * np.linalg.solve(seen, cross.T).T).sum(1)
    rows = zip(known.constants, constants.tolist(), np.sqrt(variance).tolist(), strict=True)
    return {name: Belief(mean=mean, sd=sd) for name, mean, sd in rows}


def _constants(known: Priors, shown: Sequence[tuple[Training, float]]) -> Array:
    """Most probable constants (k,), by Gauss-Newton steps that are halved until they gain."""
    start, variance = np.array([belief.mean for belief in known.constants.values()]), _variance(known)
    if not shown:
        return start
    trainings, losses = [training for training, _ in shown], np.array([loss for _, loss in shown])
    inverse = np.linalg.inv(_deviations(known, trainings) + np.diag(_scatter(known, trainings)))
    features = _features(trainings)

    def penalty(constants: Array) -> float:
        errors = losses - law_loss(dict(zip(known.constants, constants, strict=True)), features)
        return float(errors @ inverse @ errors + ((constants - start) ** 2 / variance).sum())

    constants = start
    for _ in range(_ROUNDS):
        value, slopes = _slopes(known, constants, features)
        gradient = slopes @ inverse @ (losses - value) + (start - constants) / variance
        step = np.linalg.solve(slopes @ inverse @ slopes.T + np.diag(1 / variance), gradient)
        while penalty(constants + step) > penalty(constants) and np.abs(step).max() > _STEP:
            step = step / 2
        constants = constants + step
        if np.abs(step).max() <= _STEP:
            break
    return constants


def _linear(known: Priors, constants: Array, trainings: Sequence[Training]) -> tuple[Array, Array, Array]:
    """The law linearised at `constants`, before any training: mean losses (n,), their covariance (n, n), and that of
    constants and losses (k, n)."""
    value, slopes = _slopes(known, constants, _features(trainings))
    cross = _variance(known)[:, None] * slopes
    start = np.array([belief.mean for belief in known.constants.values()])
    return value + (start - constants) @ slopes, slopes.T @ cross, cross


def _slopes(known: Priors, constants: Array, features: Mapping[str, Array]) -> tuple[Array, Array]:
    """The law's losses (n,), and their derivatives by the constants (k, n)."""
    value = law_loss(dict(zip(known.constants, constants, strict=True)), features)
    moved = [dict(zip(known.constants, constants + _STEP * row, strict=True)) for row in np.eye(len(constants))]
    return value, np.stack([(law_loss(one, features) - value) / _STEP for one in moved])


def _variance(known: Priors) -> Array:
    return np.array([belief.sd**2 for belief in known.constants.values()])


def law_loss(c: Mapping[str, float], f: Mapping[str, Array]) -> Array:
    """Loss by the law with constants `c` of trainings with features `f`: (n,) nats.

    Muon has a term of tokens and a constant of its own. The best rate is Step Law's power of N and D, times a factor,
    and another one for Muon; it changes with the batch. The best batch is Step Law's power of D, times a factor. Either
    costs nats by the square of its logarithmic distance; the curvatures are logarithms, so that they stay positive.
    """
    best_rate, best_batch = _optimum(c, f)
    loss = learned_loss(c, f["log_n"], f["log_tokens"], f["context"], f["muon"])
    off = np.exp(c["rate_curve"]) * (f["log_rate"] - best_rate) ** 2
    off = off + np.exp(c["batch_curve"]) * (f["log_batch"] - best_batch) ** 2
    return np.asarray(bounded(loss, f["untrained"]) + off)


def _optimum(c: Mapping[str, float], f: Mapping[str, Array]) -> tuple[Array, Array]:
    """Logarithms of the best learning rate at the batch of each training, and of the best batch: (n,) each."""
    batch = best_log_batch(c, f["log_tokens"])
    rate = c["rate"] + c["rate_muon"] * f["muon"] + c["rate_tokens"] * f["log_tokens"]
    return rate + c["rate_parameters"] * f["log_n"] + c["rate_batch"] * (f["log_batch"] - batch), batch


def _features(trainings: Sequence[Training]) -> dict[str, Array]:
    rows = [
        {
            "log_n": math.log(max(1, t.recipe.shape.parameters_non_embedding) / REFERENCE_PARAMETERS),
            "log_tokens": math.log(t.tokens / REFERENCE_TOKENS),
            "log_rate": math.log(t.recipe.learning_rate),
            "log_batch": math.log(t.recipe.tokens_per_step),
            "muon": float(t.recipe.optimizer == "muon"),
            "context": context_loss(t.recipe.shape.block_size),
            "untrained": math.log(t.recipe.shape.vocab_size),
        }
        for t in trainings
    ]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _deviations(known: Priors, trainings: Sequence[Training]) -> Array:
    """Covariance of the deviations from the law: (n, n)."""
    shapes, rivals = np.array([str(t.recipe.shape) for t in trainings]), np.array([str(t.rival) for t in trainings])
    tokens = np.log([t.tokens for t in trainings])
    length = tokens - np.log([t.recipe.max_tokens for t in trainings])
    muon = np.array([t.recipe.optimizer == "muon" for t in trainings])
    near = np.exp(-0.5 * ((tokens[:, None] - tokens) / _COMMON_LENGTH) ** 2)
    common = known.common_sd**2 * (muon[:, None] == muon) * near
    shared = known.shape_sd**2 * (shapes[:, None] == shapes)
    lines = known.own_sd**2 + known.own_slope_sd**2 * np.outer(length, length)
    every: Array = known.text_sd**2 + common + shared + lines * (rivals[:, None] == rivals)
    return every


def _scatter(known: Priors, trainings: Sequence[Training]) -> Array:
    """Variance of single trainings: (n,)."""
    steps = np.array([t.tokens / t.recipe.tokens_per_step for t in trainings])
    every: Array = known.noise_sd**2 + (known.early_sd * EARLY_STEPS / steps) ** 2
    return every

"""Objective: tokens/s (maximised), or the final loss that a scaling law predicts from them (minimised).

A predicted loss is for ranking only and is printed with its band. Also here: schedule and learning rate as functions
of the length of a training.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from autotune.config.candidate import Candidate, Shape
from autotune.config.search_settings import SearchSettings
from autotune.errors import ConfigError, suggest
from autotune.runs.records import TrialRecord

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Law:
    """loss = e + a / N^alpha + b / D^beta, in nats a token, for N parameters and D tokens."""

    name: str
    e: float
    a: float
    alpha: float
    b: float
    beta: float
    counts: Literal["all", "non_embedding"]
    """Parameters that N counts."""
    band: float
    """Largest distance of results/reference/losses-published/losses.csv from the prediction, in nats: FineWeb and other
    recipes included."""
    source: str
    """Paper and equation of the constants, and where they are off."""

    def loss(self, parameters: float, tokens: float) -> float:
        return float(self.e + self.a / parameters**self.alpha + self.b / tokens**self.beta)


LAWS = (
    Law(
        name="lingle",
        e=2.523, a=0.287 * 1e8**0.40, alpha=0.40, b=0.462 * 1e9**0.38, beta=0.38,
        counts="non_embedding", band=0.26,
        source="least squares (rms 0.018) over 21 tuned runs of 46M to 2.9B parameters, 0.1B to 4.3B tokens: Lingle, "
        "lucaslingle.substack.com/p/scaling-laws-for-optimal-lr-and-batch-1d4",
    ),
    Law(
        name="hoffmann",
        e=1.69, a=406.4, alpha=0.34, b=410.7, beta=0.28,
        counts="all", band=1.3,
        source="Hoffmann et al. 2022, arXiv:2203.15556, equation 10; 0.3 to 1.2 nats too high below 1B tokens",
    ),
    Law(
        name="besiroglu",
        e=1.8172, a=482.01, alpha=0.3478, b=2085.43, beta=0.3658,
        counts="all", band=1.3,
        source="Besiroglu et al. 2024, arXiv:2404.10102, refit of Hoffmann's; too high below 1B tokens",
    ),
)  # fmt: skip

# Each law was fitted at one block size and would make short blocks look free. The loss of a token at position
# t is about 2.9 + 4.5 t^-0.56 (Kaplan et al. 2020, arXiv:2001.08361, figure 20, below 10^8 parameters;
# 2.3 + 5.4 t^-0.62 for the largest); the mean of its second term over a block of T tokens is 4.5 T^-0.56 / 0.44.
_POSITION_SCALE, _POSITION_EXPONENT, _REFERENCE_BLOCK = 4.5, 0.56, 1024

# Nats per factor e of speed, for a training whose length is given in tokens: far below the resolution of any law, but
# it ranks plans of one shape, for which the law predicts the same loss.
_SPEED_WEIGHT = 1e-3  # a convention

_SOFT = 8.0  # exponent of the soft minimum in `predict_loss`: a convention


@functools.cache
def find_law(name: str) -> Law:
    """Entry of LAWS by name. Raises ConfigError."""
    laws = {law.name: law for law in LAWS}
    if name not in laws:
        raise ConfigError(f"scaling law {name!r} is not known; {suggest(name, laws)}")
    return laws[name]


def law_of(settings: SearchSettings) -> Law:
    """Law of a search."""
    return find_law(settings.law)


def raw_loss(law: Law, shape: Shape, tokens: float) -> float:
    """Loss by `law` and the length of the block, without the bound of `predict_loss`."""
    parameters = shape.parameters if law.counts == "all" else shape.parameters_non_embedding
    return law.loss(parameters, tokens) + _context_loss(shape.block_size) - _context_loss(_REFERENCE_BLOCK)


def predict_loss(law: Law, shape: Shape, tokens: float) -> float:
    """Predicted final loss in nats per token after `tokens`; for ranking only.

    Power laws are unbounded: for the first million tokens they predict 30 nats. A soft minimum with ln(vocabulary),
    the loss of an untrained model, keeps the order and changes losses below 5 by less than 0.002.
    """
    loss, untrained = raw_loss(law, shape, tokens), math.log(shape.vocab_size)
    return float(untrained * (1.0 + (untrained / loss) ** _SOFT) ** (-1 / _SOFT)) if untrained > 0 else loss


def _context_loss(block_size: int) -> float:
    return float(_POSITION_SCALE * block_size**-_POSITION_EXPONENT / (1.0 - _POSITION_EXPONENT))


def training_tokens(settings: SearchSettings, tokens_per_second: float) -> float:
    """Length of the training in tokens at this speed."""
    if settings.train_tokens is not None:
        return float(settings.train_tokens)
    if settings.train_seconds is not None:
        return tokens_per_second * settings.train_seconds
    return float(settings.recipe.max_tokens)


def loss_at(settings: SearchSettings, candidate: Candidate, tokens_per_second: float) -> float | None:
    """Predicted loss at a measured speed; None for `throughput`."""
    if settings.objective == "throughput":
        return None
    return predict_loss(law_of(settings), candidate.shape, training_tokens(settings, tokens_per_second))


def score(settings: SearchSettings, candidate: Candidate, tokens_per_second: float) -> float:
    """Objective at a measured speed."""
    loss = loss_at(settings, candidate, tokens_per_second)
    if loss is None:
        return tokens_per_second
    # For a training of given duration the speed is already in the number of tokens.
    return loss - (_SPEED_WEIGHT * math.log(tokens_per_second) if settings.train_tokens is not None else 0.0)


def interval(
    settings: SearchSettings, candidate: Candidate, tokens_per_second: float, ci95: float
) -> tuple[float, float]:
    """Objective at both ends of an interval of tokens/s, smaller value first."""
    ends = (tokens_per_second - ci95, tokens_per_second + ci95)
    scores = [score(settings, candidate, max(end, tokens_per_second * 0.01)) for end in ends]
    return min(scores), max(scores)


def speed_needed(settings: SearchSettings, candidate: Candidate, objective: float) -> float:
    """Tokens/s at which `candidate` would reach `objective`; by bisection, as the objective is monotonic in speed."""
    sign = 1 if maximised(settings) else -1
    low, high = -3.0, 15.0  # powers of ten, beyond any machine
    for _ in range(50):
        middle = (low + high) / 2
        reached = sign * score(settings, candidate, 10**middle) >= sign * objective
        low, high = (low, middle) if reached else (middle, high)
    return float(10**high)


def maximised(settings: SearchSettings) -> bool:
    """Whether a larger objective is better."""
    return settings.objective == "throughput"


def best_first(records: Sequence[TrialRecord], maximise: bool) -> list[TrialRecord]:
    """Feasible records by objective; equal ones by trial number."""
    feasible = [record for record in records if record.objective is not None]
    return sorted(feasible, key=lambda record: (_signed(record, maximise), record.trial))


def _signed(record: TrialRecord, maximise: bool) -> float:
    assert record.objective is not None
    return -record.objective if maximise else record.objective


def pareto_front(points: Iterable[tuple[float, float, T]]) -> list[T]:
    """Items of (cost, value, item) that no other item beats in both lower cost and higher value; lowest cost first."""
    front: list[tuple[float, T]] = []
    for _, value, item in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][0]:
            front.append((value, item))
    return [item for _, item in front]


def batch_tokens(tokens: float) -> float:
    """Tokens of a step for a training over `tokens`: 0.58 D^0.571 (Step Law, see `finish_candidate`)."""
    return float(0.58 * tokens**0.571)


def finish_candidate(candidate: Candidate, tokens: float, rate_factor: float = 1.0) -> Candidate:
    """Candidate with iterations, learning rate, warm-up and intervals for a training over `tokens`.

    Learning rate: 1.79 N^-0.713 D^0.307 (Step Law, Li et al. 2025, arXiv:2503.04715; N non-embedding parameters,
    D tokens), clamped to [1e-4, 3e-3] because it was fitted from 60M parameters up, times
    `rate_factor`. Warm-up is a tenth of the iterations, at most llm.c's 700; the final rate is a tenth of it, as in
    nanoGPT. Evaluations take about a tenth of the time at most: a forward pass costs a third of a step, so each covers
    at most a quarter of the tokens trained since the last one.
    """
    recipe, evaluation = candidate.recipe, candidate.evaluation
    iterations = max(1, round(tokens / recipe.tokens_per_step))
    rate = 1.79 * recipe.shape.parameters_non_embedding**-0.713 * (iterations * recipe.tokens_per_step) ** 0.307
    rate = float(f"{rate_factor * min(max(rate, 1e-4), 3e-3):.2g}")  # the rule is not more precise than that
    interval = max(1, min(250, iterations // 5))
    rows = evaluation.eval_batch_size or candidate.plan.micro_batch_size
    evaluated = round(0.25 * interval * recipe.global_batch_size / rows)
    return replace(
        candidate,
        recipe=replace(
            recipe,
            max_iters=iterations,
            lr_decay_iters=iterations,
            warmup_iters=min(700, iterations // 10),
            learning_rate=rate,
            min_lr=float(f"{rate / 10:.2g}"),
        ),
        evaluation=replace(
            evaluation, eval_interval=interval, eval_iters=max(1, min(evaluation.eval_iters, evaluated))
        ),
        checkpointing=replace(candidate.checkpointing, checkpoint_interval=interval),
        tracking=replace(candidate.tracking, log_interval=max(1, min(10, iterations // 100))),
    )

"""What is maximised or minimised: tokens/s, or the final loss that a scaling law predicts from them.

A law only ranks; its loss is a prediction and is printed with its band. Also the schedule and the learning
rate that follow from the length of a training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from autotune.config.candidate import Candidate, Shape
from autotune.config.search import SearchSettings
from autotune.errors import ConfigError, suggest
from autotune.runs.records import TrialRecord


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
    """Which parameters N counts."""
    band: float
    """Published losses, FineWeb's and other recipes' among them, lie within this of the prediction, in nats."""
    source: str

    def loss(self, parameters: float, tokens: float) -> float:
        return float(self.e + self.a / parameters**self.alpha + self.b / tokens**self.beta)


LAWS = (
    Law(
        name="lingle",
        e=2.523, a=0.287 * 1e8**0.40, alpha=0.40, b=0.462 * 1e9**0.38, beta=0.38,
        counts="non_embedding", band=0.26,
        source="least squares over Lingle's 21 tuned runs of 46M to 2.9B parameters, 0.1B to 4.3B tokens; rms 0.018",
    ),
    Law(
        name="hoffmann",
        e=1.69, a=406.4, alpha=0.34, b=410.7, beta=0.28,
        counts="all", band=1.3,
        source="Hoffmann et al. 2022, arXiv:2203.15556, approach 3; 0.3 to 1.2 nats too high below 1B tokens",
    ),
    Law(
        name="besiroglu",
        e=1.8172, a=482.01, alpha=0.3478, b=2085.43, beta=0.3658,
        counts="all", band=1.3,
        source="Besiroglu et al. 2024, arXiv:2404.10102, refit of Hoffmann's; too high below 1B tokens",
    ),
)  # fmt: skip

# The laws were fitted at one block size each and would give short blocks away for free. The loss of a
# token at position t is about 2.9 + 4.5 t^-0.56 (Kaplan et al. 2020, arXiv:2001.08361, figure 20, below 10^8
# parameters; 2.3 + 5.4 t^-0.62 for the largest); the mean of its second part over a block of T is 4.5 T^-0.56 / 0.44.
_POSITION_SCALE, _POSITION_EXPONENT, _REFERENCE_BLOCK = 4.5, 0.56, 1024

# Nats for a factor e of speed, where the length of the training is given in tokens: far below what any law
# can tell apart, but it decides between plans of one shape, to which the law is blind.
_SPEED_WEIGHT = 1e-3


def find_law(name: str) -> Law:
    """The row of LAWS of that name. Raises ConfigError."""
    laws = {law.name: law for law in LAWS}
    if name not in laws:
        raise ConfigError(f"scaling law {name!r} is not known; {suggest(name, laws)}")
    return laws[name]


def law_of(settings: SearchSettings) -> Law:
    """The law of a search, as it was moved to the user's data."""
    law = find_law(settings.law)
    band = law.band if settings.law_band is None else settings.law_band
    return replace(law, e=law.e + settings.law_offset, band=band)


def raw_loss(law: Law, shape: Shape, tokens: float) -> float:
    """By `law` and the block's length, without an upper end."""
    parameters = shape.parameters if law.counts == "all" else shape.parameters_non_embedding
    return law.loss(parameters, tokens) + _context_loss(shape.block_size) - _context_loss(_REFERENCE_BLOCK)


def unlimited(loss: float, shape: Shape) -> float:
    """The `raw_loss` that `predict_loss` shows as `loss`; infinite for what an untrained model reaches."""
    ratio = math.log(shape.vocab_size) / loss
    return math.log(shape.vocab_size) * (ratio**8 - 1.0) ** -0.125 if ratio > 1.0 else math.inf


def predict_loss(law: Law, shape: Shape, tokens: float) -> float:
    """Final loss in nats a token after `tokens`, by `law` and the block's length. A prediction, for ranking.

    Power laws know no upper end: for the first million tokens they say 30 nats. A soft minimum with ln(vocabulary),
    an untrained model's loss, keeps their order and changes losses below 5 by less than 0.002.
    """
    loss, untrained = raw_loss(law, shape, tokens), math.log(shape.vocab_size)
    return float(untrained * (1.0 + (untrained / loss) ** 8) ** -0.125) if untrained > 0 else loss


def _context_loss(block_size: int) -> float:
    return float(_POSITION_SCALE * block_size**-_POSITION_EXPONENT / (1.0 - _POSITION_EXPONENT))


def training_tokens(settings: SearchSettings, tokens_per_second: float) -> float:
    """Tokens that the training will see at this speed."""
    if settings.train_tokens is not None:
        return float(settings.train_tokens)
    if settings.train_seconds is not None:
        return tokens_per_second * settings.train_seconds
    return float(settings.recipe.max_tokens)


def loss_at(settings: SearchSettings, candidate: Candidate, tokens_per_second: float) -> float | None:
    """The loss that the law predicts at a measured speed; None for `throughput`."""
    if settings.objective == "throughput":
        return None
    return predict_loss(law_of(settings), candidate.shape, training_tokens(settings, tokens_per_second))


def score(settings: SearchSettings, candidate: Candidate, tokens_per_second: float) -> float:
    """The objective at a measured speed."""
    loss = loss_at(settings, candidate, tokens_per_second)
    if loss is None:
        return tokens_per_second
    # With the time given, speed is already in the tokens.
    return loss - (_SPEED_WEIGHT * math.log(tokens_per_second) if settings.train_tokens is not None else 0.0)


def interval(
    settings: SearchSettings, candidate: Candidate, tokens_per_second: float, ci95: float
) -> tuple[float, float]:
    """The objective over an interval of tokens/s, smaller end first."""
    ends = (tokens_per_second - ci95, tokens_per_second + ci95)
    scores = [score(settings, candidate, max(end, tokens_per_second * 0.01)) for end in ends]
    return min(scores), max(scores)


def speed_needed(settings: SearchSettings, candidate: Candidate, objective: float) -> float:
    """Tokens/s at which `candidate` would reach `objective`: by bisection, as more speed is never worse."""
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
    """Feasible records by their objective; equal ones in the order of their trials."""
    feasible = [record for record in records if record.objective is not None]
    return sorted(feasible, key=lambda record: (_signed(record, maximise), record.trial))


def _signed(record: TrialRecord, maximise: bool) -> float:
    assert record.objective is not None
    return -record.objective if maximise else record.objective


def finish_candidate(candidate: Candidate, tokens: float) -> Candidate:
    """The candidate with iterations, learning rate, warm-up and intervals for a training over `tokens`.

    Learning rate: 1.79 N^-0.713 D^0.307 (Step Law, Li et al. 2025, arXiv:2503.04715; N non-embedding parameters,
    D tokens), kept within 1e-4 and 3e-3 because it was fitted from 60M parameters up. Warm-up is a tenth of
    the iterations, at most llm.c's 700; the rate ends at a tenth, as nanoGPT's does. Evaluations take about a
    tenth of the time at most: a forward alone costs a third of a step, so a quarter of the tokens between two.
    """
    recipe, evaluation = candidate.recipe, candidate.evaluation
    iterations = max(1, round(tokens / recipe.tokens_per_step))
    rate = 1.79 * recipe.shape.parameters_non_embedding**-0.713 * (iterations * recipe.tokens_per_step) ** 0.307
    rate = float(f"{min(max(rate, 1e-4), 3e-3):.2g}")  # more digits would claim to know more than the rule does
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

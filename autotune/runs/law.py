"""Scaling laws: the final loss that published trainings predict for a shape and a number of tokens, and for short
trainings, of which no published law knows anything, the curve that recorded ones follow.

For ranking, and printed with its band.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from autotune.config.candidate import Shape
from autotune.config.tables import read_json
from autotune.errors import ConfigError, suggest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T", float, "NDArray[np.float64]")


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

REFERENCE_PARAMETERS, REFERENCE_TOKENS = 1e8, 1e9
"""Where the terms of `learned_loss` are given in nats: what the published constants describe."""
SHORT_TOKENS = 1e8
"""Two hundred times the longest recorded training: beyond, the recorded ones say nothing."""
CURVES = Path(__file__).with_name("curves.json")

_SOFT = 8.0  # exponent of the soft minimum in `predict_loss`: a convention


@functools.cache
def find_law(name: str) -> Law:
    """Entry of LAWS by name. Raises ConfigError."""
    laws = {law.name: law for law in LAWS}
    if name not in laws:
        raise ConfigError(f"scaling law {name!r} is not known; {suggest(name, laws)}")
    return laws[name]


def raw_loss(law: Law, shape: Shape, tokens: float) -> float:
    """Loss by `law` and the length of the block, without the bound of `predict_loss`."""
    parameters = shape.parameters if law.counts == "all" else shape.parameters_non_embedding
    return law.loss(parameters, tokens) + context_loss(shape.block_size) - context_loss(_REFERENCE_BLOCK)


def predict_loss(law: Law, shape: Shape, tokens: float, *, muon: bool = False) -> float:
    """Predicted final loss in nats per token after `tokens`; for ranking only. By `law`, or by the curve of recorded
    short trainings, by Muon or AdamW, where that is lower: a power law fitted to long trainings is nats too high for
    short ones."""
    loss, untrained = raw_loss(law, shape, tokens), math.log(shape.vocab_size)
    if untrained <= 0:
        return loss
    return float(min(bounded(loss, untrained), bounded(short_loss(shape, tokens, muon=muon), untrained)))


def short_loss(shape: Shape, tokens: float, *, muon: bool = False) -> float:
    """Loss of a short training by AdamW or Muon at its best rate and batch: `learned_loss` with the constants that the
    recorded trainings of `curves.json` left. More than SHORT_TOKENS do not lower it."""
    log_n = math.log(max(1, shape.parameters_non_embedding) / REFERENCE_PARAMETERS)
    log_tokens = math.log(min(max(1.0, tokens), SHORT_TOKENS) / REFERENCE_TOKENS)
    return learned_loss(_means("races"), log_n, log_tokens, context_loss(shape.block_size), float(muon))


def large_batch_loss(tokens: float, batch_tokens: float) -> float:
    """Nats that steps of at least `batch_tokens` cost a training over `tokens`: 0 up to the best batch, beyond it as in
    `autotune.runs.curves.law_loss`, with the constants of recorded trainings below SHORT_TOKENS."""
    c = _means("races" if tokens < SHORT_TOKENS else "published")
    beyond = math.log(batch_tokens) - best_log_batch(c, math.log(max(1.0, tokens) / REFERENCE_TOKENS))
    return float(math.exp(c["batch_curve"]) * max(0.0, beyond) ** 2)


def best_log_batch(c: Mapping[str, float], log_tokens: T) -> T:
    """Logarithm of the best batch in tokens with constants `c`: a power of the training's tokens; numbers or arrays."""
    best: T = c["batch"] + c["batch_tokens"] * log_tokens
    return best


@functools.cache
def _means(name: str) -> dict[str, float]:
    """Means of constants in `curves.json`: `races`, those that recorded trainings left, or `published`."""
    return {constant: float(belief["mean"]) for constant, belief in read_json(CURVES)[name]["constants"].items()}


def learned_loss(c: Mapping[str, float], log_n: T, log_tokens: T, context: T, muon: T) -> T:
    """Loss with constants `c` at the best rate and batch; numbers or arrays. `log_n`, `log_tokens`: against
    REFERENCE_PARAMETERS and REFERENCE_TOKENS; `muon`: 1 for Muon, else 0.

    Size and a longer block show last: before, few tokens are what limits a training. Until then, Muon learns more from
    shorter blocks, of which a batch has more.
    """
    data: T = c["b"] * math.e ** (-(c["beta"] + c["beta_muon"] * muon) * log_tokens - c["muon"] * muon)
    size: T = c["a"] * math.e ** (-c["alpha"] * log_n)
    late: T = math.e**-data
    early: T = (1.0 - late) * c["context_muon"] * muon * context
    loss: T = c["e"] + c["muon_offset"] * muon + data + late * (context + size) + early
    return loss


def bounded(loss: T, untrained: T) -> T:
    """Soft minimum of a law's loss and of an untrained model's, ln(vocabulary); numbers or arrays.

    Power laws are unbounded: for the first million tokens they predict 30 nats. This keeps the order and changes losses
    below 5 by less than 0.002.
    """
    least: T = untrained * (1.0 + (untrained / loss) ** _SOFT) ** (-1 / _SOFT)
    return least


def context_loss(block_size: int) -> float:
    """What the length of a block adds to the loss, up to a constant."""
    return float(_POSITION_SCALE * block_size**-_POSITION_EXPONENT / (1.0 - _POSITION_EXPONENT))

"""Scaling laws: the final loss that published trainings predict for a shape and a number of tokens.

For ranking, and printed with its band.
"""

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from autotune.config.candidate import Shape
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


def predict_loss(law: Law, shape: Shape, tokens: float) -> float:
    """Predicted final loss in nats per token after `tokens`; for ranking only."""
    loss, untrained = raw_loss(law, shape, tokens), math.log(shape.vocab_size)
    return float(bounded(loss, untrained)) if untrained > 0 else loss


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

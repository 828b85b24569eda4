"""The seconds of an optimizer step, from what it computes and moves and from what a device can: a roofline.

Williams, Waterman and Patterson, Roofline, CACM 2009: a product of matrices takes as long as its FLOPs or as its bytes,
whichever is longer; what lies between products takes its bytes; every kernel costs its launch. Efficiencies
(`efficiencies.json`) say which fraction of the data sheet's rates training reaches.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from autotune.config.candidate import AUTOCAST, Candidate
from autotune.config.cards import Card
from autotune.config.tables import read_json, read_table
from autotune.kernels import registry
from autotune.memory.structure import matrix_elements, optimizer_bytes, tokens

REFERENCE_RATIO = 16.0
"""FLOP/s of half precision over those of float32 on an A100. It is 2 where accumulating in float32 halves the rate of
tensor cores, as on GeForce cards."""


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Rates of a device."""

    flops: Mapping[str, float]
    """FLOP/s of matrix products by dtype of the plan: bfloat16, float16, tfloat32, float32."""
    bytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """What training reaches of a device's rates."""

    products: float
    """Fraction of the peak FLOP/s."""
    traffic: float
    """Fraction of the bandwidth."""
    launch_seconds: float
    """Seconds of a kernel that has nothing to do."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where the efficiencies come from."""

    cuda: str
    cpu: str
    command: str


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """`efficiencies.json`, written by `scripts/fit_throughput`."""

    cuda: Efficiency
    """On a card whose tensor cores have REFERENCE_RATIO times the rate of its other cores."""
    ratio_exponent: float
    """Tensor cores that are slower, beside the rest of the card, are kept busy more easily: efficiency of products is
    multiplied by (REFERENCE_RATIO / the card's ratio) to this power."""
    log_half_width: float
    """Half width of the 95 % interval of log tokens/s."""
    cpu: Efficiency
    cpu_peaks: Peaks
    """One core; good for the order of plans, not for their speeds."""
    provenance: Provenance


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Predicted tokens/s."""

    tokens_per_second: float
    low: float
    """2.5 % bound."""
    high: float
    """97.5 % bound."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a device has to do in a micro step, or in an update."""

    products: tuple[tuple[float, float], ...] = ()
    """FLOPs and bytes of each group of equal matrix products."""
    bytes: float = 0.0
    """Moved between products."""
    kernels: float = 0.0


@functools.cache
def fitted() -> Fitted:
    path = Path(__file__).with_name("efficiencies.json")
    return read_table(Fitted, read_json(path), path.name)


def peaks_of(card: Card) -> Peaks:
    known = {
        "bfloat16": card.bfloat16_tflops, "float16": card.float16_tflops, "tfloat32": card.tfloat32_tflops,
        "float32": card.float32_tflops,
    }  # fmt: skip
    flops = {dtype: 1e12 * tflops for dtype, tflops in known.items() if tflops is not None}
    return Peaks(flops=flops, bytes_per_second=1e9 * card.gb_per_second)


def efficiency_of(card: Card, known: Fitted) -> Efficiency:
    ratio = card.float16_tflops / card.float32_tflops
    products = known.cuda.products * (REFERENCE_RATIO / ratio) ** known.ratio_exponent
    return replace(known.cuda, products=min(1.0, products))


def predict(card: Card, candidate: Candidate) -> Speed:
    """Tokens/s of `candidate` on a card that was not measured."""
    speed, factor = math.exp(log_speed(candidate, card)), math.exp(fitted().log_half_width)
    return Speed(tokens_per_second=speed, low=speed / factor, high=speed * factor)


def log_speed(candidate: Candidate, card: Card | None) -> float:
    """Logarithm of the predicted tokens/s; without a card that of one CPU core, for comparisons only."""
    known = fitted()
    if card is None:
        seconds = step_seconds(candidate, known.cpu_peaks, known.cpu)
    else:
        seconds = step_seconds(candidate, peaks_of(card), efficiency_of(card, known))
    return math.log(candidate.recipe.tokens_per_step / seconds)


def step_seconds(candidate: Candidate, peaks: Peaks, efficiency: Efficiency) -> float:
    """Seconds of one optimizer step. Products in a dtype that tensor cores lack run at float32's rate."""
    plan = candidate.plan
    dtype = "bfloat16" if plan.dtype == "bfloat16_residual" else plan.dtype
    rate = peaks.flops.get(dtype, peaks.flops["float32"]) * efficiency.products
    bandwidth = peaks.bytes_per_second * efficiency.traffic

    def seconds(work: Work) -> float:
        products = sum(max(flops / rate, moved / bandwidth) for flops, moved in work.products)
        return products + work.bytes / bandwidth + work.kernels * efficiency.launch_seconds

    return candidate.gradient_accumulation_steps * seconds(micro_step(candidate)) + seconds(update(candidate))


def micro_step(candidate: Candidate) -> Work:
    """Forward and backward of one micro batch."""
    shape, plan, count = candidate.shape, candidate.plan, tokens(candidate)
    width, layers, compiled = shape.n_embd, shape.n_layer, plan.compile != "off"
    again_matrices, again_rest = _recomputed(candidate)
    # operands of products; between blocks; gradients of weights
    a, r = (2 if plan.matrix_dtype in AUTOCAST else 4), (2 if plan.dtype == "bfloat16_residual" else 4)

    products = [_product(count, n, m, a, layers * (3 + again_matrices)) for n, m in _matrices(width)]
    # scores and weighted values: 2 products forward, 4 backward. All scores count, as in PaLM's convention: kernels
    # that skip the masked half reach about half the rate of a product
    scores = count * shape.n_head * shape.block_size * layers
    written = 8.0 * (a + 2) * scores if plan.attention == "sdpa_math" else 0.0
    products.append(((3 + again_matrices) * 4.0 * scores * shape.head_size, written))
    products.append(_product(count, width, shape.vocab_size, a, 4 if plan.loss == "cce" else 3))

    # (B, T, C) tensors between products; compilation fuses casts, norms, activations and additions
    forward, backward = (12 * a + 4 * r, 18 * a + 6 * r) if compiled else (12 * a + 6 * r + 16, 14 * a + 10 * r + 16)
    residual = count * width * layers * ((1 + again_rest) * forward + backward)
    # weights are cast from float32, their gradients added in float32
    weights = (matrix_elements(candidate) + shape.vocab_size * width) * (16.0 if a == 2 else 8.0)
    head = _head_bytes(candidate, a)
    chunks = -(-count // plan.loss_chunk_tokens) if registry.find("loss", plan.loss).chunked else 1
    kernels = layers * ((14 + 26 if compiled else 40 + 70) + 20 * again_rest) + 30 + 10 * chunks
    if plan.compile == "block":
        kernels += 4 * layers  # guards are checked for each block
    return Work(products=tuple(products), bytes=residual + weights + head, kernels=kernels)


def update(candidate: Candidate) -> Work:
    """Clipping and the optimizer's update."""
    shape = candidate.shape
    state = 2.0 * optimizer_bytes(candidate)  # read and written
    flops = 0.0
    if candidate.recipe.optimizer == "muon":  # five Newton-Schulz iterations of each matrix
        flops = sum(5.0 * min(n, m) ** 2 * (4.0 * max(n, m) + 2.0 * min(n, m)) for n, m in _matrices(shape.n_embd))
    # weights and gradients: read for the norm, scaled, read, written, cleared
    return Work(products=((shape.n_layer * flops, 0.0),), bytes=28.0 * shape.parameters + state, kernels=50.0)


def _matrices(width: int) -> tuple[tuple[int, int], ...]:
    """The matrices of a block."""
    return (width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)


def _product(rows: int, n: int, m: int, element: int, times: float) -> tuple[float, float]:
    """FLOPs and bytes of `times` products of (rows, n) and (n, m); those of the backward are as large."""
    return times * 2.0 * rows * n * m, times * float(element) * (rows * n + n * m + rows * m)


def _recomputed(candidate: Candidate) -> tuple[float, float]:
    """Shares of a forward's products, and of the rest of it, that the backward computes again."""
    plan = candidate.plan
    if plan.recomputed_every:
        share = -(-candidate.shape.n_layer // plan.recomputed_every) / candidate.shape.n_layer
        return share, share
    if plan.memory_budget is not None:  # what is cheap is given up first
        return max(0.0, 1.0 - 2.0 * plan.memory_budget), 1.0 - plan.memory_budget
    return 0.0, 1.0 if plan.activation_checkpointing == "selective" else 0.0


def _head_bytes(candidate: Candidate, a: int) -> float:
    """Bytes of logits and their gradient between products, and of the weight's gradient between chunks."""
    shape, plan, count = candidate.shape, candidate.plan, tokens(candidate)
    if plan.loss == "cce":  # logits stay on the chip
        return 0.0
    eager = plan.compile == "off" and plan.loss in ("full", "chunked")
    logits = float(count * shape.vocab_size) * (24 + 2 * a if eager else 4 * a)
    if not registry.find("loss", plan.loss).chunked:
        return logits
    chunks = -(-count // plan.loss_chunk_tokens)
    return logits + (chunks - 1) * (a + 8.0) * shape.vocab_size * shape.n_embd

"""A prediction of a candidate's peak memory from its structure, calibrated by measured trials.

The peak is the largest of a few moments of a step: while the loss is computed, while the head's gradient is
cast, at the end of the backward. What a moment holds is a sum: exact terms (weights, moments, gradients that
add up, batches) plus terms `coefficient x size`, such as 40 bytes an element of (tokens, n_layer, n_embd) for
compiled bfloat16 activations. The sizes follow from shape and plan. The coefficients are normal variables:
their priors come from measurements on one machine, and Bayesian linear regression moves them to what the
trials of this machine show (Bishop, Pattern Recognition and Machine Learning, 3.3). The model so knows how
sure it is: the interval is wide before calibration and narrow where much was measured.
"""

import functools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from autotune.config.candidate import AUTOCAST, Candidate, Plan, Shape, one_of
from autotune.config.tables import read_json, read_table
from autotune.environment import Environment
from autotune.errors import ConfigError
from autotune.files import write_atomically
from autotune.measure.types import TrialResult

Array = NDArray[np.float64]
T = TypeVar("T")

NOISE = 0.015
"""Relative scatter of a measured peak around the structure's formula, one standard deviation."""
ROUNDS = 12
"""Each round asks again which moment is the largest; it settles within a few, or stays between two of one size."""
CALIBRATED = 256
"""Measured trials that move the coefficients: the latest half of so many, and as many from all before."""
_REMEMBERED = 4096
"""Candidates whose moments are kept: those of all trials are needed after each trial."""

_MEASURED = ("ok", "over_limit")
_ON_CUDA = {
    "layer/low/compiled/none": 36.0, "layer/low/compiled/none/block": -1.6, "layer/narrow/compiled/none": 32.5,
    "layer/low/eager/none": 36.0, "layer/low/eager/selective": 25.5, "layer/narrow/eager/none": 35.0,
    "block/low/compiled/block/block": 7.0, "block/low/compiled/block/full": 4.0, "casts/compiled/block": 0.9,
    "block/low/eager/block/off": 10.0, "block/narrow/eager/block/off": 10.0, "logits/auto_chunker/low/compiled": 3.9,
    "head/full/low/compiled/block": 3.2, "head/full/low/compiled/full": 2.9, "logits/late/low": 0.7,
    "scores/low/compiled/selective/full": 5.0,
}  # fmt: skip
"""Means that are not the CPU's. Of torch 2.11's CUDA allocator, with the driver's calls answered by a stand-in that
runs no kernel: peaks follow from what is allocated, not from what is computed."""

_LIBRARIES = ("torch_linear_cross_entropy", "liger", "cce")
"""Losses with buffers of their own."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """`coefficient x size` bytes of a moment."""

    size: float
    """Elements (the coefficient is bytes an element) or bytes (the coefficient is a ratio)."""
    mean: float
    """Of the coefficient, before any trial."""
    sigma: float


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One instant of a step that may hold the peak."""

    exact: float
    """Bytes that need no coefficient."""
    terms: Mapping[str, Term]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A peak that was not measured."""

    peak_allocated_bytes: int
    peak_device_bytes: int
    """The peak as the card (or the resident size) would show it: what a limit is compared with."""
    low_device_bytes: int
    """2.5 % and 97.5 % bounds of it."""
    high_device_bytes: int


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """Those that trials have moved; others are their priors."""

    names: tuple[str, ...] = ()
    means: tuple[float, ...] = ()
    covariance: tuple[float, ...] = ()
    """Row by row."""

    @functools.cached_property
    def arrays(self) -> tuple[Mapping[str, int], Array, Array]:
        """Place by name, means (names,), covariance (names, names)."""
        count = len(self.names)
        index = {name: place for place, name in enumerate(self.names)}
        return index, np.array(self.means), np.array(self.covariance).reshape(count, count)


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """Coefficients and how sure they are; `calibrate` makes one, `predict` reads it."""

    device: str
    """`cpu` or `cuda`."""
    fingerprint: str = ""
    """Of the environment that the trials belong to; empty before calibration."""
    allocated: Coefficients = Coefficients()
    beyond: Coefficients = Coefficients()
    """What the device shows beyond the allocated bytes."""
    trials: int = 0
    """Measured ones behind the calibration; 0: priors only."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """Allocated peaks of the calibration, by candidate family and micro batch: for extrapolation."""

    @functools.cached_property
    def families(self) -> Mapping[str, Mapping[int, float]]:
        """The same by family, then by micro batch."""
        found: dict[str, dict[int, float]] = defaultdict(dict)
        for key, peak in self.measured.items():
            own, _, size = key.rpartition("@")
            found[own][int(size)] = peak
        return found


@functools.lru_cache(maxsize=_REMEMBERED)
def moments(candidate: Candidate, device: str) -> tuple[Moment, ...]:
    """What a step of `candidate` holds at the instants that can be its peak, on a `device` (`cpu` or `cuda`)."""
    shape, plan = candidate.shape, candidate.plan
    kind = ("low" if plan.matrix_dtype in AUTOCAST else "f32", "eager" if plan.compile == "off" else "compiled")
    steps = candidate.gradient_accumulation_steps
    tokens = plan.micro_batch_size * shape.block_size
    # with the gradients that later micro steps add to
    weights, batches = 4.0 * shape.parameters * (2.0 if steps > 1 else 1.0), 16.0 * tokens * min(steps, 4)
    state = weights + _optimizer_bytes(candidate) + batches
    body, end = _activations(candidate, tokens, kind), _backward_end(candidate, tokens, kind)
    if device == "cuda":  # cuBLAS's, counted as allocated: up to 32 MiB for each thread that multiplies
        body["workspaces"] = end["workspaces"] = Term(size=1e6, mean=80.0, sigma=40.0)
    found = [Moment(exact=state, terms={**body, **_head(candidate, tokens, kind)})]
    if plan.loss == "full" and not _late(plan):
        # logits are gone, the head's gradient exists twice: to be cast, or to be added
        twice = Term(size=shape.vocab_size * shape.n_embd, mean=8.0, sigma=1.0)
        found.append(Moment(exact=state, terms={**body, f"head twice/{kind[0]}/{plan.compile}": twice}))
    found.append(Moment(exact=state, terms=end))
    return tuple(found if device == "cpu" else map(_on_cuda, found))


def _on_cuda(moment: Moment) -> Moment:
    own = {name: replace(moment.terms[name], mean=mean) for name, mean in _ON_CUDA.items() if name in moment.terms}
    return replace(moment, terms={**moment.terms, **own})


def _late(plan: Plan) -> bool:
    """Inductor, given the whole model, computes the head's gradient last of all, and so keeps the logits till then."""
    return plan.loss == "full" and plan.compile == "full"


def _optimizer_bytes(candidate: Candidate) -> float:
    """Of the optimizer's state: two moments, for Muon one of the blocks' matrices."""
    shape = candidate.shape
    if candidate.recipe.optimizer == "muon":
        return 8.0 * shape.parameters - 4.0 * _matrices(shape, shape.n_layer)
    if candidate.recipe.optimizer == "adamw_8bit":
        return (2.0 + 8.0 / 256) * shape.parameters  # a byte an element, and two scales for 256 of them
    return 8.0 * shape.parameters


def _matrices(shape: Shape, layers: int) -> int:
    """Elements of the matrices of so many blocks."""
    return 12 * layers * shape.n_embd**2


def _activations(candidate: Candidate, tokens: int, kind: tuple[str, str]) -> dict[str, Term]:
    """Saved for the backward when the loss is computed: by blocks that keep what they need, and by those that
    are computed again as a whole."""
    shape, plan = candidate.shape, candidate.plan
    every = plan.recomputed_every
    again = 0 if every is None else -(-shape.n_layer // every)
    kept, keeps = shape.n_layer - again, "none" if every else plan.activation_checkpointing
    width = tokens * shape.n_embd
    narrow = plan.dtype == "bfloat16_residual"
    key = f"{'narrow' if narrow else kind[0]}/{kind[1]}"
    terms = {f"ends/{key}/{keeps if kept else 'block'}": Term(size=width, mean=8.0, sigma=4.0)}
    if kept:
        mean, sigma = _kept(plan, key)
        terms[f"layer/{key}/{keeps}"] = Term(size=width * kept, mean=mean, sigma=sigma)
        terms[f"layer/{key}/{keeps}/{plan.compile}"] = Term(size=width * kept, mean=0.0, sigma=0.375 * sigma)
        # Inductor, given the whole model, computes scores again in the backward
        scores = (0.0, 3.0) if plan.compile == "full" else (5.0, 2.0)
        terms |= _of_attention(candidate, tokens * shape.n_head * kept, scores, f"{key}/{keeps}/{plan.compile}")
        terms |= _casts(shape, kind, kept, keeps)
    if again:
        terms[f"inputs/{key}/block"] = Term(size=width * again, mean=2.0 if narrow else 4.0, sigma=0.3)
        terms |= _casts(shape, kind, again, "block")
    if again == shape.n_layer:  # else a block that keeps more than this is there before this one is computed again
        terms[f"block/{key}/block/{plan.compile}"] = Term(size=width, mean=40.0, sigma=20.0)
        terms |= _of_attention(candidate, tokens * shape.n_head, (5.0, 2.0), f"{key}/block/{plan.compile}")
    return terms


def _kept(plan: Plan, key: str) -> tuple[float, float]:
    """Bytes an element of (tokens, n_layer, n_embd), and how sure that is."""
    every = {  # with nothing computed again, and selectively
        "narrow/compiled": (37.0, 20.0), "low/compiled": (41.0, 22.0), "f32/compiled": (57.0, 44.0),
        "narrow/eager": (54.0, 30.0), "low/eager": (55.0, 31.0), "f32/eager": (67.0, 47.0),
    }  # fmt: skip
    none, selective = every[key]
    if plan.memory_budget is not None:  # what the partitioner makes of it is not monotone: nearly nothing is known
        return 6.0 + 0.7 * (none - 6.0) * plan.memory_budget, 0.3 * none
    return (selective if plan.activation_checkpointing == "selective" else none), 4.0


def _of_attention(candidate: Candidate, rows: int, scores: tuple[float, float], key: str) -> dict[str, Term]:
    """What attention keeps beside its output, for `rows` rows of scores."""
    if candidate.plan.attention != "sdpa_math":
        return {f"normalisers/{candidate.plan.attention}": Term(size=rows, mean=4.0, sigma=1.0)}
    return {f"scores/{key}": Term(size=rows * candidate.shape.block_size, mean=scores[0], sigma=scores[1])}


def _casts(shape: Shape, kind: tuple[str, str], layers: int, keeps: str) -> dict[str, Term]:
    """The matrices of so many blocks in the dtype of matrix products."""
    if kind[0] != "low":
        return {}
    return {f"casts/{kind[1]}/{keeps}": Term(size=_matrices(shape, layers), mean=2.0, sigma=0.5)}


def _loss_kind(plan: Plan) -> str:
    """Losses that hold the same tensors share their coefficients."""
    return "chunked" if plan.loss == "chunked_triton" else plan.loss


def _logit_rows(plan: Plan, tokens: int) -> int:
    """Of the logits, those that exist at one time."""
    return tokens if plan.loss == "full" else min(tokens, plan.loss_chunk_tokens)


def _head(candidate: Candidate, tokens: int, kind: tuple[str, str]) -> dict[str, Term]:
    """Logits and what stands beside them."""
    shape, plan = candidate.shape, candidate.plan
    dtype, mode = kind
    if plan.loss == "chunked_triton":  # its kernel is compiled in any plan
        mode = "compiled"
    if plan.loss in _LIBRARIES:  # a prior so wide that only trials can rule one out
        size = (tokens + shape.vocab_size) * shape.n_embd
        return {f"head/{plan.loss}/{dtype}/{mode}": Term(size=size, mean=8.0, sigma=8.0)}
    chunked = plan.loss != "full"
    rows = _logit_rows(plan, tokens)
    key = f"{_loss_kind(plan)}/{dtype}/{mode}"
    itemsize = 2.0 if dtype == "low" else 4.0
    eager = 10.0 if chunked and dtype == "low" else 12.0  # log-softmax, its gradient and the gradient before it
    logits = itemsize if mode == "compiled" else eager
    beside = _beside_logits(plan, dtype == "low")
    return {
        f"logits/{key}": Term(size=rows * shape.vocab_size, mean=logits, sigma=1.0),
        f"head/{key}/{plan.compile}": Term(size=shape.vocab_size * shape.n_embd, mean=beside, sigma=1.0),
    }


def _beside_logits(plan: Plan, low: bool) -> float:
    """Bytes an element of the head's weight: its cast, its gradient, while logits exist."""
    if plan.loss != "full":
        return 6.5 if low else 4.5
    if plan.compile == "block":
        return 4.5
    return 2.0 if low else 0.0


def _backward_end(candidate: Candidate, tokens: int, kind: tuple[str, str]) -> dict[str, Term]:
    """New gradients: all of them where a whole graph returns them at once, or none was there to add to."""
    shape, plan = candidate.shape, candidate.plan
    accumulates = candidate.gradient_accumulation_steps > 1
    steps = "several" if accumulates else "one"
    whole = 4.0 if plan.compile == "full" or not accumulates else 0.0
    late = f"/late/{kind[0]}" if _late(plan) else ""
    embedding = 4.0 if plan.loss == "full" and not late else 8.0
    if not accumulates and not late and (plan.loss == "full" or plan.compile == "off"):
        embedding += 4.0
    terms = {
        f"embedding gradient/{_loss_kind(plan)}/{plan.compile}/{steps}{late}": Term(
            size=shape.vocab_size * shape.n_embd, mean=embedding, sigma=1.0
        ),
        f"matrix gradients/{plan.compile}/{steps}": Term(size=_matrices(shape, shape.n_layer), mean=whole, sigma=0.3),
        f"end/{'/'.join(kind)}": Term(size=tokens * shape.n_embd, mean=8.0, sigma=4.0),
    }
    if late:
        itemsize = 2.0 if kind[0] == "low" else 4.0
        terms[f"logits{late}"] = Term(size=tokens * shape.vocab_size, mean=itemsize, sigma=0.5)
    return terms


def calibrate(
    device: str, trials: Iterable[tuple[Candidate, TrialResult]], environment: Environment | None = None
) -> MemoryModel:
    """The priors moved to what `trials` measured; those without a measured peak are left out."""
    every = [(c, r, float(peak)) for c, r in trials if r.status in _MEASURED and (peak := r.peak("allocated_bytes"))]
    data = _bounded(every)
    more = [(c, peak, whole - peak) for c, r, peak in data if (whole := r.peak("device_bytes")) is not None]
    return MemoryModel(
        device=device,
        fingerprint=environment.fingerprint if environment else "",
        allocated=_regression([(moments(c, device), peak, NOISE * peak) for c, _, peak in data]),
        beyond=_regression([([beyond(c, device)], rest, _beyond_noise(c, device, peak)) for c, peak, rest in more]),
        trials=len(every),
        measured={f"{family(c)}@{c.plan.micro_batch_size}": peak for c, _, peak in every},
    )


def _bounded(every: list[T]) -> list[T]:
    """At most CALIBRATED of them, so that calibrating does not take longer and longer."""
    if len(every) <= CALIBRATED:
        return every
    before, latest = every[: -CALIBRATED // 2], every[-CALIBRATED // 2 :]
    wanted = min(len(before), CALIBRATED // 2)
    return [before[i * len(before) // wanted] for i in range(wanted)] + latest


def _regression(data: Sequence[tuple[Sequence[Moment], float, float]]) -> Coefficients:
    """Of (a candidate's moments, what was measured of the largest, its standard deviation)."""
    if not data:
        return Coefficients()
    found = [moment for own, _, _ in data for moment in own]
    terms = {name: term for moment in found for name, term in moment.terms.items()}
    names = tuple(sorted(terms))
    sizes, exact, _ = _table(found, {name: place for place, name in enumerate(names)})
    owner = np.repeat(np.arange(len(data)), [len(own) for own, _, _ in data])  # (moments,): the candidate of each
    prior = np.array([terms[name].mean for name in names])
    precision = np.diag([terms[name].sigma ** -2.0 for name in names])
    peaks = np.array([peak for _, peak, _ in data])
    weights = np.array([sigma**-2.0 for _, _, sigma in data])

    def largest(means: Array) -> NDArray[np.intp]:
        """Of each candidate the moment that is then the largest: sorted by candidate, then by bytes, the last one."""
        order: NDArray[np.intp] = np.lexsort((exact + sizes @ means, owner))
        return np.compress(np.append(np.diff(owner) > 0, True), order)

    means: Array = prior
    for _ in range(ROUNDS):
        chosen = largest(means)
        rows = sizes[chosen]
        covariance = np.linalg.inv(precision + rows.T @ (rows * weights[:, None]))
        update = covariance @ (precision @ prior + rows.T @ (weights * (peaks - exact[chosen])))
        if np.array_equal(largest(update), chosen):
            means = update
            break
        means = 0.5 * (means + update)  # damped, or two moments of one size would take turns for ever
    return Coefficients(names=names, means=tuple(means.tolist()), covariance=tuple(covariance.ravel().tolist()))


def _table(found: Sequence[Moment], index: Mapping[str, int]) -> tuple[Array, Array, Array]:
    """Of moments: sizes (moments, names) of the terms that `index` knows; bytes that need none of these coefficients
    (moments,), which are the exact ones and other terms by their priors; and the variance of the latter."""
    sizes = np.zeros((len(found), len(index)))
    rows, columns, values = [], [], []
    exact, variance = [moment.exact for moment in found], [0.0] * len(found)
    for row, moment in enumerate(found):
        for name, term in moment.terms.items():
            if (column := index.get(name)) is not None:
                rows.append(row)
                columns.append(column)
                values.append(term.size)
            else:
                exact[row] += term.size * term.mean
                variance[row] += (term.size * term.sigma) ** 2
    sizes[rows, columns] = values
    return sizes, np.array(exact), np.array(variance)


def beyond(candidate: Candidate, device: str) -> Moment:
    """What the device shows beyond the allocated bytes: the process itself and its libraries; on CUDA also what the
    allocator cannot use, as smaller tensors lie in the blocks that the largest ones, logits, have left."""
    if device == "cpu":
        return Moment(exact=0.0, terms={"process": Term(size=1e6, mean=450.0, sigma=400.0)})
    plan, logits = candidate.plan, _low_logits(candidate)
    key = f"unused/{plan.allocator}/{'full' if plan.loss == 'full' else 'chunked'}"
    own = f"{key}/{plan.compile}/{plan.activation_checkpointing}"
    return Moment(exact=0.0, terms={
        "context": Term(size=1e6, mean=650.0, sigma=150.0),
        key: Term(size=logits, mean=0.6, sigma=0.4),
        own: Term(size=logits, mean=0.0, sigma=0.4),
    })  # fmt: skip


def _beyond_noise(candidate: Candidate, device: str, allocated: float) -> float:
    """Standard deviation of that, bytes: how blocks come to lie is hardly foreseen."""
    if device == "cpu":
        return math.hypot(16e6, 0.02 * allocated)
    return math.hypot(50e6, 0.2 * _low_logits(candidate))


def _low_logits(candidate: Candidate) -> float:
    """Bytes of the logits that exist at one time, in two bytes each."""
    tokens = candidate.plan.micro_batch_size * candidate.shape.block_size
    return 2.0 * _logit_rows(candidate.plan, tokens) * candidate.shape.vocab_size


def predict(model: MemoryModel, candidate: Candidate) -> Prediction:
    """The peak of `candidate`, and how sure that is."""
    return predictions(model, [candidate])[0]


def predictions(model: MemoryModel, candidates: Sequence[Candidate]) -> list[Prediction]:
    """Their peaks, and how sure those are.

    Where two or more micro batches of the same shape and plan were measured, the peak is extrapolated from the
    two nearest (memory is affine in the micro batch); otherwise it comes from the structure.
    """
    structure = _largest(model.allocated, [moments(candidate, model.device) for candidate in candidates])
    rest = _largest(model.beyond, [[beyond(candidate, model.device)] for candidate in candidates])
    found = []
    for candidate, (total, unsure), (more, scatter) in zip(candidates, structure, rest, strict=True):
        allocated, sigma = _from_neighbours(model, candidate) or (total, math.hypot(unsure, NOISE * total))
        noise = _beyond_noise(candidate, model.device, allocated)
        device, spread = allocated + more, 1.96 * math.hypot(sigma, scatter, noise)
        found.append(
            Prediction(
                peak_allocated_bytes=round(allocated),
                peak_device_bytes=round(device),
                low_device_bytes=round(device - spread),
                high_device_bytes=round(device + spread),
            )
        )
    return found


def _largest(known: Coefficients, found: Sequence[Sequence[Moment]]) -> list[tuple[float, float]]:
    """For each candidate's moments: bytes of the largest one, and their standard deviation as far as the coefficients
    are unsure."""
    index, means, covariance = known.arrays
    sizes, totals, variance = _table([moment for own in found for moment in own], index)
    totals = totals + sizes @ means
    variance = variance + ((sizes @ covariance) * sizes).sum(1)
    each = iter(zip(totals.tolist(), np.sqrt(variance).tolist(), strict=True))
    return [max(next(each) for _ in own) for own in found]


@functools.lru_cache(maxsize=_REMEMBERED)
def family(candidate: Candidate) -> str:
    """Equal for candidates that differ in nothing but the micro batch (and in whether it accumulates not at all)."""
    plan = replace(candidate.plan, micro_batch_size=1)
    accumulates = candidate.gradient_accumulation_steps > 1
    return json.dumps([vars(candidate.shape), vars(plan), candidate.recipe.optimizer, accumulates], sort_keys=True)


def _from_neighbours(model: MemoryModel, candidate: Candidate) -> tuple[float, float] | None:
    known = model.families.get(family(candidate), {})
    size = candidate.plan.micro_batch_size
    if size in known:
        return known[size], NOISE / 6 * known[size]
    if len(known) < 2:
        return None
    near, far = sorted(known, key=lambda other: abs(other - size))[:2]
    slope = (known[far] - known[near]) / (far - near)
    allocated = known[near] + slope * (size - near)
    # a kink between moments may lie further out: the further, the less sure
    return allocated, allocated * NOISE * (0.5 + abs(size - near) / max(near, far))


def save(model: MemoryModel, path: Path) -> None:
    write_atomically(path, json.dumps(asdict(model), indent=1) + "\n")


_LARGEST_FIGURE = 1e18
"""In a file: products of three of them are finite."""


def load(path: Path) -> MemoryModel:
    """Raises ConfigError for a file that is missing or not a memory model."""
    advice = "give a run, or the memory_model.json that a search writes"
    model = read_table(MemoryModel, read_json(path, advice), path.name)
    one_of(f"{path.name}.device", model.device, ("cpu", "cuda"))
    for name, known in (("allocated", model.allocated), ("beyond", model.beyond)):
        count, figures = len(known.names), (*known.means, *known.covariance)
        if (len(known.means), len(known.covariance)) != (count, count**2) or len(set(known.names)) != count:
            raise ConfigError(f"{path} is damaged: {name} has not one mean and one row of covariance a name; {advice}")
        if any(abs(figure) > _LARGEST_FIGURE for figure in figures):
            raise ConfigError(f"{path} is damaged: {name} has a figure beyond {_LARGEST_FIGURE:.0e}; {advice}")
    if any(abs(peak) > _LARGEST_FIGURE for peak in model.measured.values()):
        raise ConfigError(f"{path} is damaged: measured has a peak beyond {_LARGEST_FIGURE:.0e}; {advice}")
    return model

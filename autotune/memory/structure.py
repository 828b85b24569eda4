"""What a training step holds when its memory use is largest: sizes from shape and plan, no measured numbers.

A step has up to three peak points: while the loss is computed, while the head's gradient exists twice, and at the end
of the backward. Each holds exact bytes (weights, optimizer state, accumulated gradients, batches) plus
`coefficient x size` for everything else, such as bytes per element of (tokens, n_layer, n_embd) activations.
`DEPENDS` lists the choices that each coefficient depends on. Values come from `autotune.memory.priors` and from trials.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autotune.config.candidate import AUTOCAST, Candidate, Shape

Array = NDArray[np.float64]
Arrays = tuple[Array, Array]
"""Exact bytes (points,), and sizes (points, keys)."""
Sizes = Iterator[tuple["Key", float]]


class Key(NamedTuple):
    """Name of a coefficient: what it multiplies, and the choices it depends on (empty: on any of them)."""

    kind: str
    dtype: str = ""
    residual: str = ""
    mode: str = ""
    compile: str = ""
    recompute: str = ""
    loss: str = ""
    library: str = ""
    accumulation: str = ""
    allocator: str = ""

    def __str__(self) -> str:
        """As files write it: `layer dtype=half residual=half recompute=none`."""
        return " ".join([self.kind.replace(" ", "_"), *(f"{name}={value}" for name, value in self.choices.items())])

    @property
    def choices(self) -> Mapping[str, str]:
        """The fields that are set, without the kind."""
        return {name: value for name, value in self._asdict().items() if value and name != "kind"}


VALUES = {
    "dtype": ("half", "float32"),  # operands of matrix products
    "residual": ("half", "float32"),  # what passes from block to block
    "mode": ("eager", "compiled"),
    "compile": ("off", "block", "full"),
    "recompute": ("none", "selective", "budget", "block"),
    "loss": ("full", "chunked", "auto_chunker"),
    "library": ("torch_linear_cross_entropy", "liger", "cce"),  # losses with buffers of their own
    "accumulation": ("one", "several"),  # micro steps per optimizer step
    "allocator": ("default", "expandable_segments"),
}
"""Values of a key's fields."""

DEPENDS: Mapping[str, tuple[str, ...]] = {
    "layer": ("dtype", "residual", "mode", "recompute"),
    "budget floor": (),
    "ends": (),
    "block inputs": ("residual",),
    "attention rows": (),
    "scores": ("dtype", "compile", "recompute"),
    "casts": ("recompute",),
    "logits": ("dtype", "mode", "loss"),
    "head": ("dtype", "compile", "loss"),
    "library head": ("dtype", "library"),
    "head gradient twice": (),
    "embedding gradient": ("compile", "accumulation"),
    "kept logits": ("dtype",),
    "matrix gradients": ("compile", "accumulation"),
    "backward end": (),
    "workspaces": (),
    "process": ("compile",),
    "context": (),
    "unused": ("compile", "loss", "allocator"),
}
"""Kinds of coefficients, and the choices that each depends on. Dependences that did not lower the error under
cross-validation (`scripts/fit_priors --check`) were removed."""

OVERHEAD = {"cpu": ("process",), "cuda": ("context", "unused")}
"""Kinds, by device, of what the device shows beyond the allocated bytes."""
_ABSENT = {"cpu": ("workspaces",), "cuda": ()}


def keys(device: str) -> tuple[tuple[Key, ...], tuple[Key, ...]]:
    """All coefficients of the allocated bytes, and all of the overhead."""
    others = {*itertools.chain(*OVERHEAD.values()), *_ABSENT[device]}
    return _keys(kind for kind in DEPENDS if kind not in others), _keys(OVERHEAD[device])


def _keys(kinds: Iterable[str]) -> tuple[Key, ...]:
    found = (
        Key(kind, **dict(zip(DEPENDS[kind], values, strict=True)))
        for kind in kinds
        for values in itertools.product(*(VALUES[name] for name in DEPENDS[kind]))
    )
    return tuple(filter(_reached, found))


def _reached(key: Key) -> bool:
    """Whether any candidate has this combination of choices."""
    kept = key.kind in ("layer", "scores")
    return not (kept and key.recompute == "block") and (key.dtype, key.residual) != ("float32", "half")


POINTS = 4
"""Most peak points of a step."""


@dataclass(frozen=True, kw_only=True)
class PeakPoint:
    """A point in a step at which its memory use may be largest."""

    exact: float
    """Bytes that need no coefficient."""
    sizes: Mapping[Key, float]
    """What each coefficient multiplies: elements (then it is bytes per element) or bytes (then a ratio)."""


def peak_points(candidate: Candidate, device: str) -> tuple[PeakPoint, ...]:
    """Allocated bytes at the peak points of a step of `candidate` on a `device` (`cpu` or `cuda`)."""
    step = _Step(candidate)
    shape, plan, steps = candidate.shape, candidate.plan, candidate.gradient_accumulation_steps
    # weights, and the gradients that later micro steps add to; int64 tokens and targets
    state = 4.0 * shape.parameters * (2 if steps > 1 else 1) + optimizer_bytes(candidate)
    state += 16.0 * step.tokens * min(steps, 4)
    # memory of cuBLAS, counted as allocated: up to 32 MiB for each thread that multiplies
    shared = {Key("workspaces"): 1e6} if device == "cuda" else {}
    body = {**shared, **dict(step.activations())}
    points = [PeakPoint(exact=state, sizes={**body, **dict(step.head())})]
    if plan.loss == "full" and not step.late:
        # logits are freed; the head's gradient exists twice, to be cast or added
        points.append(PeakPoint(exact=state, sizes={**body, Key("head gradient twice"): step.head_elements}))
    if plan.recomputed_every == 1:
        # a block is computed again; the head's gradient waits for the token embedding's, which is the same tensor
        again = {**body, **dict(step.block(1, "none"))}
        points.append(PeakPoint(exact=state + 4.0 * step.head_elements, sizes=again))
    points.append(PeakPoint(exact=state, sizes={**shared, **dict(step.backward_end())}))
    return tuple(points)


def arrays(points: Sequence[PeakPoint], place: Mapping[Key, int]) -> Arrays:
    """Points as arrays; a point that a step does not have holds nothing. Raises KeyError for a key without a place."""
    exact, sizes = np.zeros(POINTS), np.zeros((POINTS, len(place)))
    for i, point in enumerate(points):
        exact[i] = point.exact
        for key, size in point.sizes.items():
            sizes[i, place[key]] = size
    return exact, sizes


def overhead(candidate: Candidate, device: str) -> PeakPoint:
    """What the device shows beyond the allocated bytes: the process and its libraries; on CUDA also what the allocator
    cannot use, since smaller tensors lie in the blocks that the largest ones, logits, have left."""
    step = _Step(candidate)
    if device == "cpu":
        return PeakPoint(exact=0.0, sizes={step.key("process"): 1e6})
    return PeakPoint(exact=0.0, sizes={Key("context"): 1e6, step.key("unused"): half_logits_bytes(candidate)})


def half_logits_bytes(candidate: Candidate) -> float:
    """Bytes of the logits that exist at one time, at two bytes per element."""
    step = _Step(candidate)
    return 2.0 * step.logit_rows * candidate.shape.vocab_size


def optimizer_bytes(candidate: Candidate) -> float:
    """Bytes of the optimizer state: two moments per parameter; Muon has one for the blocks' matrices."""
    shape = candidate.shape
    if candidate.recipe.optimizer == "muon":
        return 8.0 * shape.parameters - 4.0 * matrix_elements(shape)
    if candidate.recipe.optimizer == "adamw_8bit":
        return (2.0 + 8.0 / 256) * shape.parameters  # one byte per element, and two scales per 256 of them
    return 8.0 * shape.parameters


def matrix_elements(shape: Shape, layers: int | None = None) -> int:
    """Elements of the matrices of `layers` blocks (default: all)."""
    return 12 * (shape.n_layer if layers is None else layers) * shape.n_embd**2


@dataclass(frozen=True)
class _Step:
    """Sizes of one candidate's step: each method yields coefficients with what they multiply."""

    candidate: Candidate

    def key(self, kind: str, **other: str) -> Key:
        """The coefficient of that kind under this candidate's choices, or `other` ones."""
        choices = {**self.choices, **other}
        return Key(kind, **{name: choices[name] for name in DEPENDS[kind]})

    @functools.cached_property
    def choices(self) -> Mapping[str, str]:
        plan = self.candidate.plan
        recompute = "block" if plan.recomputed_every else plan.activation_checkpointing
        return {
            "dtype": "half" if plan.matrix_dtype in AUTOCAST else "float32",
            "residual": "half" if plan.dtype == "bfloat16_residual" else "float32",
            "mode": "eager" if plan.compile == "off" else "compiled",
            "compile": plan.compile,
            "recompute": recompute if plan.memory_budget is None else "budget",
            "loss": plan.loss if plan.loss in VALUES["loss"] else "chunked",
            "library": plan.loss,
            "accumulation": "several" if self.candidate.gradient_accumulation_steps > 1 else "one",
            "allocator": plan.allocator,
        }

    @property
    def tokens(self) -> int:
        """Tokens of a micro batch."""
        return self.candidate.plan.micro_batch_size * self.candidate.shape.block_size

    @property
    def residual_elements(self) -> int:
        """Elements of (tokens, n_embd)."""
        return self.tokens * self.candidate.shape.n_embd

    @property
    def head_elements(self) -> int:
        """Elements of the head's weight, which is the token embedding too."""
        return self.candidate.shape.vocab_size * self.candidate.shape.n_embd

    @property
    def logit_rows(self) -> int:
        """Rows of the logits that exist at one time."""
        plan = self.candidate.plan
        return self.tokens if plan.loss == "full" else min(self.tokens, plan.loss_chunk_tokens)

    @property
    def late(self) -> bool:
        """Inductor, given the whole model, computes the head's gradient last and keeps the logits until then."""
        return self.candidate.plan.loss == "full" and self.candidate.plan.compile == "full"

    def activations(self) -> Sizes:
        """What is saved for the backward when the loss is computed: by blocks that keep what they need (`kept`), and
        by blocks that keep their input only (`again`)."""
        layers, plan = self.candidate.shape.n_layer, self.candidate.plan
        again = -(-layers // plan.recomputed_every) if plan.recomputed_every else 0
        kept, recompute = layers - again, "none" if plan.recomputed_every else self.choices["recompute"]
        yield self.key("ends"), self.residual_elements
        if kept:  # they need more than one block that is computed again
            yield from self.block(kept, recompute)
            yield from self.casts(kept, recompute)
        if plan.memory_budget is not None:
            yield self.key("budget floor"), self.residual_elements * layers
        if again:
            yield self.key("block inputs"), self.residual_elements * again
            yield from self.casts(again, "block")

    def block(self, layers: int, recompute: str) -> Sizes:
        """What blocks keep for their backward; of attention, besides its output: one number per row, or the scores."""
        shape, plan = self.candidate.shape, self.candidate.plan
        part = 1.0 if plan.memory_budget is None else plan.memory_budget
        yield self.key("layer", recompute=recompute), self.residual_elements * layers * part
        rows = self.tokens * shape.n_head * layers
        if plan.attention == "sdpa_math":
            yield self.key("scores", recompute=recompute), rows * shape.block_size
        else:
            yield self.key("attention rows"), rows

    def casts(self, layers: int, recompute: str) -> Sizes:
        """Copies of the blocks' matrices in the dtype of matrix products."""
        if self.choices["dtype"] == "half":
            yield self.key("casts", recompute=recompute), matrix_elements(self.candidate.shape, layers)

    def head(self) -> Sizes:
        """Logits, and what exists besides them: the cast of the head's weight, its gradient."""
        plan, shape = self.candidate.plan, self.candidate.shape
        if plan.loss in VALUES["library"]:
            yield self.key("library head"), self.residual_elements + self.head_elements
            return
        mode = "compiled" if plan.loss == "chunked_triton" else self.choices["mode"]  # its kernel always is
        yield self.key("logits", mode=mode), self.logit_rows * shape.vocab_size
        yield self.key("head"), self.head_elements

    def backward_end(self) -> Sizes:
        """New gradients: all of them where a whole graph returns them at once, or none existed to add to."""
        shape = self.candidate.shape
        yield self.key("embedding gradient"), self.head_elements
        yield self.key("matrix gradients"), matrix_elements(shape)
        yield self.key("backward end"), self.residual_elements
        if self.late:
            yield self.key("kept logits"), self.tokens * shape.vocab_size

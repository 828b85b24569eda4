"""What a training step holds when its memory use is largest: sizes from shape and plan, no measured numbers.

A step has up to five peak points: while the loss is computed, while the head's gradient exists twice, while a block is
computed again, at the end of the backward, and while the optimizer updates weights. Each holds exact bytes (weights,
optimizer state, accumulated gradients, batches) plus `coefficient x size` for everything else, such as bytes per
element of (tokens, n_layer, n_embd) activations. Coefficients come from `autotune.memory.priors` and from trials.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autotune.config.candidate import AUTOCAST, Candidate, Plan
from autotune.kernels import registry

Array = NDArray[np.float64]
Arrays = tuple[Array, Array]
"""Exact bytes (points,), and sizes (points, keys)."""


class Key(NamedTuple):
    """Name of a coefficient: what it multiplies, and the choices it depends on (empty: on none of them)."""

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
        """As files write it: `layer dtype=half residual=half mode=eager recompute=none`."""
        choices = zip(self._fields[1:], self[1:], strict=True)
        return " ".join([self.kind.replace(" ", "_"), *(f"{name}={value}" for name, value in choices if value)])


VALUES = {
    "dtype": ("half", "float32"),  # operands of matrix products
    "residual": ("half", "float32"),  # what passes from block to block
    "mode": ("eager", "compiled"),
    "compile": ("off", "block", "full"),
    "recompute": ("none", "selective", "budget"),  # of blocks that keep more than their input
    "loss": ("full", "chunked", "auto_chunker"),
    "library": ("torch_linear_cross_entropy", "liger", "cce"),  # losses with buffers of their own
    "accumulation": ("one", "several"),  # micro steps per optimizer step
    "allocator": ("default", "expandable_segments"),
}
"""Values of a key's fields."""

DEPENDS: Mapping[str, tuple[str, ...]] = {
    "layer": ("dtype", "residual", "mode", "recompute"), "budget floor": (), "ends": (), "block inputs": ("residual",),
    "attention rows": (), "scores": ("dtype", "compile", "recompute"), "casts": (),
    "logits": ("dtype", "mode", "loss"), "head": ("dtype", "compile", "loss"), "library head": ("dtype", "library"),
    "head gradient twice": (), "embedding gradient": ("compile", "accumulation"), "kept logits": ("dtype",),
    "matrix gradients": ("compile", "accumulation"), "backward end": (), "workspaces": (),
    "process": ("compile",), "context": (), "unused": ("loss", "allocator"),
}  # fmt: skip
"""Kinds of coefficients, and the choices that each depends on. Dependences that did not lower the error under
cross-validation (`scripts/fit_priors --check`) were removed."""

def settled(plan: Plan) -> bool:
    """Whether the sums below describe the plan well: not what a partitioner keeps within a memory budget, which is not
    monotone in it, nor the buffers of a library's loss."""
    return plan.memory_budget is None and plan.loss not in VALUES["library"]


_ABSENT = {"cpu": ("workspaces", "context", "unused"), "cuda": ("process",)}


@functools.cache
def keys(device: str) -> Mapping[Key, int]:
    """All coefficients on a `device` (`cpu` or `cuda`), with their places in arrays."""
    every = [
        Key(kind, **dict(zip(names, values, strict=True)))
        for kind, names in DEPENDS.items()
        for values in itertools.product(*(VALUES[name] for name in names))
        if kind not in _ABSENT[device]
    ]
    found = [key for key in every if (key.dtype, key.residual) != ("float32", "half")]  # no such plan
    return {key: place for place, key in enumerate(found)}


POINTS = 5
"""Most peak points of a step."""


@dataclass(frozen=True, kw_only=True)
class PeakPoint:
    """A point in a step at which its memory use may be largest."""

    exact: float
    """Bytes that need no coefficient."""
    sizes: Mapping[Key, float]
    """What each coefficient multiplies: elements (then it is bytes per element) or bytes (then a ratio)."""


def peak_points(candidate: Candidate, device: str) -> tuple[PeakPoint, ...]:
    """Allocated bytes at the peak points of a step on a `device` (`cpu` or `cuda`); the optimizer's is the last."""
    shape, plan, steps = candidate.shape, candidate.plan, candidate.gradient_accumulation_steps
    key, head, count = functools.partial(_key, candidate), shape.vocab_size * shape.n_embd, tokens(candidate)
    # weights, and the gradients that later micro steps add to; int64 tokens and targets
    kept = weight_bytes(candidate) + optimizer_bytes(candidate) + 16.0 * count * min(steps, 4)
    gradients = weight_bytes(candidate)
    state = kept + (gradients if _adds_gradients(candidate) else 0.0) + gathered_bytes(candidate)
    body = _activations(candidate)
    end: dict[Key, float] = {key("embedding gradient"): head, key("matrix gradients"): matrix_elements(candidate)}
    end[key("backward end")] = count * shape.n_embd
    points = [(state, body | _head(candidate)), (state, end)]
    whole = _whole_logits(candidate)
    if whole and plan.compile == "full":
        # Inductor, given the whole model, computes the head's gradient last and keeps the logits until then
        end[key("kept logits")] = count * shape.vocab_size
    elif whole:  # logits are freed; the head's gradient exists twice, to be cast or added
        points.append((state, body | {key("head gradient twice"): head}))
    if plan.recomputed_every == 1:  # the head's gradient waits for the token embedding's, which is the same tensor
        points.append((state + 4.0 * head, body | _blocks(candidate, 1, "none")))
    points.append((kept + gradients + update_bytes(candidate, device), {}))
    # memory of cuBLAS, counted as allocated: up to 32 MiB for each thread that multiplies
    shared = {key("workspaces"): 1e6} if device == "cuda" else {}
    return tuple(PeakPoint(exact=exact, sizes=sizes | shared) for exact, sizes in points)


def overhead(candidate: Candidate, device: str) -> PeakPoint:
    """What the device shows beyond the allocated bytes: the process and its libraries; on CUDA also what the allocator
    cannot use, since smaller tensors lie in the blocks that the largest ones, logits, have left."""
    if device == "cpu":
        return PeakPoint(exact=0.0, sizes={_key(candidate, "process"): 1e6})
    sizes = {_key(candidate, "context"): 1e6, _key(candidate, "unused"): logits_bytes(candidate)}
    return PeakPoint(exact=0.0, sizes=sizes)


def arrays(points: Sequence[PeakPoint], device: str) -> Arrays:
    """Points as arrays; a point that a step does not have holds nothing."""
    place = keys(device)
    exact, sizes = np.zeros(POINTS), np.zeros((POINTS, len(place)))
    for i, point in enumerate(points):
        exact[i] = point.exact
        for key, size in point.sizes.items():
            sizes[i, place[key]] = size
    return exact, sizes


def tokens(candidate: Candidate) -> int:
    """Tokens of a micro batch."""
    return candidate.plan.micro_batch_size * candidate.shape.block_size


def half_logits_bytes(candidate: Candidate) -> float:
    """Bytes of the logits that exist at one time, at two bytes per element."""
    rows = min(tokens(candidate), candidate.plan.loss_chunk_tokens)
    return 2.0 * (tokens(candidate) if _whole_logits(candidate) else rows) * candidate.shape.vocab_size


def logits_bytes(candidate: Candidate) -> float:
    """The same in the dtype of matrix products."""
    return half_logits_bytes(candidate) * (1 if candidate.plan.matrix_dtype in AUTOCAST else 2)


def _whole_logits(candidate: Candidate) -> bool:
    """Whether the logits of all tokens exist at one time."""
    loss = candidate.plan.loss
    return loss not in VALUES["library"] and not registry.find("loss", loss).chunked


def weight_bytes(candidate: Candidate) -> float:
    """Bytes of the weights that a process keeps."""
    return 4.0 * candidate.shape.parameters / (candidate.plan.processes if candidate.plan.sharding == "full" else 1)


def gathered_bytes(candidate: Candidate) -> float:
    """Bytes of divided weights that forward and backward need whole: embeddings and last norm throughout, and the block
    that is computed."""
    if candidate.plan.sharding != "full":
        return 0.0
    shape = candidate.shape
    blocks = shape.parameters_non_embedding / shape.n_layer
    return 4.0 * (shape.parameters - shape.parameters_non_embedding + blocks)


def _adds_gradients(candidate: Candidate) -> bool:
    """Whether a micro step adds to gradients that exist: those of the micro step before, or of replicas, which keep the
    memory in which they are summed."""
    replicas = candidate.plan.processes > 1 and candidate.plan.sharding != "full"
    return replicas or candidate.gradient_accumulation_steps > 1


def optimizer_bytes(candidate: Candidate) -> float:
    """Bytes of the optimizer state of a process."""
    divided = candidate.plan.processes if candidate.plan.sharding != "none" else 1
    return _whole_optimizer_bytes(candidate) / divided


def _whole_optimizer_bytes(candidate: Candidate) -> float:
    """Two moments per parameter; Muon has one for the blocks' matrices."""
    parameters = candidate.shape.parameters
    if candidate.recipe.optimizer == "muon":
        return 8.0 * parameters - 4.0 * matrix_elements(candidate)
    if candidate.recipe.optimizer == "adamw_8bit":
        return (2.0 + 8.0 / 256) * parameters  # one byte per element, and two scales per 256 of them
    return 8.0 * parameters


def update_bytes(candidate: Candidate, device: str) -> float:
    """Bytes that the optimizer allocates for the update of one weight and frees again. Fused AdamW and the 8-bit one
    write in place. Muon orthogonalises the largest matrix, (4 n_embd, n_embd). On the CPU: two copies of it and a
    product (n_embd, n_embd) in float32; on a card: its update in float32 and a copy in bfloat16."""
    if candidate.recipe.optimizer != "muon":
        return 0.0
    bytes_each = 2 * 4 * 4 + 4 if device == "cpu" else 4 * 4 + 4 * 2
    return bytes_each * float(candidate.shape.n_embd) ** 2


def matrix_elements(candidate: Candidate) -> int:
    """Elements of the blocks' matrices."""
    return 12 * candidate.shape.n_layer * candidate.shape.n_embd**2


def _key(candidate: Candidate, kind: str, **other: str) -> Key:
    """The coefficient of that kind under this candidate's choices, or `other` ones."""
    plan = candidate.plan
    choices = {
        "dtype": "half" if plan.matrix_dtype in AUTOCAST else "float32",
        "residual": "half" if plan.dtype == "bfloat16_residual" else "float32",
        "mode": "eager" if plan.compile == "off" else "compiled",
        "compile": plan.compile,
        "loss": plan.loss if plan.loss in VALUES["loss"] else "full" if _whole_logits(candidate) else "chunked",
        "library": plan.loss,
        "accumulation": "several" if _adds_gradients(candidate) else "one",
        "allocator": plan.allocator,
        **other,
    }
    return Key(kind, **{name: choices[name] for name in DEPENDS[kind]})


def _activations(candidate: Candidate) -> dict[Key, float]:
    """What is saved for the backward when the loss is computed: by blocks that keep what they need (`kept`), and by
    blocks that keep their input only (`again`)."""
    shape, plan = candidate.shape, candidate.plan
    residual = tokens(candidate) * shape.n_embd
    again = -(-shape.n_layer // plan.recomputed_every) if plan.recomputed_every else 0
    kept, recompute = shape.n_layer - again, "none" if plan.recomputed_every else plan.activation_checkpointing
    sizes: dict[Key, float] = {_key(candidate, "ends"): residual}
    if kept:  # they need more than one block that is computed again
        sizes |= _blocks(candidate, kept, recompute if plan.memory_budget is None else "budget")
    if plan.memory_budget is not None:
        sizes[_key(candidate, "budget floor")] = residual * kept
    if again:
        sizes[_key(candidate, "block inputs")] = residual * again
    if plan.matrix_dtype in AUTOCAST:  # matrices in the dtype of their products; compiled blocks cast again, too
        cast = 1.0 if plan.compile == "off" else kept / shape.n_layer
        sizes[_key(candidate, "casts")] = matrix_elements(candidate) * cast
    return sizes


def _blocks(candidate: Candidate, layers: int, recompute: str) -> dict[Key, float]:
    """What blocks keep for their backward; of attention, besides its output: one number per row, or the scores."""
    shape, plan = candidate.shape, candidate.plan
    part = 1.0 if plan.memory_budget is None else plan.memory_budget
    rows = tokens(candidate) * shape.n_head * layers
    attention = {_key(candidate, "attention rows"): rows}
    if plan.attention == "sdpa_math":
        attention = {_key(candidate, "scores", recompute=recompute): rows * shape.block_size}
    return {
        _key(candidate, "layer", recompute=recompute): tokens(candidate) * shape.n_embd * layers * part,
        **attention,
    }


def _head(candidate: Candidate) -> dict[Key, float]:
    """Logits, and what exists besides them: the cast of the head's weight, its gradient."""
    plan, shape = candidate.plan, candidate.shape
    elements = shape.vocab_size * shape.n_embd
    if plan.loss in VALUES["library"]:
        return {_key(candidate, "library head"): tokens(candidate) * shape.n_embd + elements}
    mode = {"mode": "compiled"} if plan.loss == "chunked_triton" else {}  # its kernel is compiled in any plan
    return {_key(candidate, "logits", **mode): half_logits_bytes(candidate) / 2, _key(candidate, "head"): elements}

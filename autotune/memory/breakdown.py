"""A predicted peak by category: the terms of the memory model's largest peak point."""

from collections import defaultdict
from collections.abc import Mapping

from autotune.config.candidate import Candidate
from autotune.memory.model import MemoryModel
from autotune.memory.structure import (
    PeakPoint,
    gathered_bytes,
    keys,
    optimizer_bytes,
    overhead,
    peak_points,
    tokens,
    weight_bytes,
)

OUTSIDE = "outside the allocator"
"""Category of the process, its libraries and what the allocator cannot use; all others are of `CATEGORIES`."""
_CATEGORY = {
    "logits": "logits and loss", "head": "logits and loss", "library head": "logits and loss",
    "kept logits": "logits and loss",
    "casts": "weight casts",
    "head gradient twice": "gradients", "embedding gradient": "gradients", "matrix gradients": "gradients",
    "backward end": "temporaries",
    "workspaces": "library workspaces",
    "process": OUTSIDE, "context": OUTSIDE, "unused": OUTSIDE,
}  # fmt: skip
"""Category by kind of coefficient; all other kinds are activations."""


def predicted_breakdown(model: MemoryModel, candidate: Candidate) -> Mapping[str, float]:
    """Predicted bytes of a step at its peak by category, the largest first."""
    place, means = keys(model.device), model.normal.means

    def terms(point: PeakPoint) -> dict[str, float]:
        return {key.kind: float(means[place[key]]) * size for key, size in point.sizes.items()}

    points = peak_points(candidate, model.device)
    top = max(points, key=lambda point: point.exact + sum(terms(point).values()))
    steps, gathered = candidate.gradient_accumulation_steps, 0.0 if top is points[-1] else gathered_bytes(candidate)
    exact = {
        "parameters": weight_bytes(candidate) + gathered,
        "optimizer state": optimizer_bytes(candidate),
        "batch": 16.0 * tokens(candidate) * min(steps, 4),  # as in `peak_points`
    }
    found: dict[str, float] = defaultdict(float, exact)
    found["gradients"] += top.exact - sum(exact.values())
    for kind, count in [*terms(top).items(), *terms(overhead(candidate, model.device)).items()]:
        found[_CATEGORY.get(kind, "activations")] += count
    return {name: found[name] for name in sorted(found, key=lambda name: -found[name]) if found[name]}

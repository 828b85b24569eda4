"""`autotune estimate`: predicted peaks for a card of N GiB, with no device."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autotune.config.candidate import Candidate, Plan, Recipe
from autotune.config.presets import GUIDE
from autotune.config.toml import CandidateFile, format_candidate, parse_candidate
from autotune.search.memory_model import MemoryModel, Prediction, predict
from autotune.search.settings import parse_shape
from autotune.units import GIB, format_bytes

MICRO_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True, kw_only=True)
class EstimateRow:
    """One shape and plan over micro batches."""

    candidate: Candidate
    predictions: tuple[tuple[int, Prediction], ...]
    """(micro batch, its predicted peak), ascending."""
    largest: int
    """Largest micro batch whose whole interval lies below the limit; 0: none."""


def candidates(models: Sequence[str], assignments: tuple[str, ...]) -> list[Candidate]:
    """`12x12x768` words, or without any the guide's rows, each with the plan that the assignments
    (`plan.loss=chunked`) make of the default one. Raises ConfigError."""
    shapes = [parse_shape(word, Recipe().shape) for word in models] or [row.shape for row in GUIDE]
    plain = [Candidate(recipe=Recipe(shape=shape), plan=Plan(micro_batch_size=1)) for shape in shapes]
    texts = [format_candidate(CandidateFile(candidate=candidate)) for candidate in plain]
    return [parse_candidate(text, "--set", assignments).candidate for text in texts]


def estimate(model: MemoryModel, candidates: Sequence[Candidate], limit_bytes: int) -> list[EstimateRow]:
    """A row for each candidate, whose own micro batch does not matter."""
    return [
        EstimateRow(
            candidate=candidate,
            predictions=tuple((size, predict(model, with_micro_batch(candidate, size))) for size in MICRO_BATCHES),
            largest=largest_micro_batch(model, candidate, limit_bytes),
        )
        for candidate in candidates
    ]


def cells(row: EstimateRow, limit_bytes: int) -> dict[str, str]:
    """A line of the table: GiB by micro batch, `-` beyond the limit, `?` where only a trial can tell."""
    shape = row.candidate.shape
    line = {"model": f"{shape.n_layer}x{shape.n_head}x{shape.n_embd}", "parameters": f"{shape.parameters / 1e6:.1f}M"}
    for size, prediction in row.predictions:
        doubt = "?" if prediction.high_device_bytes > limit_bytes else ""
        over = prediction.low_device_bytes > limit_bytes
        line[f"b={size}"] = "-" if over else f"{prediction.peak_device_bytes / GIB:.1f}{doubt}"
    return {**line, "largest": str(row.largest)}


def certainty(model: MemoryModel, rows: Sequence[EstimateRow]) -> str:
    """How sure the table is, in one line."""
    found = [prediction for row in rows for _, prediction in row.predictions]
    spans = [(prediction.high_device_bytes - prediction.low_device_bytes) / 2 for prediction in found]
    source = f"calibrated by {model.trials} trials" if model.trials else "not calibrated: priors from a CPU"
    return f"{source}; 95 % interval ±{format_bytes(min(spans))} to ±{format_bytes(max(spans))}"


def with_micro_batch(candidate: Candidate, size: int) -> Candidate:
    """`candidate` in micro batches of `size`; its global batch grows to two of them where it is smaller, since
    gradients that add up are the case to plan for."""
    recipe = replace(candidate.recipe, global_batch_size=max(candidate.recipe.global_batch_size, 2 * size))
    return Candidate(recipe=recipe, plan=replace(candidate.plan, micro_batch_size=size))


def largest_micro_batch(model: MemoryModel, candidate: Candidate, limit_bytes: int) -> int:
    """By bisection: the predicted peak grows with the micro batch."""

    def beyond(size: int) -> bool:
        return predict(model, with_micro_batch(candidate, size)).high_device_bytes > limit_bytes

    return bisect.bisect_left(range(1, 1 << 16), True, key=beyond)  # how many of 1, 2, 3, ... are not beyond it

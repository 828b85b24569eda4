"""`autotune estimate`: predicted peaks for a card of N GiB, with no device."""

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

    label: str
    candidate: Candidate
    predictions: tuple[tuple[int, Prediction], ...]
    """(micro batch, its predicted peak), ascending."""
    largest: int
    """Largest micro batch whose whole interval lies below the limit; 0: none."""


def candidates(models: Sequence[str], assignments: tuple[str, ...]) -> list[tuple[str, Candidate]]:
    """`12x12x768` words, or without any the guide's rows, each with the plan that the assignments
    (`plan.loss=chunked`) make of the default one. Raises ConfigError."""
    shapes = [parse_shape(word, Recipe().shape) for word in models] or [row.shape for row in GUIDE]
    found = []
    for shape in shapes:
        plain = Candidate(recipe=Recipe(shape=shape), plan=Plan(micro_batch_size=1))
        text = format_candidate(CandidateFile(candidate=plain))
        changed = parse_candidate(text, "--set", assignments).candidate
        found.append((f"{shape.n_layer}x{shape.n_head}x{shape.n_embd}", changed))
    return found


def cells(row: EstimateRow, limit_bytes: int) -> dict[str, str]:
    """A line of the table: GiB by micro batch, `-` beyond the limit, `?` where only a trial can tell."""
    line = {"model": row.label, "parameters": f"{row.candidate.shape.parameters / 1e6:.1f}M"}
    for size, prediction in row.predictions:
        doubt = "?" if prediction.high_device_bytes > limit_bytes else ""
        over = prediction.low_device_bytes > limit_bytes
        line[f"b={size}"] = "-" if over else f"{prediction.peak_device_bytes / GIB:.1f}{doubt}"
    line["largest"] = str(row.largest)
    return line


def certainty(model: MemoryModel, rows: Sequence[EstimateRow]) -> str:
    """How sure the table is, in one line."""
    spans = [
        (prediction.high_device_bytes - prediction.low_device_bytes) / 2
        for row in rows
        for _, prediction in row.predictions
    ]
    source = f"calibrated by {model.trials} trials" if model.trials else "not calibrated: priors from a CPU"
    return f"{source}; 95 % interval ±{format_bytes(min(spans))} to ±{format_bytes(max(spans))}"


def estimate(model: MemoryModel, candidates: Sequence[tuple[str, Candidate]], limit_bytes: int) -> list[EstimateRow]:
    """A row for each (label, candidate), whose own micro batch does not matter."""
    return [_row(model, label, candidate, limit_bytes) for label, candidate in candidates]


def _row(model: MemoryModel, label: str, candidate: Candidate, limit_bytes: int) -> EstimateRow:
    predictions = tuple((size, predict(model, with_micro_batch(candidate, size))) for size in MICRO_BATCHES)
    return EstimateRow(
        label=label,
        candidate=candidate,
        predictions=predictions,
        largest=largest_micro_batch(model, candidate, limit_bytes),
    )


def with_micro_batch(candidate: Candidate, size: int) -> Candidate:
    """`candidate` in micro batches of `size`; its global batch grows to two of them where it is smaller, since
    gradients that add up are the case to plan for."""
    recipe = replace(candidate.recipe, global_batch_size=max(candidate.recipe.global_batch_size, 2 * size))
    return Candidate(recipe=recipe, plan=replace(candidate.plan, micro_batch_size=size))


def largest_micro_batch(model: MemoryModel, candidate: Candidate, limit_bytes: int) -> int:
    """By bisection: the predicted peak grows with the micro batch."""

    def fits(size: int) -> bool:
        return predict(model, with_micro_batch(candidate, size)).high_device_bytes <= limit_bytes

    low, high = 0, 1
    while fits(high) and high < 1 << 16:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low

"""`autotune estimate`: predicted peaks on a card of N GiB; needs no device."""

import bisect
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from autotune.config.candidate import Candidate, Plan, Recipe, at_least, parse_shape
from autotune.config.presets import GUIDE
from autotune.config.toml import CandidateFile, format_candidate, parse_candidate
from autotune.memory import priors
from autotune.memory.model import MemoryModel, predict
from autotune.units import GIB, format_bytes

MICRO_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)


def candidates(models: Sequence[str], assignments: tuple[str, ...], vocab_size: int | None = None) -> list[Candidate]:
    """Shapes from words like `12x12x768` (default: the guide's rows), each with the default plan changed by the
    assignments (`plan.loss=chunked`). Raises ConfigError."""
    shapes = [parse_shape(word, Recipe().shape) for word in models] or [row.shape for row in GUIDE]
    if vocab_size is not None:
        at_least("--vocab-size", vocab_size, 1)
        shapes = [replace(shape, vocab_size=vocab_size) for shape in shapes]
    plain = [Candidate(recipe=Recipe(shape=shape), plan=Plan(micro_batch_size=1)) for shape in shapes]
    texts = [format_candidate(CandidateFile(candidate=candidate)) for candidate in plain]
    return [parse_candidate(text, "--set", assignments).candidate for text in texts]


def fixed(assignments: Sequence[str]) -> list[str]:
    """Fields of the plan that are assigned."""
    names = [word.partition("=")[0].strip().partition(".") for word in assignments]
    return [name for table, _, name in names if table == "plan"]


def estimate(model: MemoryModel, candidates: Sequence[Candidate], limit_bytes: int) -> tuple[list[dict[str, str]], str]:
    """One table row per candidate, and notes on certainty and provenance, one per line.

    A row has GiB by micro batch (the candidate's own does not matter): `-` is over the limit, `?` needs a trial; and
    the largest micro batch that fits with its whole interval.
    """
    rows, spans = [], []
    for candidate in candidates:
        shape = candidate.shape
        name = shape.size
        row = {"model": name, "vocabulary": f"{shape.vocab_size:,}", "parameters": f"{shape.parameters / 1e6:.1f}M"}
        for size in MICRO_BATCHES:
            found = predict(model, with_micro_batch(candidate, size))
            doubt = "?" if found.high_device_bytes > limit_bytes else ""
            peak = f"{found.peak_device_bytes / GIB:.1f}{doubt}"
            row[f"b={size}"] = "-" if found.low_device_bytes > limit_bytes else peak
            spans.append((found.high_device_bytes - found.low_device_bytes) / 2)
        rows.append({**row, "largest": str(largest_micro_batch(model, candidate, limit_bytes))})
    source = f"calibrated by {model.trials} trials" if model.trials else "not calibrated by trials on a card"
    if model.of_stand_in:
        source += " on a stand-in for a card: allocated bytes are the allocator's own, the device's are not measured"
    span = f"95 % interval ±{format_bytes(min(spans))} to ±{format_bytes(max(spans))}"
    meaning = "19 of 20 measured peaks should lie within it"
    return rows, f"{source}; {span}: {meaning}\npriors ({model.device}): {priors.of(model.device).provenance}"


def as_json(model: MemoryModel, candidates: Sequence[Candidate], limit_bytes: int) -> dict[str, Any]:
    """The same in bytes: predictions by micro batch, and the largest that fits with its whole interval."""
    return {
        "limit_bytes": limit_bytes,
        "calibrated_by_trials": model.trials,
        "models": [
            {
                **asdict(candidate.shape),
                "parameters": candidate.shape.parameters,
                "peaks": {size: vars(predict(model, with_micro_batch(candidate, size))) for size in MICRO_BATCHES},
                "largest_micro_batch": largest_micro_batch(model, candidate, limit_bytes),
            }
            for candidate in candidates
        ],
    }


def with_micro_batch(candidate: Candidate, size: int) -> Candidate:
    """`candidate` with micro batches of `size`, and at least two of them per step: accumulated gradients are the case
    to plan for."""
    recipe = replace(candidate.recipe, global_batch_size=max(candidate.recipe.global_batch_size, 2 * size))
    return Candidate(recipe=recipe, plan=replace(candidate.plan, micro_batch_size=size))


def largest_micro_batch(model: MemoryModel, candidate: Candidate, limit_bytes: int) -> int:
    """The largest that fits with its whole interval, 0 for none; by bisection: peaks grow with the micro batch."""

    def too_large(size: int) -> bool:
        return predict(model, with_micro_batch(candidate, size)).high_device_bytes > limit_bytes

    return bisect.bisect_left(range(1, 1 << 16), True, key=too_large)

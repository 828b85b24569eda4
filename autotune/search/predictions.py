"""What a search on a card would try first, and what it should find: `autotune estimate --gpu`. Nothing is measured."""

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import autotune
from autotune.config.candidate import Candidate
from autotune.config.cards import Card
from autotune.config.toml import CandidateFile, format_candidate
from autotune.environment import Environment
from autotune.errors import ConfigError
from autotune.files import write_atomically
from autotune.memory.estimate import largest_micro_batch
from autotune.memory.model import MemoryModel
from autotune.memory.model import predict as predict_peak
from autotune.memory.structure import optimizer_bytes, weight_bytes
from autotune.runs.law import find_law, predict_loss
from autotune.runs.objective import finish_candidate
from autotune.search import roofline
from autotune.search.resolve import resolve
from autotune.search.space import build_space, plan_in_words
from autotune.search.start import starts
from autotune.units import GIB, format_bytes, format_count, format_duration

TOKENS_A_PARAMETER = 20
"""Length of a training of which nothing is said: Hoffmann et al. 2022, arXiv:2203.15556, table 3."""
_LAW = "lingle"


@dataclass(frozen=True, kw_only=True)
class Range:
    """A predicted figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is predicted for the plan that a search would try first."""

    candidate: Candidate
    largest_micro_batch: int
    """Largest one with which that plan fits with its whole interval."""
    peak_device_bytes: Range
    tokens_per_second: Range
    mfu: Range
    training_seconds: Range
    loss: Range
    """By the scaling law, with its band."""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Predictions for one shape."""

    shape: str
    parameters: int
    state_bytes: int
    """Weights, gradients and optimizer state."""
    tokens: int
    """Length of the training."""
    found: Found | None
    """None: no plan fits."""


def environment_of(card: Card) -> Environment:
    """This installation on a machine with that card."""
    return Environment(
        device="cuda:0", device_name=card.name, device_memory_bytes=card.memory_bytes, capability=card.capability,
        peak_flops=card.peak_flops, torch=importlib.metadata.version("torch"), python=platform.python_version(),
        autotune=autotune.__version__, cpu_count=1, platform="",
    )  # fmt: skip


def predict(
    card: Card, candidates: Sequence[Candidate], fixed: Sequence[str], memory_limit: str, tokens: int | None,
    model: MemoryModel,
) -> tuple[list[Predicted], int]:  # fmt: skip
    """Predictions for the candidates' shapes, and the limit in bytes. `fixed`: fields of the plan that keep the
    candidate's value. `tokens`: None: TOKENS_A_PARAMETER. Raises ConfigError."""
    rows, limit = [], 0
    for candidate in candidates:
        environment, shape = environment_of(card), candidate.shape
        words = shape.size
        asked = resolve(environment, model=words, memory_limit=memory_limit)
        limit = asked.memory_limit_bytes
        own = {name: (str(getattr(candidate.plan, name)),) for name in fixed}
        plan = replace(asked.baseline, **{name: getattr(candidate.plan, name) for name in fixed})
        asked = replace(asked, recipe=candidate.recipe, baseline=plan, choices=own)
        length = tokens or TOKENS_A_PARAMETER * shape.parameters
        best = starts(build_space(asked, environment), asked, card, model, count=1)
        rows.append(
            Predicted(
                shape=words, parameters=shape.parameters, tokens=length,
                state_bytes=round(2 * weight_bytes(candidate) + optimizer_bytes(candidate)),
                found=_found(card, finish_candidate(best[0], length), length, limit, model) if best else None,
            )
        )  # fmt: skip
    return rows, limit


def _found(card: Card, candidate: Candidate, tokens: int, limit: int, model: MemoryModel) -> Found:
    peak, speed = predict_peak(model, candidate), roofline.predict(card, candidate)
    law, per_token = find_law(_LAW), candidate.shape.flops_per_token / card.peak_flops
    loss = predict_loss(law, candidate.shape, tokens)
    return Found(
        candidate=candidate,
        largest_micro_batch=largest_micro_batch(model, candidate, limit),
        peak_device_bytes=Range(value=peak.peak_device_bytes, low=peak.low_device_bytes, high=peak.high_device_bytes),
        tokens_per_second=Range(value=speed.tokens_per_second, low=speed.low, high=speed.high),
        mfu=Range(
            value=speed.tokens_per_second * per_token, low=speed.low * per_token, high=min(1.0, speed.high * per_token)
        ),
        training_seconds=Range(
            value=tokens / speed.tokens_per_second, low=tokens / speed.high, high=tokens / speed.low
        ),
        loss=Range(value=loss, low=loss - law.band, high=loss + law.band),
    )


def text(card: Card, rows: Sequence[Predicted], limit: int, model: MemoryModel) -> str:
    """For a terminal of 80 columns."""
    lines = [
        f"predicted for {card.name}, not measured: {format_bytes(card.memory_bytes)}, of which {format_bytes(limit)} "
        f"are used; {card.peak_flops / 1e12:,.4g} TFLOP/s, {card.gb_per_second:,.0f} GB/s"
    ]
    for row in rows:
        lines += ["", f"{row.shape}, {format_count(row.parameters)} parameters"]
        lines += _lines(row, limit) if row.found else [
            f"  no plan fits: weights, gradients and optimizer state take {format_bytes(row.state_bytes)}"
        ]  # fmt: skip
    return "\n".join([*lines, "", *provenance(model)])


def _lines(row: Predicted, limit: int) -> list[str]:
    found = row.found
    assert found is not None
    peak, speed, mfu, lasts, loss = (
        found.peak_device_bytes, found.tokens_per_second, found.mfu, found.training_seconds, found.loss,
    )  # fmt: skip
    doubt = ", within the error of the model" if peak.high > limit else ""
    return [
        f"  plan    {plan_in_words(found.candidate)}",
        f"  memory  {peak.value / GIB:.1f} GiB ({peak.low / GIB:.1f} to {peak.high / GIB:.1f}){doubt}; "
        f"largest micro batch {found.largest_micro_batch}",
        f"  speed   {speed.value:,.0f} tokens/s ({speed.low:,.0f} to {speed.high:,.0f}), "
        f"MFU {mfu.value:.0%} ({mfu.low:.0%} to {mfu.high:.0%})",
        f"  length  {format_count(row.tokens)} tokens in {format_duration(lasts.value)} "
        f"({format_duration(lasts.low)} to {format_duration(lasts.high)})",
        f"  loss    {loss.value:.2f} by the law '{_LAW}' ({loss.low:.2f} to {loss.high:.2f})",
    ]


def provenance(model: MemoryModel) -> list[str]:
    """Where the predictions come from, one line each."""
    known = roofline.fitted()
    memory = f"calibrated by {model.trials} trials" if model.trials else "priors, not calibrated by trials on a card"
    return [
        "intervals: 95 %; `autotune search` on the card measures instead",
        f"speed: {known.provenance.cuda}",
        f"memory: {memory}",
        f"length without --tokens: {TOKENS_A_PARAMETER} tokens per parameter",
    ]


def as_json(card: Card, rows: Sequence[Predicted], limit: int, model: MemoryModel) -> Mapping[str, Any]:
    return {
        "predicted": True, "card": asdict(card), "memory_limit_bytes": limit, "law": _LAW,
        "rows": [asdict(row) for row in rows], "provenance": provenance(model),
    }  # fmt: skip


def write_toml(path: Path, card: Card, rows: Sequence[Predicted]) -> None:
    """The candidate of the only row, to start a search or a trial from. Raises ConfigError."""
    if len(rows) != 1:
        raise ConfigError(f"--toml writes one candidate, there are {len(rows)} shapes; give one with --model 12x12x768")
    found = rows[0].found
    if found is None:
        raise ConfigError(f"--toml {path} has nothing to hold: no plan of {rows[0].shape} fits; give a smaller --model")
    head = f"# Predicted for {card.name} by `autotune estimate`, not measured.\n"
    write_atomically(path, head + format_candidate(CandidateFile(candidate=found.candidate)))

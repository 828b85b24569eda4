"""The memory guide's rows, claimed against true: `autotune guide`.

Parameters, tokens and rules are arithmetic. Memory and speed are predicted for the row's card, or measured on this one
under the row's memory limit.
"""

import csv
import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autotune.config import cards
from autotune.config.candidate import Candidate
from autotune.config.cards import Card
from autotune.config.presets import ADVISED_TOKENS, GuideRow
from autotune.config.search_settings import SearchSettings
from autotune.environment import Environment
from autotune.errors import ConfigError
from autotune.measure.types import TrialRequest, TrialResult
from autotune.memory.model import MemoryModel
from autotune.memory.model import predict as predict_peak
from autotune.runs.law import predict_loss
from autotune.runs.objective import batch_tokens, best_learning_rate, clamp_learning_rate, law_of, training_tokens
from autotune.search import roofline
from autotune.search.predictions import Range, environment_of
from autotune.search.resolve import resolve
from autotune.search.space import baseline, build_space, plan_in_words, shape_in_words
from autotune.search.start import STARTS, card_of, starts
from autotune.units import GIB, format_bytes, format_count, format_duration

Measure = Callable[[TrialRequest], TrialResult]
CLASS_SECONDS = 24 * 3600.0
"""Length of the training for which the best shape of a memory class is predicted."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of running a row's model."""

    plan: str
    status: str
    """`predicted`, or that of the trial."""
    peak_device_bytes: Range | None
    tokens_per_second: Range | None

    @property
    def hours(self) -> float | None:
        """Hours to the length that the guide advises."""
        return ADVISED_TOKENS / self.tokens_per_second.value / 3600 if self.tokens_per_second else None


@dataclass(frozen=True, kw_only=True)
class Class:
    """What a search over shapes would prefer within a row's memory, by law and roofline; never measured here."""

    shape: str
    loss: float
    guide_loss: float
    """Predicted loss of the row's own shape with its best plan, after the same time."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One row of the guide, claimed against true."""

    row: GuideRow
    device: str
    limit_bytes: int
    parameters: int
    tokens: int
    """Tokens of the row's own iterations."""
    plain: Way
    """nanoGPT's way."""
    best: Way | None
    """The fastest way that fits; None: none does."""
    learning_rate: float
    """By the published rule, for the row's own tokens."""
    batch_tokens: float
    preferred: Class | None
    """None where this device's speeds are not predicted."""

    @property
    def fits(self) -> bool:
        """Whether nanoGPT's way stays within the limit."""
        peak = self.plain.peak_device_bytes
        return self.plain.status in ("ok", "predicted") and peak is not None and peak.value <= self.limit_bytes


def check(
    row: GuideRow, model: MemoryModel, here: Environment | None = None, measure: Measure | None = None,
    *, ways: int = STARTS,
) -> Checked:  # fmt: skip
    """`row` on its own card, predicted; or on the machine `here`, where `measure` tries so many `ways` of running it
    beside nanoGPT's. Raises ConfigError."""
    environment = here or environment_of(cards.find(row.card))
    settings = resolve(environment, guide=row)
    space, card = build_space(settings, environment), card_of(environment)
    found = starts(space, settings, card, model, count=ways if measure else 1)
    if measure is not None:
        plain = _measured(settings, baseline(settings), measure)
        tried = [_measured(settings, candidate, measure) for candidate in found]
    else:
        assert card is not None
        plain = _predicted(card, baseline(settings), model)
        tried = [_predicted(card, candidate, model) for candidate in found]
    tokens = row.max_iters * settings.recipe.tokens_per_step
    return Checked(
        row=row,
        device=environment.device_name,
        limit_bytes=settings.memory_limit_bytes,
        parameters=row.shape.parameters,
        tokens=tokens,
        plain=plain,
        best=max((way for way in tried if way.status in ("ok", "predicted")), key=_speed, default=None),
        learning_rate=best_learning_rate(row.shape, tokens),
        batch_tokens=batch_tokens(tokens),
        preferred=_preferred(card, environment, settings, model) if card is not None else None,
    )


def _speed(way: Way) -> float:
    return way.tokens_per_second.value if way.tokens_per_second else 0.0


def _predicted(card: Card, candidate: Candidate, model: MemoryModel) -> Way:
    peak, speed = predict_peak(model, candidate), roofline.predict(card, candidate)
    return Way(
        plan=plan_in_words(candidate),
        status="predicted",
        peak_device_bytes=Range(value=peak.peak_device_bytes, low=peak.low_device_bytes, high=peak.high_device_bytes),
        tokens_per_second=Range(value=speed.tokens_per_second, low=speed.low, high=speed.high),
    )


def _measured(settings: SearchSettings, candidate: Candidate, measure: Measure) -> Way:
    limit = settings.memory_limit_bytes
    request = TrialRequest(
        candidate=candidate, device=settings.device, result_path="", memory_limit_bytes=limit, final=True
    )
    result = measure(request)
    peak, speed, half = result.peak_bytes, result.tokens_per_second, result.tokens_per_second_ci95 or 0.0
    return Way(
        plan=plan_in_words(candidate),
        status=result.status,
        peak_device_bytes=None if peak is None else Range(value=peak, low=peak, high=peak),
        tokens_per_second=None if speed is None else Range(value=speed, low=speed - half, high=speed + half),
    )


def _preferred(card: Card, environment: Environment, asked: SearchSettings, model: MemoryModel) -> Class | None:
    """The shape with the lowest predicted loss after CLASS_SECONDS on the card."""
    settings = resolve(environment, train_time=f"{CLASS_SECONDS:.0f}s")
    settings = replace(settings, memory_limit_bytes=asked.memory_limit_bytes)
    own = starts(build_space(asked, environment), asked, card, model, count=1)
    best = starts(build_space(settings, environment), settings, card, model, count=1)
    if not own or not best:
        return None

    def loss(candidate: Candidate) -> float:
        speed = roofline.predict(card, candidate).tokens_per_second
        return predict_loss(law_of(settings), candidate.shape, training_tokens(settings, speed))

    return Class(shape=shape_in_words(best[0].shape), loss=loss(best[0]), guide_loss=loss(own[0]))


def lines(checked: Sequence[Checked]) -> list[str]:
    """For a terminal of 80 columns."""
    wide = (line for one in checked for line in _lines(one))
    return [part for line in wide for part in textwrap.wrap(line, 80, subsequent_indent=" " * 14) or [""]]


def _lines(one: Checked) -> list[str]:
    row, shape = one.row, one.row.shape
    memory = f", claimed {row.claimed_memory}" if row.claimed_memory else ""
    tokens = f", claimed {row.claimed_tokens}" if row.claimed_tokens else ""
    verdict = "fits" if one.fits else "does not fit"
    batch = row.micro_batch_size * row.gradient_accumulation_steps * shape.block_size
    clamped = clamp_learning_rate(one.learning_rate)
    rows = {
        "parameters": f"{format_count(one.parameters)}, claimed {row.claimed}",
        "memory": f"{_gib(one.plain)} as nanoGPT runs it{memory}: {verdict} in {format_bytes(one.limit_bytes)}",
        "": f"{_gib(one.best)} with {one.best.plan}" if one.best else "no way of running it fits",
        "speed": f"{_tokens(one.plain)} as nanoGPT runs it, {_tokens(one.best)} with the other plan",
        "length": f"{format_count(one.tokens)} tokens in {row.max_iters:,} iterations{tokens}; "
        f"{format_count(ADVISED_TOKENS)} tokens, as advised, take {_hours(one.best)}",
        "rate": f"{row.learning_rate:.1e} advised, {clamped:.1e} by the published rule"
        + (f" (it gives {one.learning_rate:.1e}, beyond its range)" if clamped != one.learning_rate else ""),
        "batch": f"{format_count(batch)} tokens advised, {format_count(one.batch_tokens)} by the published rule",
    }
    if one.preferred is not None:
        rows["search"] = (
            f"would begin with {one.preferred.shape}: predicted loss {one.preferred.loss:.2f} after "
            f"{format_duration(CLASS_SECONDS)}, the guide's shape {one.preferred.guide_loss:.2f}"
        )
    steps = f"micro batch {row.micro_batch_size} x {row.gradient_accumulation_steps}"
    head = f"{row.name} ({row.cards}): {shape.size}, {steps}"
    return ["", f"{head}, on {one.device}", *(f"  {key:<10}  {text}" for key, text in rows.items())]


def _gib(way: Way | None) -> str:
    if way is None or way.peak_device_bytes is None:
        return f"unknown ({way.status})" if way else "-"
    peak = way.peak_device_bytes
    span = f" ({peak.low / GIB:.1f} to {peak.high / GIB:.1f})" if peak.low < peak.high else ""
    return f"{peak.value / GIB:.1f} GiB{span}"


def _tokens(way: Way | None) -> str:
    return "-" if way is None or way.tokens_per_second is None else f"{way.tokens_per_second.value:,.0f} tokens/s"


def _hours(way: Way | None) -> str:
    return "unknown time" if way is None or way.hours is None else format_duration(3600 * way.hours)


def as_rows(checked: Sequence[Checked]) -> list[dict[str, Any]]:
    """Flat rows: those of the CSV and of `--json`."""
    return [_flat(one) for one in checked]


def _flat(one: Checked) -> dict[str, Any]:
    row, best = one.row, one.best
    batch = row.micro_batch_size * row.gradient_accumulation_steps * row.shape.block_size
    return {
        "row": row.name, "device": one.device, "limit_bytes": one.limit_bytes,
        "n_layer": row.shape.n_layer, "n_head": row.shape.n_head, "n_embd": row.shape.n_embd,
        "claimed_parameters": row.claimed, "parameters": one.parameters,
        "claimed_memory": row.claimed_memory, "plain_status": one.plain.status, **_way("plain", one.plain),
        "plain_fits": one.fits, "best_plan": best.plan if best else "",
        "best_status": best.status if best else "", **_way("best", best),
        "claimed_tokens": row.claimed_tokens, "tokens": one.tokens,
        "advised_tokens": ADVISED_TOKENS, "hours_to_advised": best.hours if best else None,
        "advised_learning_rate": row.learning_rate, "rule_learning_rate": one.learning_rate,
        "advised_batch_tokens": batch, "rule_batch_tokens": round(one.batch_tokens),
        **{f"preferred_{k}": v for k, v in (asdict(one.preferred) if one.preferred else {}).items()},
    }  # fmt: skip


def _way(name: str, way: Way | None) -> dict[str, Any]:
    peak, speed = (way.peak_device_bytes, way.tokens_per_second) if way else (None, None)
    return {
        f"{name}_peak_device_bytes": peak and round(peak.value), f"{name}_peak_low": peak and round(peak.low),
        f"{name}_peak_high": peak and round(peak.high), f"{name}_tokens_per_second": speed and round(speed.value),
        f"{name}_tokens_low": speed and round(speed.low), f"{name}_tokens_high": speed and round(speed.high),
    }  # fmt: skip


def as_text(path: Path, checked: Sequence[Checked]) -> str:
    """What a file of that name holds. Raises ConfigError."""
    kinds = {".csv": as_csv, ".md": as_markdown}
    if path.suffix not in kinds:
        raise ConfigError(f"--out {path} must end in .csv or .md; give for example guide.csv")
    return kinds[path.suffix](checked)


def provenance(measured: bool) -> tuple[str, ...]:
    rules = "rules: Step Law, Li et al. 2025, arXiv:2503.04715"
    known = roofline.fitted().provenance
    return (rules,) if measured else (f"predicted, not measured; 95 % intervals; speed: {known.cuda}", rules)


def as_csv(checked: Sequence[Checked]) -> str:
    rows = as_rows(checked)
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(checked: Sequence[Checked]) -> str:
    """The table of docs and README."""
    head = ("row", "claimed", "true", "nanoGPT's memory", "best plan's memory", "tokens/s of both", "50B tokens")
    body = [
        (
            f"{one.row.name}: {one.row.shape.size}", one.row.claimed,
            format_count(one.parameters), _gib(one.plain) + ("" if one.fits else ", does not fit"),
            _gib(one.best), f"{_speed(one.plain):,.0f} → {_speed(one.best):,.0f}" if one.best else "-",
            _hours(one.best),
        )
        for one in checked
    ]  # fmt: skip
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *body)) + "\n"

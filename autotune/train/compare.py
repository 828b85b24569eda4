"""The training held against what the search measured."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from autotune.environment import Environment
from autotune.units import format_bytes

SPEED_TOLERANCE = 0.02
PEAK_TOLERANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One number, before and now."""

    text: str
    within: bool
    """The difference is not more than promised."""


def compare_speed(
    measured: Mapping[str, Any], tokens_per_second: float | None, ci95: float | None, device: str
) -> Comparison | None:
    """Tokens/s of the training against the verdict's: within 2 %, or, on the CPU, which other programs share,
    within both intervals if they are wider. None where one of the two is not known."""
    before = measured.get("tokens_per_second")
    if not before or tokens_per_second is None:
        return None
    allowed = SPEED_TOLERANCE * before
    if device == "cpu":
        allowed = max(allowed, measured.get("tokens_per_second_ci95", 0.0) + (ci95 or 0.0))
    difference = tokens_per_second / before - 1
    return Comparison(
        text=f"tokens/s: {before:,.0f} measured, {tokens_per_second:,.0f} in training "
        f"({difference:+.1%}, expected within ±{allowed / before:.1%})",
        within=abs(tokens_per_second - before) <= allowed,
    )


def compare_peak(measured: Mapping[str, Any], view: str, peak: int | None) -> Comparison | None:
    """A peak of the training (`view`: peak_allocated_bytes, ...) against the verdict's: not above it by
    more than 1 %, as that is what runs out of memory, nor below. None where one of the two is not known."""
    before = measured.get(view)
    if not before or peak is None:
        return None
    difference = peak / before - 1
    name = view.removeprefix("peak_").removesuffix("_bytes")
    return Comparison(
        text=f"peak memory, {name}: {format_bytes(before)} measured, {format_bytes(peak)} in training "
        f"({difference:+.1%}, expected within ±{PEAK_TOLERANCE:.0%})",
        within=abs(difference) <= PEAK_TOLERANCE,
    )


def other_machine(there: Mapping[str, Any], here: Environment) -> str:
    """What differs between the machine of the measurement (`[environment]`) and this one; empty if nothing."""
    now = json.loads(json.dumps(asdict(here)))  # tuples as lists, as TOML has them
    different = [
        f"{key} {there[key]!r} there, {now[key]!r} here" for key in now if there.get(key, now[key]) != now[key]
    ]
    return "; ".join(different)

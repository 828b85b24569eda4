"""The training held against what the search measured."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from autotune.environment import Environment, differences
from autotune.units import format_bytes

SPEED_TOLERANCE = 0.02
PEAK_TOLERANCE = 0.01


def compare(measured: Mapping[str, Any], found: Mapping[str, Any], device: str) -> Iterator[tuple[str, bool]]:
    """The training's figures against the verdict's of the same names: a line each, and whether that is as promised.

    Tokens/s: within 2 %, or within the interval that the search gave for one more process and the training's own,
    where that is wider. Peaks: not above by more than 1 %, as that is what runs out of memory, nor below. What one of
    the two does not know is left out, and so is what the CPU's resident size says: the program's libraries outweigh
    it.
    """
    before, now = measured.get("tokens_per_second"), found["tokens_per_second"]
    if before and now is not None:
        promised = measured.get("training_tokens_per_second_ci95") or measured.get("tokens_per_second_ci95") or 0.0
        both = math.hypot(promised, found["tokens_per_second_ci95"] or 0.0)
        allowed = max(SPEED_TOLERANCE, both / before)
        yield (
            f"tokens/s: {before:,.0f} measured, {now:,.0f} in training "
            f"({now / before - 1:+.1%}, expected within ±{allowed:.1%})",
            abs(now / before - 1) <= allowed,
        )
    for view in ("allocated",) if device == "cpu" else ("allocated", "device"):
        before, now = (figures.get(f"peak_{view}_bytes") for figures in (measured, found))
        if before and now is not None:
            yield (
                f"peak memory, {view}: {format_bytes(before)} measured, {format_bytes(now)} in training "
                f"({now / before - 1:+.1%}, expected within ±{PEAK_TOLERANCE:.0%})",
                abs(now / before - 1) <= PEAK_TOLERANCE,
            )


def other_machine(there: Mapping[str, Any], here: Environment) -> str:
    """What differs between the machine of the measurement (`[environment]`) and this one; empty if nothing."""
    return "; ".join(differences(there, here)) if there else ""

"""The rule of a race: which rival is trained next, how far, and who is ahead. Successive halving (Jamieson and
Talwalkar, AISTATS 2016) over a field that the time decides.

Pure functions of the rivals and their readings: a race that was killed continues by asking again.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from autotune.runs.races import Difference, Reading, Rival, by_rival, difference

ETA = 3
"""Each level keeps one rival in so many and trains it so many times as long: between the usual 2 and 4."""
FEWEST = 2
"""Rivals that a race needs."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What to do next."""

    rival: int
    fraction: float
    """Length to train it to, as a fraction of its full training."""


def next_rung(
    rivals: Sequence[Rival], readings: Sequence[Reading], seconds_left: float, overhead_seconds: float
) -> Step | None:
    """The next rung; None: the race is over, or nothing useful fits in the time left. `rivals`: the most plausible
    first. `overhead_seconds`: expected time of a rung beside its steps."""
    if not readings:
        fraction = _first_fraction(rivals, seconds_left, overhead_seconds)
        return None if fraction is None else Step(rival=rivals[0].rival, fraction=fraction)
    fraction = min(reading.fraction for reading in readings)
    known = {rival.rival: rival for rival in rivals}
    field = [rival for rival in rivals if _read_at(readings, rival.rival, fraction)]
    longest = max(reading.fraction for reading in readings)
    waiting = [rival for rival in rivals if rival not in field]
    if waiting and longest == fraction:  # the first level is open as long as the levels after it still fit
        later = _later_levels([*field, waiting[0]], fraction, overhead_seconds)
        if len(field) < FEWEST or cost(waiting[0], fraction, [], overhead_seconds) + later <= seconds_left:
            return _affordable(waiting[0], fraction, readings, seconds_left, overhead_seconds)
    order = _ahead(readings, fraction)
    while fraction < 1.0 and len(order) >= FEWEST:
        shorter, fraction = fraction, min(1.0, ETA * fraction)
        kept = order[: max(FEWEST, math.ceil(len(order) / ETA))]
        order = [rival for rival in kept if not _hopeless(rival, kept[0], readings, shorter)]
        for rival in order:
            if len(order) >= FEWEST and not _read_at(readings, rival, fraction):
                return _affordable(known[rival], fraction, readings, seconds_left, overhead_seconds)
        order = _ahead(readings, fraction)
    return None


def cost(rival: Rival, fraction: float, readings: Sequence[Reading], overhead_seconds: float) -> float:
    """Expected wall clock of a rung, which continues from the longest one so far."""
    done = max((r.fraction for r in readings if r.rival == rival.rival and r.loss is not None), default=0.0)
    return overhead_seconds + max(0.0, fraction - rival.kept_share * done) * rival.seconds


def order_of(readings: Sequence[Reading]) -> tuple[int, ...]:
    """Rivals with a loss, best first: the longer their training the more it counts, then the loss."""
    longest = {rival: found[-1] for rival, found in by_rival(readings).items()}
    return tuple(sorted(longest, key=lambda rival: (-longest[rival].fraction, longest[rival].loss)))


def tied(readings: Sequence[Reading]) -> tuple[int, ...]:
    """Rivals that were trained as far as the best one and cannot be distinguished from it."""
    order, found = order_of(readings), by_rival(readings)
    if not order:
        return ()
    best = found[order[0]][-1]
    rest = [(rival, difference(found[rival][-1], best)) for rival in order[1:]]
    as_far = [(rival, apart) for rival, apart in rest if found[rival][-1].fraction == best.fraction]
    return tuple(rival for rival, apart in as_far if apart is not None and not apart.significant)


def _first_fraction(rivals: Sequence[Rival], seconds_left: float, overhead_seconds: float) -> float | None:
    """The longest first rung with which a field as large as possible fits. A rung trains for at least as long as its
    process needs to start: shorter ones would spend the budget on starting. None: not even two rivals fit."""
    seconds = statistics.fmean(rival.seconds for rival in rivals) if rivals else 0.0
    for count in range(len(rivals), FEWEST - 1, -1):
        low, high = 0.0, 1.0
        for _ in range(30):  # the cost grows with the fraction
            middle = (low + high) / 2
            first = sum(cost(rival, middle, [], overhead_seconds) for rival in rivals[:count])
            fits = first + _later_levels(rivals[:count], middle, overhead_seconds) <= seconds_left
            low, high = (middle, high) if fits else (low, middle)
        fraction = 1.0 if low > 0.99 else float(f"{low:.3g}")
        if fraction * seconds >= min(overhead_seconds, seconds):
            return fraction
    return None


def _later_levels(field: Sequence[Rival], fraction: float, overhead_seconds: float) -> float:
    """Expected wall clock of all levels after the first."""
    seconds, kept = max(rival.seconds for rival in field), min(rival.kept_share for rival in field)
    count, total = len(field), 0.0
    while fraction < 1.0 and count > FEWEST:
        shorter, fraction, count = fraction, min(1.0, ETA * fraction), max(FEWEST, math.ceil(count / ETA))
        total += count * (overhead_seconds + (fraction - kept * shorter) * seconds)
    return total


def _affordable(
    rival: Rival, fraction: float, readings: Sequence[Reading], seconds_left: float, overhead_seconds: float
) -> Step | None:
    fits = cost(rival, fraction, readings, overhead_seconds) <= seconds_left
    return Step(rival=rival.rival, fraction=fraction) if fits else None


def _read_at(readings: Sequence[Reading], rival: int, fraction: float) -> bool:
    """Whether the rival was trained to this length; one that failed there is not tried again."""
    ended = (r for r in readings if r.rival == rival and r.status != "interrupted")
    return any(reading.fraction == fraction for reading in ended)


def _ahead(readings: Sequence[Reading], fraction: float) -> list[int]:
    """Rivals with a loss at this length, best first."""
    read = [reading for reading in readings if reading.fraction == fraction and reading.loss is not None]
    return [reading.rival for reading in sorted(read, key=lambda reading: reading.loss or 0.0)]


def _hopeless(rival: int, leader: int, readings: Sequence[Reading], fraction: float) -> bool:
    """Whether a rival was behind the leader beyond noise at its last two lengths, and did not come closer."""
    apart = [gap for at in (fraction / ETA, fraction) if (gap := _gap(rival, leader, readings, at)) is not None]
    return len(apart) == 2 and all(gap.significant for gap in apart) and 0.0 < apart[0].nats <= apart[1].nats


def _gap(rival: int, leader: int, readings: Sequence[Reading], fraction: float) -> Difference | None:
    at = {r.rival: r for r in readings if math.isclose(r.fraction, fraction) and r.loss is not None}
    return difference(at[rival], at[leader]) if rival in at and leader in at else None

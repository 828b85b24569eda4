"""The rule of a race: which rival is trained next, how far, and who is ahead. Successive halving (Jamieson and
Talwalkar, AISTATS 2016) over a field that the time decides.

Who is ahead is not who has the lowest loss so far: small batches lead in short trainings and lose long ones. Rivals are
ordered by the final loss that the posterior of `autotune.runs.curves` expects of each (docs/race.md shows what that
gains). Pure functions of the rivals and their readings: a race that was killed continues by asking again.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from autotune.config.candidate import Plan, Shape
from autotune.runs.curves import Posterior, Priors, Training, predict, priors
from autotune.runs.races import Reading, Rival, by_rival, difference

ETA = 3
"""Each level keeps one rival in so many and trains it so many times as long."""
FEWEST = 2
"""Rivals that a race needs."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What to do next."""

    rival: int
    fraction: float
    """Length to train it to, as a fraction of its full training."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Choices of the rule; `scripts/replay_races` compares others."""

    eta: int = ETA
    known: Priors | None = None
    """What is expected before any reading; None: the package's own, by the length of the trainings."""
    extrapolates: bool = True
    """Order rivals by their expected final loss, not by their latest reading."""


RULE = Rule()


def next_rung(
    rivals: Sequence[Rival],
    readings: Sequence[Reading],
    seconds_left: float,
    overhead_seconds: float,
    rule: Rule = RULE,
    *,
    running: Sequence[Step] = (),
    slots: int = 1,
) -> Step | None:
    """The next rung; None: the race is over, nothing useful fits in the time left, or what runs must end first.
    `rivals`: the most plausible first. `overhead_seconds`: expected time of a rung beside its steps. `running`: rungs
    that have begun; `slots`: how many can run at the same time."""
    begun = [*((reading.rival, reading.fraction) for reading in readings), *((s.rival, s.fraction) for s in running)]
    known = {rival.rival: rival for rival in rivals}
    busy = sum(cost(known[step.rival], step.fraction, readings, overhead_seconds) for step in running)
    work_left = slots * seconds_left - busy
    if not begun:
        for field in _fields(rivals, rule):
            if first := _first_fraction(field, work_left, overhead_seconds, rule.eta):
                return _affordable(field[0], first, readings, seconds_left, overhead_seconds)
        return None
    rivals = _compiled(rivals, {known[rival].code for rival, _ in begun})
    known = {rival.rival: rival for rival in rivals}
    fraction, longest = min(length for _, length in begun), max(length for _, length in begun)
    runs = {(step.rival, step.fraction) for step in running}
    field = [rival for rival in rivals if (rival.rival, fraction) in runs or _read_at(readings, rival.rival, fraction)]
    waiting = [rival for rival in rivals if rival not in field]
    for new in _entrants(waiting, rule) if longest == fraction else ():  # as long as the levels after the first fit
        later = _later_levels([*field, new], fraction, overhead_seconds, rule.eta) if len(field) >= FEWEST else 0.0
        if cost(new, fraction, [], overhead_seconds) + later <= work_left:
            return _affordable(new, fraction, readings, seconds_left, overhead_seconds)
    order = _ahead(rivals, readings, fraction, rule)
    while fraction < 1.0 and len(order) >= FEWEST and fraction not in {step.fraction for step in running}:
        fraction, kept = min(1.0, rule.eta * fraction), order[: max(FEWEST, math.ceil(len(order) / rule.eta))]
        for rival in kept:
            if (rival, fraction) not in runs and not _read_at(readings, rival, fraction):
                return _affordable(known[rival], fraction, readings, seconds_left, overhead_seconds)
        order = _ahead(rivals, readings, fraction, rule)
    return None


def cost(rival: Rival, fraction: float, readings: Sequence[Reading], overhead_seconds: float) -> float:
    """Expected wall clock of a rung, which continues from the longest one so far."""
    own = [reading for reading in readings if reading.rival == rival.rival]
    done = max((reading.fraction for reading in own if reading.loss is not None), default=0.0)
    beside = overhead_seconds + (0.0 if own else rival.compiling_seconds)
    return beside + max(0.0, fraction - rival.kept_share * done) * rival.seconds


def expected(
    rivals: Sequence[Rival], readings: Sequence[Reading], known: Priors | None = None, also: Sequence[Training] = ()
) -> Posterior:
    """Joint distribution of the rivals' losses after their full training, and of the losses of other trainings."""
    recipes = {rival.rival: rival.candidate.recipe for rival in rivals}
    full = {rival.rival: full_tokens(rival, readings) for rival in rivals}
    shown = []
    for rival, found in by_rival(readings).items():
        for reading in found:
            tokens = reading.tokens or reading.fraction * full[rival]
            shown.append((Training(recipe=recipes[rival], tokens=tokens, rival=rival), reading.loss or 0.0))
    wanted = [Training(recipe=recipe, tokens=full[rival], rival=rival) for rival, recipe in recipes.items()]
    longest = statistics.median(training.tokens for training in wanted)
    return predict(known or priors(longest), shown, [*wanted, *also])


def full_tokens(rival: Rival, readings: Sequence[Reading]) -> float:
    """Tokens of the rival's whole training, by the speed that its last rung showed."""
    found = by_rival(readings).get(rival.rival, [])
    if found and (tokens := found[-1].tokens):
        return tokens / found[-1].fraction
    return float(rival.candidate.recipe.max_tokens)


def order_of(rivals: Sequence[Rival], readings: Sequence[Reading], rule: Rule = RULE) -> tuple[int, ...]:
    """Rivals with a loss, best first: those of the last level or the one before it as they stand, then those of shorter
    trainings. One that the last level had no time for may still be expected to end lower."""
    longest = {rival: found[-1].fraction for rival, found in by_rival(readings).items()}
    standing, far = _standing(rivals, readings, rule), max(longest.values(), default=0.0)

    def key(rival: int) -> tuple[float, float]:
        near = rule.extrapolates and rule.eta * longest[rival] >= far
        return -far if near else -longest[rival], standing[rival]

    return tuple(sorted(longest, key=key))


def _standing(rivals: Sequence[Rival], readings: Sequence[Reading], rule: Rule) -> Mapping[int, float]:
    """A number for each rival with a loss; lower is better."""
    if not rule.extrapolates:
        return {rival: found[-1].loss or 0.0 for rival, found in by_rival(readings).items()}
    return dict(zip((rival.rival for rival in rivals), expected(rivals, readings, rule.known).means, strict=True))


def tied(rivals: Sequence[Rival], readings: Sequence[Reading]) -> tuple[int, ...]:
    """Rivals that were trained as far as the best one and cannot be distinguished from it."""
    order, found = order_of(rivals, readings), by_rival(readings)
    if not order:
        return ()
    best = found[order[0]][-1]
    rest = [(rival, difference(found[rival][-1], best)) for rival in order[1:]]
    as_far = [(rival, apart) for rival, apart in rest if found[rival][-1].fraction == best.fraction]
    return tuple(rival for rival, apart in as_far if apart is not None and not apart.significant)


def shortest(rivals: Sequence[Rival], overhead_seconds: float) -> float:
    """Expected wall clock of the shortest race between two of the rivals."""

    def seconds(pair: Sequence[Rival]) -> float:
        stepping = statistics.fmean(rival.seconds for rival in pair)
        return sum(rival.compiling_seconds + overhead_seconds + min(overhead_seconds, stepping) for rival in pair)

    return min(seconds(_with_its_mate(rival, rivals)) for rival in rivals)


def _fields(rivals: Sequence[Rival], rule: Rule) -> Iterator[list[Rival]]:
    """The fields that may race, the best first: as many of the most plausible rivals as possible, else any two, by the
    loss that is expected of one."""
    for count in range(len(rivals), FEWEST - 1, -1):
        yield _in_turn(rivals[:count])
    ranked = _by_expected_loss(rivals, rule)
    for rival in ranked if len(rivals) >= FEWEST else ():
        yield _with_its_mate(rival, ranked)


def _entrants(waiting: Sequence[Rival], rule: Rule) -> list[Rival]:
    """The next rival, and those to train in its place where compiling its code takes too long, the best first."""
    quicker = [rival for rival in waiting if rival.compiling_seconds < waiting[0].compiling_seconds]
    return [*waiting[:1], *(_by_expected_loss(quicker, rule) if quicker else [])]


def _with_its_mate(rival: Rival, rivals: Sequence[Rival]) -> list[Rival]:
    """The rival with the first of those whose code then takes the least time to compile."""
    others = _compiled([other for other in rivals if other is not rival], {rival.code})
    return [rival, min(others, key=lambda other: other.compiling_seconds)]


def _by_expected_loss(rivals: Sequence[Rival], rule: Rule) -> list[Rival]:
    means = expected(rivals, [], rule.known).means
    return [rivals[int(place)] for place in means.argsort(kind="stable")]


def _first_fraction(field: Sequence[Rival], seconds_left: float, overhead_seconds: float, eta: int) -> float | None:
    """The longest first rung with which the field fits. A rung trains for at least as long as its process needs to
    start: shorter ones would spend the budget on starting. None: it does not fit."""
    seconds = statistics.fmean(rival.seconds for rival in field)
    low, high = 0.0, 1.0
    for _ in range(30):  # the cost grows with the fraction
        middle = (low + high) / 2
        first = sum(cost(rival, middle, [], overhead_seconds) for rival in field)
        fits = first + _later_levels(field, middle, overhead_seconds, eta) <= seconds_left
        low, high = (middle, high) if fits else (low, middle)
    fraction = 1.0 if low > 0.99 else float(f"{low:.3g}")
    return fraction if fraction * seconds >= min(overhead_seconds, seconds) else None


def _in_turn(field: Sequence[Rival]) -> list[Rival]:
    """The rivals as they are trained one after the other: only the first with its code has to compile it."""
    return [_compiled([rival], {other.code for other in field[:place]})[0] for place, rival in enumerate(field)]


def _compiled(rivals: Sequence[Rival], codes: Set[tuple[Shape, Plan]]) -> list[Rival]:
    """The rivals, once these codes are compiled."""
    return [replace(rival, compiling_seconds=0.0) if rival.code in codes else rival for rival in rivals]


def _later_levels(field: Sequence[Rival], fraction: float, overhead_seconds: float, eta: int) -> float:
    """Expected wall clock of all levels after the first."""
    seconds, kept = max(rival.seconds for rival in field), min(rival.kept_share for rival in field)
    count, total = len(field), 0.0
    while fraction < 1.0 and count > FEWEST:
        shorter, fraction, count = fraction, min(1.0, eta * fraction), max(FEWEST, math.ceil(count / eta))
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


def _ahead(rivals: Sequence[Rival], readings: Sequence[Reading], fraction: float, rule: Rule) -> list[int]:
    """Rivals with a loss at this length, best first. Longer readings do not count: a level's order must not change
    while the next one runs."""
    so_far = [reading for reading in readings if reading.fraction <= fraction]
    read = {reading.rival for reading in so_far if reading.fraction == fraction and reading.loss is not None}
    standing = _standing(rivals, so_far, rule)
    return sorted(read, key=lambda rival: standing[rival])

"""The race of a search: who takes part, what each rung is asked, and what the race shows.

The law that ranks shapes knows neither the user's text nor the optimizer, its rate and the batch. So real trainings of
the most plausible candidates compete, by the rule in `autotune.search.halving`.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from autotune.config.candidate import Candidate, Optimizer, Recipe, Shape
from autotune.config.search_settings import SearchSettings
from autotune.data.shards import open_split
from autotune.measure.types import EVALUATION_CODE, FROM_CACHE, Z95, RungRequest, RungResult, TrialRequest, TrialResult
from autotune.runs.curves import Posterior, Training
from autotune.runs.objective import (
    batch_tokens,
    best_first,
    best_learning_rate,
    clamp_learning_rate,
    finish_candidate,
    training_tokens,
)
from autotune.runs.races import Change, Lineup, RaceVerdict, Reading, Rival, by_rival, difference
from autotune.runs.records import TrialRecord
from autotune.search.halving import Step, expected, full_tokens, order_of, shortest, tied
from autotune.search.space import canonical
from autotune.units import format_count

SHAPES = 12
"""Shapes that may compete: the law errs about their order by more than they differ."""
MOST_RIVALS = 27
_RATES: dict[Optimizer, tuple[float, ...]] = {"muon": (0.5, 1.0, 2.0, 4.0, 8.0), "adamw": (0.5, 1.0, 2.0)}
"""Factors of the rule's learning rate."""
_DRAWS = 1000
"""Samples of what is expected of the rivals before any reading."""
_DECAY_SHARE = 0.4
"""Part of a rival's training in which the learning rate decays (docs/race.md#decay)."""
_BASELINE_PLACE = 4
"""Place of the baseline's recipe among the rivals: it shows what was gained, and hardly ever wins."""
_SMALLEST_PART = 4
"""A batch may be this many times smaller than the plan's micro batch: smaller ones leave the device idle."""

_EVALUATED_SHARE, _FORWARD_SPEED = 0.2, 3.0
"""An evaluation takes this fraction of a rung's overhead; a forward alone is about so many times as fast as a step."""
_CHUNKS = (8, 64)
"""Fewest and most chunks of validation tokens: fewer give no interval, more no narrower one worth the time."""
_CHUNK_TOKENS = 2048
_REPEATS = 4
"""Times that a text can be repeated and be nearly as good as new text (Muennighoff et al., Scaling Data-Constrained
Language Models, 2023)."""
_PATIENCE = 3.0
"""Multiple of its expected time after which a rung is considered to hang, but not before..."""
_PATIENCE_SECONDS = 60.0


def candidates_for_race(records: Sequence[TrialRecord], settings: SearchSettings) -> tuple[Rival, ...]:
    """Rivals, in the order in which they should be trained: measured shapes with optimizers, learning rates and batches
    around the rules, and among those the most promising (`_most_promising`). The baseline's recipe is one of the first,
    so that it is known what was gained."""
    ranked = best_first([record for record in records if record.role not in ("race", "final")], maximise=False)
    fastest = {record.candidate.shape: record for record in reversed(ranked)}
    every = [rival for record in fastest.values() for rival in _rivals_of(record, settings)]
    unique = {(rival.candidate.recipe, rival.rate_factor): rival for rival in every}
    field = [replace(rival, rival=number) for number, rival in enumerate(unique.values())]
    order = _most_promising(_of_best_shapes(field, settings), first_overhead(records), settings.seed)
    return _with_baseline_early(order, settings)[:MOST_RIVALS]


def _rivals_of(record: TrialRecord, settings: SearchSettings) -> list[Rival]:
    """Recipes for the shape of a trial, around the rules; of the baseline's shape its own recipe too."""
    measured, speed = record.candidate, record.result.tokens_per_second or 0.0
    tokens = training_tokens(settings, speed)
    optimizers: tuple[Optimizer, ...] = ("adamw",) if settings.target == "nanogpt" else ("muon", "adamw")
    recipes = [
        (optimizer, batch, factor)
        for optimizer, batch in itertools.product(optimizers, _batches(measured, tokens, settings))
        for factor in _RATES[optimizer]
    ]
    if measured.shape == settings.recipe.shape:
        own = settings.recipe.optimizer, settings.recipe.global_batch_size
        recipes.append((*own, _own_factor(settings, _rival(measured, *own, 1.0, tokens, settings).recipe)))
    return [
        Rival(
            rival=0, candidate=_rival(measured, optimizer, batch, factor, tokens, settings), rate_factor=factor,
            seconds=tokens / speed, compiling_seconds=_compiling(record, batch),
        )
        for optimizer, batch, factor in recipes
    ]  # fmt: skip


def _compiling(record: TrialRecord, batch: int) -> float:
    """Seconds that compiling adds to a first rung in batches of so many sequences, after a trial that compiled for its
    own micro batch and not for evaluations."""
    plan = record.candidate.plan
    if plan.compile == "off":
        return 0.0
    step = (1.0 - FROM_CACHE) * record.result.compiling_seconds
    return step * (EVALUATION_CODE + (batch < plan.micro_batch_size))


def _of_best_shapes(rivals: Sequence[Rival], settings: SearchSettings) -> list[Rival]:
    """The rivals of the SHAPES shapes from whose best recipe the lowest loss is expected, and of the baseline's."""
    least: dict[Shape, float] = {}
    for rival, loss in zip(rivals, expected(rivals, []).means.tolist(), strict=True):
        shape = rival.candidate.shape
        least[shape] = min(loss, least.get(shape, math.inf))
    best = {*sorted(least, key=least.__getitem__)[:SHAPES], settings.recipe.shape}
    return [rival for rival in rivals if rival.candidate.shape in best]


def _most_promising(rivals: Sequence[Rival], overhead_seconds: float, seed: int) -> list[Rival]:
    """The first has the lowest loss expected before any reading; each further one lowers the least loss that is
    expected of the field by most for the time of its rung. So what is uncertain comes before what is nearly the same as
    one in the field, and what runs code of another before what has to be compiled."""
    field = sorted(rivals, key=lambda rival: rival.rival)
    before = expected(field, [])
    draws = np.random.default_rng(seed).multivariate_normal(before.means, before.covariance, _DRAWS)  # (draws, rivals)
    order = [int(draws.mean(axis=0).argmin())]
    least, waiting = draws[:, order[0]], [place for place in range(len(field)) if place != order[0]]

    def worth(place: int) -> float:
        compiled = any(field[other].code == field[place].code for other in order)
        seconds = 2 * overhead_seconds + (0.0 if compiled else field[place].compiling_seconds)
        return float((least - np.minimum(least, draws[:, place])).mean()) / (seconds or 1.0)

    while waiting and len(order) < MOST_RIVALS:
        place = max(waiting, key=worth)
        waiting.remove(place)
        order.append(place)
        least = np.minimum(least, draws[:, place])
    return [field[place] for place in (*order, *waiting)]


def _with_baseline_early(rivals: list[Rival], settings: SearchSettings) -> tuple[Rival, ...]:
    own = next(((place, rival) for place, rival in enumerate(rivals) if is_baseline(rival, settings)), None)
    if own is not None and own[0] > _BASELINE_PLACE:
        rivals.remove(own[1])
        rivals.insert(_BASELINE_PLACE, own[1])
    return tuple(replace(rival, rival=number) for number, rival in enumerate(rivals))


def is_baseline(rival: Rival, settings: SearchSettings) -> bool:
    """Whether the rival learns with the baseline's recipe, schedule aside."""
    recipe, own = rival.candidate.recipe, settings.recipe
    return (recipe.shape, recipe.optimizer, recipe.global_batch_size, rival.rate_factor) == (
        own.shape, own.optimizer, own.global_batch_size, _own_factor(settings, recipe),
    )  # fmt: skip


def _own_factor(settings: SearchSettings, recipe: Recipe) -> float:
    """The baseline's learning rate as a multiple of the rule's for `recipe`, the same for batches that differ in how
    their steps fill the length."""
    if not settings.own_rate:
        return 1.0
    rule = clamp_learning_rate(best_learning_rate(recipe.shape, recipe.max_tokens))
    return float(f"{settings.recipe.learning_rate / rule:.3g}")


def _rival(
    candidate: Candidate, optimizer: Optimizer, batch: int, factor: float, tokens: float, settings: SearchSettings
) -> Candidate:
    recipe = replace(candidate.recipe, optimizer=optimizer, global_batch_size=batch)
    if settings.target != "nanogpt":
        recipe = replace(recipe, schedule="wsd", decay_share=_DECAY_SHARE)
    # the plan stays as it was measured and compiled, unless the batch is smaller than its micro batch
    plan = replace(candidate.plan, micro_batch_size=min(candidate.plan.micro_batch_size, batch))
    rival = replace(candidate, recipe=recipe, plan=plan)
    return finish_candidate(rival if plan == candidate.plan else canonical(rival), tokens, factor)


def _batches(candidate: Candidate, tokens: float, settings: SearchSettings) -> list[int]:
    """Sequences of a step: the plan's micro batch times the power of two that comes nearest to the rule's tokens, the
    baseline's tokens, twice and half the first; none for which the plan would have to run in far smaller parts."""
    block, micro = candidate.shape.block_size, candidate.plan.micro_batch_size
    rule = micro * 2.0 ** round(math.log2(batch_tokens(tokens) / block / micro))
    smallest = max(1, micro // _SMALLEST_PART)
    wanted = (rule, settings.recipe.tokens_per_step / block, 2 * rule, rule / 2)
    return list(dict.fromkeys(max(smallest, int(size)) for size in wanted))


def make_lineup(rivals: Sequence[Rival], data: Path, speed: float, overhead_seconds: float) -> Lineup:
    """The rivals with the validation tokens on which all are evaluated. `speed`: tokens/s of a typical rival."""
    blocks = math.lcm(*(rival.candidate.shape.block_size for rival in rivals))
    forward = max(_CHUNK_TOKENS, *(r.candidate.plan.micro_batch_size * r.candidate.shape.block_size for r in rivals))
    there = (len(open_split(data, "val")[0]) - 1) // blocks  # windows of another file would not be the same for all
    size = max(1, min(-(-forward // blocks), there // _CHUNKS[0]))
    wanted = _FORWARD_SPEED * speed * max(1.0, _EVALUATED_SHARE * overhead_seconds)
    chunks = min(max(_CHUNKS[0], round(wanted / (size * blocks))), _CHUNKS[1], max(1, there // size))
    return Lineup(rivals=tuple(rivals), chunk_tokens=size * blocks, chunks=chunks)


def shortest_race(records: Sequence[TrialRecord], settings: SearchSettings) -> float:
    """Expected seconds of the shortest race between recipes for shapes that were measured."""
    ran = [record for record in records if record.objective is not None and record.role not in ("race", "final")]
    return shortest([rival for record in ran for rival in _rivals_of(record, settings)], first_overhead(records))


def first_overhead(records: Sequence[TrialRecord]) -> float:
    """Expected time of a rung beside its steps before any was run: that of trials, were all code in the cache."""
    ran = [record.result for record in records if record.objective is not None and record.role != "race"]
    beside = [
        (result.trial_seconds or 0.0) - result.phase_seconds.get("measure", 0.0) - result.saved_by_cache
        for result in ran
    ]  # fmt: skip
    return statistics.median(beside) if beside else 0.0


def overhead(rivals: Sequence[Rival], readings: Sequence[Reading], before: float) -> float:
    """Expected time of a rung beside its steps, once its code is compiled: the mean so far, else `before`."""
    known, compiled, beside = {rival.rival: rival for rival in rivals}, set[object](), list[float]()
    for reading in readings:
        rival = known[reading.rival]
        compiling = 0.0 if rival.code in compiled else rival.compiling_seconds
        compiled.add(rival.code)
        if reading.loss is not None:
            beside.append(max(0.0, reading.seconds - reading.stepping_seconds - compiling))
    return statistics.fmean(beside) if beside else before


def equal_tokens(
    rival: Rival, fraction: float, lineup: Lineup, readings: Sequence[Reading], records: Sequence[TrialRecord],
    train_seconds: float | None,
) -> int | None:  # fmt: skip
    """Tokens of a rung whose training was given in time, if its speed is known. Rivals that execute the same step get
    the same, even if another program disturbs one of them."""
    if train_seconds is None:
        return None
    same = {other.rival for other in lineup.rivals if other.candidate.id == rival.candidate.id}
    ran = [reading for reading in readings if reading.rival in same and reading.tokens and reading.tokens_per_second]
    alike = next((reading.tokens for reading in ran if reading.fraction == fraction), None)
    if alike is not None:
        return alike
    trials = (record for record in records if record.candidate.id == rival.candidate.id and record.role != "race")
    speeds = [reading.tokens_per_second or 0.0 for reading in ran]
    speeds = speeds or [speed for record in trials if (speed := record.result.tokens_per_second)]
    return round(fraction * train_seconds * statistics.median(speeds)) if speeds else None


def rung_request(
    rival: Rival, step: Step, lineup: Lineup, *, device: str, memory_limit_bytes: int | None, checkpoints: Path | None,
    result_path: Path, timeout_seconds: float, train_seconds: float | None, tokens: int | None = None,
    evaluations: int = 1,
) -> RungRequest:  # fmt: skip
    """What the worker of one rung is asked. `train_seconds`: the full training's, if it was given in time, which the
    worker's own speed converts to tokens, unless `tokens` are given."""
    kept = checkpoints is not None and rival.kept_share > 0.0
    return RungRequest(
        candidate=rival.candidate, device=device, result_path=str(result_path),
        memory_limit_bytes=memory_limit_bytes, timeout_seconds=timeout_seconds,
        checkpoints=str(checkpoints) if kept else "",
        target_tokens=tokens or max(1, round(step.fraction * rival.candidate.recipe.max_tokens)),
        target_seconds=step.fraction * train_seconds if train_seconds and tokens is None else None,
        chunk_tokens=lineup.chunk_tokens, chunks=lineup.chunks, evaluations=evaluations,
    )  # fmt: skip


def patience(expected_seconds: float) -> float:
    """Seconds after which a rung that should take `expected_seconds` is considered to hang."""
    return max(_PATIENCE_SECONDS, _PATIENCE * expected_seconds)


def reading_of(number: int, step: Step, result: RungResult, rival: Rival) -> Reading:
    """The reading of a rung that has ended."""
    losses = result.chunk_losses if result.status == "ok" else ()
    return Reading(
        reading=number, rival=step.rival, fraction=step.fraction, status=result.status, message=result.message,
        iterations=result.iterations,
        tokens=None if result.iterations is None else result.iterations * rival.candidate.recipe.tokens_per_step,
        loss=statistics.fmean(losses) if losses else None, chunk_losses=losses,
        tokens_per_second=result.tokens_per_second, tokens_per_second_ci95=result.tokens_per_second_ci95,
        peak_allocated_bytes=result.peak("allocated_bytes"), peak_device_bytes=result.peak("device_bytes"),
        seconds=result.trial_seconds or 0.0, stepping_seconds=result.stepping_seconds, started_at=result.started_at,
        curve_tokens=result.curve_tokens, curve_losses=result.curve_losses,
    )  # fmt: skip


def as_trial_request(request: RungRequest) -> TrialRequest:
    """The request of a trial of the rung's candidate, for the study."""
    return TrialRequest(**{field.name: getattr(request, field.name) for field in fields(TrialRequest)})


def as_trial(result: RungResult) -> TrialResult:
    """What a rung measured of its candidate's speed and memory."""
    return TrialResult(**{field.name: getattr(result, field.name) for field in fields(TrialResult)})


def conclude_race(lineup: Lineup, readings: Sequence[Reading], settings: SearchSettings) -> RaceVerdict | None:
    """What the race shows so far; None while nothing was read."""
    if not readings:
        return None
    order, raced = order_of(lineup.rivals, readings), {reading.rival for reading in readings}
    rivals = {rival.rival: rival for rival in lineup.rivals if rival.rival in raced}
    told = RaceVerdict(
        rivals=tuple(rivals.values()), order=order, seconds=sum(reading.seconds for reading in readings),
        readings=tuple(replace(reading, chunk_losses=()) for reading in readings),
    )  # fmt: skip
    if not order:
        return told
    winner, found = rivals[order[0]], by_rival(readings)
    own = next((rival for rival in lineup.rivals if is_baseline(rival, settings)), None)
    widths = [
        apart.ci95 for rival in order[1:]
        if (apart := difference(found[rival][0], found[order[0]][0])) is not None and math.isfinite(apart.ci95)
    ]  # fmt: skip
    foreseen, places = expected(lineup.rivals, readings), [rival.rival for rival in lineup.rivals]
    place, against = places.index(order[0]), None
    if own is not None and own.rival != winner.rival:
        against = _compared("all of it", "baseline", "best", [(own, winner)], winner, readings)
        if against.nats is None:
            against = _expected_apart(against, foreseen, place, places.index(own.rival))
    return replace(
        told,
        expected_loss=float(foreseen.means[place]),
        expected_ci95=float(Z95 * foreseen.sd[place]),
        tied_with=tied(lineup.rivals, readings),
        against_baseline=against,
        changes=_changes(winner, lineup, readings, settings),
        noise_ci95=statistics.median(widths) if widths else None,
    )  # fmt: skip


def race_notes(lineup: Lineup, race: RaceVerdict, readings: Sequence[Reading]) -> list[str]:
    """What the user should know about a race's outcome; one line each."""
    if not race.order:
        return ["no rival of the race came to the end of a rung: the winner is by the law, not raced"]
    return [*_repeats(lineup, race, readings), *_small_split(lineup, race)]


def _repeats(lineup: Lineup, race: RaceVerdict, readings: Sequence[Reading]) -> list[str]:
    """A note where the training repeats its text too often."""
    winner = next(rival for rival in lineup.rivals if rival.rival == race.order[0])
    there = sum(map(len, open_split(Path(winner.candidate.recipe.data), "train")))
    repeats = full_tokens(winner, readings) / there
    if repeats <= _REPEATS:
        return []
    return [
        f"the training repeats its text {repeats:.1f} times: the expected loss does not allow for that and "
        "may be too low, and the model may learn the text by heart; prepare more text, or train for less time"
    ]


def _small_split(lineup: Lineup, race: RaceVerdict) -> list[str]:
    if lineup.chunks >= _CHUNKS[0]:
        return []
    tokens = lineup.chunks * lineup.chunk_tokens
    noise = "unknown" if race.noise_ci95 is None else f"±{race.noise_ci95:.3f} nats"
    return [
        f"the validation split is small: rivals were compared on {tokens:,} tokens, the noise of a difference is "
        f"{noise}; prepare more data"
    ]


def _changes(
    winner: Rival, lineup: Lineup, readings: Sequence[Reading], settings: SearchSettings
) -> tuple[Change, ...]:
    """Each thing in which the winner's recipe differs from the baseline's, and what it gained alone: by two rivals that
    were raced, and differ in it and in nothing else; if there are none, what all readings together let expect. An
    optimizer is compared at its own best rate."""
    raced = {reading.rival for reading in readings}
    values = {rival.rival: _recipe_values(rival) for rival in lineup.rivals if rival.rival in raced}
    ours, recipe, own = values[winner.rival], winner.candidate.recipe, settings.recipe
    theirs = {
        "shape": own.shape, "optimizer": own.optimizer, "learning rate": _own_factor(settings, recipe),
        "batch": own.tokens_per_step,
    }  # fmt: skip
    rivals, found = [rival for rival in lineup.rivals if rival.rival in raced], []
    for what in [name for name in ours if ours[name] != theirs[name]]:
        free = {what, "learning rate"} if what == "optimizer" else {what}
        pairs = [
            (one, other)
            for one, other in itertools.permutations(rivals, 2)
            if values[one.rival][what] == theirs[what] and values[other.rival][what] == ours[what]
            and all(values[one.rival][name] == values[other.rival][name] for name in ours.keys() - free)
        ]  # fmt: skip
        before, after = (_in_words(what, value[what]) for value in (theirs, ours))
        change = _compared(what, before, after, pairs, winner, readings)
        if change.nats is None:
            change = _expected_change(change, winner, lineup, readings, settings)
        found.append(change)
    if recipe.schedule != own.schedule:
        found.append(Change(what="schedule", before=own.schedule, after=recipe.schedule, rivals=()))
    return tuple(found)


def _expected_change(
    change: Change, winner: Rival, lineup: Lineup, readings: Sequence[Reading], settings: SearchSettings
) -> Change:  # fmt: skip
    """The change with the difference that is expected after the whole training between the winner and the same recipe
    with the baseline's `change.what`. A shape of which no rival tells the speed has none."""
    recipe, own, tokens = winner.candidate.recipe, settings.recipe, full_tokens(winner, readings)
    rate = recipe.learning_rate / winner.rate_factor
    if change.what == "shape":
        alike = next((rival for rival in lineup.rivals if rival.candidate.shape == own.shape), None)
        if alike is None:
            return change
        tokens, ruled = full_tokens(alike, readings), alike.candidate.recipe.learning_rate / alike.rate_factor
        other = replace(
            alike.candidate.recipe, optimizer=recipe.optimizer, learning_rate=ruled * winner.rate_factor,
            global_batch_size=max(1, recipe.tokens_per_step // own.shape.block_size),
        )  # fmt: skip
    elif change.what == "optimizer":
        other = replace(recipe, optimizer=own.optimizer, learning_rate=rate)
    elif change.what == "learning rate":
        other = replace(recipe, learning_rate=rate * _own_factor(settings, recipe))
    else:
        other = replace(recipe, global_batch_size=own.global_batch_size)
    found = expected(lineup.rivals, readings, also=[Training(recipe=other, tokens=tokens, rival="as before")])
    return _expected_apart(change, found, [rival.rival for rival in lineup.rivals].index(winner.rival), -1)


def _expected_apart(change: Change, found: Posterior, one: int, other: int) -> Change:
    """The change with the expected difference between two losses of the posterior, by their places in it."""
    apart = np.zeros(len(found.means))
    apart[one], apart[other] = 1.0, -1.0
    sd = found.widening * math.sqrt(max(0.0, float(apart @ found.covariance @ apart)))
    return replace(change, nats=float(apart @ found.means), ci95=Z95 * sd)


def _recipe_values(rival: Rival) -> dict[str, object]:
    recipe = rival.candidate.recipe
    return {
        "shape": recipe.shape, "optimizer": recipe.optimizer, "learning rate": rival.rate_factor,
        "batch": recipe.tokens_per_step,
    }  # fmt: skip


def _in_words(what: str, value: object) -> str:
    if isinstance(value, Shape):
        return f"{value.size}, block {value.block_size}"
    if what == "learning rate":
        return f"{value:.3g} x rule"
    return f"{format_count(value)} tokens a step" if isinstance(value, int) else str(value)


def _compared(
    what: str, before: str, after: str, pairs: Sequence[tuple[Rival, Rival]], winner: Rival,
    readings: Sequence[Reading],
) -> Change:  # fmt: skip
    """The second of a pair against the first, at the longest length that both were trained to. Of several pairs, the
    one most like the winner counts, then the longest, then that with the best first."""
    read, ours = by_rival(readings), _recipe_values(winner)
    found = []
    for one, other in pairs:
        alike = sum(value == ours[name] for name, value in _recipe_values(other).items())
        for a, b in itertools.product(read.get(one.rival, []), read.get(other.rival, [])):
            if a.fraction == b.fraction and (apart := difference(b, a)) is not None:
                found.append(((-alike, -a.fraction, a.loss or 0.0), (one.rival, other.rival), a.fraction, apart))
    if not found:
        return Change(what=what, before=before, after=after, rivals=())
    _, rivals, fraction, apart = min(found, key=lambda pair: pair[0])
    return Change(
        what=what, before=before, after=after, rivals=rivals, nats=apart.nats,
        ci95=apart.ci95 if math.isfinite(apart.ci95) else None, fraction=fraction,
    )  # fmt: skip

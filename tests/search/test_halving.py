"""The rule of a race looks at where rivals will be, not at where they are."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.measure.types import Status
from autotune.runs.curves import Training, predict, priors
from autotune.runs.races import Reading, Rival
from autotune.search.halving import Rule, cost, expected, next_rung, order_of, shortest

FULL = 2**21
BATCHES = (1024, 2048, 4096, 8192)
RAW = Rule(extrapolates=False)


def rivals(batches: Sequence[int] = BATCHES) -> list[Rival]:
    """Alike but for the batch; 100 s each."""
    shape = Shape(n_layer=4, n_head=4, n_embd=128, block_size=128)
    recipes = [
        Recipe(
            shape=shape, global_batch_size=batch // 128, max_iters=FULL // batch, schedule="wsd", optimizer="muon",
            learning_rate=0.006,
        )
        for batch in batches
    ]  # fmt: skip
    return [
        Rival(rival=number, candidate=Candidate(recipe=recipe, plan=Plan(micro_batch_size=1)), seconds=100.0)
        for number, recipe in enumerate(recipes)
    ]


def law(rival: Rival, fraction: float) -> float:
    recipe = rival.candidate.recipe
    return float(predict(priors(2**19), [], [Training(recipe=recipe, tokens=fraction * FULL, rival=0)]).means[0])


def reading(rival: Rival, fraction: float, loss: float | None) -> Reading:
    status: Status = "ok" if loss is not None else "incorrect"
    return Reading(reading=0, rival=rival.rival, fraction=fraction, status=status, loss=loss)


def test_a_lead_that_will_be_lost_does_not_count() -> None:
    field = rivals((1024, 8192))
    readings = [reading(rival, 1 / 64, law(rival, 1 / 64)) for rival in field]
    assert readings[0].loss < readings[1].loss  # type: ignore[operator]
    assert order_of(field, readings, RAW) == (0, 1)
    assert order_of(field, readings) == (1, 0)


def test_a_rival_far_better_than_the_law_is_believed() -> None:
    field = rivals((1024, 8192))
    readings = [reading(rival, f, law(rival, f) - 1.0 * (rival.rival == 0)) for rival in field for f in (1 / 8, 1 / 2)]
    assert order_of(field, readings) == (0, 1)


def test_a_longer_training_counts_more() -> None:
    field = rivals((2048, 4096))
    readings = [reading(field[0], 0.5, law(field[0], 0.5)), reading(field[1], 0.125, law(field[1], 0.125) - 0.5)]
    assert order_of(field, readings) == (0, 1)


def test_readings_narrow_what_is_expected() -> None:
    field = rivals()
    before = expected(field, [])
    after = expected(field, [reading(rival, 0.25, law(rival, 0.25)) for rival in field])
    assert (after.sd < before.sd).all()


@pytest.mark.parametrize("eta", [2, 3, 4])
def test_each_level_keeps_one_in_eta(eta: int) -> None:
    field, readings, left, rule = rivals((512, 1024, 2048, 4096, 8192, 16384)), list[Reading](), 300.0, Rule(eta=eta)
    while (step := next_rung(field, readings, left, 10.0, rule)) is not None:
        left -= cost(field[step.rival], step.fraction, readings, 10.0)
        readings.append(reading(field[step.rival], step.fraction, law(field[step.rival], step.fraction)))
    counts = Counter(one.fraction for one in readings)
    first, second = sorted(counts)[:2]
    assert counts[first] >= 4
    assert counts[second] == max(2, math.ceil(counts[first] / eta))
    assert second == pytest.approx(min(1.0, eta * first))
    assert left >= 0.0


def test_the_order_of_a_level_holds_while_the_next_one_runs() -> None:
    field = rivals()
    first = [reading(rival, 0.125, law(rival, 0.125)) for rival in field]
    step = next_rung(field, first, 1e3, 1.0)
    assert step is not None
    bad = reading(field[step.rival], step.fraction, 9.0)
    after = next_rung(field, [*first, bad], 1e3, 1.0)
    assert after is not None
    good = reading(field[step.rival], step.fraction, 3.0)
    assert after == next_rung(field, [*first, good], 1e3, 1.0)


def test_a_rival_that_diverged_is_not_trained_on() -> None:
    field, readings = rivals(), list[Reading]()
    while (step := next_rung(field, readings, 1e3, 1.0)) is not None:
        loss = None if step.rival == 2 else law(field[step.rival], step.fraction)
        readings.append(reading(field[step.rival], step.fraction, loss))
        assert len(readings) < 50
    assert sum(one.rival == 2 for one in readings) == 1
    assert 2 not in order_of(field, readings)


def test_code_is_compiled_once_for_all_rivals_that_share_it() -> None:
    """Two rivals that run the same code fit where two with code of their own do not."""
    alike = [replace(rival, compiling_seconds=60.0) for rival in rivals((1024, 2048))]
    plans = (Plan(micro_batch_size=1), Plan(micro_batch_size=2))
    apart = [
        replace(rival, candidate=replace(rival.candidate, plan=plan))
        for rival, plan in zip(alike, plans, strict=True)
    ]
    assert next_rung(apart, [], 120.0, 10.0) is None
    step, readings, left = next_rung(alike, [], 120.0, 10.0), list[Reading](), 120.0
    assert step is not None
    assert cost(alike[0], step.fraction, [], 10.0) == pytest.approx(70.0 + 100.0 * step.fraction)
    while (step := next_rung(alike, readings, left, 10.0)) is not None:
        paid = replace(alike[step.rival], compiling_seconds=0.0 if readings else 60.0)
        left -= cost(paid, step.fraction, readings, 10.0)
        readings.append(reading(alike[step.rival], step.fraction, law(alike[step.rival], step.fraction)))
    assert {one.rival for one in readings} == {0, 1}
    assert left >= 0.0


def test_a_rival_whose_code_takes_too_long_is_passed_over() -> None:
    """Without time to compile for the second rival, the third is trained, which runs the first one's code."""
    field = [replace(rival, compiling_seconds=40.0) for rival in rivals((1024, 2048, 4096))]
    field[1] = replace(field[1], candidate=replace(field[1].candidate, plan=Plan(micro_batch_size=2)))
    assert shortest(field, 10.0) == pytest.approx(80.0)
    assert next_rung(field, [], 79.0, 10.0) is None
    step = next_rung(field, [], 100.0, 10.0)
    assert step is not None
    first = reading(field[0], step.fraction, 7.0)
    left = 100.0 - cost(field[0], step.fraction, [], 10.0)
    assert next_rung(field, [first], left, 10.0) == replace(step, rival=2)


def test_the_shortest_race_is_between_two_that_share_code() -> None:
    """Where the most plausible rival takes too long to compile, the best of the others is raced, with its mate."""
    takes = (60.0, 40.0, 40.0, 20.0)
    field = [replace(rival, compiling_seconds=seconds) for rival, seconds in zip(rivals(), takes, strict=True)]
    for place, micro in ((1, 2), (2, 2), (3, 3)):
        field[place] = replace(
            field[place], candidate=replace(field[place].candidate, plan=Plan(micro_batch_size=micro))
        )
    assert shortest(field, 10.0) == pytest.approx(80.0)
    assert next_rung(field, [], 79.0, 10.0) is None
    step = next_rung(field, [], 81.0, 10.0)
    assert step is not None
    best = min((1, 2), key=lambda number: expected(field, []).means[number])
    assert step.rival == best
    first = reading(field[best], step.fraction, 7.0)
    left = 81.0 - cost(field[best], step.fraction, [], 10.0)
    assert next_rung(field, [first], left, 10.0) == replace(step, rival=3 - best)


def test_a_rival_compiles_once() -> None:
    rival = replace(rivals()[0], compiling_seconds=60.0)
    assert cost(rival, 0.25, [reading(rival, 0.125, None)], 10.0) == pytest.approx(35.0)

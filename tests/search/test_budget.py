from dataclasses import replace

import pytest
from fake_machine import CUDA, settings

from autotune.measure.types import TrialResult
from autotune.runs.records import Role, TrialRecord
from autotune.search.budget import (
    CLOSING_SECONDS,
    Budget,
    begin,
    final_seconds,
    final_steps,
    measure_seconds,
    next_allowance,
    reserve,
)
from autotune.search.space import baseline

SETTINGS = settings(CUDA)


def budget(seconds: float, elapsed: float = 0.0) -> Budget:
    return Budget(seconds=seconds, started=100.0, clock=lambda: 100.0 + elapsed)


def record(trial: int, objective: float, seconds: float = 10.0, role: Role = "search", micro: int = 8) -> TrialRecord:
    candidate = baseline(settings(CUDA))
    candidate = replace(candidate, plan=replace(candidate.plan, micro_batch_size=micro))
    result = TrialResult(status="ok", phase="done", tokens_per_second=objective, trial_seconds=seconds)
    return TrialRecord(trial=trial, role=role, candidate=candidate, result=result, objective=objective)


def test_the_first_trial_may_take_half_of_a_long_search_and_all_of_a_short_one() -> None:
    long = next_allowance(budget(3600), [], SETTINGS)
    assert long is not None
    assert long.seconds == (3600 - CLOSING_SECONDS) / 2
    assert not long.ends_budget
    short = next_allowance(budget(60), [], SETTINGS)
    assert short is not None
    assert short.seconds == 60 - CLOSING_SECONDS
    assert short.ends_budget


def test_no_trial_starts_that_cannot_finish_before_the_reserve() -> None:
    known = [record(0, 1.0, micro=1), record(1, 2.0, micro=2)]
    kept = reserve(budget(600), known, SETTINGS)
    assert next_allowance(budget(600, elapsed=600 - kept - CLOSING_SECONDS - 11), known, SETTINGS) is not None
    assert next_allowance(budget(600, elapsed=600 - kept - CLOSING_SECONDS - 9), known, SETTINGS) is None


def test_a_hanging_trial_costs_four_times_the_slowest_that_worked() -> None:
    allowance = next_allowance(budget(3600), [record(0, 1.0, seconds=50)], SETTINGS)
    assert allowance is not None
    assert allowance.seconds == 200


def test_the_reserve_is_for_the_three_best_and_the_baseline() -> None:
    known = [record(0, 1.0, role="baseline", micro=1)] + [record(n, 10.0 + n, micro=1 + n) for n in range(1, 6)]
    assert reserve(budget(3600), known, SETTINGS) == 4 * final_seconds(known[0], budget(3600))


def test_the_reserve_is_a_part_of_the_budget_but_enough_for_one() -> None:
    known = [record(n, 10.0 + n, seconds=60, micro=1 + n) for n in range(5)]
    one = final_seconds(known[0], budget(600))
    assert reserve(budget(600), known, SETTINGS) == 180
    assert reserve(budget(100), known, SETTINGS) == final_seconds(known[0], budget(100)) > 30
    assert one > 60


def test_no_time_is_kept_for_what_cannot_be_confirmed_any_more() -> None:
    assert reserve(budget(100), [record(0, 1.0, seconds=95)], SETTINGS) == 0.0


def test_a_finalist_whose_whole_steps_do_not_fit_is_composed() -> None:
    slow = replace(record(0, 1.0), result=replace(record(0, 1.0).result, step_seconds_p50=100.0))
    assert final_seconds(slow, budget(600)) == pytest.approx(1.1 * 10 + 600)
    assert final_seconds(slow, budget(600), "composed") == pytest.approx(1.1 * 10 + 5)
    assert final_steps(slow, budget(700)) == "whole"
    assert final_steps(slow, budget(600)) == "composed"
    assert reserve(budget(600), [slow], SETTINGS) == pytest.approx(16)


def test_a_finalist_finds_its_code_in_the_compile_cache() -> None:
    cold = replace(record(0, 1.0).result, trial_seconds=50.0, phase_seconds={"compile": 40.0}, compile_cache_misses=2)
    warm = replace(cold, compile_cache_misses=0)
    eager = replace(cold, compile_cache_misses=None)
    took = {name: final_seconds(replace(record(0, 1.0), result=result), budget(600)) for name, result in
            {"cold": cold, "warm": warm, "eager": eager}.items()}  # fmt: skip
    assert took["cold"] == pytest.approx(1.1 * (50 - 0.8 * 40) + 5)
    assert took["warm"] == took["eager"] == pytest.approx(1.1 * 50 + 5)


def test_nothing_is_kept_back_while_nothing_is_feasible() -> None:
    failed = replace(record(0, 1.0), objective=None)
    assert reserve(budget(600), [], SETTINGS) == reserve(budget(600), [failed], SETTINGS) == 0.0


def test_what_comes_before_a_trial_counts() -> None:
    known = [record(0, 1.0, micro=1), record(1, 2.0, micro=2)]
    left = 600 - CLOSING_SECONDS - reserve(budget(600), known, SETTINGS)
    assert next_allowance(budget(600), known, SETTINGS, ahead=left - 11) is not None
    assert next_allowance(budget(600), known, SETTINGS, ahead=left - 9) is None


def test_the_second_trial_is_spared_the_start_of_a_process() -> None:
    slow = replace(record(0, 1.0).result, trial_seconds=10.0, phase_seconds={"start": 6.0})
    first, second = (replace(record(n, 1.0 + n, micro=1 + n), result=slow) for n in range(2))
    for known, lasts in (([first], 4), ([first, second], 10)):
        left = 600 - CLOSING_SECONDS - reserve(budget(600), known, SETTINGS)
        assert next_allowance(budget(600), known, SETTINGS, ahead=left - lasts - 1) is not None
        assert next_allowance(budget(600), known, SETTINGS, ahead=left - lasts + 1) is None


def test_what_is_confirmed_needs_no_reserve() -> None:
    known = [record(n, 10.0 + n, micro=1 + n) for n in range(3)]
    finals = [replace(r, trial=10 + r.trial, role="final") for r in known]
    assert reserve(budget(3600), [*known, *finals], SETTINGS) == final_seconds(known[0], budget(3600))


def test_a_machine_that_was_slow_to_start_is_given_time_to_close() -> None:
    for took, closing in ((0.5, CLOSING_SECONDS), (9.0, 9.0), (200.0, 60.0)):
        made = begin(600.0, 100.0, lambda took=took: 100.0 + took)  # type: ignore[misc]
        assert made.closing_seconds == closing
        assert made.remaining() == 600 - took - closing
    assert begin(600.0, None, lambda: 7.0).started == 7.0


def test_short_searches_measure_for_a_shorter_time() -> None:
    assert measure_seconds(budget(3600)) == 5.0
    assert measure_seconds(budget(180)) == 1.5
    assert measure_seconds(budget(10)) == 0.5

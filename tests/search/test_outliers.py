"""Trials that another program disturbed."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.runs.records import TrialRecord
from autotune.search import acquisition
from autotune.search.outliers import expected_speeds, suspected_outliers
from autotune.search.simulation import Table, read_tables, speed
from autotune.search.space import every_candidate

RECORDED = Path(__file__).parents[2] / "results" / "reference" / "cpu-torch-2.13" / "trials.jsonl"


@pytest.fixture(scope="module")
def table() -> Table:
    return read_tables(RECORDED)[-1]


def recorded(table: Table, name: str, pace: float = 1.0) -> TrialRecord:
    candidate, result = every_candidate(table.space)[name], table.results[name]
    result = replace(result, tokens_per_second=pace * speed(result))
    return TrialRecord(trial=0, role="search", candidate=candidate, result=result, objective=result.tokens_per_second)


def ranked(table: Table) -> list[str]:
    return sorted(table.results, key=lambda name: -speed(table.results[name]))


def test_a_disturbed_trial_beyond_the_fitted_ones_is_suspected_too(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = table.space.choices
    records = [recorded(table, name) for name in ranked(table) if speed(table.results[name])]
    monkeypatch.setattr(acquisition, "FITTED", 32)
    slow = recorded(table, records[0].candidate.id, pace=0.6)
    suspects = suspected_outliers(names, [*records[1:], slow], table.settings)
    assert slow.candidate in [record.candidate for record in suspects[:3]]


def test_a_disturbed_trial_is_suspected_and_no_other(table: Table) -> None:
    """Thirty of the recorded trials of real models, as a search would have chosen them; then the best at 0.6 of its
    speed, as when another program runs beside it."""
    order, noticed = ranked(table), 0
    for seed in range(6):
        rng = random.Random(seed)
        drawn = dict.fromkeys(rng.sample(order[: len(order) // 2], 15) + rng.sample(order, 15))
        records = [recorded(table, name) for name in drawn if speed(table.results[name])]
        assert suspected_outliers(table.space.choices, records, table.settings) == []
        best = max(range(len(records)), key=lambda i: records[i].objective or 0.0)
        records[best] = recorded(table, records[best].candidate.id, pace=0.6)
        noticed += suspected_outliers(table.space.choices, records, table.settings)[:1] == [records[best]]
    assert noticed >= 4


def test_too_few_records_or_equal_ones_expect_nothing(table: Table) -> None:
    record = recorded(table, ranked(table)[0])
    assert all(sd == float("inf") for _, sd in expected_speeds([record] * 5, table.settings))
    assert suspected_outliers(table.space.choices, [], table.settings) == []

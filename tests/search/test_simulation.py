"""Replays of a table that the formula machine answered."""

import itertools
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import pytest
from fake_machine import CPU, answer

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.errors import ConfigError
from autotune.measure.runner import Running
from autotune.measure.types import TrialRequest, TrialResult
from autotune.search.loop import search
from autotune.search.resolve import resolve
from autotune.search.simulation import (
    CHOICES,
    VARIANTS,
    RecordedMachine,
    Table,
    limited,
    peak_of_best,
    quartiles,
    read_tables,
    replay,
    speed,
)
from autotune.search.space import build_space, every_candidate

RECIPE = Recipe(shape=Shape(n_layer=2, n_head=2, n_embd=128, block_size=128, vocab_size=8192), global_batch_size=16)
LIMIT = CPU.device_memory_bytes


def line(candidate: Candidate) -> str:
    asked = TrialRequest(candidate=candidate, device="cpu", result_path="", memory_limit_bytes=LIMIT)
    seconds = {"off": 5.0, "block": 10.0, "full": 18.0}[candidate.plan.compile]
    result = replace(answer(asked), trial_seconds=seconds)
    return json.dumps({"id": candidate.id, "candidate": asdict(candidate), "result": asdict(result)}) + "\n"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = replace(resolve(CPU, model="2x2x128", choices=CHOICES), recipe=RECIPE, baseline=Plan(micro_batch_size=8))
    path = tmp_path_factory.mktemp("table") / "trials.jsonl"
    path.write_text("".join(map(line, every_candidate(build_space(settings, CPU)).values())))
    path.with_suffix(".environment.json").write_text(json.dumps(asdict(CPU)))
    return path


@pytest.fixture(scope="module")
def table(file: Path) -> Table:
    (found,) = read_tables(file)
    return found


def test_a_table_holds_each_candidate_once(table: Table) -> None:
    assert table.results.keys() == every_candidate(table.space).keys()
    assert len(table.results) == 168
    assert table.settings.recipe == RECIPE
    assert table.best == max(speed(result) for result in table.results.values()) > 0


def test_a_table_that_lacks_a_candidate_is_refused(file: Path, tmp_path: Path) -> None:
    short = tmp_path / "trials.jsonl"
    short.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    short.with_suffix(".environment.json").write_text(json.dumps(asdict(CPU)))
    with pytest.raises(ConfigError, match="lacks 1 of 168 candidates"):
        read_tables(short)


def half_of(table: Table) -> int:
    """A limit that half of the candidates keep."""
    return sorted(result.peak("allocated_bytes") or 0 for result in table.results.values())[len(table.results) // 2]


@pytest.mark.slow
def test_ours_is_twice_as_fast_as_random_search_and_confirms_a_winner_in_time(table: Table) -> None:
    asked = limited(table, half_of(table))
    ours, theirs = ([replay(asked, sampler, seed) for seed in range(3)] for sampler in ("additive", "random"))
    near = [median(trace.reached(0.02) for trace in traces) for traces in (ours, theirs)]
    print(f"to 2 %: {near[0]:.0f} s, at random {near[1]:.0f} s, of {asked.seconds:.0f} s")
    assert near[0] < 0.5 * near[1]
    assert max(trace.verdict for trace in ours) <= 0.01
    low, middle, high = quartiles(ours, [0.25 * asked.seconds, 0.5 * asked.seconds])
    assert (low <= middle).all()
    assert (middle <= high).all()
    assert middle[0] <= 0.02


@pytest.mark.parametrize("variant", [*VARIANTS, "tpe"])
def test_variants_search_the_table_too(table: Table, variant: str) -> None:
    trace = replay(limited(table, half_of(table)), variant, 1, budget_seconds=0.3 * table.seconds)
    assert trace.seconds[-1] <= 0.3 * table.seconds
    assert trace.regret[-1] < 0.3


def test_the_clock_is_the_recorded_one_and_a_replay_repeats(table: Table) -> None:
    trace = replay(table, "additive", 3)
    assert replay(table, "additive", 3) == trace
    until_best = trace.seconds[: trace.regret.index(0.0) + 1]
    steps = {round(after - before, 6) for before, after in itertools.pairwise(until_best)}
    assert steps <= {5.0, 10.0, 18.0}
    assert list(trace.regret) == sorted(trace.regret, reverse=True)
    assert trace.at(0.0) == 1.0
    assert trace.at(trace.reached(0.02)) <= 0.02


@pytest.mark.slow
def test_four_workers_know_a_good_plan_in_a_fraction_of_the_time(table: Table) -> None:
    """On a simulated clock, and the same in every replay."""
    asked, seconds = limited(table, half_of(table)), 0.3 * table.seconds
    one, four = ([replay(asked, "additive", seed, seconds, workers) for seed in range(3)] for workers in (1, 4))
    assert replay(asked, "additive", 1, seconds, 4) == four[1]
    assert len(four[0].seconds) > 2 * len(one[0].seconds)
    near = [median(trace.reached(0.02) for trace in traces) for traces in (one, four)]
    print(f"to 2 %: {near[0]:.0f} s alone, {near[1]:.0f} s with four")
    assert near[1] < 0.6 * near[0]
    assert max(trace.verdict for trace in four) <= 0.02


def test_budget_and_finals_are_replayed(table: Table) -> None:
    """A budget of a few trials is kept, and its winner is one that was confirmed."""
    machine = RecordedMachine(table, 100.0)
    requests = list[TrialRequest]()

    def measure(request: TrialRequest, log: Path) -> Running[TrialResult]:
        requests.append(request)
        return machine.measure(request, log)

    asked, clock = replace(table.settings, budget_seconds=100.0), machine.clock
    with tempfile.TemporaryDirectory() as folder:
        verdict = search(asked, Path(folder, "run"), CPU, measure=measure, clock=clock, pause=machine.pause)
    assert machine.now <= 100.0
    assert verdict.confirmed
    assert {request.final for request in requests} == {False, True}


def test_a_smaller_device_turns_away_what_allocates_more(table: Table) -> None:
    limit = half_of(table)
    assert peak_of_best(table) > limit
    small = limited(table, limit)
    (process,) = {r.peak("device_bytes") - r.peak("allocated_bytes") for r in small.results.values()}  # type: ignore[operator]
    assert small.settings.memory_limit_bytes == process + limit
    for name, result in table.results.items():
        fits = (result.peak("allocated_bytes") or 0) <= limit
        assert small.results[name].status == ("ok" if fits else "over_limit")
    assert small.best < table.best

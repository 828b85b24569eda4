"""The first candidates of a search, by predicted speed within predicted memory."""

import math
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_machine import CPU, CUDA, OLD_CUDA, settings
from proposals import SMALL, Trials

from autotune.config.candidate import Candidate
from autotune.config.cards import find
from autotune.data.shards import write_shard
from autotune.memory.model import MemoryModel, predict
from autotune.runs.objective import score
from autotune.search.roofline import log_speed
from autotune.search.simulation import Trace, read_tables, replay
from autotune.search.space import build_space
from autotune.search.start import STARTS, card_of, pace_of, starts
from autotune.units import GIB

MODEL = MemoryModel(device="cuda")
CARD = find("3090")
TABLE = Path(__file__).parents[2] / "results" / "reference" / "cpu-torch-2.13" / "trials.jsonl"


def text(directory: Path) -> Path:
    write_shard(directory / "a_val_000000.bin", np.arange(20_000) % 50_000)
    write_shard(directory / "a_train_000001.bin", np.arange(50_000) % 50_000)
    return directory


def way(candidate: Candidate) -> tuple[str, ...]:
    plan = candidate.plan
    return plan.loss, plan.compile, plan.dtype, plan.activation_checkpointing


def test_starts_are_the_fastest_ways_that_fit() -> None:
    asked = settings(memory_limit="16GiB")
    space = build_space(asked, CUDA)
    found = starts(space, asked, CARD, MODEL)
    speeds = [log_speed(candidate, CARD) for candidate in found]
    assert len(found) == STARTS
    assert speeds == sorted(speeds, reverse=True)
    assert len(set(map(way, found))) == STARTS
    assert all(predict(MODEL, candidate).high_device_bytes <= 16 * GIB for candidate in found)
    larger = starts(space, asked, CARD, None)
    assert log_speed(larger[0], CARD) >= speeds[0]
    assert larger[0].plan.micro_batch_size > found[0].plan.micro_batch_size


def test_where_no_interval_fits_the_predicted_peak_decides() -> None:
    asked = settings(memory_limit="3000MiB")
    found = starts(build_space(asked, CUDA), asked, CARD, MODEL)
    assert found
    for candidate in found:
        peak = predict(MODEL, candidate)
        assert peak.peak_device_bytes <= asked.memory_limit_bytes < peak.high_device_bytes


def test_what_may_not_fit_must_be_as_much_faster() -> None:
    """Expected speed: a plan that fits with 60 % counts 60 % of its speed."""
    asked = settings(memory_limit="3000MiB")
    found = starts(build_space(asked, CUDA), asked, CARD, MODEL)
    expected = [predict(MODEL, c).p_within(asked.memory_limit_bytes) * math.exp(log_speed(c, CARD)) for c in found]
    assert expected == sorted(expected, reverse=True)
    assert all(predict(MODEL, c).p_within(asked.memory_limit_bytes) >= 0.5 for c in found)


def test_less_memory_than_the_weights_has_no_start() -> None:
    asked = settings(model="24x16x2048", memory_limit="8GiB")
    assert starts(build_space(asked, CUDA), asked, CARD, MODEL) == []


def test_a_card_older_than_bfloat16_starts_in_float16() -> None:
    asked = settings(OLD_CUDA)
    assert {c.plan.dtype for c in starts(build_space(asked, OLD_CUDA), asked, find("T4"), MODEL)} == {"float16"}


def test_starts_of_a_search_for_shapes_have_the_shape_with_the_least_predicted_loss() -> None:
    def shape(train_time: str) -> tuple[int, int]:
        asked = settings(model="", objective="loss", train_time=train_time)
        found = starts(build_space(asked, CUDA), asked, CARD, MODEL)
        assert len({candidate.shape for candidate in found}) == 1
        return found[0].shape.n_layer, found[0].shape.n_embd

    assert shape("20m") < shape("3d")


def test_a_race_starts_from_shapes_of_several_widths(tmp_path: Path) -> None:
    asked = settings(CPU, model="", objective="loss", data=text(tmp_path), train_time="3m")
    found = starts(build_space(asked, CPU), asked, card_of(CPU), MemoryModel(device="cpu"))
    assert len({candidate.shape.n_embd for candidate in found}) >= STARTS - 1
    losses = [score(asked, c, math.exp(log_speed(c, None))) for c in found]
    assert losses[0] == min(losses)
    fast = starts(build_space(asked, CPU), asked, card_of(CPU), MemoryModel(device="cpu"), pace=100.0)
    assert fast[0].shape.parameters_non_embedding > found[0].shape.parameters_non_embedding


def test_a_budget_for_few_trials_compiles_one_block_of_a_new_shape(tmp_path: Path) -> None:
    asked = settings(CPU, model="", objective="loss", data=text(tmp_path), train_time="3m", budget="5m")
    space, model = build_space(asked, CPU), MemoryModel(device="cpu")
    slow = starts(space, asked, None, model, compiling_seconds=40.0)
    assert {(c.plan.compile, c.plan.loss, c.plan.loss_chunk_tokens) for c in slow} == {("block", "chunked", 512)}
    assert len({candidate.shape.n_embd for candidate in slow}) >= STARTS - 1
    assert starts(space, asked, None, model, compiling_seconds=4.0) == starts(space, asked, None, model)
    full = replace(asked, choices={"loss": ("full",), "compile": ("off", "full")})
    one = starts(build_space(full, CPU), full, None, model, compiling_seconds=40.0)
    assert one
    assert {(candidate.plan.compile, candidate.plan.loss) for candidate in one} <= {("off", "full"), ("full", "full")}


def test_the_pace_of_a_cpu_is_what_was_measured_over_what_was_predicted() -> None:
    trials = Trials(settings(CPU)).run(3)
    ratios = [(r.result.tokens_per_second or 0.0) / math.exp(log_speed(r.candidate, None)) for r in trials.records]
    assert pace_of(trials.records, None) == pytest.approx(statistics.median(ratios))
    assert pace_of(trials.records, CARD) == 1.0
    assert pace_of([], None) == 1.0


def test_the_card_of_a_machine() -> None:
    assert card_of(CPU) is None
    assert card_of(replace(CUDA, device_name="NVIDIA GeForce RTX 4090")) == find("4090")
    assert card_of(replace(CUDA, device_name="NVIDIA GeForce RTX 4090 Laptop GPU", capability=(8, 9))) is not None


def test_a_search_begins_with_its_starts() -> None:
    asked = settings(CUDA, choices=SMALL)
    trials = Trials(asked).run(1)
    for count in range(1, 1 + STARTS):
        known = {record.candidate.id for record in trials.records}
        found = starts(build_space(asked, CUDA), asked, card_of(CUDA), trials.model())
        left = [candidate for candidate in found if candidate.id not in known]
        assert trials.run(count + 1).records[-1].candidate == left[0]


@pytest.fixture(scope="module")
def traces() -> dict[str, list[Trace]]:
    """Searches of the recorded table of two layers."""
    table = read_tables(TABLE)[0]
    variants = ("additive-no-priors", "additive-no-start-no-priors")
    return {v: [replay(table, v, seed, 0.25 * table.seconds) for seed in range(6)] for v in variants}


@pytest.mark.slow
def test_five_trials_hold_one_within_5_percent_of_the_best_without_fitted_priors(
    traces: dict[str, list[Trace]],
) -> None:
    assert all(trace.within_first(5) <= 0.05 for trace in traces["additive-no-priors"])
    assert not all(trace.within_first(5) <= 0.05 for trace in traces["additive-no-start-no-priors"])

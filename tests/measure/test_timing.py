"""Medians with honest intervals, and a warm-up that ends."""

import time

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from autotune.measure.timing import MAX_WARMUP, Stopwatch, summarise, warm_up


def test_the_interval_covers_the_true_median_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    for count in (7, 25):
        trials = [summarise(rng.exponential(1.0, count).tolist()) for _ in range(2000)]
        # the half width is the farther end's, so a skewed law is covered somewhat more often
        covered = np.mean([abs(t.median - np.log(2)) <= t.ci95 for t in trials])
        assert 0.95 <= covered <= 0.995


def test_few_samples_have_a_wide_interval() -> None:
    rng = np.random.default_rng(0)
    for count in (2, 3, 5):
        trials = [summarise(rng.normal(10.0, 1.0, count).tolist()) for _ in range(2000)]
        assert np.mean([abs(t.median - 10.0) <= t.ci95 for t in trials]) >= 0.92
    assert summarise([3.0]).ci95 == 3.0


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=60))
def test_the_median_lies_among_the_samples_and_the_interval_within_their_spread(samples: list[float]) -> None:
    timing = summarise(samples)
    assert min(samples) <= timing.median <= max(samples)
    if len(samples) > 5:
        assert 0 <= timing.ci95 <= max(samples) - min(samples)
    assert timing.samples == len(samples)


def test_one_stall_does_not_move_the_median() -> None:
    assert summarise([1.0] * 20 + [50.0]).median == 1.0


def test_warm_up_waits_for_a_falling_series_and_gives_up_on_a_wild_one() -> None:
    falling = iter([10.0, 5.0, 2.0, 1.0, 1.01, 1.0])
    assert warm_up(lambda: next(falling), time.monotonic() + 60) == 5
    wild = iter([1.0, 2.0] * MAX_WARMUP)
    assert warm_up(lambda: next(wild), time.monotonic() + 60) == MAX_WARMUP
    assert warm_up(lambda: 1.0, time.monotonic() - 1) == 1


def test_the_stopwatch_times_the_work() -> None:
    seconds = Stopwatch(torch.device("cpu")).time(lambda: time.sleep(0.05))()
    assert 0.05 <= seconds < 0.5

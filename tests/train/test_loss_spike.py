"""Losses that are spikes, and losses that are not."""

from collections import deque

import numpy as np
import pytest

from autotune.train.resume import SUSTAINED, WINDOW, loss_spike


def complaints(losses: list[float]) -> list[str]:
    recent: deque[float] = deque(maxlen=WINDOW)
    return [loss_spike(recent, loss, 1.0) for loss in losses]


def test_a_noisy_learning_curve_has_no_spike() -> None:
    steps = np.arange(2000)
    for noise in (0.02, 0.3, 1.0):
        curve = 3 + 8 * np.exp(-steps / 150) + np.random.default_rng(0).normal(0, noise, len(steps))
        assert set(complaints(curve.tolist())) == {""}


def test_one_high_loss_is_no_spike_several_are() -> None:
    usual = [3.0 + 0.01 * (step % 7) for step in range(WINDOW)]
    assert complaints([*usual, 9.0, *usual])[WINDOW:] == [""] * (WINDOW + 1)
    said = complaints([*usual, *[9.0] * SUSTAINED])
    assert said[:-1] == [""] * (len(said) - 1)
    assert said[-1] == "the training loss has jumped from 3.03 to 9.00"


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (3.0, float("nan"))])
def test_nan_and_infinity_are_reported_at_once(loss: float, norm: float) -> None:
    assert loss_spike(deque(), loss, norm)

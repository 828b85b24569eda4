"""Pilots that move a scaling law: of a machine of formulas, and with a trainer whose losses are known."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_machine import CUDA, Machine, settings

from autotune.config.toml import read_candidate
from autotune.errors import AutotuneError, ConfigError, InterruptedByUser
from autotune.measure.types import TrialRequest, TrialResult
from autotune.runs.law import predict_loss, raw_loss, unlimited
from autotune.runs.objective import law_of, loss_at
from autotune.search.budget import Budget
from autotune.search.calibrate import calibrate_law, pilot_shapes
from autotune.search.loop import search
from autotune.search.space import baseline

SETTINGS = settings(CUDA, model="", budget="1h")


class Trainer:
    """Ends with the loss of the law, moved by so many nats for each pilot, in the time it was given."""

    def __init__(self, machine: Machine, *moves: float) -> None:
        self.machine, self.moves = machine, list(moves)
        self.files: list[Path] = []

    def train(self, file: Path, device: str, seconds: float) -> Mapping[str, Any]:
        self.files.append(file)
        self.machine.now += 0.8 * seconds
        recipe = read_candidate(file).candidate.recipe
        law = law_of(replace(SETTINGS, law_offset=self.moves.pop(0)))
        return {"validation_loss": predict_loss(law, recipe.shape, recipe.max_tokens), "tokens": recipe.max_tokens}


def budget(machine: Machine, seconds: float = 3600.0) -> Budget:
    return Budget(seconds=seconds, started=0.0, clock=machine.clock)


def test_two_pilots_move_the_law_to_the_data(tmp_path: Path) -> None:
    machine = Machine()
    trainer = Trainer(machine, 0.30, 0.34)
    moved, told = calibrate_law(SETTINGS, tmp_path, budget(machine), machine.measure, trainer.train)
    assert moved.law_offset == pytest.approx(0.32, abs=1e-6)
    assert moved.law_band == pytest.approx(0.05)
    assert "moved by +0.32" in told
    assert machine.now <= 0.2 * 3600
    shapes = [read_candidate(file).candidate.shape for file in trainer.files]
    assert shapes == list(pilot_shapes(SETTINGS.recipe.shape))
    assert (shapes[0].n_layer, shapes[0].n_embd, shapes[0].head_size) == (6, 384, 64)
    candidate = baseline(SETTINGS)
    losses = [loss_at(asked, candidate, 1e5) for asked in (SETTINGS, moved)]
    assert losses[1] == pytest.approx((losses[0] or 0.0) + 0.32, abs=0.01)


def test_a_law_that_does_not_hold_is_not_moved(tmp_path: Path) -> None:
    machine = Machine()
    trainer = Trainer(machine, -1.0, 0.5)
    moved, told = calibrate_law(SETTINGS, tmp_path, budget(machine), machine.measure, trainer.train)
    assert moved == SETTINGS
    assert "disagree by more than its band" in told


def test_too_short_a_budget_and_a_pilot_that_fails_are_told(tmp_path: Path) -> None:
    machine = Machine()
    with pytest.raises(ConfigError, match="give --budget 10m00s or more"):
        calibrate_law(SETTINGS, tmp_path, budget(machine, 300.0), machine.measure)
    oom = TrialResult(status="oom", phase="compile", message="no room")
    with pytest.raises(AutotuneError, match=r"parameters ended as oom \(no room\)"):
        calibrate_law(SETTINGS, tmp_path, budget(machine), lambda request, log: oom)


def test_a_loss_is_led_back_to_the_law(tmp_path: Path) -> None:
    shape, law = SETTINGS.recipe.shape, law_of(SETTINGS)
    for tokens in (1e7, 1e9, 1e11):
        assert unlimited(predict_loss(law, shape, tokens), shape) == pytest.approx(raw_loss(law, shape, tokens))
    assert unlimited(11.0, shape) == float("inf")


def test_ctrl_c_in_a_pilot_leaves_nothing_that_could_not_go_on(tmp_path: Path) -> None:
    def interrupted(request: TrialRequest, log: Path) -> TrialResult:
        raise KeyboardInterrupt

    with pytest.raises(InterruptedByUser, match="start the search again"):
        search(SETTINGS, tmp_path / "run", CUDA, measure=interrupted, calibrate_loss=True)
    assert not (tmp_path / "run").exists()

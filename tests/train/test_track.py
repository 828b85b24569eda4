"""Rows elsewhere: TensorBoard's files, Weights & Biases offline."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from trainings import curve, settings

from autotune.config.candidate import Recipe
from autotune.errors import ConfigError
from autotune.train.trainer import train


def test_tensorboard_holds_the_rows_also_after_a_resume(recipe: Recipe, tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the package tensorboard is not installed"
    )
    watched = replace(recipe, tensorboard=True, max_iters=4, checkpoint_interval=2, eval_interval=4)
    train(settings(replace(watched, max_iters=2), tmp_path / "train"))
    train(settings(watched, tmp_path / "train", resume=True))
    events = accumulator.EventAccumulator(str(tmp_path / "train" / "tensorboard")).Reload()
    seen = [(event.step, pytest.approx(event.value)) for event in events.Scalars("train_loss")]
    assert seen == [(int(row[0]), float(row[2])) for row in curve(tmp_path / "train")]


def test_wandb_offline_keeps_the_rows_here_and_no_key(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="the package wandb is not installed")
    key = "0123456789abcdef" * 3
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", key[:40])
    train(settings(replace(recipe, wandb_log=True, max_iters=2, eval_interval=2), tmp_path / "train"))
    (offline,) = (tmp_path / "train" / "wandb").glob("offline-run-*")
    (store,) = offline.glob("*.wandb")
    assert b"train_loss" in store.read_bytes()
    found = subprocess.run(["grep", "-rl", key[:40], str(tmp_path)], capture_output=True, text=True, check=False)
    assert found.stdout == ""


def test_a_missing_package_is_told_before_anything_is_written(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb_log = true needs the package wandb; run `pip install .*\[wandb\]`"):
        train(settings(replace(recipe, wandb_log=True), tmp_path / "train"))
    assert not (tmp_path / "train").exists()

"""TensorBoard files, and Weights & Biases offline."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from trainings import changed, curve, settings

from autotune.cli import run
from autotune.config.candidate import Candidate, Tracking
from autotune.errors import ConfigError
from autotune.train.output import LogRow, check_trackers, named
from autotune.train.trainer import train


def test_tensorboard_has_the_rows_also_after_a_resume(candidate: Candidate, tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the package tensorboard is not installed"
    )
    watched = changed(candidate, tensorboard=True, max_iters=4, checkpoint_interval=2, eval_interval=4)
    train(settings(changed(watched, max_iters=2), tmp_path / "train"))
    train(settings(watched, tmp_path / "train", resume=True))
    events = accumulator.EventAccumulator(str(tmp_path / "train" / "tensorboard")).Reload()
    seen = [(event.step, pytest.approx(event.value)) for event in events.Scalars("train/loss")]
    assert seen == [(int(row[0]), float(row[2])) for row in curve(tmp_path / "train")]
    assert {"iter", "train/loss", "val/loss", "lr", "grad_norm"} <= set(events.Tags()["scalars"])


def test_names_and_units_are_nanogpts() -> None:
    """Its train.py logs iter, train/loss, val/loss, lr, and mfu in percent; the others are ours."""
    row = LogRow(
        iteration=3, tokens=96, train_loss=2.5, validation_loss=2.75, lr=1e-3, grad_norm=0.5, tokens_per_second=100.0,
        mfu=0.375, data_wait_seconds=0.0, peak_allocated_bytes=7, peak_device_bytes=None, seconds=1.5,
    )  # fmt: skip
    assert named(row) == {
        "iter": 3, "train/loss": 2.5, "val/loss": 2.75, "lr": 1e-3, "mfu": 37.5,
        "tokens": 96, "grad_norm": 0.5, "tokens_per_second": 100.0, "data_wait_seconds": 0.0,
        "peak_allocated_bytes": 7, "seconds": 1.5,
    }  # fmt: skip
    assert named(replace(row, validation_loss=None, mfu=None)).keys().isdisjoint({"val/loss", "mfu"})


def test_wandb_offline_keeps_the_rows_here_and_no_key(
    candidate: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="the package wandb is not installed")
    key = "0123456789abcdef" * 3
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", key[:40])
    train(settings(changed(candidate, wandb_log=True, max_iters=2, eval_interval=2), tmp_path / "train"))
    wandb.teardown()  # as at the end of a process: its service writes the last rows
    (offline,) = (tmp_path / "train" / "wandb").glob("offline-run-*")
    (store,) = offline.glob("*.wandb")
    assert b"train/loss" in store.read_bytes()
    found = subprocess.run(["grep", "-rl", key[:40], str(tmp_path)], capture_output=True, text=True, check=False)
    assert found.stdout == ""


def test_a_missing_package_is_reported_before_anything_is_written(
    candidate: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb_log = true needs the package wandb; run `pip install .*\[wandb\]`"):
        train(settings(changed(candidate, wandb_log=True), tmp_path / "train"))
    assert not (tmp_path / "train").exists()


def test_all_missing_packages_are_reported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        check_trackers(Tracking(wandb_log=True, tensorboard=True))
    for key, package in (("wandb_log", "wandb"), ("tensorboard", "tensorboard")):
        assert f"training.{key} = true needs the package {package}; run `pip install nanogpt-autotune[{package}]`" in (
            str(caught.value)
        )


def test_a_folder_of_runs_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb leaves a folder `wandb` in the working directory, which Python would import as an empty package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match="needs the package wandb"):
        check_trackers(Tracking(wandb_log=True))


def test_a_mode_that_wandb_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the package wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "ofline")
    check_trackers(Tracking())
    with pytest.raises(ConfigError, match="WANDB_MODE = 'ofline' is not known to wandb; did you mean 'offline'"):
        check_trackers(Tracking(wandb_log=True))


def test_wandb_without_a_key_is_one_line_and_the_training_can_be_resumed(
    candidate: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="the package wandb is not installed")
    wandb.teardown()  # it reads the environment once a process
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    watched = changed(candidate, wandb_log=True, max_iters=1, eval_interval=1)
    with pytest.raises(
        ConfigError, match=r"wandb does not start: .*; run `wandb login`, or set WANDB_MODE=offline, and"
    ):
        train(settings(watched, tmp_path / "train"))
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert train(settings(watched, tmp_path / "train", resume=True)) is not None


def test_a_search_says_what_its_training_will_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.py"
    file.write_text("wandb_log = True\nn_layer = n_head = 2\nn_embd = 64\nbatch_size = 4\n")
    arguments = ["search", "--from", str(file), "--device", "cpu", "--dry-run"]
    assert run(arguments) == 0
    assert "wandb" not in capsys.readouterr().err
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    assert run(arguments) == 0
    said = capsys.readouterr().err
    assert "note: the search runs, but `autotune train` will not: training.wandb_log = true needs the package" in said
    assert "run `pip install nanogpt-autotune[wandb]`" in said

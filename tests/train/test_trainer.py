"""What a training does, and what it refuses to do."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from trainings import PLAN, changed, curve, settings, start

from autotune.config.candidate import Candidate, Plan
from autotune.config.toml import CandidateFile, read_candidate
from autotune.config.train_settings import TrainSettings, locate
from autotune.data.shards import write_shard
from autotune.environment import SPIN
from autotune.errors import AutotuneError, CheckpointError, ConfigError, DataError, UnsupportedError
from autotune.model.checkpoint import checkpoints
from autotune.model.optim import learning_rate
from autotune.train.output import TrainSummary, summary_text
from autotune.train.trainer import train

Whole = tuple[Path, TrainSummary]


def test_it_learns(whole: Whole, candidate: Candidate) -> None:
    out, summary = whole
    rows = curve(out)
    assert abs(float(rows[0][2]) - math.log(256)) < 0.2
    assert summary.validation_loss is not None
    assert summary.validation_loss < 4.0  # uniform over 211 tokens: 5.35
    assert summary.best_validation_loss == summary.validation_loss
    assert [int(row[0]) for row in rows] == list(range(1, 41))
    assert [row[0] for row in rows if row[3]] == ["20", "40"]
    assert [float(row[4]) for row in rows] == [learning_rate(candidate.recipe, step) for step in range(40)]


def test_a_text_that_is_learned_by_heart_is_said(whole: Whole, candidate: Candidate, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 211, 900)
    write_shard(tmp_path / "x_val_000000.bin", noise[:400])
    write_shard(tmp_path / "x_train_000001.bin", noise[400:])
    long = changed(candidate, data=str(tmp_path), eval_interval=10, warmup_iters=0, min_lr=5e-3)
    summary = train(settings(long, tmp_path / "train"))
    (warning,) = summary.warnings
    assert warning.startswith(f"the validation loss was lowest at iteration {summary.best_iteration}, ")
    assert "rose as the text was repeated, 18.7 times in all" in warning
    assert (tmp_path / "train" / "checkpoints" / "best").resolve().name == f"step_{summary.best_iteration:08d}"
    assert whole[1].warnings == ()


def test_its_files(whole: Whole, candidate: Candidate) -> None:
    out, summary = whole
    names = {".lock", "checkpoints", "recipe.toml", "summary.json", "train_log.csv", "loss.png"}
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in checkpoints(out / "checkpoints")] == ["step_00000030", "step_00000040"]
    assert read_candidate(out / "recipe.toml").candidate == candidate
    written = json.loads((out / "summary.json").read_text())
    assert written == json.loads(json.dumps(asdict(summary)))
    assert (written["iterations"], written["tokens"]) == (40, 40 * 7 * 32)
    assert written["tokens_per_second"] > 0
    assert 0 <= written["data_wait_seconds"] < 0.1 * written["seconds"]
    # weights and two moments, the least that a step holds
    assert written["peak_allocated_bytes"] > 3 * 4 * candidate.shape.parameters
    header = (out / "train_log.csv").read_text().splitlines()[0]
    assert header == (
        "iteration,tokens,train_loss,validation_loss,lr,grad_norm,tokens_per_second,mfu,data_wait_seconds,"
        "peak_allocated_bytes,peak_device_bytes,seconds"
    )


def test_progress_goes_to_stderr(candidate: Candidate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(settings(changed(candidate, max_iters=4, eval_interval=4), tmp_path / "train"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "iteration 1/4  loss 5.5" in captured.err
    assert "validation" in captured.err.splitlines()[-1]


@pytest.mark.parametrize("micro", [1, 3, 5])
def test_the_micro_batch_changes_nothing(micro: int, candidate: Candidate, tmp_path: Path) -> None:
    """Also if it does not divide the global batch, and is padded."""
    steady = changed(candidate, shape=replace(candidate.shape, dropout=0.0), max_iters=6, eval_batch_size=7)
    train(settings(steady, tmp_path / "whole", replace(PLAN, micro_batch_size=7)))
    train(settings(steady, tmp_path / "sliced", replace(PLAN, micro_batch_size=micro)))
    for ours, theirs in zip(curve(tmp_path / "sliced"), curve(tmp_path / "whole"), strict=True):
        np.testing.assert_allclose([float(x or 0) for x in ours], [float(x or 0) for x in theirs], rtol=2e-4)


def test_only_better_models_are_saved_where_the_recipe_says_so(candidate: Candidate, tmp_path: Path) -> None:
    rare = changed(candidate, always_save_checkpoint=False, max_iters=12, checkpoint_interval=2, eval_interval=5)
    train(settings(rare, tmp_path / "train"))
    assert [path.name for path in checkpoints(tmp_path / "train" / "checkpoints")] == ["step_00000010", "step_00000012"]


def test_max_tokens_is_rounded_up(candidate: Candidate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = train(settings(candidate, tmp_path / "train", max_tokens=1000))
    assert (summary.iterations, summary.tokens, summary.stopped_by) == (5, 5 * 224, "max_iters")
    assert summary.validation_loss is not None
    assert "--max-tokens 1,000 is 5 whole steps of 224: 1,120 tokens" in capsys.readouterr().err


def test_max_time_stops_with_a_checkpoint(candidate: Candidate, tmp_path: Path) -> None:
    summary = train(settings(changed(candidate, max_iters=10**6), tmp_path / "train", max_seconds=0.5))
    assert summary.stopped_by == "max_time"
    assert 0 < summary.iterations < 1000
    assert summary.checkpoint.endswith(f"step_{summary.iterations:08d}")
    assert summary.validation_loss is not None


def test_it_says_how_it_compares(candidate: Candidate, whole: Whole, tmp_path: Path) -> None:
    peak = whole[1].peak_allocated_bytes
    file = CandidateFile(
        candidate=changed(candidate, max_iters=20),
        measured={"tokens_per_second": 1.0, "tokens_per_second_ci95": 0.01, "peak_allocated_bytes": peak},
    )
    summary = train(TrainSettings(file=file, out=tmp_path / "train", device="cpu"))
    speed, memory = summary.comparison
    assert summary.warnings == (speed,)
    assert "(+0.0%, expected within ±1%)" in memory
    assert f"warning: {speed}" in summary_text(summary)


def test_another_machine_is_said(candidate: Candidate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = CandidateFile(
        candidate=changed(candidate, max_iters=1), environment={"device_name": "NVIDIA H200", "cuda": ""}
    )
    train(TrainSettings(file=file, out=tmp_path / "train", device="cpu"))
    assert "measured on another machine (device_name 'NVIDIA H200' there" in capsys.readouterr().err


def test_a_candidate_of_a_stand_in_is_not_trained_as_measured(candidate: Candidate, tmp_path: Path) -> None:
    file = CandidateFile(candidate=candidate, environment={"device_name": "NVIDIA GeForce RTX 4090 (stand-in)"})
    with pytest.raises(ConfigError, match=r"made on NVIDIA GeForce RTX 4090 \(stand-in\), which computes nothing"):
        train(TrainSettings(file=file, out=tmp_path / "train", device="cpu"))
    assert not (tmp_path / "train").exists()


def test_a_nan_loss_is_not_saved(candidate: Candidate, tmp_path: Path) -> None:
    wild = changed(candidate, learning_rate=1e30, min_lr=1e30, warmup_iters=0, grad_clip=0.0, log_interval=100)
    with pytest.raises(AutotuneError, match=r"is nan at iteration \d+, there is no checkpoint to go back to; lower"):
        train(settings(wild, tmp_path / "train"))
    assert checkpoints(tmp_path / "train" / "checkpoints") == []


def test_what_cannot_be_trained_leaves_nothing(candidate: Candidate, tmp_path: Path) -> None:
    out = tmp_path / "train"
    with pytest.raises(ConfigError, match=r"training\.data is empty"):
        train(settings(changed(candidate, data=""), out))
    with pytest.raises(DataError, match="does not exist"):
        train(settings(changed(candidate, data=str(tmp_path / "nowhere")), out))
    write_shard(tmp_path / "x_train_000001.bin", [1, 2, 3] * 2000)
    with pytest.raises(DataError, match="validation"):
        train(settings(changed(candidate, data=str(tmp_path)), out))
    with pytest.raises(ConfigError, match=r"plan\.loss = 'ful' is not known; did you mean 'full'"):
        train(settings(candidate, out, replace(PLAN, loss="ful")))
    with pytest.raises(ConfigError, match="--device cuda:7"):
        train(settings(candidate, out, device="cuda:7"))
    with pytest.raises(ConfigError, match="leaves no time"):
        settings(candidate, out, max_seconds=0.0)
    with pytest.raises(ConfigError, match="--max-tokens and --max-time exclude each other"):
        settings(candidate, out, max_seconds=1.0, max_tokens=1000)
    with pytest.raises(ConfigError, match="--resume and --init-from exclude each other"):
        settings(candidate, out, resume=True, init_from=tmp_path)
    with pytest.raises(DataError, match=r"20000 training tokens give 624 sequences of 32, 1000 are needed"):
        train(settings(changed(candidate, global_batch_size=1000), out))
    with pytest.raises(CheckpointError, match=r"nowhere\.pt does not exist; give a ckpt\.pt"):
        train(settings(candidate, out, init_from=tmp_path / "nowhere.pt"))
    assert not out.exists()


def test_an_unwritable_directory(candidate: Candidate, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out .*train cannot be written: Not a directory"):
        train(settings(candidate, tmp_path / "file" / "train"))
    with pytest.raises(ConfigError, match=r"--out /sys/train cannot be written"):  # read-only for root, too
        train(settings(candidate, Path("/sys/train")))


def test_a_plan_that_is_not_compiled_as_it_says_is_refused(
    candidate: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    message = r"plan\.compile = 'full', but Inductor compiled nothing; unset TORCHDYNAMO_DISABLE"
    with pytest.raises(UnsupportedError, match=message):
        train(settings(candidate, tmp_path / "train", replace(PLAN, compile="full")))
    assert checkpoints(tmp_path / "train" / "checkpoints") == []


def test_threads_of_the_command_wait_as_those_of_trials(
    candidate: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GNU OpenMP prints its settings when it loads with torch, so the variable was set in time."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")
    process = start(changed(candidate, max_iters=1), tmp_path / "train")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert f"GOMP_SPINCOUNT = '{SPIN}'" in said


def test_the_allocator_must_be_set_before_torch(candidate: Candidate, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="PYTORCH_ALLOC_CONF=expandable_segments:True"):
        train(settings(candidate, tmp_path / "train", Plan(micro_batch_size=1, allocator="expandable_segments")))


def test_a_damaged_shard_is_named(candidate: Candidate, tmp_path: Path) -> None:
    write_shard(tmp_path / "x_val_000000.bin", [1, 2, 3] * 200)
    write_shard(tmp_path / "x_train_000001.bin", [1, 2, 300] * 2000)
    with pytest.raises(DataError, match=r"x_train_000001\.bin holds token 300"):
        train(settings(changed(candidate, data=str(tmp_path)), tmp_path / "train"))


def test_where_a_training_goes(tmp_path: Path, whole: Whole) -> None:
    assert locate(tmp_path) == (tmp_path / "best.toml", tmp_path / "train")
    assert locate(tmp_path / "best.toml") == (tmp_path / "best.toml", tmp_path / "train")
    assert locate(whole[0]) == locate(whole[0] / "recipe.toml") == (whole[0] / "recipe.toml", whole[0])
    assert locate(Path("mine.toml")) == (Path("mine.toml"), Path("results/mine/train"))

"""A training that was killed or stopped resumes exactly, and survives damaged checkpoints."""

import hashlib
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from full_disk import disk_of
from trainings import PLAN, changed, curve, settings, start, wait_for_rows

from autotune.config.candidate import TRAINING_PARTS, Candidate, Plan
from autotune.data.shards import write_shard
from autotune.errors import CheckpointError, ConfigError
from autotune.model.checkpoint import checkpoints, read_checkpoint
from autotune.train.output import TrainSummary
from autotune.train.trainer import train
from autotune.train.training_loop import locked

Whole = tuple[Path, TrainSummary]


def weights(out: Path) -> bytes:
    return (checkpoints(out / "checkpoints")[-1] / "model.safetensors").read_bytes()


def assert_same(out: Path, whole: Whole) -> None:
    assert curve(out) == curve(whole[0])
    assert weights(out) == weights(whole[0])


def test_sigkill_changes_nothing(candidate: Candidate, whole: Whole, tmp_path: Path) -> None:
    process = start(candidate, tmp_path / "train")
    wait_for_rows(tmp_path / "train", 14)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    summary = train(settings(candidate, tmp_path / "train", resume=True))
    assert_same(tmp_path / "train", whole)
    assert summary.validation_loss == whole[1].validation_loss


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGHUP))],
)
def test_a_signal_saves_and_leaves_with_130(number: int, candidate: Candidate, tmp_path: Path) -> None:
    out, rare = tmp_path / "train", changed(candidate, checkpoint_interval=10**6, eval_interval=10**6, max_iters=10**6)
    process = start(rare, out)
    wait_for_rows(out, 5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    (kept,) = checkpoints(out / "checkpoints")
    stopped = curve(out)
    assert read_checkpoint(kept).state.iteration == len(stopped) >= 5
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"error: stopped after iteration {len(stopped)}; the newest checkpoint is {kept};")
    assert "--resume" in last
    train(settings(changed(rare, max_iters=len(stopped) + 2), out, resume=True))
    assert curve(out)[: len(stopped)] == stopped
    assert len(curve(out)) == len(stopped) + 2


@pytest.mark.slow
def test_compiled_steps_resume_exactly(candidate: Candidate, tmp_path: Path) -> None:
    """On two threads, as gradients must be summed in a fixed order."""
    short = changed(candidate, max_iters=8, eval_interval=4, checkpoint_interval=4)
    plan = Plan(micro_batch_size=7, compile="full", dtype="bfloat16")
    torch.set_num_threads(2)
    train(settings(short, tmp_path / "once", plan))
    train(settings(changed(short, max_iters=4), tmp_path / "twice", plan))
    train(settings(short, tmp_path / "twice", plan, resume=True))
    torch.set_num_threads(1)
    assert curve(tmp_path / "twice") == curve(tmp_path / "once")
    assert weights(tmp_path / "twice") == weights(tmp_path / "once")


def test_a_damaged_checkpoint_falls_back(
    candidate: Candidate, first_half: Path, whole: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "train"
    shutil.copytree(first_half, out, symlinks=True)
    damaged = checkpoints(out / "checkpoints")[-1] / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    train(settings(candidate, out, resume=True))
    assert_same(out, whole)
    said = capsys.readouterr().err
    assert f"warning: {damaged} is damaged" in said
    assert f"going back to {out / 'checkpoints' / 'step_00000010'}" in said
    assert (out / "checkpoints" / "damaged_step_00000020").is_dir()
    assert (out / "checkpoints" / "best").resolve().name == "step_00000040"


@pytest.mark.parametrize("file_bytes", [100_000, 600_000])  # the weights do not fit; the optimizer state does not
def test_a_full_disk_loses_nothing(
    file_bytes: int, candidate: Candidate, first_half: Path, whole: Whole, tmp_path: Path
) -> None:
    out = tmp_path / "train"
    shutil.copytree(first_half, out, symlinks=True)
    with disk_of(file_bytes), pytest.raises(CheckpointError, match=r"File too large.*free space"):
        train(settings(candidate, out, resume=True))
    names = {path.name for path in (out / "checkpoints").iterdir()}
    assert names == {"step_00000010", "step_00000020", "best"}
    train(settings(candidate, out, resume=True))
    assert_same(out, whole)


def test_a_kill_before_the_first_checkpoint(
    candidate: Candidate, whole: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "train"
    temporary = out / "checkpoints" / ".step_00000010.tmp"
    temporary.mkdir(parents=True)  # what a SIGKILL in mid-write leaves
    (temporary / "model.safetensors").write_bytes(b"half")
    (out / "train_log.csv").write_text("iteration,tokens\n1,224\n2,4")
    train(settings(candidate, out, resume=True))
    assert_same(out, whole)
    assert not temporary.exists()
    assert "starting again at iteration 0" in capsys.readouterr().err


def test_another_plan_may_go_on(candidate: Candidate, tmp_path: Path) -> None:
    steady = changed(candidate, shape=replace(candidate.shape, dropout=0.0), eval_batch_size=7)
    train(settings(steady, tmp_path / "one"))
    train(settings(changed(steady, max_iters=20), tmp_path / "two"))
    another = replace(PLAN, micro_batch_size=7, loss="chunked", loss_chunk_tokens=100)
    train(settings(steady, tmp_path / "two", another, resume=True))
    losses = zip(curve(tmp_path / "two"), curve(tmp_path / "one"), strict=True)
    assert all(abs(float(ours[2]) - float(theirs[2])) < 2e-3 for ours, theirs in losses)


def test_nothing_is_overwritten_unasked(candidate: Candidate, whole: Whole) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")}
    with pytest.raises(ConfigError, match="already holds a training; continue it with --resume"):
        train(settings(candidate, whole[0]))
    assert {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")} == before


def test_another_training_is_refused(candidate: Candidate, whole: Whole, tmp_path: Path) -> None:
    files = [path for path in whole[0].rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    wider = changed(candidate, shape=replace(candidate.shape, n_embd=32))
    with pytest.raises(CheckpointError, match=r"another training: model\.n_embd = 32 \(checkpoint: 64\);"):
        train(settings(wider, whole[0], resume=True))
    with pytest.raises(CheckpointError, match=r"training\.learning_rate = 0\.1 \(checkpoint: 0\.005\)"):
        train(settings(changed(candidate, learning_rate=0.1), whole[0], resume=True))
    for name in ("walk_val_000000.bin", "walk_train_000001.bin"):
        write_shard(tmp_path / name, [1, 2, 3] * 2000)
    with pytest.raises(CheckpointError, match=f"the tokens in {tmp_path}"):
        train(settings(changed(candidate, data=str(tmp_path)), whole[0], resume=True))
    assert {path: path.read_bytes() for path in files} == before


def test_a_training_that_is_further_than_asked_is_left_alone(candidate: Candidate, whole: Whole) -> None:
    before = (whole[0] / "recipe.toml").read_text()
    with pytest.raises(CheckpointError, match=r"at iteration 40 already, beyond training\.max_iters = 5; raise it"):
        train(settings(candidate, whole[0], resume=True, max_tokens=1000))
    assert (whole[0] / "recipe.toml").read_text() == before


def test_a_checkpoint_of_a_later_version_is_refused(candidate: Candidate, tmp_path: Path) -> None:
    out = tmp_path / "train"
    train(settings(changed(candidate, max_iters=2, eval_interval=2), out))
    state = out / "checkpoints" / "step_00000002" / "state.json"
    later = state.read_text().replace('"format": 2', '"format": 3')
    state.write_text(later)
    with pytest.raises(CheckpointError, match="has checkpoint format 3, this version reads up to 2"):
        train(settings(candidate, out, resume=True))
    assert state.read_text() == later


def test_a_training_of_an_earlier_version_is_resumed(
    candidate: Candidate, first_half: Path, whole: Whole, tmp_path: Path
) -> None:
    """Format 1 has the settings of evaluation, checkpoints and trackers in the recipe."""
    out = tmp_path / "train"
    shutil.copytree(first_half, out, symlinks=True)
    for path in checkpoints(out / "checkpoints"):
        body = json.loads((path / "state.json").read_text())["body"]
        old = body["train"]["candidate"]
        for part in TRAINING_PARTS:
            old["recipe"] |= old.pop(part)
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        (path / "state.json").write_text(json.dumps({"format": 1, "sha256": digest, "body": body}))
    train(settings(candidate, out, resume=True))
    assert_same(out, whole)


def test_nothing_to_resume(candidate: Candidate, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no training to resume; leave --resume out"):
        train(settings(candidate, tmp_path / "nowhere", resume=True))
    assert not (tmp_path / "nowhere").exists()


def test_a_finished_training_is_left_alone(candidate: Candidate, whole: Whole) -> None:
    before = (whole[0] / "summary.json").read_text()
    summary = train(settings(candidate, whole[0], resume=True))
    assert summary.train_loss == whole[1].train_loss
    assert summary.iterations == 40
    assert (whole[0] / "summary.json").read_text() == before


def test_two_processes_do_not_share_a_directory(candidate: Candidate, tmp_path: Path) -> None:
    with locked(tmp_path / "train"), pytest.raises(ConfigError, match="another process trains in"):
        train(settings(candidate, tmp_path / "train"))


@pytest.mark.slow
def test_signals_while_saving_do_not_cost_the_checkpoint(candidate: Candidate, tmp_path: Path) -> None:
    """A closed ssh sends one from the kernel, one from the shell, and the service manager a SIGTERM."""
    out, rare = tmp_path / "train", changed(candidate, checkpoint_interval=10**6, eval_interval=10**6, max_iters=10**6)
    process = start(rare, out)
    wait_for_rows(out, 5)
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 130
    (kept,) = checkpoints(out / "checkpoints")
    assert read_checkpoint(kept).state.iteration == len(curve(out)) >= 5


IGNORING = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.mark.slow
def test_nohup_is_respected(candidate: Candidate, tmp_path: Path) -> None:
    out, rare = tmp_path / "train", changed(candidate, checkpoint_interval=10**6, eval_interval=10**6, max_iters=10**6)
    process = start(rare, out, launcher=("-c", IGNORING))
    wait_for_rows(out, 3)
    process.send_signal(signal.SIGHUP)
    wait_for_rows(out, len(curve(out)) + 5)  # it goes on
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_garbage_in_the_log_is_dropped_with_a_warning_on_resume(
    candidate: Candidate, first_half: Path, whole: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "train"
    shutil.copytree(first_half, out, symlinks=True)
    log = out / "train_log.csv"
    log.write_text(log.read_text().replace("\n5,", "\ngarbage\n5,"))
    train(settings(candidate, out, resume=True))
    assert_same(out, whole)
    assert "had 1 invalid lines; they are dropped" in capsys.readouterr().err

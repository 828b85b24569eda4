"""Trainings that run out of memory or meet bad data."""

import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from trainings import PLAN, changed, curve, settings, start, wait_for_rows

from autotune.config.candidate import Candidate, Shape
from autotune.data.batches import open_batches, shuffled
from autotune.data.shards import HEADER_BYTES
from autotune.errors import AutotuneError
from autotune.model.checkpoint import checkpoints, read_checkpoint
from autotune.train.trainer import train


def losses(out: Path) -> list[float]:
    return [float(row[2]) for row in curve(out)]


def data_bytes(process: int) -> int:
    """Bytes of a process that RLIMIT_DATA counts."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmData")).split()[1]) * 1024


@pytest.mark.slow
def test_memory_that_others_take_halves_the_micro_batch_only(candidate: Candidate, tmp_path: Path) -> None:
    """A real limit, set while it runs, is less than its micro batch needs."""
    shape = Shape(n_layer=1, n_head=1, n_embd=16, block_size=128, vocab_size=16384)  # logits of 64 MiB in one piece
    wide = changed(candidate, shape=shape, global_batch_size=8, max_iters=24, eval_iters=1, eval_interval=24)
    plan = replace(PLAN, micro_batch_size=8)
    train(settings(wide, tmp_path / "whole", plan))
    process = start(wide, tmp_path / "train", plan)
    wait_for_rows(tmp_path / "train", 4)
    seen, now = [], len(curve(tmp_path / "train"))
    while len(curve(tmp_path / "train")) < now + 4:
        seen.append(data_bytes(process.pid))
    before = resource.prlimit(process.pid, resource.RLIMIT_DATA)
    limit = min(seen) + 6 * (max(seen) - min(seen)) // 10
    resource.prlimit(process.pid, resource.RLIMIT_DATA, (limit, before[1]))
    wait_for_rows(tmp_path / "train", len(curve(tmp_path / "train")) + 5)
    resource.prlimit(process.pid, resource.RLIMIT_DATA, before)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "warning: out of memory in iteration" in said
    assert "continuing with 4 sequences a forward in each step, what is learned stays the same" in said
    np.testing.assert_allclose(losses(tmp_path / "train"), losses(tmp_path / "whole"), rtol=1e-4)


def spoiled(candidate: Candidate, directory: Path, steps: range) -> Candidate:
    """The candidate on a copy of its data in which the batches of `steps` hold tokens never seen before."""
    shutil.copytree(candidate.recipe.data, directory)
    block, rows = candidate.shape.block_size, candidate.recipe.global_batch_size
    source = open_batches(
        directory,
        seed=candidate.recipe.seed,
        global_batch_size=rows,
        block_size=block,
        vocab_size=candidate.shape.vocab_size,
    )
    places = np.arange(steps.start * rows, steps.stop * rows)
    (shard,) = directory.glob("*_train_*")
    tokens = np.memmap(shard, dtype="<u2", mode="r+", offset=HEADER_BYTES)
    drawn = np.random.default_rng(1)
    for window in shuffled(places, source.train_windows, candidate.recipe.seed, 0):
        tokens[window * block : (window + 1) * block] = drawn.integers(220, 256, block)
    tokens.flush()
    return changed(candidate, data=str(directory))


def test_a_loss_spike_rolls_back_and_skips_its_data(
    candidate: Candidate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = spoiled(changed(candidate, max_iters=70, lr_decay_iters=70), tmp_path / "data", range(54, 58))
    summary = train(settings(bad, tmp_path / "train"))
    said = capsys.readouterr().err
    assert "going back to iteration 50 and skipping the data since (rollback 1 of at most 3)" in said
    assert [int(row[0]) for row in curve(tmp_path / "train")] == list(range(1, 71))
    assert max(losses(tmp_path / "train")[50:]) < losses(tmp_path / "train")[30]
    last = read_checkpoint(checkpoints(tmp_path / "train" / "checkpoints")[-1]).state
    assert last.skipped_batches == 8  # 50 to 57, of which the last four were bad
    assert summary is not None
    assert summary.validation_loss == summary.best_validation_loss


def test_it_gives_up_after_some_rollbacks(candidate: Candidate, tmp_path: Path) -> None:
    endless = spoiled(changed(candidate, max_iters=85, lr_decay_iters=85), tmp_path / "data", range(54, 86))
    with pytest.raises(AutotuneError, match=r"jumped from .* after 3 rollbacks .* and check the data"):
        train(settings(endless, tmp_path / "train"))
    kept = read_checkpoint(checkpoints(tmp_path / "train" / "checkpoints")[-1])
    assert kept.state.iteration == 50

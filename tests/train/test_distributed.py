"""Several processes under torchrun learn what one learns."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from trainings import changed, curve, settings, start, wait_for_rows

from autotune.config.candidate import Candidate
from autotune.errors import ConfigError
from autotune.model.checkpoint import checkpoints
from autotune.train.distributed import DistributedContext
from autotune.train.trainer import train

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


def numbers(out: Path) -> list[list[float]]:
    return [[float(cell or 0) for cell in row] for row in curve(out)]


@pytest.mark.slow
def test_two_processes_learn_what_one_does_and_one_resumes(candidate: Candidate, tmp_path: Path) -> None:
    """Seven sequences in micro batches of three: one process has three of them, the other four."""
    steady = changed(candidate, shape=replace(candidate.shape, dropout=0.0), max_iters=12, eval_interval=4)
    train(settings(steady, tmp_path / "one"))
    process = start(changed(steady, max_iters=8), tmp_path / "two", launcher=TORCHRUN)
    printed, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert printed.count("trained 8 iterations") == 1
    assert said.count("iteration 8/8") == 1
    assert [path.name for path in checkpoints(tmp_path / "two" / "checkpoints")] == ["step_00000004", "step_00000008"]
    train(settings(steady, tmp_path / "two", resume=True))
    np.testing.assert_allclose(numbers(tmp_path / "two"), numbers(tmp_path / "one"), rtol=1e-4, atol=1e-6)


def test_a_killed_launcher_leaves_no_process(candidate: Candidate, tmp_path: Path) -> None:
    process = start(changed(candidate, max_iters=100_000), tmp_path / "two", launcher=TORCHRUN)
    wait_for_rows(tmp_path / "two", 2)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(ranks) == 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10.0
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline, f"of {ranks}, some still run"
        time.sleep(0.05)


def test_each_row_has_one_process() -> None:
    for count in (1, 2, 3, 8):
        parts = [range(8)[DistributedContext(rank=rank, world_size=count).rows(8)] for rank in range(count)]
        assert [row for part in parts for row in part] == list(range(8))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_more_processes_than_sequences(candidate: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match=r"global_batch_size = 7 is less than one sequence for each of 8 processes"):
        train(settings(candidate, tmp_path / "train"))
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match=r"'many'; start it with torchrun"):
        train(settings(candidate, tmp_path / "train"))
    assert not (tmp_path / "train").exists()

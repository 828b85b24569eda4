"""Several processes under torchrun learn what one learns."""

import time
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trainings import PLAN, changed, curve, settings, start, wait_for_rows

from autotune.config.candidate import Candidate
from autotune.errors import ConfigError, UnsupportedError
from autotune.model.checkpoint import checkpoints
from autotune.model.distributed import DistributedContext
from autotune.train.exchange import export
from autotune.train.trainer import train

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


def numbers(out: Path) -> list[list[float]]:
    return [[float(cell or 0) for cell in row] for row in curve(out)]


def two(given: Candidate, out: Path, sharding: str, flags: tuple[str, ...] = ()) -> str:
    """Train in two processes; what they said."""
    process = start(given, out, replace(PLAN, sharding=sharding), flags, TORCHRUN)  # type: ignore[arg-type]
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    return said


def newest(out: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of the newest checkpoint."""
    path = checkpoints(out / "checkpoints")[-1]
    return load_file(path / "model.safetensors") | load_file(path / "optimizer.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["optimizer", "full"])
def test_divided_state_learns_resumes_and_exports_as_one_process_does(
    sharding: str, candidate: Candidate, tmp_path: Path
) -> None:
    """Muon's matrices and AdamW's vectors; odd numbers of validation batches and of sequences."""
    steady = changed(
        candidate, shape=replace(candidate.shape, dropout=0.0), max_iters=6, eval_interval=3, checkpoint_interval=3,
        eval_iters=3, optimizer="muon",
    )  # fmt: skip
    train(settings(steady, tmp_path / "one"))
    two(steady, tmp_path / "two", sharding)
    np.testing.assert_allclose(numbers(tmp_path / "two"), numbers(tmp_path / "one"), rtol=1e-3, atol=1e-6)
    one, all_of_two = newest(tmp_path / "one"), newest(tmp_path / "two")
    kinds = [{name: (t.shape, t.dtype) for name, t in held.items()} for held in (one, all_of_two)]
    assert kinds[0] == kinds[1]

    two(changed(steady, max_iters=3), tmp_path / "resumed", sharding)
    copytree(tmp_path / "resumed", tmp_path / "alone", symlinks=True)
    assert "resuming at iteration 3" in two(steady, tmp_path / "resumed", sharding, ("--resume",))
    for name, tensor in newest(tmp_path / "resumed").items():
        assert torch.equal(tensor, all_of_two[name]), name
    train(settings(steady, tmp_path / "alone", resume=True))  # one process goes on where two have stopped
    np.testing.assert_allclose(numbers(tmp_path / "alone"), numbers(tmp_path / "one"), rtol=1e-3, atol=1e-6)
    export(tmp_path / "two", "hf", tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert torch.equal(exported["transformer.wte.weight"], all_of_two["wte.weight"])


def test_what_cannot_be_divided_is_refused(
    candidate: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = replace(PLAN, sharding="full")
    with pytest.raises(UnsupportedError, match="'full' needs several processes; start it with torchrun"):
        train(settings(candidate, tmp_path / "train", alone))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for changes, says in (
        ({"compile": "full"}, "gathers block by block, outside of compiled graphs; use plan.compile = block or off"),
        ({"dtype": "float16"}, "needs a CUDA device"),
    ):
        with pytest.raises(UnsupportedError, match=says):
            train(settings(candidate, tmp_path / "train", replace(alone, **changes)))  # type: ignore[arg-type]
    assert not (tmp_path / "train").exists()


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


@pytest.mark.slow
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

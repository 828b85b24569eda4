"""Data that is easy to learn, and an uninterrupted training on it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from trainings import PLAN, changed, settings

from autotune.config.candidate import Candidate, Checkpointing, Evaluation, Recipe, Shape, Tracking
from autotune.data.shards import write_shard
from autotune.train.output import TrainSummary
from autotune.train.trainer import train


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices gain nothing from a second thread, and wait for it on shared cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a walk over 211 tokens by steps of 1, 2 or 3: ln(3) nats a token."""
    directory = tmp_path_factory.mktemp("text")
    walk = np.cumsum(np.random.default_rng(0).integers(1, 4, 24_000)) % 211
    write_shard(directory / "walk_val_000000.bin", walk[:4000])
    write_shard(directory / "walk_train_000001.bin", walk[4000:])
    return directory


@pytest.fixture(scope="session")
def candidate(text: Path) -> Candidate:
    """Global batch 7 is not a multiple of micro batch 3; dropout makes random states matter."""
    recipe = Recipe(
        shape=Shape(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=256, dropout=0.1),
        data=str(text),
        global_batch_size=7,
        max_iters=40,
        lr_decay_iters=40,
        warmup_iters=4,
        learning_rate=5e-3,
        min_lr=5e-4,
    )
    return Candidate(
        recipe=recipe,
        plan=PLAN,
        evaluation=Evaluation(eval_interval=20, eval_iters=2),
        checkpointing=Checkpointing(checkpoint_interval=10),
        tracking=Tracking(log_interval=1),
    )


@pytest.fixture(scope="session")
def first_half(candidate: Candidate, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of 20 iterations, to be copied and resumed."""
    out = tmp_path_factory.mktemp("first_half") / "train"
    train(settings(changed(candidate, max_iters=20), out))
    return out


@pytest.fixture(scope="session")
def whole(candidate: Candidate, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainSummary]:
    out = tmp_path_factory.mktemp("whole") / "train"
    return out, train(settings(candidate, out))

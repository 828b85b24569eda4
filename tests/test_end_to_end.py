"""The main job on real text: prepare, search, train the winner to completion, sample."""

import csv
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from precision import FAST

from autotune.data.shards import open_split

CONFIG = f"""
# A nanoGPT config file: 800 steps of 8 x 64 tokens
n_layer = 2
n_head = 4
n_embd = 128
block_size = 64
batch_size = 8
gradient_accumulation_steps = 1
learning_rate = 3e-3
min_lr = 3e-3 / 10
max_iters = 800
lr_decay_iters = 800
warmup_iters = 40
beta2 = 0.99
eval_interval = 400
eval_iters = 40
bias = False
dropout = 0.0
dtype = "{FAST}"
"""
SAMPLE = os.environ.get("AUTOTUNE_FINEWEB_SAMPLE", "")


def autotune(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "autotune", *arguments], capture_output=True, text=True, check=False, cwd=cwd
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLE, reason="AUTOTUNE_FINEWEB_SAMPLE does not name the parquet sample of FineWeb")
def test_from_fineweb_to_a_trained_model(tmp_path: Path) -> None:
    autotune("data", "prepare", SAMPLE, "--out", "data", cwd=tmp_path)
    shards = [*open_split(tmp_path / "data", "train"), *open_split(tmp_path / "data", "val")]
    tokens = np.concatenate([np.asarray(shard) for shard in shards])
    assert len(tokens) == 4_364_780
    assert (tokens == 50256).sum() == 2800
    frequencies = np.bincount(tokens) / len(tokens)
    entropy = -(frequencies[frequencies > 0] * np.log(frequencies[frequencies > 0])).sum()

    (tmp_path / "small.py").write_text(CONFIG)
    words = ("--from", "small.py", "--data", "data", "--budget", "3m", "--name", "run")
    printed = autotune("search", *words, cwd=tmp_path)
    run = tmp_path / "results" / "run"
    assert "autotune train results/run" in printed
    with (run / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert trials[0]["role"] == "baseline"
    assert any(trial["status"] == "ok" for trial in trials)
    best = tomllib.loads((run / "best.toml").read_text())
    assert best["measured"]["tokens_per_second"] > 0

    printed = autotune("train", "results/run", cwd=tmp_path)
    assert "tokens/s" in printed
    summary = json.loads((run / "train" / "summary.json").read_text())
    assert summary["iterations"] == best["training"]["max_iters"] == 800
    assert summary["validation_loss"] < entropy - 0.4  # it has learned more than how often each token comes
    assert len(autotune("sample", "results/run", "--tokens", "40", cwd=tmp_path)) > 20
    report = autotune("report", "results/run", "--json", cwd=tmp_path)
    assert json.loads(report)["runs"]

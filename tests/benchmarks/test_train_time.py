"""Trainings of given time by the wall clock of their command: alone, with their code in no compile cache or in one, and
beside busy processes.

    scripts/bench -k time_asked
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.config.candidate import Candidate, Evaluation, Plan, Recipe, Schedule, Shape, Tracking
from autotune.config.toml import CandidateFile, format_candidate
from autotune.data.shards import write_shard

ASKED = 60.0


def train(directory: Path, schedule: Schedule, cache: Path, *arguments: str) -> Path:
    """Run the command in `directory`; ten times as many iterations are planned as fit."""
    drawn = np.random.default_rng(0).zipf(1.3, 400_000) % 8192
    write_shard(directory / "x_val_000000.bin", drawn[:20_000])
    write_shard(directory / "x_train_000001.bin", drawn[20_000:])
    recipe = Recipe(
        shape=Shape(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=8192), global_batch_size=32,
        schedule=schedule, max_iters=10_000, lr_decay_iters=10_000, warmup_iters=1000, train_seconds=ASKED,
        data=str(directory),
    )  # fmt: skip
    candidate = Candidate(
        recipe=recipe, plan=Plan(micro_batch_size=16, dtype="float32"), evaluation=Evaluation(eval_interval=100),
        tracking=Tracking(log_interval=1),
    )  # fmt: skip
    (directory / "x.toml").write_text(format_candidate(CandidateFile(candidate=candidate)))
    out = directory / "train"
    subprocess.run(
        [sys.executable, "-m", "autotune", "train", "x.toml", "--out", str(out), "--device", "cpu", *arguments],
        cwd=directory, check=True, stderr=subprocess.DEVNULL, env={**os.environ, "AUTOTUNE_CACHE_DIR": str(cache)},
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compile cache with the code of the training. It is filled twice: a short training has no time to compile its
    evaluation as well."""
    cache = tmp_path_factory.mktemp("compiled")
    for seconds in (1, 60):
        train(tmp_path_factory.mktemp("before"), "wsd", cache, "--train-time", f"{seconds}s")
    return cache


@pytest.mark.benchmark(group="time asked")
@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@pytest.mark.parametrize("case", ["nothing compiled", "compiled", "compiled, beside two busy processes"])
def test_a_training_takes_the_time_asked(
    benchmark: Any, case: str, schedule: Schedule, tmp_path: Path, compiled: Path
) -> None:
    cache = tmp_path / "empty" if case == "nothing compiled" else compiled
    beside = 2 if "busy" in case else 0
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
    began = time.monotonic()
    try:
        out = benchmark.pedantic(train, args=(tmp_path, schedule, cache), rounds=1)
    finally:
        for process in spinning:
            process.kill()
            process.wait()
    took = time.monotonic() - began
    summary = json.loads((out / "summary.json").read_text())
    rate = float((out / "train_log.csv").read_text().splitlines()[-1].split(",")[4])
    print(f"\n{case}, {schedule}: {took:.1f} s for {ASKED:.0f}, {summary['iterations']} steps, last rate {rate:g}; "
          f"load average {os.getloadavg()[0]:.1f}")  # fmt: skip
    benchmark.extra_info |= {"took": took, "iterations": summary["iterations"]}
    assert (rate, summary["schedule"]) == (Recipe().min_lr, 1.0)
    assert took <= 1.05 * ASKED

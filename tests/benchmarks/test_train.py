"""A training against the bare step, and against forty SIGKILLs.

scripts/bench -k train
"""

import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainings import PLAN, changed, curve, settings, start

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.data.batches import open_batches
from autotune.data.shards import write_shard
from autotune.measure.runner import run_trial
from autotune.measure.types import TrialRequest, TrialResult
from autotune.model.checkpoint import checkpoints
from autotune.model.distributed import DistributedContext
from autotune.model.step import build
from autotune.train.prefetch import Prefetcher
from autotune.train.trainer import train

KILLS = 40
LENGTH = 1000
"""Iterations of the training that is killed: more than forty lives reach, also on a fast machine."""
STEPS, SKIPPED = 50, 5


@pytest.fixture
def text(tmp_path: Path) -> Path:
    drawn = np.random.default_rng(0).zipf(1.3, 400_000) % 8192
    write_shard(tmp_path / "x_val_000000.bin", drawn[:20_000])
    write_shard(tmp_path / "x_train_000001.bin", drawn[20_000:])
    return tmp_path


@pytest.mark.benchmark(group="train")
def test_a_training_is_as_fast_as_its_bare_step(benchmark: Any, text: Path, tmp_path: Path) -> None:
    """Alternately and on the same batches: STEPS steps of a training, STEPS bare ones in a loop. Of both the wall clock
    from the end of step SKIPPED to that of step STEPS - SKIPPED: it holds fetching, logging and progress, but neither
    compilation and profiled steps before nor evaluation and checkpoint after."""
    recipe = Recipe(
        shape=Shape(n_layer=4, n_head=4, n_embd=128, block_size=128, vocab_size=8192), data=str(text),
        global_batch_size=16, max_iters=STEPS,
    )  # fmt: skip
    candidate = changed(
        Candidate(recipe=recipe, plan=Plan(micro_batch_size=8, dtype="bfloat16", loss="chunked")),
        eval_interval=STEPS, eval_iters=1, checkpoint_interval=STEPS, log_interval=SKIPPED,
    )  # fmt: skip
    step = build(candidate, torch.device("cpu"))
    source = open_batches(text, seed=recipe.seed, global_batch_size=16, block_size=128, vocab_size=8192)
    feed = Prefetcher(source, DistributedContext(), candidate, step.device)
    batches = [feed.batch(number) for number in range(STEPS)]

    def bare() -> float:
        ends = []
        for batch in batches:
            step.step(batch, 1e-4)
            ends.append(time.perf_counter())
        return ends[STEPS - SKIPPED - 1] - ends[SKIPPED - 1]

    def trained(name: str) -> float:
        out = tmp_path / name
        train(settings(candidate, out, candidate.plan))
        rows = [line.split(",") for line in (out / "train_log.csv").read_text().splitlines()[1:]]
        wall = {int(row[0]): float(row[-1]) for row in rows}
        return wall[STEPS - SKIPPED] - wall[SKIPPED]

    bare(), trained("warm")
    pairs = [(trained(str(number)), bare()) for number in range(7)]
    ratio = statistics.median(theirs / ours for ours, theirs in pairs)
    benchmark.extra_info["ratio"] = ratio
    tokens = recipe.tokens_per_step * (STEPS - 2 * SKIPPED)
    print(f"\n4 layers, 128 wide, 2 x 8 x 128 tokens, bfloat16, compiled, {torch.get_num_threads()} threads")
    for ours, theirs in pairs:
        print(f"train {tokens / ours:8,.0f} tokens/s   bare step {tokens / theirs:8,.0f}   ratio {theirs / ours:.3f}")
    print(f"median ratio {ratio:.3f}")
    benchmark.pedantic(lambda: step.step(batches[0], 1e-4), rounds=3)
    feed.close()
    assert ratio >= 0.98


@pytest.mark.benchmark(group="train")
def test_two_hundred_steps_come_out_as_measured(
    benchmark: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finalist's trial, two hundred steps of `autotune train`, and the trial again: each in a process of its own,
    with one thread."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe = Recipe(
        shape=Shape(n_layer=4, n_head=4, n_embd=128, block_size=128, vocab_size=8192), data=str(text),
        global_batch_size=16, max_iters=200,
    )  # fmt: skip
    candidate = changed(
        Candidate(recipe=recipe, plan=Plan(micro_batch_size=8, dtype="bfloat16", loss="chunked")),
        eval_interval=100, eval_iters=4, checkpoint_interval=100, log_interval=20,
    )  # fmt: skip

    def trial() -> TrialResult:
        asked = TrialRequest(candidate=candidate, device="cpu", result_path="", measure_seconds=5.0, final=True)
        return run_trial(asked, tmp_path / "trial.log")

    def trained() -> dict[str, Any]:
        process = start(candidate, tmp_path / "train", candidate.plan)
        process.communicate()
        found: dict[str, Any] = json.loads((tmp_path / "train" / "summary.json").read_text())
        return found

    before = trial()
    summary = benchmark.pedantic(trained, rounds=1)
    trials = before, trial()
    speeds = [one.tokens_per_second or 0.0 for one in trials]
    speed, peak = summary["tokens_per_second"] / statistics.mean(speeds), summary["peak_allocated_bytes"]
    noise = max(
        abs(speeds[1] / speeds[0] - 1), *((t.tokens_per_second_ci95 or 0) / (t.tokens_per_second or 1) for t in trials)
    )
    measured = before.peak("allocated_bytes") or 0
    benchmark.extra_info |= {"speed": speed, "noise": noise, "peak": peak / measured}
    print(f"\ntrials {speeds[0]:,.0f} and {speeds[1]:,.0f} tokens/s, training {summary['tokens_per_second']:,.0f}")
    print(f"ratio {speed:.3f}, the machine's own noise {noise:.1%}; peak {peak / measured:.4f} of the trial's")
    assert speed == pytest.approx(1.0, abs=max(0.02, noise))
    assert peak == pytest.approx(measured, rel=0.01)


@pytest.mark.benchmark(group="train")
def test_forty_kills_of_a_training_change_nothing(benchmark: Any, tmp_path: Path) -> None:
    """SIGKILL at random moments: while torch loads, in a step, in an evaluation, in the middle of a checkpoint."""
    walk = np.cumsum(np.random.default_rng(0).integers(1, 4, 24_000)) % 211
    write_shard(tmp_path / "walk_val_000000.bin", walk[:4000])
    write_shard(tmp_path / "walk_train_000001.bin", walk[4000:])
    recipe = Recipe(
        shape=Shape(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=256, dropout=0.1), data=str(tmp_path),
        global_batch_size=7, max_iters=LENGTH, lr_decay_iters=LENGTH, warmup_iters=4, learning_rate=5e-3,
    )  # fmt: skip
    candidate = changed(
        Candidate(recipe=recipe, plan=PLAN), eval_interval=10, eval_iters=2, checkpoint_interval=3, log_interval=1
    )
    torch.set_num_threads(1)
    train(settings(candidate, tmp_path / "whole"))
    out, chance, reached = tmp_path / "killed", random.Random(0), []

    def life(rows: int, seconds: float) -> None:
        flags = ("--resume",) if (out / "train_log.csv").exists() else ()
        process = start(candidate, out, flags=flags)
        assert process.stderr is not None
        while rows and "iteration" in process.stderr.readline():
            rows -= 1
        time.sleep(seconds)
        process.kill()
        process.communicate()
        reached.append(len(curve(out)))

    def lives() -> None:
        life(5, 0.0)
        for _ in range(KILLS - 1):
            rows = chance.choice((0, 2, 5, 10, 15))
            life(rows, chance.uniform(0.0, 0.1) if rows else chance.uniform(0.0, 4.0))
        train(settings(candidate, out, resume=True))

    benchmark.pedantic(lives, rounds=1)
    print(f"\nkilled at iterations {reached}")
    assert max(reached) < LENGTH, "the last kill came after the end"
    assert len(set(reached)) > KILLS // 3
    assert curve(out) == curve(tmp_path / "whole")
    ends = [checkpoints(one / "checkpoints")[-1] / "model.safetensors" for one in (out, tmp_path / "whole")]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    assert [path for path in (out / "checkpoints").iterdir() if path.name.startswith(".")] == []

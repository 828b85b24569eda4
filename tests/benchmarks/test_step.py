"""One optimizer step against plain nanoGPT's way of running the same shape, interleaved in one run; and what is left
of its peak where activations are computed again, or kept in fewer bytes.

    scripts/bench -k step
    scripts/bench -k recompute

Plain nanoGPT (model.py and train.py of the repository, as of 2024): the compiled forward returns the full
logits beside the loss, and on a CPU configure_optimizers takes the unfused AdamW.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.data.batches import synthetic_batch
from autotune.measure.memory import MemoryMeter
from autotune.model.step import TrainStep, build

CPU = torch.device("cpu")
SHAPE = Shape(n_layer=6, n_head=6, n_embd=384, block_size=256)
ROUNDS = 7


def batch() -> tuple[Tensor, Tensor]:
    tokens, targets = synthetic_batch(seed=0, step=0, global_batch_size=8, block_size=256, vocab_size=50257)
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def candidate(**plan: object) -> Candidate:
    recipe = Recipe(shape=SHAPE, global_batch_size=8)
    return Candidate(recipe=recipe, plan=Plan(micro_batch_size=8, **plan))  # type: ignore[arg-type]


def plain_nanogpt() -> tuple[TrainStep, Callable[[], None]]:
    step = build(candidate(compile="off"), CPU)
    for group in step.optimizer.param_groups:
        group["fused"] = False  # torch's default on the CPU
    tokens, targets = batch()

    def logits_and_loss(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(step.model.hidden(tokens), step.model.wte.weight)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)

    compiled = torch.compile(logits_and_loss)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            _logits, loss = compiled(tokens, targets)
        loss.backward()
        step.optimizer_step(1e-4)

    return step, run


def ours(**plan: object) -> tuple[TrainStep, Callable[[], None]]:
    step = build(candidate(**plan), CPU)
    tokens, targets = batch()

    def run() -> None:
        step.step([(tokens, targets, 1.0)], 1e-4)

    return step, run


def peak_above_state(step: TrainStep, run: Callable[[], None]) -> int:
    """Bytes above parameters and optimizer state, of a step that is warm."""
    run()
    run()
    meter = MemoryMeter(CPU, lambda: 0)
    with meter.stage("steady"):
        run()
    peak = meter.views()["steady"].allocated_bytes
    assert peak is not None
    return peak


def interleaved(runs: dict[str, Callable[[], None]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each, measured in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


@pytest.mark.benchmark(group="step")
def test_step_against_plain_nanogpt(benchmark) -> None:
    built = {
        "plain nanoGPT": plain_nanogpt(),
        "full": ours(loss="full"),
        "chunked 256": ours(loss="chunked", loss_chunk_tokens=256),
        "chunked 512": ours(loss="chunked", loss_chunk_tokens=512),
    }
    peaks = {name: peak_above_state(*pair) for name, pair in built.items()}
    seconds = interleaved({name: run for name, (_, run) in built.items()})
    print(f"\n6 layers, 6 heads, 384 wide, 8 x 256 tokens, bfloat16, compiled, {torch.get_num_threads()} threads")
    print(f"{'':16}{'tokens/s':>10}{'ratio':>8}{'MiB above state':>18}{'ratio':>8}")
    base_seconds, base_peak = seconds["plain nanoGPT"], peaks["plain nanoGPT"]
    for name in built:
        speed, memory = base_seconds / seconds[name], peaks[name] / base_peak
        benchmark.extra_info[name] = {"speed_ratio": speed, "memory_ratio": memory}
        rate = 8 * 256 / seconds[name]
        print(f"{name:16}{rate:10.0f}{speed:8.2f}{peaks[name] / 2**20:18.1f}{memory:8.2f}")
    benchmark.pedantic(built["chunked 256"][1], rounds=3)
    assert benchmark.extra_info["full"]["speed_ratio"] >= 1.2
    assert benchmark.extra_info["chunked 256"]["speed_ratio"] >= 1.0
    assert benchmark.extra_info["chunked 256"]["memory_ratio"] <= 0.5


@pytest.mark.benchmark(group="recompute")
def test_recompute_peaks(benchmark) -> None:
    shape = replace(SHAPE, n_layer=4, n_head=4, n_embd=256, vocab_size=2048)
    tokens, targets = (t.clamp(max=2047) for t in batch())
    kept = ("none", "selective", "every_2", "budget_0.5", "block")
    print(
        f"\n4 layers, 4 heads, 256 wide, vocabulary 2048, 8 x 256 tokens, MiB\n{'':34}"
        + "".join(f"{k:>12}" for k in kept)
    )
    for dtype in ("bfloat16", "bfloat16_residual"):
        for compiled in ("full", "block"):
            peaks = []
            for recompute in kept:
                torch._dynamo.reset()
                plan = Plan(micro_batch_size=8, compile=compiled, dtype=dtype, activation_checkpointing=recompute)
                step = build(Candidate(recipe=Recipe(shape=shape, global_batch_size=8), plan=plan), CPU)
                peaks.append(peak_above_state(step, lambda step=step: step.step([(tokens, targets, 1.0)], 1e-4)))
                peaks[-1] += step.state_bytes()
            benchmark.extra_info[f"{dtype} {compiled}"] = dict(zip(kept, peaks, strict=True))
            print(f"{dtype:20}compile {compiled:6}" + "".join(f"{peak / 2**20:12.1f}" for peak in peaks))
    benchmark.pedantic(lambda: None, rounds=1)
    assert all(row["block"] < row["none"] for row in benchmark.extra_info.values())

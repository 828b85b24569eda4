"""The memory model's priors against measured peaks of compiled candidates that they were not fitted to.

    scripts/bench -k memory_model                     # measure 60 candidates that are not recorded
    python tests/benchmarks/test_memory_model.py 120 1 FILE        # record 120 trials, drawn with seed 1
    python tests/benchmarks/test_memory_model.py 120 1 FILE rare   # with values that few searches on a CPU try

Peaks on the CPU are exact and the same on every machine. `scripts/fit_priors` turns recorded trials into priors.
"""

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.config.tables import read_table
from autotune.environment import describe
from autotune.errors import UnsupportedError
from autotune.measure.memory import MemoryMeter
from autotune.measure.types import MemoryView, TrialResult
from autotune.measure.worker import live_bytes, resident_batches
from autotune.memory.model import MemoryModel, calibrate, predict
from autotune.model.step import build, check_supported, machine_of

RECORDED = Path(__file__).parents[2] / "results" / "reference" / "cpu-torch-2.13" / "memory_trials.jsonl"
HELD_OUT = int(os.environ.get("HELD_OUT", "60"))
"""Candidates to measure; continuous integration has time for fewer."""


def draw(rng: random.Random) -> Candidate:
    """A small candidate: any shape, micro batch and plan of the CPU's space."""
    head_size = rng.choice([32, 64])
    width, block = head_size * rng.choice([2, 3, 4, 5, 6]), rng.choice([64, 128, 256])
    micro = min(rng.choice([1, 2, 3, 4, 6, 8, 12, 16]), 2048 // block)
    shape = Shape(n_layer=rng.choice([1, 2, 3, 4, 6]), n_head=width // head_size, n_embd=width, block_size=block)
    plan = Plan(
        micro_batch_size=micro,
        loss=rng.choice(["full", "chunked"]),
        loss_chunk_tokens=min(rng.choice([128, 256, 512, 1024]), micro * block),
        compile=rng.choice(["full", "full", "block", "block", "off"]),  # type: ignore[arg-type]
        activation_checkpointing=rng.choice(["none", "none", "block", "selective"]),  # type: ignore[arg-type]
        dtype=rng.choice(["bfloat16", "bfloat16", "float32"]),  # type: ignore[arg-type]
        attention=rng.choice(["sdpa", "sdpa", "sdpa_math"]),
    )
    return Candidate(recipe=Recipe(shape=shape, global_batch_size=micro * rng.choice([1, 1, 2, 4])), plan=plan)


def draw_rare(rng: random.Random) -> Candidate:
    """A smaller candidate with at least one value that `draw` leaves out."""
    while True:
        base = draw(rng)
        shape = replace(base.shape, n_layer=rng.choice([1, 2, 3, 4]))
        plan = replace(
            base.plan,
            loss=rng.choice(["full", "chunked", "auto_chunker", "torch_linear_cross_entropy"]),
            loss_chunk_tokens=min(rng.choice([128, 256, 512]), base.plan.micro_batch_size * shape.block_size),
            activation_checkpointing=rng.choice(["none", "block", "selective", "every_2", "budget_0.5", "budget_0.2"]),
            dtype=rng.choice(["bfloat16", "bfloat16_residual", "bfloat16_residual", "float32"]),
        )
        optimizer = rng.choice(["adamw", "adamw", "muon"])
        candidate = Candidate(recipe=replace(base.recipe, shape=shape, optimizer=optimizer), plan=plan)
        usual = (
            plan.loss in ("full", "chunked") and plan.dtype != "bfloat16_residual" and optimizer == "adamw"
            and plan.activation_checkpointing in ("none", "block", "selective")
        )  # fmt: skip
        with suppress(UnsupportedError):
            check_supported(candidate, machine_of(torch.device("cpu")))
            if not usual:
                return candidate


def measure(candidate: Candidate) -> TrialResult:
    """First and steady steps as a trial has them, in this process."""
    torch._dynamo.reset()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = build(candidate, device)
    batches = resident_batches(candidate, device, whole_step=False)
    meter = MemoryMeter(device, lambda: live_bytes(step, batches))
    with meter.stage("first_step"):
        step.step(batches[:2], 0.0)
    with meter.stage("steady"):
        step.step(batches[:2], 1e-4)
    return TrialResult(status="ok", phase="done", memory=meter.views())


@pytest.mark.benchmark(group="memory model")
def test_prediction_error(benchmark) -> None:
    model, rng, held_out = MemoryModel(device="cpu"), random.Random(4), list[Candidate]()
    emulated = describe("cpu").emulated
    rows = [json.loads(line)["candidate"] for line in RECORDED.read_text().splitlines()]
    seen = {read_table(Candidate, row, "candidate").id for row in rows}
    while len(held_out) < HELD_OUT:
        candidate = draw(rng)
        if emulated:  # one in bfloat16 would take minutes
            candidate = replace(candidate, plan=replace(candidate.plan, dtype="float32"))
        if candidate.id not in seen and candidate.plan.compile != "off":
            held_out.append(candidate)
    errors = []
    for candidate in held_out:
        allocated = measure(candidate).peak("allocated_bytes")
        assert allocated is not None
        errors.append(abs(predict(model, candidate).peak_allocated_bytes / allocated - 1))
        print(f"{errors[-1]:7.2%}  {allocated / 2**20:8.1f} MiB  {asdict(candidate.plan)}", flush=True)
    benchmark.extra_info |= {"median": statistics.median(errors), "worst": max(errors)}
    print(f"\n{len(errors)} compiled candidates: median {statistics.median(errors):.2%}, worst {max(errors):.2%}")
    benchmark(lambda: predict(model, held_out[0]))
    assert statistics.median(errors) <= 0.03
    assert max(errors) <= 0.10


@pytest.mark.parametrize(("trials", "most_ms"), [(50, 5), (1000, 20)])
@pytest.mark.benchmark(group="memory model's calibration", timer=time.process_time, min_rounds=10)
def test_calibration_cost(benchmark, trials: int, most_ms: float) -> None:
    rows = [json.loads(line) for line in RECORDED.read_text().splitlines()]
    known = []
    for number in range(trials):
        row = rows[number % len(rows)]
        candidate = read_table(Candidate, row["candidate"], "candidate")
        shape = replace(candidate.shape, n_layer=candidate.shape.n_layer + number // len(rows))
        peak = row["peak_allocated_bytes"]
        view = MemoryView(allocated_bytes=peak, device_bytes=peak + 500_000_000)
        candidate = replace(candidate, recipe=replace(candidate.recipe, shape=shape))
        known.append((candidate, TrialResult(status="ok", phase="done", memory={"steady": view})))
    calibrate("cpu", known)
    benchmark(lambda: calibrate("cpu", known))
    assert benchmark.stats["median"] * 1000 <= most_ms


def record(count: int, seed: int, path: Path, drawn: Callable[[random.Random], Candidate]) -> None:
    rng = random.Random(seed)
    with path.open("a") as file:
        for _ in range(count):
            candidate = drawn(rng)
            try:
                allocated = measure(candidate).peak("allocated_bytes")
            except UnsupportedError as error:
                print(error, flush=True)
                continue
            file.write(json.dumps({"candidate": asdict(candidate), "peak_allocated_bytes": allocated}) + "\n")
            file.flush()


if __name__ == "__main__":
    record(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), draw_rare if sys.argv[4:] == ["rare"] else draw)

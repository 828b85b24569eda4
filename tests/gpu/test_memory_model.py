"""The memory model on compiled candidates drawn by chance: one half calibrates it, the other half is predicted."""

import random
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from os import cpu_count

import pytest
from gpu.bench import Bench, Row, measured, rows_in

from autotune.config.candidate import Candidate, Plan, Shape
from autotune.config.tables import read_table
from autotune.measure.types import TrialResult
from autotune.memory.model import calibrate, predict

pytestmark = pytest.mark.gpu

GROUPS, GROUP = 14, 6
"""84 candidates, six at the same time: nothing is timed."""


def draw(rng: random.Random, bench: Bench) -> Candidate:
    head = rng.choice([64, 128])
    heads = rng.choice([4, 6, 8, 12]) * 64 // head
    shape = Shape(
        n_layer=rng.choice([2, 4, 6, 8, 12]), n_head=heads, n_embd=heads * head, block_size=rng.choice([512, 1024])
    )
    if bench.dry:
        shape = replace(bench.shape(shape.n_layer, 2, 64), n_layer=rng.choice([1, 2, 3]))
    plan = Plan(
        micro_batch_size=rng.choice([1, 2, 3, 4, 6, 8, 12, 16, 24]),
        loss=rng.choice(["full", "chunked"]),
        loss_chunk_tokens=rng.choice([1024, 2048, 4096, 8192]),
        compile=rng.choice(["full", "block"]),  # type: ignore[arg-type]
        activation_checkpointing=rng.choice(["none", "none", "block"]),  # type: ignore[arg-type]
        attention="sdpa",
        dtype="bfloat16",
    )
    return bench.candidate(shape, plan, plan.micro_batch_size * rng.choice([1, 2, 4]))


@pytest.mark.seconds(150)
@pytest.mark.parametrize("group", [0, *(pytest.param(g, marks=pytest.mark.card_only) for g in range(1, GROUPS))])
def test_peaks(group: int, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(7)
    drawn = [draw(rng, bench) for _ in range(GROUP * GROUPS)][GROUP * group : GROUP * (group + 1)]
    at_once = 1 if bench.dry else GROUP
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (cpu_count() or 1) // at_once)))
    with ThreadPoolExecutor(at_once) as pool:
        results = list(pool.map(lambda candidate: bench.trial(candidate, measure_seconds=0.1), drawn))
    trials = [
        {"candidate": asdict(candidate), "result": asdict(result), **measured(result)}
        for candidate, result in zip(drawn, results, strict=True)
    ]
    bench.row.clear()
    bench.row.update({"trials": trials})
    failed = [result.message for result in results if result.status != "ok"]
    assert not failed


def test_prediction_error(bench: Bench) -> None:
    """Allocated peaks are predicted; the device's are explained by what the allocator reserved and the context."""
    groups = rows_in(bench.directory, "memory_model").values()
    trials = [pair(row) for group in groups for row in group.get("trials", ()) if row["status"] == "ok"]
    assert len(trials) >= GROUP
    known, held_out = trials[::2], trials[1::2]
    model = calibrate(bench.device_kind, known, bench.environment)
    contexts = [d - r for _, t in known if (d := t.peak("device_bytes")) and (r := t.peak("reserved_bytes"))]
    context = statistics.median(contexts) if contexts else 0.0
    errors: dict[str, list[float]] = {"allocated": [], "device": [], "explained": []}
    for candidate, result in held_out:
        prediction, reserved = predict(model, candidate), result.peak("reserved_bytes")
        pairs = {
            "allocated": (prediction.peak_allocated_bytes, result.peak("allocated_bytes")),
            "device": (prediction.peak_device_bytes, result.peak("device_bytes")),
            "explained": (None if reserved is None else reserved + context, result.peak("device_bytes")),
        }
        for view, (said, true) in pairs.items():
            if said and true:
                errors[view].append(abs(said / true - 1))
    for view, found in errors.items():
        if found:
            bench.row.update({f"{view}_median": statistics.median(found), f"{view}_worst": max(found)})
    bench.row.update({"held_out": len(held_out), "errors": errors})
    assert len(errors["allocated"]) == len(held_out)
    assert len(errors["explained"]) == (0 if bench.dry else len(held_out))  # the CPU reserves nothing
    assert max(errors["allocated"]) <= 0.10
    assert max(errors["explained"], default=0.0) <= 0.02


def pair(row: Row) -> tuple[Candidate, TrialResult]:
    return read_table(Candidate, row["candidate"], "candidate"), read_table(TrialResult, row["result"], "result")

"""Peaks by torch's own CUDA allocator on the card that this process finds, as rows that scripts/fit_priors reads.

scripts/cuda_rehearsal --record COUNT [CARD...]    # appends to results/reference/cuda-stand-in/peaks-torch-2.14.jsonl

Candidates are drawn by the card's name, so that anybody can measure the same rows again.
"""

import gc
import json
import random
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.environment import Environment, describe
from autotune.errors import UnsupportedError
from autotune.measure.memory import MemoryMeter
from autotune.measure.types import TrialResult
from autotune.measure.worker import live_bytes, resident_batches
from autotune.memory.model import MemoryModel, predict
from autotune.model.step import build, check_supported, machine_of


def draw(rng: random.Random, here: Environment) -> Candidate:
    """A plan that users of the card would try. Whole graphs of two layers only: compilation takes the time."""
    compile = rng.choice(["full", "block", "block", "block", "off", "off"])
    head = rng.choice([64, 64, 128])
    heads = rng.choice([4, 6, 8, 12, 16]) * 64 // head
    layers = 2 if compile == "full" else rng.choice([4, 6, 8, 12])
    shape = Shape(n_layer=layers, n_head=heads, n_embd=heads * head, block_size=rng.choice([512, 1024, 1024]))
    half = ["bfloat16", "bfloat16", "bfloat16", "bfloat16_residual"] if here.capability >= (8, 0) else ["float16"]
    micro = rng.choice([2, 4, 6, 8, 12, 16, 24, 32, 48, 64])
    losses = ["full", "full", "chunked", "chunked", "chunked_triton", "torch_linear_cross_entropy", "auto_chunker"]
    plan = Plan(
        micro_batch_size=micro,
        loss=rng.choice(losses),
        loss_chunk_tokens=min(rng.choice([1024, 2048, 4096, 8192]), micro * shape.block_size),
        compile=compile,  # type: ignore[arg-type]
        activation_checkpointing=rng.choice(["none", "none", "none", "block", "selective", "every_2", "budget_0.5"]),
        dtype=rng.choice([*half, *half, "float32", "tfloat32"]),  # type: ignore[arg-type]
        attention=rng.choice(["sdpa", "sdpa", "sdpa", "sdpa_efficient"]),
    )
    optimizer = rng.choice(["adamw", "adamw", "adamw", "muon"])
    batch = micro * rng.choice([1, 2, 4])
    return Candidate(recipe=Recipe(shape=shape, global_batch_size=batch, optimizer=optimizer), plan=plan)


def drawn(count: int, here: Environment) -> list[Candidate]:
    """`count` candidates that the card can run and should have memory for."""
    rng, machine, found = random.Random(here.device_name), machine_of(torch.device("cuda")), list[Candidate]()
    while len(found) < count:
        candidate = draw(rng, here)
        with suppress(UnsupportedError):
            check_supported(candidate, machine)
            if predict(MemoryModel(device="cuda"), candidate).high_device_bytes < here.device_memory_bytes:
                found.append(candidate)
    return found


def measure(candidate: Candidate) -> TrialResult:
    """First and steady steps as a trial has them; nothing of an earlier candidate is left in this process."""
    torch._dynamo.reset()
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    device = torch.device("cuda:0")
    meter = MemoryMeter(device, lambda: live_bytes(step, batches))
    step = build(candidate, device)
    batches = resident_batches(candidate, device, whole_step=False)
    with meter.stage("first_step"):
        step.step(batches[:2], 0.0)
    with meter.stage("steady"):
        step.step(batches[:2], 1e-4)
    return TrialResult(status="ok", phase="done", memory=meter.views())


def main(count: int, path: Path) -> None:
    here = describe("cuda:0")
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = [row["candidate"] for row in known if row["card"] == here.device_name]
    for candidate in sorted(drawn(count, here), key=lambda one: ("off", "block", "full").index(one.plan.compile)):
        if (table := json.loads(json.dumps(asdict(candidate)))) in done:
            continue
        try:
            result = measure(candidate)
        except RuntimeError as error:  # out of memory included: the interval is one of 95 %
            print(f"no row: {candidate.plan}: {str(error).strip().splitlines()[0]}", file=sys.stderr, flush=True)
            continue
        row = {
            "card": here.device_name, "torch": here.torch, "candidate": table,
            "peak_allocated_bytes": result.peak("allocated_bytes"),
            "peak_reserved_bytes": result.peak("reserved_bytes"),
        }  # fmt: skip
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        said = predict(MemoryModel(device="cuda"), candidate).peak_allocated_bytes / row["peak_allocated_bytes"] - 1
        peak = f"{row['peak_allocated_bytes'] / 2**30:6.2f} GiB, predicted {said:+.1%}"
        print(f"{peak}: {candidate.shape} {candidate.plan}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

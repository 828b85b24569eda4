"""Every way to execute a step learns the same: loss curves of many plans against plain float32, not compiled."""

from dataclasses import fields, replace
from itertools import cycle, product

import numpy as np
import pytest
import torch

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.data.batches import micro_batches
from autotune.kernels import registry
from autotune.measure.memory import MemoryMeter
from autotune.model.step import build, machine_of

STEPS = 30
RECIPE = Recipe(
    shape=Shape(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=256), global_batch_size=7, warmup_iters=0
)
REFERENCE = Plan(micro_batch_size=7, compile="off", dtype="float32")
TOLERANCE = {"float32": 0.002, "bfloat16": 0.05, "bfloat16_residual": 0.05}
"""Nats, at every step."""
EARLY_STEPS, EARLY_TOLERANCE = 6, 5e-4
"""float32 plans, before rounding errors add up."""


def here(operation: registry.Operation) -> list[str]:
    machine, rows = machine_of(torch.device("cpu")), registry.kernels(operation)
    return [row.name for row in rows if registry.why_unavailable(row, machine, compile="off") is None]


def eager() -> list[Plan]:
    """Micro batches by dtype; kernels by recomputation, each in the next of the other choices."""
    every = product((1, 2, 3), TOLERANCE)
    plans = [replace(REFERENCE, micro_batch_size=micro, dtype=dtype) for micro, dtype in every]  # type: ignore[arg-type]
    kernels = product(here("attention"), here("loss"), ("none", "block", "every_2", "selective"))
    others = cycle(product(TOLERANCE, (7, 3), (50, 96)))
    return plans + [
        replace(REFERENCE, attention=attention, loss=loss, activation_checkpointing=recompute,
                dtype=dtype, micro_batch_size=micro, loss_chunk_tokens=chunk)  # type: ignore[arg-type]
        for (attention, loss, recompute), (dtype, micro, chunk) in zip(kernels, others, strict=False)
    ]  # fmt: skip


COMPILED = [
    replace(REFERENCE, compile="block", loss="chunked", loss_chunk_tokens=50, micro_batch_size=3),
    replace(REFERENCE, compile="full"),
    replace(REFERENCE, compile="block", activation_checkpointing="selective"),
    replace(REFERENCE, compile="block", activation_checkpointing="budget_0.5"),
    replace(REFERENCE, compile="block", activation_checkpointing="every_2", dtype="bfloat16"),
    replace(
        REFERENCE, compile="block", activation_checkpointing="block", dtype="bfloat16", loss="chunked",
        loss_chunk_tokens=50,
    ),
    replace(REFERENCE, compile="block", loss="auto_chunker", loss_chunk_tokens=112),
    replace(REFERENCE, compile="full", dtype="bfloat16_residual"),
]  # fmt: skip


def name(plan: Plan) -> str:
    """What differs from the reference."""
    pairs = ((field.name, getattr(plan, field.name), getattr(REFERENCE, field.name)) for field in fields(Plan))
    return " ".join(f"{key}={value}" for key, value, usual in pairs if value != usual) or "reference"


PLANS = [
    *(pytest.param(plan, id=name(plan), marks=[pytest.mark.slow] * (plan.micro_batch_size == 2)) for plan in eager()),
    *(pytest.param(plan, id=name(plan), marks=pytest.mark.slow) for plan in COMPILED),
]


def curve(plan: Plan, optimizer: str = "adamw") -> list[float]:
    """Losses of the recipe under `plan`, over the same text again and again."""
    torch._dynamo.reset()  # a function compiled too often would silently run uncompiled
    recipe = replace(RECIPE, optimizer=optimizer)  # type: ignore[arg-type]
    step = build(Candidate(recipe=recipe, plan=plan), torch.device("cpu"))
    text = np.random.default_rng(0).integers(0, 256, (RECIPE.global_batch_size, 33))
    sliced = micro_batches(text[:, :-1].copy(), text[:, 1:].copy(), plan.micro_batch_size)
    batches = [(torch.from_numpy(x), torch.from_numpy(y), share) for x, y, share in sliced]
    return [step.step(batches, 3e-3)[0].item() for _ in range(STEPS)]


@pytest.fixture(scope="module")
def reference() -> list[float]:
    losses = curve(REFERENCE)
    assert losses[-1] < losses[0] - 2
    return losses


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_learns_what_the_reference_learns(plan: Plan, reference: list[float]) -> None:
    losses = curve(plan)
    assert losses == pytest.approx(reference, abs=TOLERANCE[plan.dtype])
    if plan.dtype == "float32":
        assert losses[:EARLY_STEPS] == pytest.approx(reference[:EARLY_STEPS], abs=EARLY_TOLERANCE)


@pytest.mark.slow
def test_a_smaller_budget_keeps_less() -> None:
    peaks = {}
    for budget in ("budget_1", "budget_0.5", "budget_0"):
        torch._dynamo.reset()
        plan = replace(REFERENCE, compile="block", activation_checkpointing=budget)
        step = build(Candidate(recipe=RECIPE, plan=plan), torch.device("cpu"))
        tokens = torch.zeros(7, 32, dtype=torch.long)
        step.step([(tokens, tokens, 1.0)], 0.0)
        meter = MemoryMeter(step.device, step.state_bytes)
        with meter.stage("steady"):
            step.micro_step(tokens, tokens, 1.0)
        peaks[budget] = meter.views()["steady"].allocated_bytes or 0
    assert peaks["budget_1"] > peaks["budget_0.5"] >= peaks["budget_0"]

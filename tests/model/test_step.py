"""One optimizer step: accumulation, clipping, plans that must not change what is learned."""

import re
import subprocess
import sys
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.data.batches import micro_batches
from autotune.errors import ConfigError, UnsupportedError
from autotune.kernels import registry
from autotune.model.optim import Muon, learning_rate
from autotune.model.step import TrainStep, build, check_supported, machine_of

CPU = torch.device("cpu")
RECIPE = Recipe(
    shape=Shape(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=256),
    global_batch_size=7,
    learning_rate=3e-3,
    warmup_iters=0,
)


def losses(plan: Plan, steps: int = 6, recipe: Recipe = RECIPE) -> list[float]:
    rng = np.random.default_rng(0)
    step = build(Candidate(recipe=recipe, plan=plan), CPU)
    tokens = rng.integers(0, 256, (RECIPE.global_batch_size, 33))
    return [run(step, tokens, plan.micro_batch_size) for _ in range(steps)]


def run(step: TrainStep, tokens: np.ndarray, micro_batch_size: int) -> float:
    sliced = micro_batches(tokens[:, :-1].copy(), tokens[:, 1:].copy(), micro_batch_size)
    loss, norm = step.step([(torch.from_numpy(x), torch.from_numpy(y), share) for x, y, share in sliced], 3e-3)
    assert norm > 0
    return loss.item()


PLAIN = Plan(micro_batch_size=7, compile="off", dtype="float32")


def test_gradients_are_cleared_and_clipped() -> None:
    recipe = replace(RECIPE, grad_clip=1e-9, weight_decay=0.0)
    step = build(Candidate(recipe=recipe, plan=PLAIN), CPU)
    before = [p.detach().clone() for p in step.model.parameters()]
    run(step, np.random.default_rng(0).integers(0, 256, (7, 33)), 7)
    assert all(p.grad is None for p in step.model.parameters())
    # clipped to 1e-9, AdamW's normalised update would still be 1 * lr if clipping did not reach its epsilon
    moved = max((a - b).abs().max().item() for a, b in zip(before, step.model.parameters(), strict=True))
    assert moved < 1e-3


def test_state_bytes_are_weights_gradients_and_two_moments() -> None:
    step = build(Candidate(recipe=RECIPE, plan=PLAIN), CPU)
    count = RECIPE.shape.parameters
    assert step.state_bytes() == 4 * count
    step.micro_step(torch.zeros(1, 32, dtype=torch.long), torch.zeros(1, 32, dtype=torch.long), 1.0)
    assert step.state_bytes() == 8 * count
    step.optimizer_step(1e-3)
    scalars = 4 * len(list(step.model.parameters()))  # AdamW's step counters
    assert step.state_bytes() == 12 * count + scalars


@pytest.mark.slow
def test_inductor_chunks_the_loss_or_the_plan_is_refused() -> None:
    """It takes the product that grows its inputs most: the head, unless the vocabulary is as small as the MLP."""
    plan = replace(PLAIN, compile="full", loss="auto_chunker", loss_chunk_tokens=112)
    with pytest.raises(UnsupportedError, match="left the logits of this model whole; use chunked"):
        losses(plan, steps=1)
    larger = replace(RECIPE, shape=replace(RECIPE.shape, vocab_size=1024))
    assert losses(plan, recipe=larger) == pytest.approx(losses(PLAIN, recipe=larger), abs=5e-4)


HOPPER = registry.machine("cuda:0", (9, 0), "2.13.0+cu130")
ODD = replace(RECIPE, shape=replace(RECIPE.shape, n_head=16))


@pytest.mark.parametrize(
    ("machine", "recipe", "plan", "reason"),
    [
        ("cpu", RECIPE, {"dtype": "float16"}, "plan.dtype = 'float16' needs a CUDA device; use bfloat16 or float32"),
        ("cpu", RECIPE, {"dtype": "tfloat32"}, "plan.dtype = 'tfloat32' needs a CUDA device"),
        ("cpu", RECIPE, {"activation_checkpointing": "budget_0.5"}, "needs compiled graphs"),
        ("cpu", RECIPE, {"attention": "flex"}, "plan.attention = 'flex' needs cuda, this is cpu; see "),
        ("cpu", RECIPE, {"loss": "auto_chunker"}, "needs compile = full or block, the plan says off"),
        ("cpu", RECIPE, {"loss": "chunked"}, "plan.loss_chunk_tokens = 1024 is more than a micro batch has (224)"),
        ("cuda", ODD, {"attention": "sdpa_flash"}, "needs a head size in steps of 8 up to 256, this is 4"),
        ("cuda", RECIPE, {"loss": "cce"}, "'cce' needs the package cut-cross-entropy, which is not installed"),
        ("cuda", RECIPE, {"loss": "cce", "dtype": "float32"}, "needs bfloat16 or float16, the plan says float32"),
        ("old torch", RECIPE, {"loss": "torch_linear_cross_entropy"}, "needs torch 2.13, this is 2.11"),
    ],
)
def test_what_a_machine_cannot_run_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, machine: str, recipe: Recipe, plan: dict[str, object], reason: str
) -> None:
    if "package" in reason:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    elif plan.get("loss") == "cce":
        monkeypatch.setattr(registry, "_why_not_installed", lambda kernel: None)
    machines = {"cpu": machine_of(CPU), "cuda": HOPPER, "old torch": replace(HOPPER, torch=(2, 11))}
    candidate = Candidate(recipe=recipe, plan=replace(PLAIN, **{"dtype": "bfloat16", **plan}))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=re.escape(reason)) as caught:
        check_supported(candidate, machines[machine])
    assert "\n" not in str(caught.value)


def test_what_only_some_cards_can_run() -> None:
    old, new = (registry.machine("cuda:0", capability, "2.13.0") for capability in ((7, 5), (8, 0)))
    candidate = Candidate(recipe=RECIPE, plan=replace(PLAIN, dtype="tfloat32"))
    check_supported(candidate, new)
    with pytest.raises(UnsupportedError, match=r"needs compute capability 8\.0, this card has 7\.5"):
        check_supported(candidate, old)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UnsupportedError, match=r"needs the package bitsandbytes"):
        build(Candidate(recipe=replace(RECIPE, optimizer="adamw_8bit"), plan=PLAIN), CPU)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gradient_that_overflows_in_float16_skips_the_whole_step(optimizer: str) -> None:
    recipe = replace(RECIPE, optimizer=optimizer)  # type: ignore[arg-type]
    candidate = Candidate(recipe=recipe, plan=replace(PLAIN, dtype="float16"))
    model = build(replace(candidate, plan=PLAIN), CPU).model
    step = TrainStep(candidate, model, CPU)  # `build` refuses float16 on the CPU: it is slow there, but correct
    tokens = np.random.default_rng(0).integers(0, 256, (7, 33))
    first, scale = run(step, tokens, 7), step.scaler.get_scale()
    before = [p.detach().clone() for p in model.parameters()]
    moments = [t.clone() for held in step.optimizer.state.values() for t in held.values()]
    x, y = torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy())
    step.micro_step(x, y, 1.0)
    assert model.wpe.weight.grad is not None
    model.wpe.weight.grad[0, 0] = float("inf")  # a parameter of AdamW; Muon has the blocks
    step.optimizer_step(3e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    after = [t for held in step.optimizer.state.values() for t in held.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    assert step.scaler.get_scale() == scale / 2
    assert run(step, tokens, 7) < first


def test_muon_learns_and_has_one_moment_for_a_matrix() -> None:
    step = build(Candidate(recipe=replace(RECIPE, optimizer="muon"), plan=PLAIN), CPU)
    tokens = np.random.default_rng(0).integers(0, 256, (7, 33))
    curve = [run(step, tokens, 7) for _ in range(6)]
    assert curve[-1] < curve[0] - 0.5
    shape, others = RECIPE.shape, [n for n, p in step.model.named_parameters() if p.dim() < 2 or not n.startswith("h.")]
    matrices = 12 * shape.n_layer * shape.n_embd**2
    assert step.state_bytes() == 12 * shape.parameters - 4 * matrices + 4 * len(others)  # and AdamW's step counters


@pytest.mark.parametrize("shape", [(8, 24), (32, 8), (8, 8)])
def test_muon_is_torchs_without_its_rounding(shape: tuple[int, int]) -> None:
    """torch's orthogonalises in bfloat16, which has three digits."""
    torch.manual_seed(0)
    start, words = torch.randn(shape), {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = Muon([ours], **words), torch.optim.Muon([theirs], **words, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        gradient = torch.randn(shape)
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    moved, difference = (theirs - start).norm().item(), (theirs - ours).norm().item()
    assert difference < 0.02 * moved


@pytest.mark.slow
def test_one_compiled_block_serves_every_depth() -> None:
    def graphs(n_layer: int, recompute: str) -> int:
        recipe = replace(RECIPE, shape=replace(RECIPE.shape, n_layer=n_layer))
        plan = replace(PLAIN, compile="block", activation_checkpointing=recompute)
        run(build(Candidate(recipe=recipe, plan=plan), CPU), np.zeros((7, 33), dtype=np.int64), 7)
        return int(counters["stats"]["unique_graphs"])

    for recompute in ("selective", "every_2"):
        before = graphs(2, recompute)
        assert graphs(5, recompute) == before


@pytest.mark.parametrize("compile", ["full", "block"])
def test_an_evaluation_that_is_not_compiled_starts_at_once_and_has_the_same_loss(
    compile: Literal["full", "block"],
) -> None:
    step = build(Candidate(recipe=RECIPE, plan=replace(PLAIN, compile=compile)), CPU)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 33)))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    before = counters["stats"]["unique_graphs"]
    plain = step.evaluate(x, y, compiled=False).item()
    assert counters["stats"]["unique_graphs"] == before
    assert step.evaluate(x, y).item() == pytest.approx(plain, abs=1e-5)
    assert counters["stats"]["unique_graphs"] > before


def test_learning_rate_warms_up_and_decays() -> None:
    recipe = Recipe(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110, max_iters=200)
    rates = [learning_rate(recipe, i) for i in range(200)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110:] == [0.1] * 90


def test_warmup_stable_decay() -> None:
    """Up in ten steps, level to eight tenths of lr_decay_iters, in a straight line to min_lr, and level again."""
    recipe = Recipe(schedule="wsd", learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=100, decay_share=0.2)
    rates = [learning_rate(recipe, i) for i in range(120)]
    assert rates[:10] == [(i + 1) / 11 for i in range(10)]
    assert rates[10:81] == pytest.approx([1.0] * 71)
    assert rates[80:101] == pytest.approx([1.0 - 0.9 * i / 20 for i in range(21)])
    assert rates[100:] == [0.1] * 20
    with pytest.raises(ConfigError, match=r"training\.decay_share = 0\.0 must lie in \(0, 1\]"):
        replace(recipe, decay_share=0.0)


@pytest.mark.slow
def test_more_versions_of_a_function_than_torchs_limit_are_compiled() -> None:
    """torch compiles a function 8 times by default; later versions run uncompiled without a warning."""
    step = build(
        Candidate(recipe=RECIPE, plan=replace(PLAIN, compile="block", loss="chunked", loss_chunk_tokens=32)), CPU
    )
    before = counters["stats"]["unique_graphs"]
    for rows in range(1, 11):
        hidden, targets = torch.zeros(rows, 64), torch.zeros(rows, dtype=torch.long)
        assert step.model.loss(hidden, step.model.wte.weight, targets, 32).item() == pytest.approx(np.log(256))
    assert counters["stats"]["unique_graphs"] - before == 2 * 10  # the operator, and the softmax inside it


FAULTS = """
import resource, torch
from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.model.optim import Muon
from autotune.model.step import build

torch.set_num_threads(1)
shape = Shape(n_layer=2, n_head=2, n_embd=64, block_size=128, vocab_size=4096)
plan = Plan(micro_batch_size=8, compile="off", dtype="float32")
step = build(Candidate(recipe=Recipe(shape=shape, global_batch_size=8), plan=plan), torch.device("cpu"))
tokens = torch.randint(0, 4096, (8, 128))
for _ in range(9):
    step.step([(tokens, tokens, 1.0)], 1e-4)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def test_memory_freed_by_a_step_is_reused_by_the_next() -> None:
    """Otherwise a process faults in up to 16,000 pages each step, depending on the layout of its heap."""
    said = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    counts = [int(line) for line in said.split()]
    assert counts[-1] - counts[4] < 10_000  # in four steps; 64,000 with the default allocator settings

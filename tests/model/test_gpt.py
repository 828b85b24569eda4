"""The model against an independent float64 reference, and its size against the guide's."""

import math

import numpy as np
import pytest
import torch

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.config.presets import GUIDE
from autotune.kernels import registry
from autotune.measure.memory import MemoryMeter
from autotune.model.gpt import GPT
from autotune.model.recompute import run_block
from autotune.model.step import build

CPU = torch.device("cpu")


def candidate(**plan: object) -> Candidate:
    shape = Shape(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=97)
    return Candidate(
        recipe=Recipe(shape=shape, global_batch_size=4),
        plan=Plan(**{"micro_batch_size": 2, "compile": "off", "dtype": "float32", **plan}),  # type: ignore[arg-type]
    )


def reference_loss(weights: dict[str, np.ndarray], tokens: np.ndarray, targets: np.ndarray, heads: int) -> float:
    """GPT-2's forward in float64 numpy, written from the paper and nanoGPT's description, not from gpt.py."""

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale

    erf = np.vectorize(math.erf)
    x = weights["wte.weight"][tokens] + weights["wpe.weight"][: tokens.shape[1]]
    size = x.shape[-1] // heads
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("h."))
    for layer in range(layers):
        w = {name.removeprefix(f"h.{layer}."): v for name, v in weights.items() if name.startswith(f"h.{layer}.")}
        qkv = norm(x, w["ln_1.weight"]) @ w["attn.c_attn.weight"].T
        query, key, value = np.split(qkv, 3, axis=-1)
        mixed = np.zeros_like(x)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = query[..., part] @ key[..., part].transpose(0, 2, 1) / math.sqrt(size)
            scores = np.where(np.tril(np.ones(scores.shape[-2:])) > 0, scores, -np.inf)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[..., part] = scores / scores.sum(-1, keepdims=True) @ value[..., part]
        x = x + mixed @ w["attn.c_proj.weight"].T
        wide = norm(x, w["ln_2.weight"]) @ w["mlp.c_fc.weight"].T
        x = x + 0.5 * wide * (1 + erf(wide / math.sqrt(2))) @ w["mlp.c_proj.weight"].T
    logits = norm(x, weights["ln_f.weight"]) @ weights["wte.weight"].T
    highest = logits.max(-1, keepdims=True)
    log_p = logits - highest - np.log(np.exp(logits - highest).sum(-1, keepdims=True))
    counted = targets != -1
    picked = np.take_along_axis(log_p, np.where(counted, targets, 0)[..., None], -1)[..., 0]
    return float(-(picked * counted).sum() / counted.sum())


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    tokens = torch.randint(0, 97, (2, 16))
    targets = torch.randint(0, 97, (2, 16))
    targets[0, 3] = targets[1, 15] = -1
    return tokens, targets


@pytest.mark.parametrize("row", GUIDE, ids=lambda row: row.name)
def test_parameter_counts_are_those_of_the_true_models(row) -> None:
    true = {12: {768: 124_373_760, 672: 99_537_312}, 10: {640: 82_015_360}, 8: {512: 51_454_464}, 6: {384: 30_331_776}}
    shape = row.shape
    assert shape.parameters == true[shape.n_layer][shape.n_embd]
    attention, loss = (registry.load(kernel) for kernel in (registry.KERNELS[0], registry.find("loss", "full")))
    with torch.device("meta"):
        model = GPT(
            shape,
            attention=attention,
            loss=loss,
            loss_chunk_tokens=1,
            run_block=run_block(Plan()),
            residual_dtype=torch.float32,
        )
    assert sum(p.numel() for p in model.parameters()) == shape.parameters


@pytest.mark.parametrize("loss", ["full", "chunked"])
@pytest.mark.parametrize("attention", ["sdpa", "sdpa_math"])
def test_loss_equals_the_float64_reference(loss: str, attention: str) -> None:
    step = build(candidate(loss=loss, attention=attention, loss_chunk_tokens=7), CPU)
    tokens, targets = batch()
    weights = {name: p.detach().double().numpy() for name, p in step.model.named_parameters()}
    expected = reference_loss(weights, tokens.numpy(), targets.numpy(), heads=2)
    assert step.evaluate(tokens, targets).item() == pytest.approx(expected, abs=2e-6)


def test_gradients_equal_finite_differences_of_the_reference() -> None:
    step = build(candidate(loss="chunked", loss_chunk_tokens=5), CPU)
    tokens, targets = batch()
    step.micro_step(tokens, targets, 1.0)
    weights = {name: p.detach().double().numpy() for name, p in step.model.named_parameters()}
    rng = np.random.default_rng(0)
    for name, parameter in step.model.named_parameters():
        direction = rng.standard_normal(parameter.shape)
        nudge = 1e-5
        up, down = (
            reference_loss(
                {**weights, name: weights[name] + sign * nudge * direction}, tokens.numpy(), targets.numpy(), heads=2
            )
            for sign in (1, -1)
        )
        assert parameter.grad is not None
        along = float((parameter.grad.double().numpy() * direction).sum())
        assert along == pytest.approx((up - down) / (2 * nudge), rel=2e-3, abs=2e-6), name


def test_checkpointing_changes_no_gradient() -> None:
    grads = {}
    for checkpointing in ("none", "block", "every_2", "selective"):
        step = build(candidate(activation_checkpointing=checkpointing), CPU)
        step.micro_step(*batch(), 1.0)
        grads[checkpointing] = [p.grad for p in step.model.parameters()]
    for recomputed in grads.values():
        for plain, again in zip(grads["none"], recomputed, strict=True):
            torch.testing.assert_close(plain, again)


def test_what_is_computed_again_is_not_kept() -> None:
    shape = Shape(n_layer=4, n_head=2, n_embd=64, block_size=64, vocab_size=97)
    tokens = torch.zeros(8, 64, dtype=torch.long)
    peaks = {}
    for checkpointing in ("none", "every_4", "every_2", "selective", "block"):
        plan = Plan(micro_batch_size=8, compile="off", dtype="float32", activation_checkpointing=checkpointing)
        step = build(Candidate(recipe=Recipe(shape=shape), plan=plan), CPU)
        meter = MemoryMeter(CPU, step.state_bytes)
        with meter.stage("steady"):
            step.micro_step(tokens, tokens, 1.0)
        peaks[checkpointing] = meter.views()["steady"].allocated_bytes or 0
    assert peaks["none"] > peaks["every_4"] > peaks["every_2"] > peaks["block"]
    assert peaks["none"] > peaks["selective"] > peaks["block"]


def test_bias_and_dropout_are_there_when_asked_for() -> None:
    shape = Shape(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=97, bias=True, dropout=0.5)
    step = build(Candidate(recipe=Recipe(shape=shape), plan=Plan(compile="off", dtype="float32")), CPU)
    assert sum(p.numel() for p in step.model.parameters()) == shape.parameters
    tokens, targets = batch()
    losses = {step.micro_step(tokens, targets, 1.0).item() for _ in range(3)}
    assert len(losses) == 3  # dropout draws anew
    assert step.evaluate(tokens, targets) == step.evaluate(tokens, targets)  # and is off in evaluation

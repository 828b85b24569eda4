"""A kernel against a float64 reference, forward and gradients: the checks that the CPU's and the card's tests share."""

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autotune.kernels import registry
from autotune.kernels.loss_auto_chunker import compile_in_chunks
from autotune.model.step import machine_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# relative error of the whole tensor's norm: three rounding errors of the dtype, accumulated
TOLERANCE = {"float32": 2e-5, "bfloat16": 1.5e-2, "float16": 2e-3}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's kernels run on the CPU, slowly; test_contract.py starts itself again with it."""
LOSS_SIZES = [(1, 211), (123, 5003), (256, 4096)]
"""Tokens, words."""
ATTENTION_SIZES = [(1, 64), (123, 64), (128, 32)]
"""Tokens, head size."""


def why_unavailable(kernel: registry.Kernel, device: torch.device, **wanted: Any) -> str | None:
    checked = replace(kernel, capability=None) if INTERPRETED and kernel.package == "triton" else kernel
    return registry.why_unavailable(checked, machine_of(device), **wanted)


def rows(operation: registry.Operation, device: torch.device) -> list[registry.Kernel]:
    """All rows on a card, where an absent one is skipped with its reason; on the CPU those that run there."""
    cuda = device.type == "cuda"
    return [kernel for kernel in registry.kernels(operation) if cuda or why_unavailable(kernel, device) is None]


def loss_cases(device: torch.device) -> list[Any]:
    """Kernel, tokens, words, dtype. One awkward size is enough of what takes seconds to compile, in the slow lane; no
    plan has float16 on the CPU."""
    return [
        pytest.param(
            kernel, tokens, words, dtype, id=f"{kernel.name}-{tokens}-{dtype}",
            marks=[pytest.mark.slow] * kernel.compiled_only,
        )
        for kernel, (tokens, words), dtype in product(rows("loss", device), LOSS_SIZES, DTYPES)
        if not kernel.compiled_only or (tokens == 123 and (device.type, dtype) != ("cpu", "float16"))
    ]  # fmt: skip


def attention_cases(device: torch.device) -> list[Any]:
    """Kernel, tokens, head size, dtype. cuDNN refuses attention to a single key, which no training has."""
    return [
        pytest.param(kernel, tokens, head_size, dtype, id=f"{kernel.name}-{tokens}-{dtype}")
        for kernel, (tokens, head_size), dtype in product(rows("attention", device), ATTENTION_SIZES, DTYPES)
        if kernel.name != "sdpa_cudnn" or tokens > 1
    ]


def implementation(
    kernel: registry.Kernel, device: torch.device, dtype: str, head_size: int | None = None
) -> Callable[..., Tensor]:
    """The row's function; compiled, where it exists only so. Skips, with the reason, what cannot run here."""
    if reason := why_unavailable(kernel, device, dtype=dtype, head_size=head_size):
        pytest.skip(f"{kernel.name}: {reason}")
    function = registry.load(kernel)
    if not kernel.compiled_only:
        return function
    torch._dynamo.reset()
    if kernel.name == "auto_chunker":
        return compile_in_chunks(function, chunks=3, error=AssertionError("not chunked"))
    return torch.compile(function, dynamic=False)


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.double().cpu() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def loss_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-1)
    return loss.detach(), *torch.autograd.grad(loss, [hidden, weight])


def check_loss(kernel: registry.Kernel, tokens: int, words: int, dtype: str, device: torch.device) -> None:
    cross_entropy = implementation(kernel, device, dtype)
    torch.manual_seed(tokens)
    hidden, weight = torch.randn(tokens, 48), torch.randn(words, 48) * 0.3
    targets = torch.randint(0, words, (tokens,))
    targets[1::5] = -1
    expected = loss_reference(hidden, weight, targets)
    h, w = (t.to(device).requires_grad_() for t in (hidden, weight))
    with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32"):
        loss = cross_entropy(h, w, targets.to(device), 50)
    grads = torch.autograd.grad(loss * 3.0, [h, w])
    assert loss.dtype == torch.float32
    assert error(loss, expected[0]) < TOLERANCE[dtype]
    for got, wanted in zip(grads, expected[1:], strict=True):
        assert error(got / 3.0, wanted) < TOLERANCE[dtype]


def check_attention(kernel: registry.Kernel, tokens: int, head_size: int, dtype: str, device: torch.device) -> None:
    attention = implementation(kernel, device, dtype, head_size)
    torch.manual_seed(tokens)
    inputs = [torch.randn(2, 3, tokens, head_size) for _ in range(3)]
    expected = attention_reference(*inputs)
    given = [t.to(device, DTYPES[dtype]).requires_grad_() for t in inputs]
    mixed = attention(*given, 0.0)
    grads = torch.autograd.grad(mixed.float().square().sum(), given)
    assert mixed.dtype == DTYPES[dtype]
    for got, wanted in zip((mixed, *grads), expected, strict=True):
        assert error(got, wanted) < 2 * TOLERANCE[dtype] or wanted.norm() < 1e-9


def attention_reference(*inputs: Tensor) -> tuple[Tensor, ...]:
    query, key, value = (t.double().requires_grad_() for t in inputs)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ value
    return mixed.detach(), *torch.autograd.grad(mixed.square().sum(), [query, key, value])

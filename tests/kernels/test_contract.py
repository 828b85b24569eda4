"""Every row of the registry against a float64 reference, forward and gradients; rows come in by themselves."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autotune.kernels import registry
from autotune.kernels.loss_auto_chunker import compile_in_chunks
from autotune.model.step import machine_of

DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# relative error of the whole tensor's norm: three rounding errors of the dtype, accumulated
TOLERANCE = {"float32": 2e-5, "bfloat16": 1.5e-2, "float16": 2e-3}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's kernels run on the CPU, slowly: the last test starts this file again with it."""


def implementation(
    kernel: registry.Kernel, device: torch.device, dtype: str, head_size: int | None = None
) -> Callable[..., Tensor]:
    """The row's function; compiled, where it exists only so. Skips, with the reason, what cannot run here."""
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, none here")
    checked = replace(kernel, capability=None) if INTERPRETED and kernel.package == "triton" else kernel
    if reason := registry.why_unavailable(checked, machine_of(device), dtype=dtype, head_size=head_size):
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


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "words"), [(1, 211), (123, 5003), (256, 4096)])
@pytest.mark.parametrize("kernel", registry.kernels("loss"), ids=lambda kernel: kernel.name)
def test_loss(kernel: registry.Kernel, tokens: int, words: int, dtype: str, device: torch.device) -> None:
    if kernel.compiled_only and (tokens != 123 or (device.type, dtype) == ("cpu", "float16")):
        pytest.skip("one awkward size is enough of what takes seconds to compile; no plan has float16 on the CPU")
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


def test_float16_keeps_the_gradients_of_words_that_are_no_targets() -> None:
    """A token's share of the mean is 1e-4, a word's probability 2e-4: their product is nothing in float16."""
    from autotune.kernels.loss_chunked import cross_entropy

    torch.manual_seed(0)
    hidden, weight = (0.1 * torch.randn(rows, 16) for rows in (8192, 5003))
    h, w = hidden.half().requires_grad_(), weight.half().requires_grad_()
    targets = torch.zeros(8192, dtype=torch.long)
    loss = cross_entropy(h, w, targets, 1024) * 2.0**20  # scaled, as a training with float16 does it
    expected = loss_reference(h.detach(), w.detach(), targets)[2]
    assert error(torch.autograd.grad(loss, [w])[0][1:].double() / 2.0**20, expected[1:]) < 0.02


def test_a_planted_wrong_gradient_is_caught() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(64, 48), torch.randn(211, 48), torch.randint(0, 211, (64,))
    _, right, _ = loss_reference(hidden, weight, targets)
    wrong = right.clone()
    wrong[5] *= 1.2  # one row of 64, off by a fifth
    assert error(wrong, right) > TOLERANCE["bfloat16"]


@pytest.mark.parametrize("kernel", registry.kernels("loss"), ids=lambda kernel: kernel.name)
def test_all_targets_ignored_gives_no_gradient(kernel: registry.Kernel) -> None:
    if not kernel.path.startswith("loss_chunked"):
        pytest.skip("torch's mean over no targets is NaN by definition; a padded row never stands alone")
    cross_entropy = implementation(kernel, torch.device("cpu"), "float32")
    hidden, weight = torch.randn(8, 16, requires_grad=True), torch.randn(31, 16, requires_grad=True)
    loss = cross_entropy(hidden, weight, torch.full((8,), -1), 4)
    loss.backward()
    assert loss == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "head_size"), [(1, 64), (123, 64), (128, 32)])
@pytest.mark.parametrize("kernel", registry.kernels("attention"), ids=lambda kernel: kernel.name)
def test_attention(kernel: registry.Kernel, tokens: int, head_size: int, dtype: str, device: torch.device) -> None:
    if kernel.name == "sdpa_cudnn" and tokens == 1:
        pytest.skip("cuDNN refuses attention to a single key; no training has sequences of one token")
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


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_triton_kernels_through_the_interpreter() -> None:
    pytest.importorskip("triton", reason="needs the package triton, which is not installed")
    names = [kernel.name for kernel in registry.KERNELS if kernel.package == "triton"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"cpu and ({' or '.join(names)})"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([*command, __file__], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    assert f"{9 * len(names)} passed" in run.stdout, run.stdout[-3000:]


@pytest.mark.skipif(INTERPRETED, reason="a compiler needs the kernel itself")
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("capability", [70, 80, 90, 100])
def test_triton_kernels_compile_for_cards_that_are_not_here(capability: int, dtype: str) -> None:
    """Down to machine code, by Triton's own assembler; what it computes is the interpreter's test."""
    pytest.importorskip("triton", reason="needs the package triton, which is not installed")
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from autotune.kernels.loss_chunked_triton import BLOCK_V, _softmax_loss_kernel

    if (capability, dtype) == (70, "bf16"):
        pytest.skip("bfloat16 begins with capability 8.0")
    signature = {"logits": f"*{dtype}", "stride": "i32", "targets": "*i64", "scales": "*fp32", "losses": "*fp32"}
    constants = {"WORDS": 50304, "BLOCK_V": BLOCK_V}
    source = ASTSource(_softmax_loss_kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
    built = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert len(built.asm["cubin"]) > 1000
    assert built.metadata.shared < 48 << 10

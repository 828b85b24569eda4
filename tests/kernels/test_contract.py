"""Every row of the registry against a float64 reference on the CPU; a new row is tested without a change here."""

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from kernel_contract import (
    INTERPRETED,
    TOLERANCE,
    attention_cases,
    check_attention,
    check_loss,
    error,
    implementation,
    loss_cases,
    loss_reference,
    rows,
)

from autotune.kernels import registry

CPU = torch.device("cpu")


@pytest.mark.parametrize(("kernel", "tokens", "words", "dtype"), loss_cases(CPU))
def test_loss(kernel: registry.Kernel, tokens: int, words: int, dtype: str) -> None:
    check_loss(kernel, tokens, words, dtype, CPU)


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


@pytest.mark.parametrize(
    "kernel", [row for row in rows("loss", CPU) if row.path.startswith("loss_chunked")], ids=lambda kernel: kernel.name
)
def test_all_targets_ignored_gives_no_gradient(kernel: registry.Kernel) -> None:
    """torch's own mean over no targets is NaN by definition."""
    cross_entropy = implementation(kernel, CPU, "float32")
    hidden, weight = torch.randn(8, 16, requires_grad=True), torch.randn(31, 16, requires_grad=True)
    loss = cross_entropy(hidden, weight, torch.full((8,), -1), 4)
    loss.backward()
    assert loss == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize(("kernel", "tokens", "head_size", "dtype"), attention_cases(CPU))
def test_attention(kernel: registry.Kernel, tokens: int, head_size: int, dtype: str) -> None:
    check_attention(kernel, tokens, head_size, dtype, CPU)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_triton_kernels_through_the_interpreter() -> None:
    pytest.importorskip("triton", reason="needs the package triton, which is not installed")
    names = [kernel.name for kernel in registry.KERNELS if kernel.package == "triton"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        " or ".join(names),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([*command, __file__], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    assert f"{10 * len(names)} passed" in run.stdout, run.stdout[-3000:]


@pytest.mark.skipif(INTERPRETED, reason="a compiler needs the kernel itself")
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        pytest.param(capability, dtype, marks=[pytest.mark.slow] * ((capability, dtype) != (90, "bf16")))
        for capability, dtype in product((70, 80, 90, 100), ("bf16", "fp16", "fp32"))
        if (capability, dtype) != (70, "bf16")  # bfloat16 begins with capability 8.0
    ],
)
def test_triton_kernels_compile_for_cards_that_are_not_here(capability: int, dtype: str) -> None:
    """Down to machine code, by Triton's own assembler; what it computes is the interpreter's test."""
    pytest.importorskip("triton", reason="needs the package triton, which is not installed")
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from autotune.kernels.loss_chunked_triton import BLOCK_V, _softmax_loss_kernel

    signature = {"logits": f"*{dtype}", "stride": "i32", "targets": "*i64", "scales": "*fp32", "losses": "*fp32"}
    constants = {"WORDS": 50304, "BLOCK_V": BLOCK_V}
    source = ASTSource(_softmax_loss_kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
    built = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert len(built.asm["cubin"]) > 1000
    assert built.metadata.shared < 48 << 10

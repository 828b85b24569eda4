"""Every row of the registry on the card: against a float64 reference, and against torch's own in seconds and bytes."""

import json
import sys

import pytest
import torch
from gpu.bench import ROOT, Bench
from kernel_contract import ATTENTION_SIZES, DTYPES, LOSS_SIZES, check_attention, check_loss

from autotune.kernels import registry

# the CPU has a contract of its own, in tests/kernels: one size shows that this one runs
LOSSES = [pytest.param(*size, marks=[pytest.mark.card_only] * (size[0] != 123)) for size in LOSS_SIZES]
ATTENTIONS = [pytest.param(*size, marks=[pytest.mark.card_only] * (size[0] != 128)) for size in ATTENTION_SIZES]
pytestmark = [pytest.mark.gpu, pytest.mark.seconds(20)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "words"), LOSSES)
@pytest.mark.parametrize("kernel", registry.kernels("loss"), ids=lambda kernel: kernel.name)
def test_loss(kernel: registry.Kernel, tokens: int, words: int, dtype: str, bench: Bench) -> None:
    check_loss(kernel, tokens, words, dtype, torch.device(bench.device_kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "head_size"), ATTENTIONS)
@pytest.mark.parametrize("kernel", registry.kernels("attention"), ids=lambda kernel: kernel.name)
def test_attention(kernel: registry.Kernel, tokens: int, head_size: int, dtype: str, bench: Bench) -> None:
    check_attention(kernel, tokens, head_size, dtype, torch.device(bench.device_kind))


@pytest.mark.seconds(150)
@pytest.mark.parametrize("benchmark_name", ["attention", pytest.param("losses", marks=pytest.mark.card_only)])
def test_speed(benchmark_name: str, bench: Bench) -> None:
    """The kernel benchmark and its bars, at the guide's size for 24 GB on a card."""
    report, file = bench.scratch / "speed.json", ROOT / "tests" / "benchmarks" / "test_kernels.py"
    words = ("-q", "-p", "no:cacheprovider", "-k", f"test_{benchmark_name}", "--benchmark-enable", "--benchmark-only")
    command = [sys.executable, "-m", "pytest", *words, f"--benchmark-json={report}", str(file)]
    report.unlink(missing_ok=True)
    try:
        bench.output(command)
    finally:
        for found in json.loads(report.read_text())["benchmarks"] if report.exists() else ():
            pairs = {name: pair for name, pair in found["extra_info"].items() if isinstance(pair, dict)}
            bench.row.update({f"{name}: {what}": value for name, pair in pairs.items() for what, value in pair.items()})
    assert bench.row["sdpa: seconds" if benchmark_name == "attention" else "full: seconds"] == 1.0

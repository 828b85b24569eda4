"""Every row of the registry on the card: against a float64 reference, and against torch's own in seconds and bytes."""

import json
import sys
from typing import Any

import pytest
import torch
from gpu.bench import ROOT, Bench
from kernel_contract import attention_cases, check_attention, check_loss, loss_cases

from autotune.kernels import registry

pytestmark = [pytest.mark.gpu, pytest.mark.seconds(20)]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cases(every: list[Any], tokens: int) -> list[Any]:
    """All on a card. In a dry run, the ones with so many tokens: the CPU's own contract is in tests/kernels."""
    return [case for case in every if DEVICE.type == "cuda" or case.values[1] == tokens]


@pytest.mark.parametrize(("kernel", "tokens", "words", "dtype"), cases(loss_cases(DEVICE), 123))
def test_loss(kernel: registry.Kernel, tokens: int, words: int, dtype: str, bench: Bench) -> None:
    check_loss(kernel, tokens, words, dtype, torch.device(bench.device_kind))


@pytest.mark.parametrize(("kernel", "tokens", "head_size", "dtype"), cases(attention_cases(DEVICE), 128))
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

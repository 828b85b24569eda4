"""What huge pages gain on the CPU; fresh workers by turns.

scripts/bench -k pages
"""

import statistics
from pathlib import Path
from typing import Any

import pytest

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.environment import HUGE_PAGES
from autotune.measure.runner import run_trial
from autotune.measure.types import TrialRequest, TrialResult

ROUNDS = 5
SMALL_PAGES = "glibc.malloc.hugetlb=0"
SHAPE = Shape(n_layer=4, n_head=4, n_embd=128, block_size=128, vocab_size=8192)
CANDIDATE = Candidate(
    recipe=Recipe(shape=SHAPE, global_batch_size=16),
    plan=Plan(micro_batch_size=8, loss="chunked", loss_chunk_tokens=256),
)


@pytest.mark.benchmark(group="pages")
def test_huge_pages(benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)  # conftest sets it for the other tests

    def trial(tunables: str) -> TrialResult:
        monkeypatch.setenv("GLIBC_TUNABLES", tunables)
        request = TrialRequest(candidate=CANDIDATE, device="cpu", result_path="", measure_seconds=4.0, final=True)
        return run_trial(request, tmp_path / "log")

    def rounds() -> dict[str, list[TrialResult]]:
        turns = [(name, trial(name)) for _ in range(ROUNDS) for name in (SMALL_PAGES, HUGE_PAGES)]
        return {name: [result for other, result in turns if other == name] for name in (SMALL_PAGES, HUGE_PAGES)}

    trial(HUGE_PAGES)  # fills the compile cache
    found = benchmark.pedantic(rounds, rounds=1)
    speeds = {name: [result.tokens_per_second or 0.0 for result in results] for name, results in found.items()}
    resident = {n: statistics.median(r.peak("device_bytes") or 0 for r in results) for n, results in found.items()}
    print(f"\n4x4x128, T 128, 2 x 8 x 128 tokens, bfloat16, compiled; {ROUNDS} fresh processes each")
    for name in speeds:
        values = ", ".join(f"{speed:,.0f}" for speed in speeds[name])
        middle, size = statistics.median(speeds[name]), resident[name] / 2**20
        print(f"{name:24} median {middle:8,.0f} tokens/s ({values}), {size:.0f} MiB resident")
    gain = statistics.median(speeds[HUGE_PAGES]) / statistics.median(speeds[SMALL_PAGES])
    print(f"gain {gain:.3f}, resident {resident[HUGE_PAGES] / resident[SMALL_PAGES]:.3f}")
    benchmark.extra_info |= {"gain": gain}
    assert gain > 1.0

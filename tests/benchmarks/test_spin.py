"""What the bounded spin of waiting threads costs alone, and gains beside busy processes; fresh workers by turns.

    scripts/bench -k spin

Needs a machine that is otherwise quiet: the load is part of the question.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.environment import _WAITING, SPIN, busy_machine
from autotune.measure.runner import run_trial
from autotune.measure.types import TrialRequest

ROUNDS = 1
BUSY = len(os.sched_getaffinity(0))
"""Processes beside the trial: one a core."""
# a winner of scripts/quickstart: the smaller the products, the more barriers a second has
DEFAULT = "300000"
"""GNU's own GOMP_SPINCOUNT where no variable is set (libgomp/env.c)."""
REQUEST = TrialRequest(
    candidate=Candidate(
        recipe=Recipe(shape=Shape(n_layer=6, n_head=1, n_embd=64, block_size=256), global_batch_size=16),
        plan=Plan(micro_batch_size=16, compile="block", loss="chunked", loss_chunk_tokens=128),
    ),
    device="cpu",
    result_path="",
    measure_seconds=6.0,
    timeout_seconds=300.0,
)


@contextmanager
def load(processes: int) -> Iterator[None]:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def tokens_per_second(monkeypatch: pytest.MonkeyPatch, spin: str, processes: int, log: Path) -> float:
    monkeypatch.setenv("GOMP_SPINCOUNT", spin)
    with load(processes):
        result = run_trial(REQUEST, log)
    assert result.status == "ok", result.message
    assert result.tokens_per_second is not None
    return result.tokens_per_second


@pytest.mark.benchmark(group="spin")
def test_bounded_spin(benchmark, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in _WAITING:  # conftest sets one for the other tests
        monkeypatch.delenv(name, raising=False)
    noise = busy_machine()
    tokens_per_second(monkeypatch, SPIN, 0, tmp_path / "log")  # fills the compile cache
    speeds: dict[tuple[int, str], list[float]] = {}
    for _ in range(ROUNDS):
        for processes in (0, BUSY):
            for spin in (DEFAULT, SPIN):
                speed = tokens_per_second(monkeypatch, spin, processes, tmp_path / "log")
                speeds.setdefault((processes, spin), []).append(speed)
    medians = {key: statistics.median(values) for key, values in speeds.items()}
    alone, gain = (medians[processes, SPIN] / medians[processes, DEFAULT] for processes in (0, BUSY))
    print(
        f"\n6 layers, 64 wide, 16 x 256 tokens, bfloat16, blocks compiled, {BUSY} cores; median tokens/s of {ROUNDS}"
    )
    print(f"{'':28}{'default':>10}{SPIN + ' turns':>14}{'ratio':>8}")
    for processes, ratio, what in ((0, alone, "alone"), (BUSY, gain, f"beside {BUSY} busy processes")):
        print(f"{what:28}{medians[processes, DEFAULT]:10.0f}{medians[processes, SPIN]:14.0f}{ratio:8.2f}")
    benchmark.extra_info.update(alone=alone, gain=gain)
    benchmark.pedantic(lambda: None, rounds=1)
    if noise:
        pytest.skip(noise)
    assert alone >= 0.97
    assert gain >= 4

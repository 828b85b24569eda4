"""What a search takes between two trials: proposing, the memory model, the study, the run's files.

    scripts/bench -k between_trials

A simulated machine answers at once, in a process of its own, as the command line starts one.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

LIMITS_MS = {50: 50.0, 200: 100.0, 1000: 200.0}
"""By the number of trials before."""


@pytest.mark.benchmark(group="search")
@pytest.mark.parametrize("model", ["12x12x768", "shapes"])
def test_milliseconds_between_trials(benchmark, model: str) -> None:
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, __file__, model, str(max(LIMITS_MS))]

    def search() -> dict[int, float]:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return {int(trials): ms for trials, ms in json.loads(done.stdout.splitlines()[-1]).items()}

    found = benchmark.pedantic(search, rounds=1)
    for trials, ms in found.items():
        print(f"\n{model}: {ms:.0f} ms between trials after {trials}, at most {LIMITS_MS[trials]:.0f} wanted", end="")
    benchmark.extra_info |= {f"ms after {trials}": ms for trials, ms in found.items()}
    assert all(ms <= LIMITS_MS[trials] for trials, ms in found.items())


def gaps(model: str, trials: int) -> list[float]:
    """Milliseconds from the end of each trial to the beginning of the next."""
    from fake_machine import CUDA, answer, settings

    from autotune.measure.types import TrialRequest, TrialResult
    from autotune.search.loop import search

    now, began, ended = 0.0, list[float](), list[float]()

    def measure(request: TrialRequest, log: Path) -> TrialResult:
        nonlocal now
        began.append(time.perf_counter())
        if len(began) > trials + 5:
            now = 1e9  # the budget is over
        result = replace(answer(request), trial_seconds=1.0)
        ended.append(time.perf_counter())
        return result

    with tempfile.TemporaryDirectory() as directory:
        asked = settings(CUDA, model="" if model == "shapes" else model, budget="1000d")
        search(asked, Path(directory) / "run", CUDA, measure=measure, clock=lambda: now)
    return [1e3 * (begin - end) for end, begin in zip(ended, began[1:], strict=False)]


if __name__ == "__main__":
    found = gaps(sys.argv[1], int(sys.argv[2]))
    print(json.dumps({trials: statistics.median(found[trials - 5 : trials + 5]) for trials in LIMITS_MS}))

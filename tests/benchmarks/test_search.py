"""Time between two trials (proposal, memory model, study, files), and how many trials a good plan takes.

    scripts/bench -k between_trials
    scripts/bench -k proposals

For the time, a simulated machine answers at once, in a process of its own, as the command line starts one.
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
"""Milliseconds by the number of trials before."""


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


@pytest.mark.benchmark(group="search")
@pytest.mark.parametrize("words", [{}, {"memory_limit": "8GiB", "small": True}, {"model": ""}])
def test_proposals_beat_random_search_with_half_the_trials(benchmark, words: dict[str, object]) -> None:
    """Median of three seeds, over plans, over few plans in little memory, and over shapes."""
    from fake_machine import CUDA, settings
    from proposals import SMALL, Trials

    choices = {"choices": SMALL} if words.pop("small", False) else {}

    def compare() -> dict[str, float]:
        reached = dict[str, float]()
        for name, trials in NAMES.items():
            asked = [settings(CUDA, seed=seed, sampler=name, **choices, **words) for seed in range(3)]
            reached[name] = statistics.median(Trials(one).run(trials).best() for one in asked)
        return reached

    found = benchmark.pedantic(compare, rounds=1)
    print(found)
    benchmark.extra_info |= found
    assert found["additive"] > found["random"]


NAMES = {"additive": 10, "random": 20}
"""Trials by sampler."""


@pytest.mark.benchmark(group="search")
@pytest.mark.parametrize(
    "status", ["oom", "over_limit", "predicted_over_limit", "unsupported", "incorrect", "timeout", "crashed"]
)
def test_proposals_avoid_what_fails(benchmark, status: str) -> None:
    """A third of the space, the third that would be the fastest, fails."""
    from fake_machine import CUDA, settings
    from proposals import SMALL, Trials, formulas

    from autotune.measure.types import TrialResult

    asked = settings(CUDA, choices=SMALL)
    measure, failure = formulas(asked), TrialResult(status=status, phase="compile", trial_seconds=5.0)  # type: ignore[arg-type]
    trials = Trials(asked, lambda c: failure if c.plan.compile == "full" else measure(c))
    benchmark.pedantic(lambda: trials.run(25), rounds=1)
    failed = [record.result.status == status for record in trials.records]
    assert sum(failed) <= 6
    assert sum(failed[12:]) <= 1


@pytest.mark.benchmark(group="search")
@pytest.mark.parametrize("short_of_memory", [False, True])
def test_proposals_find_the_best_in_a_quarter_of_the_table_s_time(benchmark, short_of_memory: bool) -> None:
    from autotune.search.simulation import limited, peak_of_best, quartiles, read_tables, replay

    table = read_tables(Path(__file__).parents[2] / "results/reference/cpu-torch-2.13/trials.jsonl")[0]
    asked = limited(table, int(0.9 * peak_of_best(table))) if short_of_memory else table
    traces = benchmark.pedantic(lambda: [replay(asked, "additive", seed) for seed in range(9)], rounds=1)
    _, middle, _ = quartiles(traces, [0.25 * asked.seconds, 0.5 * asked.seconds])
    assert middle[0] <= 0.02
    assert middle[1] <= 0.01


if __name__ == "__main__":
    found = gaps(sys.argv[1], int(sys.argv[2]))
    print(json.dumps({trials: statistics.median(found[trials - 5 : trials + 5]) for trials in LIMITS_MS}))

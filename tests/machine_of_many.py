"""One of several machines that search together: a process with slots on formulas, and real time.

machine_of_many.py RUN_DIR URL SECONDS SLOTS [TRIAL_SECONDS [BEAT_SECONDS GRACE_SECONDS]]: searches or goes on in
RUN_DIR, with fast heartbeats unless others are given.
"""

import json
import sys
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

from autotune.search import storage

storage.BEAT_SECONDS, storage.GRACE_SECONDS = map(int, sys.argv[6:8] or (1, 8))

from fake_machine import CUDA, answer, settings  # noqa: E402

from autotune.config.search_settings import SearchSettings  # noqa: E402
from autotune.environment import Environment, Slot  # noqa: E402
from autotune.measure.types import TrialRequest, TrialResult  # noqa: E402
from autotune.search.loop import resume, search  # noqa: E402


def main(run_dir: Path, url: str, seconds: str, count: int, trial_seconds: float = 0.2) -> None:
    slots = tuple(Slot(device=f"cuda:{number}") for number in range(count))
    told = run_dir.with_suffix(".measured")  # what this machine has really measured, one candidate a line

    def measure(request: TrialRequest, log: Path) -> Generator[None, None, TrialResult]:
        end = time.monotonic() + trial_seconds * (0.5 + int(request.candidate.id[:2], 16) / 256)
        while time.monotonic() < end:
            yield
        with told.open("a") as file:
            file.write(("final:" if request.final else "") + request.candidate.id + "\n")
        return replace(answer(request), trial_seconds=trial_seconds)

    def here(asked: SearchSettings) -> tuple[Environment, tuple[Slot, ...]]:
        return CUDA, slots

    if (run_dir / "search.toml").exists():
        verdict = resume(run_dir, here, budget_seconds=float(seconds.removesuffix("s")), measure=measure)
    else:
        verdict = search(settings(budget=seconds, storage=url), run_dir, CUDA, measure=measure, slots=slots)
    winner = verdict.winner and verdict.winner.candidate.id
    print(json.dumps({"winner": winner, "status": verdict.status, "trials": verdict.trials}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), *map(float, sys.argv[5:6]))

"""A hundred SIGKILLs of searches: nothing lost, nothing left running, the budget kept.

scripts/bench -k kills
"""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

KILLS = 100
BUDGET, SLACK = 60.0, 5.0
CONFIG = """\
n_layer = 2
n_head = 2
n_embd = 64
block_size = 64
batch_size = 4
gradient_accumulation_steps = 2
compile = False
"""
MARK = "AUTOTUNE_KILL_BENCHMARK"


def start(folder: Path, words: tuple[str, ...]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "autotune", "search", *words]
    out = (folder / "out.txt").open("ab")
    return subprocess.Popen(command, cwd=folder, env={**os.environ, MARK: str(folder)}, stdout=out, stderr=out)


def left_running(folder: Path) -> list[int]:
    """Processes that a search of `folder` has started, directly or not."""
    wanted = f"{MARK}={folder}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # it has ended
            continue
    return found


def orphans(folder: Path) -> list[int]:
    """What is still there two seconds after a search has died."""
    deadline = time.monotonic() + 2.0
    while (found := left_running(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


@pytest.mark.benchmark(group="kills")
def test_a_hundred_kills_of_searches(benchmark: Any, tmp_path: Path) -> None:
    """Searches of a minute, each killed at random moments and resumed until its budget is used up: while Python
    loads, in a trial, while files are written."""
    chance, kills, spent, left = random.Random(0), 0, [], []

    def lives() -> None:
        nonlocal kills
        while kills < KILLS:
            folder = tmp_path / str(len(spent))
            folder.mkdir()
            (folder / "c.py").write_text(CONFIG)
            words: tuple[str, ...] = ("--from", "c.py", "--choices", "compile=off", "--budget", f"{BUDGET:.0f}s")
            words, seconds, code = (*words, "--name", "run"), 0.0, -signal.SIGKILL
            while code == -signal.SIGKILL and seconds < BUDGET:
                begun, process = time.monotonic(), start(folder, words)
                try:
                    code = process.wait(timeout=chance.uniform(0.0, 9.0))
                except subprocess.TimeoutExpired:
                    process.kill()
                    code, kills = process.wait(), kills + 1
                seconds += time.monotonic() - begun
                left.extend(orphans(folder))
                if (folder / "results/run/search.toml").exists():
                    words = ("--resume", "results/run")
            spent.append(seconds)
            check_run(folder / "results" / "run")

    benchmark.pedantic(lives, rounds=1)
    print(f"\n{kills} kills over {len(spent)} searches of {BUDGET:.0f} s; {len(left)} processes left running")
    print("seconds of all parts: " + ", ".join(f"{seconds:.1f}" for seconds in spent))
    benchmark.extra_info |= {"kills": kills, "seconds": spent, "left": len(left)}
    assert left == []
    assert max(spent) <= BUDGET + SLACK


def check_run(run: Path) -> None:
    """The table holds exactly what the study holds, each trial once."""
    subprocess.run([sys.executable, "-m", "autotune", "report", str(run)], check=False, stdout=subprocess.DEVNULL)
    rows = list(csv.DictReader((run / "trials.csv").open()))
    study = optuna.load_study(study_name="run", storage=f"sqlite:///{run / 'study.db'}")
    # the trial in flight at the last kill is in the table from the next start on
    kept = [trial for trial in study.trials if "request" in trial.user_attrs and trial.state.is_finished()]
    assert [int(row["trial"]) for row in rows] == sorted(trial.user_attrs["trial"] for trial in kept)
    assert len({row["trial"] for row in rows}) == len(rows)
    told = [trial.user_attrs["trial"] for trial in kept if trial.state == optuna.trial.TrialState.COMPLETE]
    assert sorted(told) == [int(row["trial"]) for row in rows if row["objective"]]

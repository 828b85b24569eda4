"""Tiny trainings, in this process and in one of their own."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from autotune.config.candidate import Candidate, Plan, Recipe
from autotune.config.toml import CandidateFile, format_candidate
from autotune.files import write_atomically
from autotune.train.settings import TrainSettings

PLAN = Plan(micro_batch_size=3, compile="off", dtype="float32")


def settings(recipe: Recipe, out: Path, plan: Plan = PLAN, **changes: object) -> TrainSettings:
    file = CandidateFile(candidate=Candidate(recipe=recipe, plan=plan))
    return replace(TrainSettings(file=file, out=out, device="cpu"), **changes)  # type: ignore[arg-type]


def start(
    recipe: Recipe, out: Path, plan: Plan = PLAN, flags: tuple[str, ...] = (), launcher: tuple[str, ...] = ()
) -> "subprocess.Popen[str]":
    """A training in a process of its own (or, by a launcher, in several); its recipe lies beside `out`."""
    toml = out.with_suffix(".toml")
    write_atomically(toml, format_candidate(CandidateFile(candidate=Candidate(recipe=recipe, plan=plan))))
    arguments = ["-m", "autotune", "train", str(toml), "--out", str(out), "--device", "cpu", *flags]
    command = [sys.executable, *launcher, *arguments]
    # as many threads as in this process, as sums depend on how they are split
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_rows(out: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(curve(out)) < count:
        assert time.monotonic() < deadline, f"no {count} rows in {out}"
        time.sleep(0.01)


def curve(out: Path) -> list[list[str]]:
    """What was learned, row for row as written: iteration, tokens, losses, lr, gradient norm."""
    log = out / "train_log.csv"
    lines = log.read_text().splitlines()[1:] if log.exists() else []
    return [line.split(",")[:6] for line in lines]

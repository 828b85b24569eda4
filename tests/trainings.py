"""Tiny trainings, in this process and in one of their own."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from background import begin

from autotune.config.candidate import TRAINING_PARTS, Candidate, Plan, Recipe
from autotune.config.toml import CandidateFile, format_candidate
from autotune.config.train_settings import TrainSettings
from autotune.files import write_atomically

PLAN = Plan(micro_batch_size=3, compile="off", dtype="float32")


def changed(candidate: Candidate, **values: object) -> Candidate:
    """The candidate with new values for fields of its recipe, evaluation, checkpointing and tracking."""
    for part in ("recipe", *TRAINING_PARTS):
        own = {name: values.pop(name) for name in vars(getattr(candidate, part)) if name in values}
        candidate = replace(candidate, **{part: replace(getattr(candidate, part), **own)})
    assert not values, values
    return candidate


def with_plan(given: Candidate | Recipe, plan: Plan) -> Candidate:
    return replace(given, plan=plan) if isinstance(given, Candidate) else Candidate(recipe=given, plan=plan)


def settings(given: Candidate | Recipe, out: Path, plan: Plan = PLAN, **changes: object) -> TrainSettings:
    file = CandidateFile(candidate=with_plan(given, plan))
    return replace(TrainSettings(file=file, out=out, device="cpu"), **changes)  # type: ignore[arg-type]


def start(
    given: Candidate | Recipe, out: Path, plan: Plan = PLAN, flags: tuple[str, ...] = (), launcher: tuple[str, ...] = ()
) -> "subprocess.Popen[str]":
    """A training in a process of its own (or, by a launcher, in several); its recipe lies beside `out`."""
    toml = out.with_suffix(".toml")
    write_atomically(toml, format_candidate(CandidateFile(candidate=with_plan(given, plan))))
    arguments = ["-m", "autotune", "train", str(toml), "--out", str(out), "--device", "cpu", *flags]
    command = [sys.executable, *launcher, *arguments]
    # as many threads as in this process, as sums depend on how they are split
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return begin(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


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

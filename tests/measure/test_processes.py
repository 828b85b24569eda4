"""Trials of several processes through torchrun: one result, of the first that failed, and no process left."""

import contextlib
import os
import re
import signal
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.measure.processes import first_to_end, result_file, together
from autotune.measure.runner import run_trial
from autotune.measure.types import MemoryView, TrialRequest, TrialResult

SHAPE = Shape(n_layer=2, n_head=2, n_embd=128, block_size=32, vocab_size=1024)
PLAN = Plan(micro_batch_size=2, compile="off", dtype="float32", processes=2)
OK = TrialResult(status="ok", phase="done", memory={"steady": MemoryView(allocated_bytes=5, device_bytes=9)})
LOST = TrialResult(status="crashed", phase="measure", message="RuntimeError: Connection closed by peer")
REPORT = """
Root Cause (first observed failure):
[0]:
  time      : 2026-11-26_04:54:42
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 19286)
"""


def request(plan: Plan = PLAN, **changes: object) -> TrialRequest:
    candidate = Candidate(recipe=Recipe(shape=SHAPE, global_batch_size=13, optimizer="muon"), plan=plan)
    asked = TrialRequest(
        candidate=candidate, device="cpu", result_path="", measure_seconds=1.0, timeout_seconds=120.0
    )
    return replace(asked, **changes)  # type: ignore[arg-type]


def test_the_fullest_process_counts() -> None:
    more = replace(OK, memory={"steady": MemoryView(allocated_bytes=7, device_bytes=8)})
    both = together([OK, more], None)
    assert (both.status, both.peak("allocated_bytes"), both.peak("device_bytes")) == ("ok", 7, 9)
    assert both.process_peak_bytes == (9, 8)


def test_the_reason_counts_and_not_what_follows_from_it() -> None:
    oom = TrialResult(status="oom", phase="compile", message="tried to allocate")
    assert together([LOST, oom], 0).message == "rank 1: tried to allocate"
    own = replace(LOST, message="ValueError: mine")
    assert together([LOST, own], 1).message == "rank 1: ValueError: mine"
    killed = TrialResult(status="crashed", phase="measure")
    assert together([LOST, killed], 1).message == ""  # torchrun's report says how it died
    assert together([OK, killed], None).status == "crashed"


def test_the_first_to_end_is_read_from_torchruns_report() -> None:
    assert first_to_end(REPORT) == (1, -9)
    assert first_to_end("no report") is None
    assert result_file(Path("a/result.json"), 2) == Path("a/result.2.json")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "optimizer", "full"])
def test_a_trial_of_two_processes(sharding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirteen sequences: one process has six, in three micro batches, the other seven, in four."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", None)  # what it has remembered
    plan = replace(PLAN, sharding=sharding, compile="block")  # type: ignore[arg-type]
    result = run_trial(request(plan, final=True), tmp_path / "log")
    assert (result.status, result.message) == ("ok", ""), (tmp_path / "log").read_text()[-3000:]
    assert set(result.memory) == {"first_step", "steady", "evaluation", "checkpoint"}
    assert len(result.process_peak_bytes) == 2
    assert {path.name.partition("_")[0] for path in scratch.iterdir()} <= {"torchinductor"}
    assert (result.tokens_per_second or 0) * (result.step_seconds_p50 or 0) == pytest.approx(13 * 32)


@pytest.mark.slow
def test_divided_state_takes_less(tmp_path: Path) -> None:
    peaks = {
        sharding: run_trial(request(replace(PLAN, sharding=sharding)), tmp_path / sharding).peak("allocated_bytes")  # type: ignore[arg-type]
        for sharding in ("none", "optimizer")
    }
    matrices = 12 * SHAPE.n_layer * SHAPE.n_embd**2
    state = 8 * SHAPE.parameters - 4 * matrices
    assert (peaks["none"] or 0) - (peaks["optimizer"] or 0) == pytest.approx(state / 2, rel=0.05)


def ranks(log: Path) -> list[int]:
    """Processes that torchrun has started for the trial that logs there."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            own = b"autotune.measure.child\x000\x00" in (folder / "cmdline").read_bytes()
            if own and (folder / "fd/1").resolve() == log.resolve() and "Z" not in state_of(folder):
                found.append(int(folder.name))
    return sorted(found)


def state_of(folder: Path) -> str:
    return (folder / "stat").read_text().rpartition(")")[2].split()[0]


def no_process_left(log: Path) -> None:
    deadline = time.monotonic() + 20
    while ranks(log):
        assert time.monotonic() < deadline, f"{ranks(log)} still run"
        time.sleep(0.05)


def measures(rank: int) -> bool:
    """Whether the trial of that process is being timed."""
    with contextlib.suppress(OSError):  # it has ended, or not begun
        request = Path(f"/proc/{rank}/cmdline").read_text().split("\0")[-2]
        return '"phase": "measure"' in Path(request).with_name("result.json").read_text()
    return False


@pytest.mark.slow
def test_a_killed_process_is_a_crash_that_names_it(tmp_path: Path) -> None:
    log, killed = tmp_path / "log", []

    def kill() -> None:
        deadline = time.monotonic() + 100
        while len(found := ranks(log)) < 2 or not measures(found[1]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(found[1], signal.SIGKILL)
        killed.append(found[1])

    killer = threading.Thread(target=kill)
    killer.start()
    result = run_trial(request(measure_seconds=60.0), log)
    killer.join()
    assert killed
    assert result.status == "crashed"
    assert re.search("rank [01] killed by SIGKILL in phase measure; see log|rank [01]: .*closed", result.message)
    no_process_left(log)


@pytest.mark.slow
def test_processes_that_hang_or_lack_memory_end_together(tmp_path: Path) -> None:
    log = tmp_path / "hangs"
    result = run_trial(request(measure_seconds=100.0, timeout_seconds=20.0), log)
    assert result.status == "timeout"
    no_process_left(log)
    log = tmp_path / "small"
    result = run_trial(request(memory_limit_bytes=100 << 20), log)
    assert result.status in ("oom", "over_limit")
    assert result.message.startswith("rank ")
    no_process_left(log)

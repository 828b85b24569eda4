"""Several slots in one process, on the simulated machine: cards, and parts of the cores."""

import csv
from collections import Counter
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_machine import CPU, CUDA, Beside, settings

from autotune.environment import Slot
from autotune.errors import InterruptedByUser, MachineError
from autotune.measure.types import TrialRequest, TrialResult
from autotune.runs.verdict import Verdict
from autotune.search import study as studies
from autotune.search.loop import search
from autotune.search.state import Event

CARDS = tuple(Slot(device=f"cuda:{number}") for number in range(3))


def go(run_dir: Path, machine: Beside, slots: tuple[Slot, ...] = CARDS, **more: object) -> Verdict:
    words = {"measure": machine.start, "clock": machine.clock, "pause": machine.pause, "slots": slots, **more}
    asked = settings(CPU if slots[0].device == "cpu" else CUDA, budget="60s")
    return search(asked, run_dir, CPU if slots[0].device == "cpu" else CUDA, **words)  # type: ignore[arg-type]


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_all_cards_are_busy_and_no_candidate_is_measured_twice(tmp_path: Path) -> None:
    alone, machine = Beside(), Beside()
    go(tmp_path / "alone", alone, CARDS[:1])
    verdict = go(tmp_path / "run", machine)
    assert verdict.confirmed
    assert machine.now <= 60
    assert Counter(request.device for request in machine.requests).keys() == {"cuda:0", "cuda:1", "cuda:2"}
    assert len(machine.requests) > 2.5 * len(alone.requests)
    searched = [request.candidate.id for request in machine.requests if not request.final]
    assert len(searched) == len(set(searched))
    assert [int(row["trial"]) for row in rows(tmp_path / "run")] == list(range(len(machine.requests)))
    assert (True, 3) in machine.together  # cards have memory of their own, so finals may run beside each other


def test_finals_run_alone_on_the_cpu(tmp_path: Path) -> None:
    machine = Beside()
    halves = (Slot(device="cpu"), replace(Slot(device="cpu"), cores=frozenset({0})))
    original = machine.start

    def start(request: TrialRequest, log: Path) -> Generator[None, None, TrialResult]:
        return (yield from original(replace(request, device=f"cpu {id(request)}"), log))

    machine.start = start  # type: ignore[method-assign]
    assert go(tmp_path / "run", machine, halves).confirmed
    assert {count for final, count in machine.together if final} == {1}
    assert {count for final, count in machine.together if not final} == {1, 2}


def test_a_card_that_fails_leaves_and_the_others_go_on(tmp_path: Path) -> None:
    machine = Beside()
    failed = list[str]()

    def start(request: TrialRequest, log: Path) -> Generator[None, None, TrialResult]:
        result = yield from machine.start(request, log)
        if request.device == "cuda:1" and not request.final:
            failed.append(request.candidate.id)
            return TrialResult(status="crashed", phase="build", trial_seconds=5.0, remedy="cuda:1 fell off the bus")
        return result

    verdict = go(tmp_path / "run", machine, measure=start)
    assert verdict.confirmed
    assert "cuda:1 left the search: cuda:1 fell off the bus" in verdict.notes
    assert len(failed) == 1  # it was asked once
    first = next(row for row in rows(tmp_path / "run") if row["candidate_id"] == failed[0])
    assert (first["status"], first["message"]) == ("interrupted", "cuda:1 fell off the bus")  # to be proposed again


def test_when_the_last_card_fails_the_search_ends(tmp_path: Path) -> None:
    machine = Beside()

    def start(request: TrialRequest, log: Path) -> Generator[None, None, TrialResult]:
        yield from machine.start(request, log)
        return TrialResult(status="crashed", phase="build", trial_seconds=5.0, remedy=f"{request.device} is gone")

    with pytest.raises(MachineError, match=r"cuda:. is gone"):
        go(tmp_path / "run", machine, measure=start)


def test_ctrl_c_stops_all_cards_and_keeps_what_was_measured(tmp_path: Path) -> None:
    machine = Beside()

    def notify(event: Event) -> None:
        if event.record is not None and event.device == "cuda:0" and event.trial > 5:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedByUser):
        go(tmp_path / "run", machine, notify=notify)
    assert machine.stopped == ["cuda:2"]
    found = rows(tmp_path / "run")
    assert [row["status"] for row in found].count("interrupted") == 1
    assert len(found) == len(machine.requests)  # the one of cuda:1, which ended at the same moment, is kept
    states = {trial.state.name for trial in studies.load_study(tmp_path / "run", None).trials}
    assert "RUNNING" not in states

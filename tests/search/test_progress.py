from pathlib import Path

import pytest
from fake_machine import CUDA, Machine, settings
from rich.console import Console

from autotune.search.loop import search
from autotune.search.progress import _picture, show_progress
from autotune.search.state import Event


def events(tmp_path: Path, **words: object) -> list[Event]:
    machine, seen = Machine(), list[Event]()
    asked = settings(budget="60s", **words)
    search(asked, tmp_path / "run", CUDA, measure=machine.measure, clock=machine.clock, notify=seen.append)
    return seen


def test_plain_lines_go_to_stderr_one_a_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = events(tmp_path)
    with show_progress(["the machine is busy"]) as notify:  # no terminal here
        assert capsys.readouterr().err == ""  # a search that cannot begin has one line only: its error
        for event in seen:
            notify(event)
    output = capsys.readouterr()
    assert output.out == ""
    first, *lines = output.err.splitlines()
    assert first == "warning: the machine is busy"
    assert len(lines) == sum(event.record is not None for event in seen)
    assert lines[0].startswith("[5.0s/1m00s] trial   0 baseline 373,217 tokens/s, 9.39 GiB: 12x12x768 block 1024")
    assert lines[0].endswith("<- best")


def test_the_live_picture_shows_budget_trial_and_best(tmp_path: Path) -> None:
    begin = [event for event in events(tmp_path, model="") if event.record is None][2]
    console = Console(width=200, record=True, force_terminal=False)
    console.print(_picture(0.0, begin, [(0.0, begin)]))
    text = console.export_text()
    assert "budget" in text
    assert "trial 2 search" in text
    assert "best so far: trial" in text

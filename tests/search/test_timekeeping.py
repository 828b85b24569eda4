"""Time is spent once: whatever kills a search, and however often, it does not come back."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake_machine
import pytest
from background import begin
from fake_machine import CUDA, Machine, settings

from autotune.config.search_settings import SearchSettings
from autotune.environment import Environment, Slot
from autotune.errors import ConfigError
from autotune.measure.types import TrialRequest, TrialResult
from autotune.runs import directory as files
from autotune.search import study as studies
from autotune.search.loop import resume, search
from autotune.search.timekeeping import Part


class Killed(BaseException):
    """The end of a process, as far as one can be had without one."""


def spent(run_dir: Path) -> float:
    return studies.spent_seconds(studies.load_study(run_dir, settings()))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))])
def test_kills_and_resumes_give_no_time_for_free(tmp_path: Path, seed: int) -> None:
    """Killed while it starts, during trials, between them: over all parts the clock shows the budget and no more."""
    rng, machine, run_dir = random.Random(seed), Machine(4.0), tmp_path / "run"
    dies_at = 0.0

    def passes(seconds: float) -> None:
        if machine.now + seconds >= dies_at:
            machine.now = dies_at
            raise Killed
        machine.now += seconds

    def measure(request: TrialRequest, log: Path) -> TrialResult:
        before = machine.now
        result = machine.measure(request, log)
        lasted, machine.now = machine.now - before, before
        passes(lasted)
        return result

    def here(asked: SearchSettings) -> tuple[Environment, tuple[Slot, ...]]:
        passes(3.0)  # loading torch
        return CUDA, (Slot(device=asked.device),)

    words: dict[str, Any] = {"measure": measure, "clock": machine.clock, "notify": lambda event: passes(0.25)}
    dies_at = 15.0
    with pytest.raises(Killed):
        search(settings(budget="100s"), run_dir, CUDA, **words)
    ended = False
    while not ended:
        dies_at = machine.now + rng.uniform(0.5, 30.0)
        with contextlib.suppress(Killed):
            with contextlib.suppress(ConfigError):  # the budget is used up
                resume(run_dir, here, **words)
            ended = True
    assert 90 < machine.now <= 105
    assert not list(run_dir.glob(".spent.*"))


def test_what_was_not_yet_in_the_study_is_added(tmp_path: Path) -> None:
    """Parts that ended before they could read the study come on top of it; of one that could, the later word counts."""
    for name, text in {"1.1": "20.0 15.5", "2.1": "- 3.0", "3.1": "- 2.0", "4.1": "", "5.1": "nonsense"}.items():
        (tmp_path / f".spent.{name}").write_text(text)
    with Part(tmp_path, time.monotonic()) as part:
        assert part.follows(tmp_path, 30.0) == 35.5 + 3.0 + 2.0
        assert len(list(tmp_path.glob(".spent.*"))) == 1
    assert not list(tmp_path.glob(".spent.*"))


def test_a_killed_process_leaves_word_of_the_time_it_took(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, str(Path(fake_machine.__file__)), str(run_dir), "search", "600s"]
    root = str(Path(fake_machine.__file__).parent.parent)
    began = time.monotonic()
    process = begin(command, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": root})
    while not (run_dir / "trials.csv").exists() or len((run_dir / "trials.csv").read_text().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGSTOP)  # no beat, no trial from here on
    lasted = time.monotonic() - began
    process.kill()
    process.wait()
    (word,) = run_dir.glob(".spent.*")
    before, part = map(float, word.read_text().split())
    assert before == 0.0
    assert part <= lasted
    (run_dir / ".trials.csv.999999999.tmp").write_text("torn")
    (run_dir / f".report.html.{os.getpid()}.tmp").write_text("being written")
    (run_dir / "logs" / ".standby.log").write_text("")
    machine = Machine()
    resume(run_dir, CUDA, budget_seconds=30.0, measure=machine.measure, clock=machine.clock)
    assert spent(run_dir) >= part + machine.now
    left = {path.name for path in [*run_dir.glob(".*"), *(run_dir / "logs").glob(".*")]}
    assert left == {".lock", f".report.html.{os.getpid()}.tmp"}


def test_time_is_written_before_a_trial_and_on_resume(tmp_path: Path) -> None:
    machine, seen = Machine(5.0), list[float]()

    def measure(request: TrialRequest, log: Path) -> TrialResult:
        seen.append(spent(tmp_path / "run") - machine.now)
        return machine.measure(request, log)

    search(settings(budget="40s"), tmp_path / "run", CUDA, measure=measure, clock=machine.clock)
    assert len(seen) >= 4
    assert seen == pytest.approx([0.0] * len(seen))
    machine.now = 500.0
    resume(tmp_path / "run", CUDA, budget_seconds=20.0, measure=machine.measure, clock=machine.clock, started=493.0)
    assert spent(tmp_path / "run") > 40 - 10 + 7


def test_another_search_of_the_run_changes_no_time(tmp_path: Path) -> None:
    machine = Machine()
    search(settings(budget="60s"), tmp_path / "run", CUDA, measure=machine.measure, clock=machine.clock)
    before = spent(tmp_path / "run")
    with files.locked(tmp_path / "run"), pytest.raises(ConfigError, match="is still running"):
        resume(tmp_path / "run", CUDA)
    assert spent(tmp_path / "run") == before


def test_a_process_knows_when_it_began() -> None:
    code = (
        "import sys, time; time.sleep(0.3); sys.path[:0] = sys.argv[1:]; "
        "from autotune.search.timekeeping import process_started; print(time.monotonic() - process_started())"
    )
    root = str(Path(fake_machine.__file__).parent.parent)
    before = time.monotonic()
    age = float(subprocess.check_output([sys.executable, "-c", code, root], text=True))
    assert 0.3 <= age <= time.monotonic() - before + 0.02  # the system counts in hundredths


def test_a_proposal_of_half_a_minute_does_not_overrun_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autotune.search import propose as module

    for seconds, trial in ((100.0, 4.0), (100.0, 12.0), (61.0, 1.0), (300.0, 7.0)):
        machine, fast = Machine(trial), module.Proposer.propose

        def slow(*words: object, machine: Machine = machine, fast: object = fast) -> object:
            machine.now += 30.0
            return fast(*words)  # type: ignore[operator]

        with monkeypatch.context() as patch:
            patch.setattr(module.Proposer, "propose", slow)
            asked = settings(budget=str(seconds))
            verdict = search(asked, tmp_path / f"{seconds}-{trial}", CUDA, measure=machine.measure, clock=machine.clock)
        assert machine.now <= seconds
        assert verdict.confirmed
        assert any(not request.final for request in machine.requests[1:])


def test_a_slow_study_takes_its_time_from_the_trial(tmp_path: Path) -> None:
    """A trial must end within the budget also where writing it down took long."""
    machine, late = Machine(5.0), list[float]()

    def notify(event: object) -> None:
        machine.now += 6.0  # stands for all that happens after the allowance was given

    def measure(request: TrialRequest, log: Path) -> TrialResult:
        late.append(machine.now + request.timeout_seconds)
        return machine.measure(request, log)

    asked = settings(budget="50s")
    search(asked, tmp_path / "run", CUDA, measure=measure, clock=machine.clock, notify=notify)
    assert max(late) <= 50


def test_the_file_says_what_was_before_and_what_came_on_top(tmp_path: Path) -> None:
    with Part(tmp_path, 0.0, lambda: 12.25) as part:
        assert part.follows(tmp_path, 1e6 + 0.5) == 1e6 + 0.5
        (file,) = tmp_path.glob(".spent.*")
        assert file.read_text().split() == ["1000000.500", "12.250"]


def test_a_directory_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    with Part(tmp_path / "missing", 0.0) as part:
        assert part.started == 0.0
    assert list(tmp_path.iterdir()) == []

"""What is advised follows from the work and from what was seen, and is never what has just failed."""

from dataclasses import replace
from pathlib import Path

import pytest
from fake_machine import CPU, CUDA, Machine, settings

from autotune.config.search_settings import SearchSettings
from autotune.environment import Environment
from autotune.errors import MachineError, NoFeasibleError
from autotune.measure.types import TrialRequest, TrialResult
from autotune.report.run import next_command, verdict_lines
from autotune.runs.read import load_run
from autotune.runs.verdict import read_verdict
from autotune.search.advice import enough_for, neat, trial_seconds
from autotune.search.loop import resume, search
from autotune.search.space import baseline
from autotune.units import parse_duration

SEEN = TrialResult(status="interrupted", phase="compile", trial_seconds=100.0)


def go(run_dir: Path, machine: Machine, asked: SearchSettings, environment: Environment = CUDA) -> None:
    search(asked, run_dir, environment, measure=machine.measure, clock=machine.clock)


def advised(run_dir: Path) -> str:
    """The budget of the command that the report names."""
    words = next_command(load_run(run_dir)).split()
    assert words[:4] == ["autotune", "search", "--resume", str(run_dir)]
    return words[-1]


def test_a_larger_model_and_a_slower_machine_take_longer() -> None:
    small, large = (baseline(settings(CPU, model=model)) for model in ("4x4x128", "12x12x768"))
    assert trial_seconds(large, CPU, None) > 4 * trial_seconds(small, CPU, None)
    assert trial_seconds(large, replace(CPU, cpu_count=16), None) < 0.5 * trial_seconds(large, CPU, None)
    assert trial_seconds(large, replace(CUDA, peak_flops=989e12), None) < trial_seconds(large, CUDA, None)


def test_what_was_seen_counts_more_than_a_guess() -> None:
    small = baseline(settings(CPU, model="4x4x128"))
    assert trial_seconds(small, CPU, replace(SEEN, trial_seconds=1000.0)) == 1500.0
    warm = replace(SEEN, phase="warmup", compile_seconds=40.0)
    slow = replace(warm, trial_seconds=200.0, compile_seconds=160.0)
    assert 100.0 < trial_seconds(small, CPU, warm) < trial_seconds(small, CPU, slow)


@pytest.mark.parametrize(
    ("seconds", "text"), [(1, "1m"), (61, "2m"), (1000, "20m"), (3601, "90m"), (86400, "1d"), (200_000, "3d")]
)
def test_durations_are_rounded_up_to_neat_ones(seconds: float, text: str) -> None:
    assert neat(seconds) == text
    assert parse_duration(text) >= seconds
    assert parse_duration(enough_for(seconds)) > seconds


@pytest.mark.parametrize("budget", ["10s", "20s", "5m", "10m", "3h"])
def test_a_budget_that_was_too_short_is_not_advised_again(tmp_path: Path, budget: str) -> None:
    machine, asked = Machine(5.0), settings(budget=budget, model="12x12x768")
    machine.hanging.add(baseline(asked).id)
    asked = replace(asked, choices={name: (str(getattr(asked.baseline, name)),) for name in vars(asked.baseline)})
    with pytest.raises(NoFeasibleError) as caught:
        go(tmp_path / "run", machine, asked)
    longer = advised(tmp_path / "run")
    assert parse_duration(longer) >= 1.5 * asked.budget_seconds
    assert f"--budget {longer}" in str(caught.value)
    assert str(tmp_path / "run") in str(caught.value)


def test_the_budget_that_is_advised_is_enough(tmp_path: Path) -> None:
    """A trial of 70 s, of which the first try saw 17: by what is advised, it is measured and confirmed."""
    machine = Machine(70.0)
    with pytest.raises(NoFeasibleError):
        go(tmp_path / "run", machine, settings(budget="20s"))
    seconds, began = parse_duration(advised(tmp_path / "run")), machine.now
    verdict = resume(tmp_path / "run", CUDA, budget_seconds=seconds, measure=machine.measure, clock=machine.clock)
    assert verdict.confirmed
    assert machine.now - began <= seconds


def test_nothing_is_kept_back_while_nothing_works(tmp_path: Path) -> None:
    """The only trial may use the whole budget."""
    machine = Machine(55.0)
    go(tmp_path / "run", machine, settings(budget="60s"))
    assert machine.requests[0].timeout_seconds == 57.0
    assert load_run(tmp_path / "run").verdict.winner is not None


def test_an_unconfirmed_finalist_names_the_budget_to_resume_with(tmp_path: Path) -> None:
    machine = Machine(50.0)
    go(tmp_path / "run", machine, settings(budget="60s"))
    (note,) = read_verdict(tmp_path / "run" / "verdict.json").notes
    assert note.startswith("trial 0 was not confirmed: that takes about")
    assert note.endswith("go on with --resume and --budget 2m")
    machine.now = 0.0
    verdict = resume(tmp_path / "run", CUDA, budget_seconds=120.0, measure=machine.measure, clock=machine.clock)
    assert verdict.confirmed


@pytest.mark.slow
def test_too_little_memory_is_answered_by_memory(tmp_path: Path) -> None:
    asked = settings(memory_limit="512MiB", budget="60s")
    with pytest.raises(NoFeasibleError, match=r"start a new search with --memory-limit \d+MiB or more"):
        go(tmp_path / "run", Machine(), asked)
    remedy = next_command(load_run(tmp_path / "run"))
    assert remedy.startswith("start a new search with --memory-limit")
    limit = remedy.split()[-3]
    go(tmp_path / "more", Machine(), settings(memory_limit=limit, budget="60s"))  # it is enough
    small = replace(CUDA, device_memory_bytes=600 << 20)
    with pytest.raises(NoFeasibleError, match="with a smaller model, Paper Card has too little memory"):
        go(tmp_path / "small", Machine(), asked, small)


def test_a_search_that_did_not_end_has_time_left(tmp_path: Path) -> None:
    machine = Machine(5.0)
    machine.hanging.add(baseline(settings()).id)
    with pytest.raises(NoFeasibleError):
        go(tmp_path / "run", machine, settings(budget="20s"))
    run = load_run(tmp_path / "run")
    assert run.verdict.ended
    killed = replace(run, verdict=replace(run.verdict, ended=False, budget_wanted=""))
    assert next_command(killed) == f"autotune search --resume {tmp_path / 'run'}"


def test_a_failure_of_the_machine_ends_the_search_with_its_remedy(tmp_path: Path) -> None:
    """Also where eager plans have worked: the first compiled one ends it."""
    machine = Machine(5.0)

    def measure(request: TrialRequest, log: Path) -> TrialResult:
        if request.candidate.plan.compile == "off":
            return machine.measure(request, log)
        machine.now += 5.0
        return TrialResult(status="unsupported", phase="compile", message="no g++", remedy="install g++, or go eager")

    for name, start, trials in (("compiled", "full", 1), ("eager", "off", 2)):
        asked = settings(budget="120s")
        asked = replace(asked, baseline=replace(asked.baseline, compile=start))  # type: ignore[arg-type]
        machine.now = 0.0
        with pytest.raises(MachineError, match=r"^install g\+\+, or go eager$") as caught:
            search(asked, tmp_path / name, CUDA, measure=measure, clock=machine.clock)
        assert caught.value.exit_code == 1
        run = load_run(tmp_path / name)
        assert len(run.rows) <= trials + 1
        assert machine.now <= 5.0 * (trials + 1)
        assert "install g++, or go eager" in run.verdict.notes
        assert (run.verdict.winner is None) == (name == "compiled")
        if name == "compiled":
            assert next_command(run) == "install g++, or go eager"


def test_whole_steps_that_do_not_fit_are_composed_and_labelled(tmp_path: Path) -> None:
    """A step of 171 micro steps takes minutes: six of them do not fit, a trial does."""
    machine = Machine(20.0)

    def measure(request: TrialRequest, log: Path) -> TrialResult:
        slow = machine.measure(request, log)
        return replace(slow, step_seconds_p50=300.0 if slow.status == "ok" else None)

    search(settings(budget="200s"), tmp_path / "run", CUDA, measure=measure, clock=machine.clock)
    finals = [request for request in machine.requests if request.final]
    assert finals
    assert all(not request.whole_steps for request in finals)
    run = load_run(tmp_path / "run")
    assert run.best is not None
    assert (run.best.measured["status"], run.best.measured["steps"]) == ("confirmed", "composed")
    assert any("confirmed by composed steps" in line for line in verdict_lines(run))
    (first, *_) = [row for row in run.rows.values() if row["role"] == "final"]
    assert "composed steps: whole ones of" in first["message"]
    assert machine.now <= 200
    machine.requests.clear()
    machine.now = 0.0
    go(tmp_path / "fast", machine, settings(budget="200s"))
    assert all(request.whole_steps for request in machine.requests if request.final)
    assert not any("composed" in line for line in verdict_lines(load_run(tmp_path / "fast")))

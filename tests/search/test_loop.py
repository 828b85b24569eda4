import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_machine
import pytest
from background import begin
from fake_machine import CPU, CUDA, Machine, answer, settings

from autotune import files
from autotune.config.candidate import Plan
from autotune.config.nanogpt import read_nanogpt
from autotune.config.search_settings import SearchSettings
from autotune.config.toml import CandidateFile, read_candidate
from autotune.environment import Environment
from autotune.errors import ConfigError, InterruptedByUser, NoFeasibleError
from autotune.measure.types import TrialRequest, TrialResult
from autotune.runs.records import COLUMNS
from autotune.runs.verdict import Verdict, read_verdict
from autotune.search import study as studies
from autotune.search.loop import rebuild, resume, search
from autotune.search.space import baseline, build_space, canonical, every_candidate
from autotune.search.state import Event


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "trials.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        found = list(reader)
        assert tuple(reader.fieldnames or ()) == COLUMNS
    return found


def read_all(run_dir: Path) -> CandidateFile:
    """Every file of a run, as a user of it would read it."""
    for row in rows(run_dir):
        assert row["status"]
    read_nanogpt(run_dir / "best_nanogpt.py", "cuda:0", (8, 0))
    return read_candidate(run_dir)


def go(
    run_dir: Path, machine: Machine, asked: SearchSettings | None = None, environment: Environment = CUDA, **more: Any
) -> Verdict:
    words = {"measure": machine.measure, "clock": machine.clock, **more}
    return search(asked or settings(), run_dir, environment, **words)


def go_on(run_dir: Path, machine: Machine, environment: Environment = CUDA, **more: Any) -> Verdict:
    return resume(run_dir, environment, measure=machine.measure, clock=machine.clock, **more)


def test_a_search_leaves_a_run(tmp_path: Path) -> None:
    run_dir, machine = tmp_path / "run", Machine()
    verdict = go(run_dir, machine)
    found = rows(run_dir)
    assert [int(row["trial"]) for row in found] == list(range(len(found)))
    assert len([row for row in found if row["status"] != "predicted_over_limit"]) == len(machine.requests)
    assert all(row["predicted_peak_bytes"] for row in found)
    assert (run_dir / "memory_model.json").exists()
    assert found[0]["role"] == "baseline"
    assert [row["role"] for row in found].count("final") >= 2
    assert {row["role"] for row in found[1:]} == {"search", "final"}
    best = read_all(run_dir)
    assert best.candidate.plan == verdict.winner.candidate.plan
    assert best.measured["trial"] == verdict.winner.trial
    assert best.measured["status"] == "confirmed"
    assert best.environment["fingerprint"] == CUDA.fingerprint
    names = {"search.toml", "environment.json", "study.db", "trials.csv", "best.toml", "best_nanogpt.py", "logs"}
    assert names <= {path.name for path in run_dir.iterdir()}


def test_the_budget_holds_and_is_used(tmp_path: Path) -> None:
    for seconds, trial_seconds in ((30.0, 5.0), (60.0, 9.0), (600.0, 47.0)):
        machine = Machine(trial_seconds)
        verdict = go(tmp_path / f"{seconds}", machine, settings(budget=str(seconds)))
        assert seconds - 2 * trial_seconds < machine.now <= seconds
        assert verdict.confirmed


def test_a_budget_for_two_trials_confirms_one(tmp_path: Path) -> None:
    machine = Machine(5.0)
    verdict = go(tmp_path / "run", machine, settings(budget="24s"))
    assert [request.final for request in machine.requests] == [False, True]
    assert verdict.confirmed


def test_what_could_not_be_done_is_said(tmp_path: Path) -> None:
    machine = Machine(10.0)
    verdict = go(tmp_path / "run", machine, settings(budget="18s"))
    assert not verdict.confirmed
    assert "trial 0 was not confirmed: that takes about" in verdict.notes[0]


def test_trials_in_flight_are_given_no_more_than_is_left(tmp_path: Path) -> None:
    machine = Machine(7.0)
    started: list[float] = []

    def measure(request: TrialRequest, log: Path) -> TrialResult:
        started.append(machine.now + request.timeout_seconds)
        return machine.measure(request, log)

    go(tmp_path / "run", machine, settings(budget="100s"), measure=measure)
    assert max(started) <= 100


def test_a_trial_that_the_budget_ends_is_interrupted_not_at_fault(tmp_path: Path) -> None:
    machine = Machine(5.0)
    machine.hanging.add(baseline(settings()).id)
    with pytest.raises(NoFeasibleError, match="too short for one trial"):
        go(tmp_path / "run", machine, settings(budget="20s"))
    assert [row["status"] for row in rows(tmp_path / "run")] == ["interrupted"]
    assert machine.now <= 20


def test_no_candidate_is_searched_twice(tmp_path: Path) -> None:
    machine = Machine()
    go(tmp_path / "run", machine, settings(budget="200s"))
    ids = [request.candidate.id for request in machine.requests if not request.final]
    assert len(ids) == len(set(ids)) > 20


def test_a_small_space_is_measured_as_a_whole(tmp_path: Path) -> None:
    asked = settings(CPU, model="2x2x64x64", budget="10m")
    asked = replace(asked, recipe=replace(asked.recipe, global_batch_size=1), baseline=Plan(micro_batch_size=1))
    machine = Machine(1.0)
    verdict = go(tmp_path / "run", machine, asked, environment=CPU)
    size = len(every_candidate(build_space(asked, CPU)))  # attention x loss x checkpointing x compile x dtype x ...
    assert verdict.notes == (f"all {size} candidates of the space were measured before the budget's end",)
    assert machine.now < 120  # of the 600 it had


def test_the_name_of_a_search_killed_at_its_start_is_free(tmp_path: Path) -> None:
    for file in ("study.db", ".lock", ".search.toml.123.tmp"):
        (tmp_path / "run" / "logs").mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / file).write_text("")
    beginning = files.locked(tmp_path / "run" / ".lock", AssertionError())
    with beginning, pytest.raises(ConfigError, match="is not empty"):
        go(tmp_path / "run", Machine())
    (tmp_path / "run" / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match="is not empty"):
        go(tmp_path / "run", Machine())
    (tmp_path / "run" / "mine.txt").unlink()
    assert go(tmp_path / "run", Machine()).confirmed


def test_a_failed_confirmation_falls_back(tmp_path: Path) -> None:
    # so few plans that all are known before the best fails, and nothing better can be found after it
    few = ("micro_batch_size=8,16", "attention=sdpa", "loss=full", "compile=off,full", "allocator=default")
    asked = settings(budget="240s", choices=few)
    best = go(tmp_path / "first", Machine(), asked).winner.candidate
    machine = Machine()
    machine.results["final:" + best.id] = TrialResult(status="crashed", phase="measure", message="boom")
    verdict = go(tmp_path / "second", machine, asked)
    assert verdict.confirmed
    assert verdict.winner.candidate.id != best.id
    assert verdict.fell_through


def test_a_disturbed_trial_is_measured_again_before_the_verdict(tmp_path: Path) -> None:
    choices = (
        "attention=sdpa", "loss=full", "activation_checkpointing=none,block", "allocator=default", "dtype=bfloat16",
    )  # fmt: skip
    asked = settings(budget="240s", choices=choices)
    undisturbed = go(tmp_path / "first", Machine(), asked)
    best, machine = undisturbed.winner.candidate, Machine()
    result = undisturbed.winner.result
    machine.results[best.id] = replace(result, tokens_per_second=0.6 * (result.tokens_per_second or 0.0))
    verdict = go(tmp_path / "second", machine, asked)
    assert verdict.winner.candidate == best
    assert verdict.confirmed


def test_the_guide_is_measured_where_shapes_are_searched(tmp_path: Path) -> None:
    machine = Machine()
    verdict = go(tmp_path / "run", machine, settings(model="", budget="60s"))
    assert [row["role"] for row in rows(tmp_path / "run")][:3] == ["baseline", "guide", "search"]
    best = read_all(tmp_path / "run")
    assert best.measured["predicted_loss"] == pytest.approx(verdict.winner.predicted_loss, abs=1e-3)
    # the schedule follows from a day at the measured speed
    day = best.measured["tokens_per_second"] * 86400
    assert best.candidate.recipe.max_tokens == pytest.approx(day, rel=0.01)


def test_a_users_own_schedule_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("batch_size = 8\ngradient_accumulation_steps = 4\nmax_iters = 1234\nlearning_rate = 7e-4\n")
    asked = settings(model="", from_file=file, budget="60s")
    machine = Machine()
    go(tmp_path / "run", machine, asked)
    assert machine.requests[0].candidate.plan.micro_batch_size == 8
    best = read_candidate(tmp_path / "run").candidate.recipe
    assert (best.max_iters, best.learning_rate, best.global_batch_size) == (1234, 7e-4, 32)


def test_nothing_that_fits_names_the_smallest_violation(tmp_path: Path) -> None:
    with pytest.raises(NoFeasibleError, match=r"the nearest was trial .* beyond the limit of 512\.0 MiB") as caught:
        go(tmp_path / "run", Machine(), settings(memory_limit="512MiB", budget="60s"))
    assert caught.value.exit_code == 3
    assert not (tmp_path / "run" / "best.toml").exists()
    assert {row["status"] for row in rows(tmp_path / "run")} <= {"oom", "interrupted", "predicted_over_limit"}


def test_nothing_that_runs_names_the_reason(tmp_path: Path) -> None:
    def crash(request: TrialRequest, log: Path) -> TrialResult:
        machine.now += 5
        return TrialResult(status="crashed", phase="compile", message="no compiler", trial_seconds=5.0)

    machine = Machine()
    with pytest.raises(NoFeasibleError, match=r"crashed, no compiler; see logs/trial-0000\.log"):
        go(tmp_path / "run", machine, settings(budget="30s"), measure=crash)


def test_ctrl_c_keeps_everything(tmp_path: Path) -> None:
    machine = Machine()

    def measure(request: TrialRequest, log: Path) -> TrialResult:
        if len(machine.requests) == 5:
            raise KeyboardInterrupt
        return machine.measure(request, log)

    with pytest.raises(InterruptedByUser, match="6 trials are kept, go on with `autotune search --resume"):
        go(tmp_path / "run", machine, measure=measure)
    assert [row["status"] for row in rows(tmp_path / "run")][-1] == "interrupted"
    read_all(tmp_path / "run")
    verdict = go_on(tmp_path / "run", machine)
    assert verdict.confirmed
    assert machine.now <= 120
    assert [int(row["trial"]) for row in rows(tmp_path / "run")] == list(range(len(rows(tmp_path / "run"))))


def test_resuming_uses_what_is_left_or_the_budget_that_is_given(tmp_path: Path) -> None:
    machine = Machine()
    go(tmp_path / "run", machine)
    machine.now = 1000.0
    before = len(machine.requests)
    with pytest.raises(ConfigError, match="give more time with --budget"):
        go_on(tmp_path / "run", machine, budget_seconds=0.0)
    go_on(tmp_path / "run", machine, budget_seconds=60.0)
    assert 1000 + 30 < machine.now <= 1060
    more = machine.requests[before:]
    assert len({r.candidate.id for r in machine.requests if not r.final}) == sum(not r.final for r in machine.requests)
    assert more


def test_the_clock_may_have_started_before_the_search(tmp_path: Path) -> None:
    machine = Machine(5.0)
    machine.now = 1020.0
    go(tmp_path / "run", machine, settings(budget="60s"), started=1000.0)
    assert 1045 < machine.now <= 1060


@pytest.mark.slow
def test_trials_are_told_below_which_speed_they_cannot_win(tmp_path: Path) -> None:
    for name, words in (("speed", {}), ("loss", {"model": ""}), ("tokens", {"model": "", "train_tokens": "1B"})):
        machine = Machine()
        asked = settings(budget="100s", **words)
        go(tmp_path / name, machine, asked)
        found = rows(tmp_path / name)
        told = [request for request in machine.requests if request.stop_below_tokens_per_second is not None]
        assert told
        assert all(not request.final and request.candidate != baseline(asked) for request in told)
        if name == "speed":
            before = [float(row["objective"] or 0) for row in found if row["role"] != "final"][: found.index(found[2])]
            assert told[1].stop_below_tokens_per_second == pytest.approx(0.7 * max(before), rel=1e-4)


def test_the_verdict_accounts_for_the_time_and_names_what_a_step_costs(tmp_path: Path) -> None:
    machine = Machine()
    verdict = go(tmp_path / "run", machine, settings(budget="200s"))
    told = read_verdict(tmp_path / "run" / "verdict.json")
    assert told == verdict
    assert (told.ended, told.confirmed) == (True, True)
    assert told.trials == len(machine.requests)
    assert told.overhead == pytest.approx(0.1 + 0.9 * told.seconds["idle"] / told.spent_seconds, abs=0.02)
    assert 0 <= told.seconds["idle"] < 5
    assert told.trials_per_hour == pytest.approx(3600 * told.trials / told.spent_seconds)
    assert sum(told.importance.values()) == pytest.approx(1.0)
    assert {neighbour.knob for neighbour in told.neighbours} <= set(told.importance)
    for neighbour in told.neighbours:
        assert neighbour.value != neighbour.winner


def test_another_machine_may_not_go_on(tmp_path: Path) -> None:
    machine = Machine()
    go(tmp_path / "run", machine)
    other = replace(CUDA, torch="2.11.0", device_name="Other Card")
    with pytest.raises(ConfigError, match=r"'Paper Card' there, 'Other Card' here, torch '2\.13\.0' there, '2\.11\.0'"):
        go_on(tmp_path / "run", machine, other, budget_seconds=60.0)
    go_on(tmp_path / "run", machine, other, budget_seconds=60.0, same_machine=False)


def test_other_threads_are_another_machine(tmp_path: Path) -> None:
    machine, here = Machine(), replace(CUDA, threads=2, variables={"OMP_NUM_THREADS": "2", "MKL_CBWR": "AVX2"})
    search(settings(), tmp_path / "run", here, measure=machine.measure, clock=machine.clock)
    other = replace(here, threads=1, variables={"MKL_CBWR": "AVX2"})
    with pytest.raises(ConfigError, match=r"threads 2 there, 1 here, OMP_NUM_THREADS '2' there, not set here\)"):
        go_on(tmp_path / "run", machine, other, budget_seconds=60.0)
    go_on(tmp_path / "run", machine, here, budget_seconds=60.0)


def test_an_older_run_is_refused_in_one_line(tmp_path: Path) -> None:
    machine, run_dir = Machine(), tmp_path / "run"
    go(run_dir, machine)
    file = run_dir / "environment.json"
    new = ("threads", "cores", "cpu_quota", "power_limit_watts", "variables")
    file.write_text(
        json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in new} | {"fingerprint": "x"})
    )
    with pytest.raises(ConfigError, match=r"threads, cores, .*variables not recorded there.*--other-machine") as caught:
        go_on(run_dir, machine, budget_seconds=60.0)
    assert "\n" not in str(caught.value)
    go_on(run_dir, machine, budget_seconds=60.0, same_machine=False)


def test_remarks_are_among_the_notes_also_of_what_goes_on(tmp_path: Path) -> None:
    machine, run_dir = Machine(), tmp_path / "run"
    first = search(
        settings(), run_dir, CUDA, measure=machine.measure, clock=machine.clock, remarks=("the machine is busy",)
    )
    assert first.notes[0] == "the machine is busy"
    again = go_on(run_dir, machine, budget_seconds=60.0, remarks=("the machine is busy", "and again"))
    assert again.notes[:2] == ("the machine is busy", "and again")
    assert rebuild(run_dir).notes[:2] == again.notes[:2]


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    machine = Machine()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        go(tmp_path / "full", machine)
    with pytest.raises(ConfigError, match="cannot be made"):
        go(tmp_path / "full" / "thesis.txt" / "run", machine)
    with pytest.raises(ConfigError, match="cannot be opened"):
        go(tmp_path / "new", machine, replace(settings(), storage="nonsense"))
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="does not exist"):
        resume(tmp_path / "new", CUDA)


def test_a_run_can_be_rebuilt_from_its_study(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    go(run_dir, Machine())
    names = ("search.toml", "environment.json", "trials.csv", "best.toml", "best_nanogpt.py", "verdict.json")
    before = {name: (run_dir / name).read_text() for name in names}
    for name in names:
        (run_dir / name).unlink()
    rebuild(run_dir)
    assert {name: (run_dir / name).read_text() for name in names} == before
    with pytest.raises(ConfigError, match=r"has no study\.db"):
        rebuild(tmp_path)


def test_a_storage_of_the_users_own(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/all.db"
    asked = replace(settings(budget="60s"), storage=url)
    go(tmp_path / "one", Machine(), asked)
    assert not (tmp_path / "one" / "study.db").exists()
    with pytest.raises(ConfigError, match="has a study 'paper' already"):
        go(tmp_path / "two", Machine(), asked)
    (tmp_path / "one" / "trials.csv").unlink()
    rebuild(tmp_path / "one")
    assert rows(tmp_path / "one")


def test_the_same_seed_gives_the_same_sequence(tmp_path: Path) -> None:
    machines = [Machine(6.0), Machine(6.0)]
    for index, machine in enumerate(machines):
        go(tmp_path / str(index), machine)
    one, two = ([request.candidate.id for request in machine.requests] for machine in machines)
    assert one == two


def test_events_tell_the_story(tmp_path: Path) -> None:
    machine, events = Machine(), list[Event]()
    go(tmp_path / "run", machine, settings(budget="40s"), notify=events.append)
    assert [event.record is None for event in events] == [True, False] * len(machine.requests)
    assert events[0].verdict.winner is None
    assert events[1].verdict.winner is not None
    assert events[-1].verdict.winner is not None


def test_the_baseline_is_measured_as_it_stands(tmp_path: Path) -> None:
    machine = Machine()
    asked = settings(budget="50s")
    asked = replace(asked, baseline=replace(asked.baseline, micro_batch_size=48))
    go(tmp_path / "run", machine, asked)
    assert machine.requests[0].candidate == baseline(asked)
    first = baseline(asked)
    assert first != canonical(first)  # 11 micro steps of 47 sequences do what 11 of 48 do
    others = [request.candidate for request in machine.requests if request.candidate != first]
    assert all(candidate == canonical(candidate) for candidate in others)


SCRIPT = Path(fake_machine.__file__)


def launch(run_dir: Path, verb: str, seconds: str) -> subprocess.Popen[str]:
    root = str(SCRIPT.parent.parent)
    command = [sys.executable, str(SCRIPT), str(run_dir), verb, seconds]
    return begin(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root})


@pytest.mark.slow
def test_a_search_killed_at_any_moment_can_be_read_and_resumed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = launch(run_dir, "search", "60s")
    for number in range(3):
        deadline = time.monotonic() + 30
        wanted = 6 * (number + 1)
        while time.monotonic() < deadline and not ((run_dir / "trials.csv").exists() and len(rows(run_dir)) >= wanted):
            time.sleep(0.013)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(rows(run_dir)) >= wanted
        read_all(run_dir)
        process = launch(run_dir, "resume", "4" if number == 2 else "60")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    said = json.loads(output)
    assert said["torch"] is False
    found = rows(run_dir)
    assert read_all(run_dir).measured["trial"] == said["winner"]
    assert [int(row["trial"]) for row in found] == list(range(len(found)))
    searched = [row["candidate_id"] for row in found if row["role"] == "search" and row["status"] != "interrupted"]
    assert len(searched) == len(set(searched))
    states = {trial.state.name for trial in studies.load_study(run_dir, settings()).trials}
    assert "RUNNING" not in states


def test_only_one_search_at_a_time(tmp_path: Path) -> None:
    def measure(request: TrialRequest, log: Path) -> TrialResult:
        with pytest.raises(ConfigError, match="is still running"):
            resume(tmp_path / "run", CUDA)
        machine.now += 50
        return replace(answer(request), trial_seconds=50.0)

    machine = Machine()
    go(tmp_path / "run", machine, settings(budget="60s"), measure=measure)


def test_the_cpus_space_works_too(tmp_path: Path) -> None:
    machine = Machine()
    verdict = go(tmp_path / "run", machine, settings(CPU, model="", budget="60s"), environment=CPU)
    assert verdict.confirmed
    assert read_candidate(tmp_path / "run").candidate.recipe.tokens_per_step == 4096


@pytest.mark.parametrize(("attribute", "key"), [("settings", "name"), ("environment", "device_name")])
def test_a_foreign_study_brings_no_code_in(tmp_path: Path, attribute: str, key: str) -> None:
    """What `rebuild` writes is executed by nanoGPT."""
    machine = Machine()
    search(settings(budget="60s"), tmp_path / "run", CUDA, measure=machine.measure, clock=machine.clock)
    study = studies.load_study(tmp_path / "run", None)
    study.set_user_attr(attribute, {**study.user_attrs[attribute], key: "x\nopen('trace', 'w')\n"})
    (tmp_path / "run" / "search.toml").unlink()
    before = (tmp_path / "run" / "best_nanogpt.py").read_text()
    with pytest.raises(ConfigError, match=f"{key} = .* holds a control character"):
        rebuild(tmp_path / "run")
    assert (tmp_path / "run" / "best_nanogpt.py").read_text() == before


def test_a_search_that_cannot_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("autotune.runs.directory.write_inputs", full)
    with pytest.raises(OSError, match="No space left"):
        search(settings(), tmp_path / "results" / "deep" / "run", CUDA, measure=Machine().measure)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "results" / "other").mkdir(parents=True)
    with pytest.raises(OSError, match="No space left"):
        search(settings(), tmp_path / "results" / "run", CUDA, measure=Machine().measure)
    assert list((tmp_path / "results").iterdir()) == [tmp_path / "results" / "other"]

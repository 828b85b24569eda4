"""Several machines in one study of a real PostgreSQL server: processes that share nothing but the database."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import optuna
import postgres
import pytest
from background import begin
from fake_machine import CUDA, Machine, settings

from autotune import cli
from autotune.config.storage import PASSWORD_VARIABLE
from autotune.errors import AutotuneError, ConfigError
from autotune.measure.types import TrialRequest, TrialResult
from autotune.search import shared, storage, study_trials, tables
from autotune.search import study as studies
from autotune.search.loop import rebuild, resume, search

pytestmark = pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing())
TESTS = Path(__file__).parents[1]
AWAY = "the study's server is away; what is measured is kept"


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    with postgres.running() as server:
        yield server


@pytest.fixture
def url(server: postgres.Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of the server, whose studies are gone afterwards."""
    monkeypatch.setenv(PASSWORD_VARIABLE, postgres.PASSWORD)
    yield server.url()
    for name in optuna.get_all_study_names(opened := server.url(password=True)):
        optuna.delete_study(study_name=name, storage=opened)


def machine(folder: Path, name: str, url: str, seconds: int, slots: int) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "machine_of_many.py"), str(folder / name), url, f"{seconds}s", str(slots)]
    log = (folder / f"{name}.err").open("a")
    return begin(command, stdout=subprocess.PIPE, stderr=log, env=environment)


def notes_of(folder: Path) -> str:
    return "".join(file.read_text() for file in folder.glob("*.err"))


def study_of(url: str) -> optuna.Study:
    full = url.replace("postgres@", f"postgres:{postgres.PASSWORD.replace('/', '%2F').replace('@', '%40')}@")
    return optuna.load_study(study_name="paper", storage=full)


def check(folder: Path, url: str, *, killed: int = 0) -> list[optuna.trial.FrozenTrial]:
    """No candidate twice, no trial lost: what a machine has measured is in the study once, except what it was telling
    when it was killed. Returns the trials."""
    trials = [trial for trial in study_of(url).trials if "request" in trial.user_attrs]
    assert not [trial for trial in trials if not trial.state.is_finished()]
    told = Counter(
        ("final:" if trial.user_attrs["role"] == "final" else "") + trial.user_attrs["candidate_id"]
        for trial in trials
        if "record" in trial.user_attrs and json.loads(trial.user_attrs["record"])["result"]["status"] == "ok"
    )
    measured = Counter(line for file in folder.glob("*.measured") for line in file.read_text().split())
    assert not {name: count for name, count in told.items() if count > 1 and not name.startswith("final:")}
    lost = {name for name in measured - told if "predicted" not in name}
    oom = {t.user_attrs["candidate_id"] for t in trials if t.user_attrs.get("status") not in (None, "ok")}
    assert len(lost - oom) <= killed
    return trials


@pytest.mark.slow
@pytest.mark.parametrize("machines", [2, 4])
def test_machines_search_together_though_one_is_killed_and_the_server_restarts(
    tmp_path: Path, server: postgres.Server, url: str, machines: int
) -> None:
    running = [machine(tmp_path, f"m{number}", url, 60, 2) for number in range(machines)]
    deadline = time.monotonic() + 180
    while not all((tmp_path / f"m{number}.measured").exists() for number in range(machines)):
        assert time.monotonic() < deadline, [file.read_text() for file in tmp_path.glob("*.err")]
        time.sleep(0.1)
    running[0].kill()
    running[0].wait()
    time.sleep(1.0)
    server.stop()
    while AWAY not in notes_of(tmp_path):
        assert time.monotonic() < deadline, notes_of(tmp_path)
        time.sleep(0.1)
    server.start()
    verdicts = [json.loads(process.communicate()[0]) for process in running[1:]]
    assert {verdict["status"] for verdict in verdicts} == {"confirmed"}
    back = json.loads(machine(tmp_path, "m0", url, 40, 2).communicate()[0])  # and its machine comes back
    assert back["status"] == "confirmed"
    trials = check(tmp_path, url, killed=2)
    given_back = [trial for trial in trials if trial.state.name == "FAIL" and trial.user_attrs["role"] != "withdrawn"]
    assert len(given_back) <= 2  # what the killed one measured
    with (tmp_path / "m0" / "trials.csv").open(newline="") as file:
        numbers = [int(row["trial"]) for row in csv.DictReader(file)]
    withdrawn = [trial for trial in trials if trial.user_attrs["role"] == "withdrawn"]
    assert len(numbers) == len(set(numbers)) == len(trials) - len(withdrawn)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"s3cr3t" not in path.read_bytes(), path


def go(run_dir: Path, url: str, **words: object) -> None:
    asked = settings(budget="40s", storage=url, **words)
    simulated = Machine()
    search(asked, run_dir, CUDA, measure=simulated.measure, clock=simulated.clock)


def test_a_second_machine_knows_what_the_first_has_measured(tmp_path: Path, url: str) -> None:
    go(tmp_path / "a", url)
    go(tmp_path / "b", url)
    records = study_trials.records(study_of(url))
    searched = [record.candidate.id for record in records if record.role not in ("final", "race")]
    assert len(searched) == len(set(searched)) > 6
    assert (tmp_path / "b" / "search.toml").read_text().count("joined = true") == 1
    assert rebuild(tmp_path / "b").trials == rebuild(tmp_path / "a").trials == len(records)
    fingerprints = {trial.user_attrs["environment"] for trial in study_of(url).trials}
    assert fingerprints == {CUDA.alike.fingerprint}


def test_who_may_not_join_is_told_why(tmp_path: Path, url: str) -> None:
    go(tmp_path / "a", url)
    with pytest.raises(ConfigError, match=r"'paper' is another search \(recipe\.shape\.n_embd 768 there, 384 here\)"):
        go(tmp_path / "b", url, model="12x12x384")
    with pytest.raises(ConfigError, match=r"another search \(objective 'throughput' there, 'loss' here"):
        go(tmp_path / "b", url, model="")
    asked, simulated = settings(budget="40s", storage=url), Machine()
    words = {"measure": simulated.measure, "clock": simulated.clock}
    other = replace(CUDA, torch="2.11.0")
    with pytest.raises(ConfigError, match=r"on another machine \(torch '2\.13\.0' there, '2\.11\.0' here\)"):
        search(asked, tmp_path / "b", other, **words)  # type: ignore[arg-type]
    assert not (tmp_path / "b").exists()
    assert search(asked, tmp_path / "b", other, same_machine=False, **words).confirmed  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"holds other tokens \(x\) than those"):
        shared.refuse_to_join(study_of(url), asked, CUDA, "x", same_machine=True)
    study_of(url).set_user_attr("autotune", 1)
    with pytest.raises(ConfigError, match="'paper' was written by another version of autotune"):
        go(tmp_path / "c", url)


def test_of_two_that_begin_with_one_candidate_the_lower_number_stays(tmp_path: Path, url: str) -> None:
    """While the first proposes, another machine begins with every candidate that it could take."""
    taken = list[str]()
    claim = study_trials.claim

    def too_late(study: optuna.Study, parameters, kinds, attributes):  # type: ignore[no-untyped-def]
        if len(taken) < 3 and attributes["role"] == "search":
            taken.append(attributes["candidate_id"])
            claim(study, parameters, kinds, attributes)
        return claim(study, parameters, kinds, attributes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_trials, "claim", too_late)
        go(tmp_path / "a", url)
    trials = [trial for trial in study_of(url).trials if trial.user_attrs.get("candidate_id") in taken]
    assert len(taken) == len(set(taken)) == 3
    assert Counter((trial.user_attrs["role"], trial.state.name) for trial in trials) == {
        ("search", "RUNNING"): 3, ("withdrawn", "FAIL"): 3,
    }  # fmt: skip


def test_a_trial_that_was_given_away_is_told_under_another_number(tmp_path: Path, url: str) -> None:
    """A machine that had seemed dead: its trial has ended as interrupted while it still ran."""
    simulated, given = Machine(), list[int]()

    def measure(request: TrialRequest, log: Path) -> TrialResult:
        if len(simulated.requests) == 2:
            study = study_of(url)
            given.append(study.trials[-1].number)
            study.tell(given[0], state=optuna.trial.TrialState.FAIL)
        return simulated.measure(request, log)

    asked = settings(budget="40s", storage=url)
    assert search(asked, tmp_path / "a", CUDA, measure=measure, clock=simulated.clock).confirmed
    trials = study_of(url).trials
    late = [t for t in trials if t.user_attrs["candidate_id"] == trials[given[0]].user_attrs["candidate_id"]]
    assert [trial.state.name for trial in late][:2] == ["FAIL", "COMPLETE"]
    assert len(study_trials.records(study_of(url))) == len(trials)


def test_the_dead_ones_trial_is_given_back(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose heartbeats end, and one that died before its first."""
    monkeypatch.setattr(storage, "GRACE_SECONDS", 1)
    monkeypatch.setattr(shared, "BEAT_SECONDS", 1)
    monkeypatch.setattr(shared, "GRACE_SECONDS", 8)
    go(tmp_path / "a", url)
    study = studies.load_study(tmp_path / "a", settings(storage=url))
    told = {"role": "search", "candidate_id": "x", "request": study.trials[0].user_attrs["request"]}
    with_beat = study_trials.claim(study, {}, {}, told).number
    running = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, user_attrs=told)
    _, without = tables.insert(study, running, beats=False)
    seconds = iter(range(0, 120, 3))
    peers = shared.Peers(study, clock=lambda: float(next(seconds)))
    peers.read()
    time.sleep(3.0)
    for _ in range(8):
        peers.beat([])
    new, running = peers.read()
    assert running == []
    assert [record.result.status for record in new if record.trial in (with_beat, without)] == ["interrupted"] * 2


@pytest.mark.slow
def test_a_server_that_does_not_come_back_ends_the_search_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Everything that was measured is in the run's directory, and told when the server is there again."""
    monkeypatch.setenv(PASSWORD_VARIABLE, postgres.PASSWORD)
    monkeypatch.setattr(storage, "within", lambda budget: storage.Patience(lambda: 2.0))
    with postgres.running() as own:
        simulated = Machine()

        def measure(request: TrialRequest, log: Path) -> TrialResult:
            if len(simulated.requests) == 2:
                own.stop(signal.SIGQUIT)
            return simulated.measure(request, log)

        asked = settings(budget="60s", storage=own.url())
        with pytest.raises(AutotuneError, match=r"the study cannot be read .*; what was measured is kept") as caught:
            search(asked, tmp_path / "a", CUDA, measure=measure, clock=simulated.clock)
        assert "\n" not in str(caught.value)
        assert len(json.loads((tmp_path / "a" / study_trials.PENDING).read_text())["records"]) == 1
        own.start()
        assert resume(tmp_path / "a", CUDA, measure=simulated.measure, clock=simulated.clock).confirmed
        assert [r.result.status for r in study_trials.records(study_of(own.url()))][:3] == ["ok"] * 3
        assert not (tmp_path / "a" / study_trials.PENDING).exists()
        own.stop()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("autotune.environment.probe", lambda device: CUDA)
        monkeypatch.setattr(storage, "FIRST_PATIENCE_SECONDS", 0.5)
        assert cli.run(["search", "--model", "12x12x768", "--storage", own.url(), "--name", "x"]) == 1
        said = capfd.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: --storage 'postgresql+psycopg://postgres@127.0.0.1")
        assert "cannot be opened" in said
        assert "s3cr3t" not in said


def test_the_same_command_goes_on_after_a_kill_and_leaves_others_alone(tmp_path: Path, url: str) -> None:
    from autotune.runs.directory import locked, own_directory

    asked = settings(budget="40s", storage=url)
    assert own_directory(tmp_path, asked) == (tmp_path / "paper", False)
    go(tmp_path / "paper", url)
    assert own_directory(tmp_path, asked) == (tmp_path / "paper", True)
    with locked(tmp_path / "paper"):  # another process of this search, on the same file system
        assert own_directory(tmp_path, asked) == (tmp_path / "paper-2", False)
    with pytest.raises(ConfigError, match=r"is another search \(seed 0 there, 7 here\)"):
        own_directory(tmp_path, replace(asked, seed=7))

"""Other programs at the study's database, and passwords in its URL."""

import csv
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import optuna
import pytest
from background import begin
from fake_machine import CUDA, Machine, settings

from autotune import cli
from autotune.config.search_settings import SearchSettings, read_settings
from autotune.config.storage import secrets_in, without_password
from autotune.config.toml import read_candidate
from autotune.errors import AutotuneError, ConfigError
from autotune.measure.types import TrialRequest, TrialResult
from autotune.runs.verdict import Verdict
from autotune.search import storage, study_trials
from autotune.search import study as studies
from autotune.search.loop import rebuild, resume, search

HOLD = """
import sqlite3, sys
other = sqlite3.connect(sys.argv[1], isolation_level=None)
other.execute(sys.argv[2])
other.execute("SELECT count(*) FROM trials").fetchall()
print("held", flush=True)
sys.stdin.read()
"""


class Holder:
    """Another program that keeps a transaction open until it is let go."""

    def __init__(self, database: Path, how: str) -> None:
        command = [sys.executable, "-c", HOLD, str(database), how]
        self.process = begin(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def let_go(self) -> None:
        self.process.communicate()


def go(run_dir: Path, machine: Machine, asked: SearchSettings | None = None, **more: object) -> Verdict:
    words = {"measure": machine.measure, "clock": machine.clock, **more}
    return search(asked or settings(budget="60s"), run_dir, CUDA, **words)  # type: ignore[arg-type]


def trials(run_dir: Path) -> list[int]:
    with (run_dir / "trials.csv").open(newline="") as file:
        return [int(row["trial"]) for row in csv.DictReader(file)]


def test_a_reader_does_not_hold_the_search_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read transaction that outlasts all patience, as a database browser leaves it open."""
    monkeypatch.setattr(storage, "within", lambda budget: lambda: 0.0)
    machine, holders = Machine(), list[Holder]()

    def measure(request: TrialRequest, log: Path) -> TrialResult:
        if len(machine.requests) == 2:
            holders.append(Holder(tmp_path / "run" / "study.db", "BEGIN"))
        return machine.measure(request, log)

    verdict = go(tmp_path / "run", machine, measure=measure)
    holders[0].let_go()
    assert verdict.confirmed
    assert len(study_trials.records(studies.load_study(tmp_path / "run", None))) == len(trials(tmp_path / "run")) > 5


@pytest.mark.parametrize("begin", ["BEGIN EXCLUSIVE", "BEGIN IMMEDIATE"])
def test_a_lock_is_waited_for(tmp_path: Path, begin: str) -> None:
    machine = Machine()

    def measure(request: TrialRequest, log: Path) -> TrialResult:
        if len(machine.requests) == 2:
            holder = Holder(tmp_path / "run" / "study.db", begin)
            threading.Timer(0.5, holder.let_go).start()
        return machine.measure(request, log)

    assert go(tmp_path / "run", machine, measure=measure).confirmed
    assert len(machine.requests) == len(trials(tmp_path / "run")) > 5


def test_a_lock_that_stays_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, machine, holders = tmp_path / "run", Machine(), list[Holder]()

    def measure(request: TrialRequest, log: Path) -> TrialResult:
        if len(machine.requests) == 2:
            holders.append(Holder(run_dir / "study.db", "BEGIN EXCLUSIVE"))
        return machine.measure(request, log)

    monkeypatch.setattr(storage, "within", lambda budget: lambda: 0.2)
    with pytest.raises(AutotuneError, match=r"database is locked; what was measured is kept, .* --resume") as caught:
        go(run_dir, machine, measure=measure)
    assert "\n" not in str(caught.value)
    assert (run_dir / study_trials.PENDING).exists()
    holders[0].let_go()
    assert len(machine.requests) == 3

    resume(run_dir, CUDA, measure=machine.measure, clock=machine.clock)
    assert not (run_dir / study_trials.PENDING).exists()
    found = study_trials.records(studies.load_study(run_dir, None))
    assert [record.trial for record in found] == trials(run_dir)
    assert found[2].result.status == "ok"  # the one that the study had not been told
    searched = [request.candidate.id for request in machine.requests if not request.final]
    assert len(searched) == len(set(searched))  # nothing was measured again


@pytest.mark.slow
def test_a_search_that_meets_a_lock_between_trials_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, machine, holders = tmp_path / "run", Machine(), list[Holder]()

    def notify(event: object) -> None:
        if len(machine.requests) == 2 and not holders:
            holders.append(Holder(run_dir / "study.db", "BEGIN IMMEDIATE"))

    monkeypatch.setattr(storage, "within", lambda budget: lambda: 0.2)
    with pytest.raises(AutotuneError, match="database is locked"):
        go(run_dir, machine, notify=notify)
    holders[0].let_go()
    assert resume(run_dir, CUDA, measure=machine.measure, clock=machine.clock).confirmed
    assert trials(run_dir) == list(range(len(trials(run_dir))))


def test_a_damaged_record_beside_the_study_is_one_line(tmp_path: Path) -> None:
    go(tmp_path / "run", Machine())
    for content in ("", "[]", "{}", '{"records": [5]}', "\0", "[" * 100_000):
        (tmp_path / "run" / study_trials.PENDING).write_text(content)
        with pytest.raises(ConfigError, match=r"pending_records\.json") as caught:
            resume(tmp_path / "run", CUDA, budget_seconds=9.0)
        assert len(str(caught.value)) < 400


def test_the_log_is_used_where_it_works(tmp_path: Path) -> None:
    go(tmp_path / "run", Machine())
    with closing(sqlite3.connect(tmp_path / "run" / "study.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_network_file_systems_are_told_from_local_ones(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "40 22 0:40 / /home rw,relatime shared:9 - nfs4 server:/home rw\n"
        "41 40 8:2 / /home/me/local\\040disk rw - xfs /dev/sdb rw\n"
    )
    kinds = {
        path: storage.network_file_system(Path(path), mounts)
        for path in ("/data/x/study.db", "/home/me/x/study.db", "/home/me/local disk/x/study.db")
    }
    assert list(kinds.values()) == [None, "nfs4", None]
    assert storage.network_file_system(Path("/x"), tmp_path / "nowhere") is None


def test_on_a_network_file_system_the_log_is_left_alone_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "network_file_system", lambda file, mounts=None: "nfs4")
    verdict = go(tmp_path / "run", Machine())
    assert any("network file system (nfs4)" in note for note in verdict.notes)
    with closing(sqlite3.connect(tmp_path / "run" / "study.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_the_study_names_the_verdict(tmp_path: Path) -> None:
    """Optuna's best_trial is the largest value; the winner is a confirmation, the one of least memory among ties."""
    run_dir, machine = tmp_path / "run", Machine()
    winner = go(run_dir, machine, settings(budget="120s")).winner
    study = studies.load_study(run_dir, None)
    told = study.user_attrs["verdict"]
    best = read_candidate(run_dir)
    assert told["trial"] == winner.trial == best.measured["trial"]
    assert told["status"] == best.measured["status"] == "confirmed"
    assert told["candidate_id"] == best.candidate.id
    frozen = study.trials[told["trial"]]
    assert frozen.user_attrs["candidate_id"] == winner.candidate.id
    assert told["objective"] == frozen.value == winner.objective
    study.set_user_attr("verdict", None)
    rebuild(run_dir)
    assert studies.load_study(run_dir, None).user_attrs["verdict"] == told


PASSWORD = "s3cr3t/w%40rd"
URLS = [
    f"postgresql+psycopg://me:{PASSWORD}@127.0.0.1:1/db",
    f"postgresql+psycopg://me@127.0.0.1:1/db?password={PASSWORD}",
    f"mysql://me:{PASSWORD}@127.0.0.1:1/db",
    f"nonsense://me:{PASSWORD}@127.0.0.1/db",
    f"sqlite://me:{PASSWORD}@/studies.db",
    f"postgresql+psycopg://me:{PASSWORD}@host@127.0.0.1:1/db",
    f"postgresql:/me:{PASSWORD}@127.0.0.1/db?password={PASSWORD}",
]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("flags", [[], pytest.param(["--debug"], marks=pytest.mark.slow)])
def test_no_message_shows_a_password(
    url: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("autotune.environment.probe", lambda device: CUDA)
    monkeypatch.setattr(storage, "FIRST_PATIENCE_SECONDS", 0.5)
    assert cli.run(["search", "--model", "12x12x768", "--storage", url, *flags]) == 1
    said = "".join(capfd.readouterr())
    assert "--storage" in said
    assert "s3cr3t" not in said
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("arguments", [["--storag", URLS[0]], [URLS[0]], [f"--storage={URLS[1]}", "--budget", "x"]])
def test_wrong_usage_shows_no_password(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["search", *arguments]) != 0
    assert "s3cr3t" not in "".join(capfd.readouterr())


def test_no_file_of_a_run_holds_the_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database stands in for a PostgreSQL server, which only `open_storage` meets."""
    opened: list[str] = []

    def stand_in(run_dir: Path, url: str, *patience: storage.Patience) -> optuna.storages.BaseStorage:
        opened.append(url)
        return real(run_dir, f"sqlite:///{tmp_path}/server.db", *patience)

    real = storage.open_storage
    monkeypatch.setattr(studies, "open_storage", stand_in)
    asked = settings(budget="60s", storage=URLS[0])
    go(tmp_path / "run", Machine(), asked, storage_url=URLS[0])
    assert opened == [URLS[0]]  # it is connected with
    plain = "postgresql+psycopg://me@127.0.0.1:1/db"
    assert read_settings(tmp_path / "run" / "search.toml").storage == plain
    resume(tmp_path / "run", CUDA, measure=Machine().measure, budget_seconds=9.0)
    rebuild(tmp_path / "run")
    assert opened[1:] == [plain, plain]
    for path in [*(tmp_path / "run").rglob("*"), tmp_path / "server.db"]:
        assert path.is_dir() or b"s3cr3t" not in path.read_bytes(), path


def test_settings_never_hold_a_password() -> None:
    for url in URLS[:2]:
        asked = replace(settings(), storage=url)
        assert "s3cr3t" not in repr(asdict(asked))
        assert asked.storage.startswith("postgresql+psycopg://me@127.0.0.1:1/db")
    assert without_password("sqlite:///a@b/studies.db") == "sqlite:///a@b/studies.db"
    assert without_password("postgresql://me@/db?host=/run/pg") == "postgresql://me@/db?host=/run/pg"


def test_a_resumed_search_takes_the_password_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from autotune.config.storage import connect_url

    monkeypatch.setenv("AUTOTUNE_STORAGE_PASSWORD", "from/the@environment")
    assert connect_url("postgresql://me@host/db").password == "from/the@environment"
    assert connect_url("postgresql://me:own@host/db").password == "own"
    assert connect_url("sqlite:///studies.db").password is None
    assert {"from/the@environment"} == secrets_in([])

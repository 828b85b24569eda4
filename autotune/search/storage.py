"""The database of a study, opened so that other programs can use it at the same time.

A server's loss is waited out: whatever Optuna was doing is done again once the server is back.

SQLite lets one program write at a time. Its write-ahead log (WAL) keeps readers out of the writer's way; for what still
locks the file, each statement is repeated until the other program is done. https://www.sqlite.org/wal.html
"""

import contextlib
import os
import sqlite3
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from autotune.config.storage import PASSWORD_VARIABLE, connect_url, scrub, secrets_in, without_password
from autotune.errors import AutotuneError, ConfigError, one_line, shown
from autotune.runs.directory import STUDY_DB
from autotune.units import format_duration

if TYPE_CHECKING:  # importing optuna takes a quarter of a second; only a search pays it
    import optuna
    import sqlalchemy

T = TypeVar("T")


class Patience:
    """How long a lock, or a server that is away, is waited for, and what is done in the meantime."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self.meanwhile: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        """Seconds from now."""
        return self._seconds()


LEAST_PATIENCE_SECONDS = 60.0
FIRST_PATIENCE_SECONDS = 5.0
"""Seconds for which a server is waited for at the start."""
_PATIENCE = "autotune_patience"
"""Name of the engine's option that holds it."""
_TRY_SECONDS = 0.1
"""Timeout of one try by SQLite; signals are handled between tries."""
_LONGEST_PAUSE_SECONDS = 0.5
_SAY_AFTER_SECONDS = 5.0

_NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs", "orangefs",
    "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone",
}  # fmt: skip
"""File systems that other machines share, where the log's shared memory does not work."""


def within(remaining: Callable[[], float]) -> Patience:
    """Waiting counts in the budget, but a finished measurement is worth a minute more."""
    return Patience(lambda: max(LEAST_PATIENCE_SECONDS, remaining()))


in_a_minute = Patience(lambda: LEAST_PATIENCE_SECONDS)
soon = Patience(lambda: FIRST_PATIENCE_SECONDS)


def open_storage(
    run_dir: Path, url: str, patience: Patience, at_first: Patience = soon
) -> "optuna.storages.BaseStorage":
    """The storage of that URL; where it is empty, the SQLite file of the run directory. `at_first`: patience with a
    server that is not reached at the start. Raises ConfigError for what does not open or holds something else."""
    import optuna
    import sqlalchemy

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    where = connect_url(url) if url else sqlalchemy.URL.create("sqlite", database=str((run_dir / STUDY_DB).resolve()))
    name = f"--storage {shown(without_password(url))}" if url else str(run_dir / STUDY_DB)
    arguments: dict[str, Any] = {"execution_options": {_PATIENCE: patience}}
    beats = where.get_backend_name() != "sqlite"
    if not beats:
        arguments["connect_args"] = {"timeout": _TRY_SECONDS, "factory": partial(_Connection, patience)}
    else:
        arguments["pool_pre_ping"] = True  # a connection to a server that was away is made again
        if where.get_backend_name() == "postgresql":
            arguments["connect_args"] = _ALERT
    try:
        engine = sqlalchemy.create_engine(where, **arguments)

        def opened() -> "optuna.storages.RDBStorage":
            tables = sqlalchemy.inspect(engine).get_table_names()
            engine.dispose()
            if tables and "studies" not in tables:  # Optuna would add its own tables to somebody's database
                raise ConfigError(f"{name} holds something else ({one_line(tables[0])}); give a database of its own")
            return _made(where.render_as_string(hide_password=False), arguments, beats=beats)

        storage = _outlasted(opened, at_first if beats else Patience(lambda: 0.0))
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, RuntimeError, ValueError) as error:
        secrets = secrets_in([url]) | {str(where.password or "")} - {""}
        advice = "give for example sqlite:///studies.db" if url else "another program may be using it, or it is damaged"
        if url and where.username:
            advice = f"its password may be given in {PASSWORD_VARIABLE}, PGPASSWORD or ~/.pgpass"
        raise ConfigError(f"{name} cannot be opened: {scrub(_reason(error), secrets)}; {advice}") from None
    if not beats:
        _prepare_sqlite(storage.engine)
    else:
        for name in _CALLS:
            setattr(storage, name, partial(_outlasting, getattr(storage, name), patience))
    return storage


BEAT_SECONDS, GRACE_SECONDS = 10, 30
"""Pause between two heartbeats of a trial, and the age of the last one at which its machine counts as dead."""
_ALERT = {
    "connect_timeout": 5, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}  # fmt: skip
"""libpq's parameters by which the loss of a server is noticed, also where it just falls silent."""
_CALLS = (
    "create_new_study", "get_study_id_from_name", "get_study_name_from_id", "get_study_directions", "get_all_studies",
    "set_study_user_attr", "set_study_system_attr", "get_study_user_attrs", "get_study_system_attrs",
    "_create_new_trial", "_set_trial_param", "set_trial_state_values", "set_trial_user_attr", "set_trial_system_attr",
    "get_trial", "_get_trials", "_get_best_trial_id", "get_trial_id_from_study_id_trial_number", "record_heartbeat",
    "_get_stale_trial_ids",
)  # fmt: skip
"""Methods of Optuna's storage that are one transaction each, so that they can be tried again. One that was committed
although its answer was lost: an attribute is written again, and a trial created twice never has a heartbeat."""


def _made(url: str, arguments: dict[str, Any], *, beats: bool) -> "optuna.storages.RDBStorage":
    """Optuna's storage. Of several processes that make its tables at the same moment, all but one fail: again."""
    import optuna
    import sqlalchemy.exc

    for more in reversed(range(_STARTS if beats else 1)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return optuna.storages.RDBStorage(
                    url, engine_kwargs=arguments, heartbeat_interval=BEAT_SECONDS if beats else None,
                    grace_period=GRACE_SECONDS if beats else None,
                )  # fmt: skip
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError, optuna.exceptions.StorageInternalError):
            if not more:
                raise
        time.sleep(_AWAY_SECONDS)
    raise AssertionError("unreachable: the last try returns or raises")


_STARTS = 10


def _outlasting(call: Callable[..., T], patience: Patience, *arguments: Any, **keywords: Any) -> T | bool:
    import optuna

    tries = 0

    def once() -> T | bool:
        nonlocal tries
        tries += 1
        try:
            return call(*arguments, **keywords)
        except optuna.exceptions.UpdateFinishedTrialError:
            if tries > 1 and getattr(call, "__name__", "") == "set_trial_state_values":
                return True  # by the try whose answer was lost
            raise

    return _outlasted(once, patience)


def _outlasted(work: Callable[[], T], patience: Patience) -> T:
    """The result of `work`, tried again while the server is away. Raises what it raises when patience ends."""
    import optuna
    import sqlalchemy.exc

    began, allowed, said = time.monotonic(), None, False
    while True:
        try:
            return work()
        except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
            allowed, waited = patience() if allowed is None else allowed, time.monotonic() - began
            if waited >= allowed or not _is_away(error):
                raise
            if not said and allowed > FIRST_PATIENCE_SECONDS:
                said = True
                print(
                    "note: the study's server is away; what is measured is kept, waiting up to "
                    f"{format_duration(allowed)}: {_reason(error)}",
                    file=sys.stderr,
                )
        patience.meanwhile()
        time.sleep(_AWAY_SECONDS)


_AWAY_SECONDS = 0.5


def _is_away(error: BaseException) -> bool:
    """Whether the error may pass: no connection, or a transaction that the server broke off."""
    import sqlalchemy.exc

    passing = (
        sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError,
        sqlalchemy.exc.PendingRollbackError,  # the connection broke within a transaction, which Optuna has ended since
    )  # fmt: skip
    while not isinstance(error, sqlalchemy.exc.SQLAlchemyError):
        if error.__cause__ is None:
            return False
        error = error.__cause__
    return isinstance(error, passing)


def outlasted(engine: "sqlalchemy.Engine", work: Callable[[], T]) -> T:
    """The result of `work` on a storage opened here. Like Optuna's own calls, it is repeated while a server is away."""
    if engine.dialect.name == "sqlite":  # each statement waits for other programs
        return work()
    return _outlasted(work, engine.get_execution_options()[_PATIENCE])


def _prepare_sqlite(engine: "sqlalchemy.Engine") -> None:
    import sqlalchemy.event

    @sqlalchemy.event.listens_for(engine, "connect")
    def _cheap_commits(new: sqlite3.Connection, _: object) -> None:
        # A few commits a trial, 5 to 10 ms each if they wait for the disk. With the log only its transfer
        # into the database waits; without it, nothing does. A killed process loses nothing either way; `sync` after
        # each trial is for the machine itself.
        (mode,) = new.execute("PRAGMA journal_mode").fetchone()
        new.execute(f"PRAGMA synchronous = {'NORMAL' if mode == 'wal' else 'OFF'}")

    engine.dispose()  # connections that were made before
    if network_file_system(Path(engine.url.database or "")) is None:
        # The mode is the file's own and stays; somebody who reads an old study.db just now keeps it as it is.
        with (
            contextlib.suppress(sqlite3.OperationalError),
            contextlib.closing(
                sqlite3.connect(engine.url.database or "", timeout=_TRY_SECONDS, uri=False)
            ) as connection,
        ):
            connection.execute("PRAGMA journal_mode = WAL")


def network_file_system(file: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """Its name, where the file lies on one; None elsewhere, and where the system does not say."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return None
    kinds: dict[Path, str] = {}
    for line in lines:  # 36 35 98:0 /root /mount options shared:1 - type source options
        before, _, after = line.partition(" - ")
        kinds[Path(before.split()[4].replace("\\040", " "))] = after.split()[0]
    kind = next((kinds[parent] for parent in file.resolve().parents if parent in kinds), "")
    return kind if kind in _NETWORK else None


def lock_note(file: Path) -> str:
    """Note on a study.db at this place; empty where there is none to make."""
    kind = network_file_system(file)
    return (
        kind
        and (
            f"{file} lies on a network file system ({kind}), where a program that reads it holds the search up; "
            "give a local --storage to avoid that"
        )
    ) or ""


def sync(run_dir: Path) -> None:
    """Wait until the run's own study.db, if it has one, is on the disk."""
    for name in (STUDY_DB, f"{STUDY_DB}-wal"):
        with contextlib.suppress(FileNotFoundError), (run_dir / name).open("rb") as handle:
            os.fsync(handle.fileno())


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Within it, or in a function decorated with it: a database that fails is one line, and what to do."""
    import optuna
    import sqlalchemy.exc

    try:
        yield
    except (optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise AutotuneError(
            f"the study cannot be read or written: {_reason(error)}; what was measured is kept, "
            "go on with `autotune search --resume RUN` once it is free"
        ) from error


def _reason(error: BaseException) -> str:
    """What the database said, without SQL."""
    while (inner := getattr(error, "orig", None) or error.__cause__) is not None:
        error = inner
    return one_line(str(error)) or type(error).__name__


class _Cursor(sqlite3.Cursor):
    connection: "_Connection"

    def execute(self, *arguments: Any) -> "_Cursor":
        _patiently(lambda: super(_Cursor, self).execute(*arguments), self.connection.patience)
        return self

    def executemany(self, *arguments: Any) -> "_Cursor":
        _patiently(lambda: super(_Cursor, self).executemany(*arguments), self.connection.patience)
        return self


class _Connection(sqlite3.Connection):
    """Repeats what another program's lock turns away. SQLite leaves the transaction as it was then."""

    def __init__(self, patience: Patience, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.patience = patience

    def cursor(self, factory: Any = _Cursor) -> Any:
        return super().cursor(factory)

    def commit(self) -> None:
        _patiently(super().commit, self.patience)


def _patiently(work: Callable[[], T], patience: Patience) -> T:
    """The result of `work`, tried again while the database is locked. Raises what it raises when patience ends."""
    began, allowed, pause, said = time.monotonic(), None, 0.01, False
    while True:
        try:
            return work()
        except sqlite3.OperationalError as error:
            # A snapshot that is out of date stays so: only a new transaction helps.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or error.sqlite_errorname == "SQLITE_BUSY_SNAPSHOT":
                raise
            allowed, waited = patience() if allowed is None else allowed, time.monotonic() - began
            if waited >= allowed:
                raise
            if waited > _SAY_AFTER_SECONDS and not said:
                said = True
                print(
                    f"note: another program has locked the study; waiting for it, up to {format_duration(allowed)}",
                    file=sys.stderr,
                )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

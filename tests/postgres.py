"""A PostgreSQL server of the system's package, on the loopback interface, for tests of several machines."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
PASSWORD = "s3cr3t/w@rd"
USER = "postgres"


def missing() -> str:
    """Why there is no server here; empty where there is one."""
    if not BINARIES and shutil.which("postgres") is None:
        return "no PostgreSQL server is installed (apt-get install postgresql)"
    if os.getuid() == 0 and shutil.which("setpriv") is None:
        return "PostgreSQL does not run as root, and there is no setpriv"
    return ""


class Server:
    """A server with one database `studies`, whose user has a password. It ends with the block of `running`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "password").write_text(PASSWORD)
        if os.getuid() == 0:
            account = self._account()
            for path in (folder, folder / "password"):
                os.chown(path, account.pw_uid, account.pw_gid)
        words = ["-D", str(self.data), "-U", USER, "-A", "scram-sha-256", f"--pwfile={folder / 'password'}", "-N"]
        subprocess.run([*self._as_user(), self._binary("initdb"), *words], check=True, capture_output=True, cwd=folder)

    def url(self, database: str = "studies", *, password: bool = False) -> str:
        from sqlalchemy import URL

        url = URL.create(
            "postgresql+psycopg", USER, PASSWORD if password else None, "127.0.0.1", self.port, database
        )
        return url.render_as_string(hide_password=False)

    def start(self) -> None:
        command = [self._binary("postgres"), "-D", str(self.data), "-p", str(self.port), "-h", "127.0.0.1", "-k", ""]
        settings = ["-c", "fsync=off", "-c", "max_connections=300", "-c", "unix_socket_directories="]
        log = (self.folder / "log").open("ab")
        self._process = subprocess.Popen([*self._as_user(), *command[:-2], *settings], stdout=log, stderr=log)
        self._wait_until_it_answers()

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: connections are cut; SIGQUIT: as by a crash."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()
            self._process = None

    def create_database(self) -> None:
        import psycopg

        with psycopg.connect(self._conninfo("postgres"), autocommit=True) as connection:
            connection.execute("CREATE DATABASE studies")

    def _conninfo(self, database: str) -> str:
        import psycopg

        return psycopg.conninfo.make_conninfo(
            host="127.0.0.1", port=self.port, user=USER, password=PASSWORD, dbname=database, connect_timeout=2
        )

    def _wait_until_it_answers(self) -> None:
        import psycopg

        deadline = time.monotonic() + 60
        while True:
            with suppress(psycopg.OperationalError):
                psycopg.connect(self._conninfo("postgres")).close()
                return
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.1)

    def _account(self) -> pwd.struct_passwd:
        try:
            return pwd.getpwnam("postgres")
        except KeyError:
            return pwd.getpwnam("nobody")

    def _as_user(self) -> list[str]:
        if os.getuid() != 0:
            return []
        account = self._account()
        ids = [f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
        return ["setpriv", *ids, "--pdeathsig=INT", "--"]

    def _binary(self, name: str) -> str:
        return str(BINARIES[-1].with_name(name)) if BINARIES else str(shutil.which(name))


@contextmanager
def running() -> Iterator[Server]:
    """A server in a folder of its own, with a database `studies`."""
    folder = Path(tempfile.mkdtemp(prefix="autotune-postgres-"))
    server = Server(folder)
    try:
        server.start()
        server.create_database()
        yield server
    finally:
        server.stop(signal.SIGQUIT)
        shutil.rmtree(folder, ignore_errors=True)

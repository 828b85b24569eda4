"""Temporary folders of trials, and the removal of those left by killed searches."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "autotune-trial-"
_DAY = 86400.0


@contextlib.contextmanager
def trial_folder() -> Iterator[Path]:
    """A new temporary folder, removed at the end; folders of dead processes are removed first.

    The folder's name has the process id, and the process holds a lock on it, which other containers see too."""
    remove_leftovers()
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-", ignore_cleanup_errors=True) as directory:
        handle = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield Path(directory)
        finally:
            os.close(handle)


def log_folder() -> Path:
    """A new temporary folder for logs that the user may want to read; removed when a trial starts a day later."""
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}log-"))


def remove_leftovers() -> None:
    """Remove the folders of trials whose process is dead. Folders of other users, which cannot be opened, stay."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if _abandoned(folder.name, os.fstat(handle).st_mtime):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if the lock is held
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def _abandoned(name: str, changed: float) -> bool:
    """Whether the process in the name is dead. Names without a process id (earlier versions, `log_folder`)
    are abandoned after a day."""
    number = name.removeprefix(_PREFIX).partition("-")[0]
    if not number.isdecimal():
        return time.time() - changed > _DAY
    return not alive(int(number))


def alive(pid: int) -> bool:
    """Whether a process with this id exists, of any user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True

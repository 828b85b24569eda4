"""A trial's folder for temporary files, and the end of those that killed searches have left."""

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
    """A new folder, gone at the end. Those of processes that are dead go first. A living one holds a lock on its own,
    which tells it also from other containers, and its number is in the name."""
    remove_leftovers()
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-", ignore_cleanup_errors=True) as directory:
        handle = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield Path(directory)
        finally:
            os.close(handle)


def remove_leftovers() -> None:
    """Remove the folders of trials whose process is dead. Others' folders, which may not be opened, stay."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if _abandoned(folder.name, os.fstat(handle).st_mtime):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where it is held
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def _abandoned(name: str, changed: float) -> bool:
    """Whether no process of that number lives. A name without one is an earlier version's, or keeps a log for the
    user: it goes after a day."""
    number = name.removeprefix(_PREFIX).partition("-")[0]
    if not number.isdecimal():
        return time.time() - changed > _DAY
    return not alive(int(number))


def alive(pid: int) -> bool:
    """Whether a process of that number runs, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True

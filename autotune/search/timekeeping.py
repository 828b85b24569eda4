"""Time spent by all parts of a search, killed ones included.

The study holds the time spent when a trial began. Each part of the search (one process) also writes twice a second, to
a file of the run, how long it has lasted since its start, before the study can be read.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from autotune.errors import AutotuneError
from autotune.runs.directory import SPENT, UNKNOWN_SPENT, read_spent

BEAT_SECONDS = 0.5
_WIDTH = 48


class Part:
    """This process's part of the search of `run_dir`, since `started` by `clock`. Nothing is written where the
    directory cannot be written in: the search itself will say so."""

    def __init__(
        self, run_dir: Path, started: float, clock: Callable[[], float] = time.monotonic, *, keep: bool = False
    ) -> None:
        """`keep`: also after a regular end, as the study holds no time of a single machine."""
        self.started, self._keep = started, keep
        self._clock, self._before = clock, UNKNOWN_SPENT
        self._file = run_dir / f"{SPENT}{os.getpid()}.{time.time_ns()}"
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True, name="autotune-time-spent")

    def __enter__(self) -> "Part":
        self._write()
        self._beats.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._beats.join()
        if not self._keep and (error is None or isinstance(error, AutotuneError)):  # the study holds the time
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)
        else:
            self._write()

    def follows(self, run_dir: Path, recorded: float) -> float:
        """Seconds that all earlier parts took: what the study has `recorded` of them, and what their files add. Only
        for the holder of the run's lock."""
        earlier = [file for file in run_dir.glob(f"{SPENT}*") if file != self._file]
        parts = [part for file in earlier if (part := read_spent(file)) is not None]
        known = [before + lasted for before, lasted in parts if before is not None]
        # Those that ended before they had read the study come on top: nothing of them is recorded.
        seconds = max([recorded, *known]) + sum(lasted for before, lasted in parts if before is None)
        self._before = f"{seconds:.3f}"
        self._write()  # before the others' files go
        for file in earlier:
            file.unlink(missing_ok=True)
        return seconds

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self._write()

    def _write(self) -> None:
        text = f"{self._before} {self._clock() - self.started:.3f}".ljust(_WIDTH)  # always as long: written in one go
        with contextlib.suppress(OSError):
            handle = os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(handle, text.encode(), 0)
            finally:
                os.close(handle)


def process_started() -> float:
    """When this process began, by `time.monotonic`: loading Python and the command line's own modules counts too.
    Where the system does not say, now."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        age = 0.0
    return time.monotonic() - max(0.0, age)

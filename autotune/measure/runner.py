"""The parent's side of a trial: fresh worker processes in their own groups, a timeout, and the report of a crash.

In a series of trials, the next worker loads torch while the current one builds and compiles.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from autotune.cgroup import ControlGroups
from autotune.environment import child_command, worker_environment
from autotune.errors import ConfigError, one_line
from autotune.files import write_atomically
from autotune.measure.blame import card_remedy, start_remedy
from autotune.measure.child import STANDBY
from autotune.measure.processes import first_to_end, result_file, together, torchrun
from autotune.measure.scratch import remove_leftovers, trial_folder
from autotune.measure.types import MemoryProfile, RungRequest, RungResult, TrialRequest, TrialResult, from_json, to_json
from autotune.model.compile_cache import compile_cache_dir

LOG_BYTES = 16 << 20
"""Maximum size of a log; a worker that prints more is killed."""
STANDBY_LOG = ".standby{}.log"
"""Output of a waiting worker, until it gets its trial; with the number of its series."""
_WORKER = "autotune.measure.worker"
_PROFILER = re.compile(r"[A-Z]+:[-0-9]+ [:0-9]+ [0-9]+:[0-9]+ \w+\.cpp:[0-9]+\] ")
"""Lines that Kineto, under torch's profiler, writes whenever it starts or stops."""
POLL_SECONDS = 0.05
"""Pause between two looks at a worker."""
_TIMED = (b'"phase": "warmup"', b'"phase": "measure"', b'"phase": "done"')

_Process = subprocess.Popen[bytes]
R = TypeVar("R", bound=TrialResult)
Running = Generator[None, None, R]
"""A worker that runs: each `next` looks whether it has ended, closing it kills its process group."""


class Standby:
    """At most one worker process that has loaded torch and its compiler, and waits for its module and its request.

    It is paused while another worker warms up or measures, so that it does not disturb the timing. It has no CUDA
    context and dies with this process.
    """

    def __init__(self, number: int = 0) -> None:
        self._name = STANDBY_LOG.format(number or "")
        self._worker: _Process | None = None
        self._log = Path()

    def start(self, log: Path) -> None:
        """Start a worker, unless one is waiting, for a trial whose log will be in the directory of `log`."""
        if self._worker is None or self._worker.poll() is not None:
            self._log = log.with_name(self._name)
            self._worker = _start(child_command(STANDBY), self._log, "default")

    def take(self, request: TrialRequest, log: Path) -> _Process | None:
        """The waiting worker, now logging to `log`; None if there is none that suits the request. The allocator is
        set before torch loads, and an eager trial must not hold the compiler's memory."""
        worker, plan = self._worker, request.candidate.plan
        if worker is None or worker.poll() is not None or plan.allocator != "default" or plan.compile == "off":
            return None
        self._worker = None
        self._log.replace(log)
        return worker

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._worker is not None and self._worker.poll() is None:
            self._worker.send_signal(number)

    def close(self) -> None:
        if self._worker is not None:
            _end(self._worker)
            self._log.unlink(missing_ok=True)


Measure = Callable[[TrialRequest, Path], TrialResult | Running[TrialResult]]
"""Runs one trial, or starts it so that others can run at the same time."""
TrainRung = Callable[[RungRequest, Path], RungResult | Running[RungResult]]
"""The same for one rung of a race."""


@contextmanager
def trials_in_a_row() -> Iterator[tuple[Measure, TrainRung]]:
    """`start_trial` and `start_rung` with standby workers, which end with the block: one for each device, or part of
    the cores, that trials run on. Removes leftovers of killed searches first."""
    remove_leftovers()
    standbys: dict[tuple[str, frozenset[int]], Standby] = {}
    with ExitStack() as stack:

        def of(request: TrialRequest) -> Standby:
            key = request.device, frozenset(os.sched_getaffinity(0))
            if key not in standbys:
                standbys[key] = stack.enter_context(closing(Standby(len(standbys))))
            return standbys[key]

        yield (
            lambda request, log: start_trial(request, log, of(request)),
            lambda request, log: start_rung(request, log, of(request)),
        )


def run_trial(
    request: TrialRequest, log: Path, standby: Standby | None = None, groups: ControlGroups | None = None
) -> TrialResult:
    """Measure one candidate in a fresh worker process; its output goes to `log`.

    standby: offers a worker that has loaded torch already. groups: control groups that count OOM kills.
    OOM, hangs and crashes become the result's status, never an exception. KeyboardInterrupt kills the worker's process
    group and is raised again.
    """
    return until_ended(start_trial(request, log, standby, groups))


def start_trial(
    request: TrialRequest, log: Path, standby: Standby | None = None, groups: ControlGroups | None = None
) -> Running[TrialResult]:
    """`run_trial`, as something that runs beside others."""
    with trial_folder() as directory:
        return (yield from _run(_WORKER, request, _DEAD, directory, log, standby, groups or ControlGroups()))


def run_rung(
    request: RungRequest, log: Path, standby: Standby | None = None, groups: ControlGroups | None = None
) -> RungResult:
    """Train one rung of a race in a fresh worker process; otherwise as `run_trial`."""
    return until_ended(start_rung(request, log, standby, groups))


def start_rung(
    request: RungRequest, log: Path, standby: Standby | None = None, groups: ControlGroups | None = None
) -> Running[RungResult]:
    """`run_rung`, as something that runs beside others."""
    module, dead = "autotune.train.rung", RungResult(status="crashed", phase="start")
    with trial_folder() as directory:
        return (yield from _run(module, request, dead, directory, log, standby, groups or ControlGroups()))


def until_ended(running: R | Running[R]) -> R:
    """The result, when there is one. Raises what interrupts the waiting, and kills the worker then."""
    if isinstance(running, TrialResult):
        return running
    with closing(running):
        while True:
            try:
                next(running)
            except StopIteration as end:
                result: R = end.value
                return result
            time.sleep(POLL_SECONDS)


def run_profile(request: TrialRequest, directory: Path, log: Path) -> tuple[TrialResult, MemoryProfile | None]:
    """Record one step of a candidate in a fresh worker process: the result of the trial, and its memory profile (None
    unless the status is `ok`). `directory` receives profile.json and, on CUDA, snapshot.pickle.

    Raises ConfigError if the directory cannot be written, otherwise behaves as `run_trial`.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("result.json", "profile.json", "snapshot.pickle"):  # left by an earlier profile
            (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error.strerror}; choose another with --out") from None
    result = until_ended(_run("autotune.profile.recorder", request, _DEAD, directory, log, None, ControlGroups()))
    written = directory / "profile.json"
    return result, from_json(MemoryProfile, written.read_text()) if result.status == "ok" else None


_DEAD = TrialResult(status="crashed", phase="start")


def _run(
    module: str, request: TrialRequest, dead: R, directory: Path, log: Path, standby: Standby | None,
    groups: ControlGroups,
) -> Running[R]:  # fmt: skip
    """Run a worker whose files go to `directory`, and complete its result with what only the parent knows. `dead`: the
    result of a worker that leaves none."""
    started_at, started = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    file, kills, processes = directory / "result.json", groups.oom_kills(), _processes(module, request)
    returncode = yield from _run_worker(module, replace(request, result_path=str(file)), log, standby)
    ended = first_to_end(log.read_text(errors="replace")) if processes > 1 and returncode else None
    results = [_read(result_file(file, rank), dead) for rank in range(processes)]
    result = results[0] if processes == 1 else together(results, ended[0] if ended else None)
    seconds = time.monotonic() - started
    phases = dict(result.phase_seconds)
    # a killed worker has not recorded the seconds of its last phase
    rest = "start" if result.message or result.status == "ok" else result.phase
    phases[rest] = phases.get(rest, 0.0) + max(0.0, seconds - sum(phases.values()))
    result = replace(result, started_at=started_at, trial_seconds=seconds, phase_seconds=phases)
    if log.stat().st_size > LOG_BYTES:
        os.truncate(log, LOG_BYTES)
        return replace(result, status="crashed", message=f"printed more than {LOG_BYTES >> 20} MiB; see {log.name}")
    if returncode is None:
        message = f"not done after {request.timeout_seconds:.0f} s, in phase {result.phase}; see {log.name}"
        return replace(result, status="timeout", message=message)
    if result.status == "crashed" and kills is not None and (groups.oom_kills() or 0) > kills:
        # the kernel killed the worker or one of its child processes, a compiler for example
        message = f"the kernel killed it for memory in phase {result.phase} (oom_kill); see {log.name}"
        return replace(result, status="oom", message=message)
    if result.status == "crashed" and (remedy := card_remedy(result.message or _last_line(log), request.device)):
        return replace(result, remedy=remedy)
    if result.status == "crashed" and not result.message and ended:
        message = f"{_death(ended[1], f'rank {ended[0]}')} in phase {result.phase}; see {log.name}"
        return replace(result, message=message)
    if result.status == "crashed" and not result.message:
        message = f"{_death(returncode)} in phase {result.phase}: {_last_line(log)}; see {log.name}"
        remedy = start_remedy(_last_line(log)) if result.phase == "start" else ""
        return replace(result, status="unsupported" if remedy else "crashed", message=message, remedy=remedy)
    return result


def _processes(module: str, request: TrialRequest) -> int:
    """Processes of a worker; rungs and profiles have one, and tell that they cannot run other plans."""
    return request.candidate.plan.processes if module == _WORKER else 1


def _read(file: Path, dead: R) -> R:
    """The result that a worker has left; `dead` where there is none."""
    if not file.exists():
        return dead
    try:
        return from_json(type(dead), file.read_text(encoding="utf-8"))
    except (ValueError, OSError, ConfigError) as error:
        return replace(dead, message=f"the worker's result cannot be read: {one_line(str(error))}")


def _run_worker(
    module: str, request: TrialRequest, log: Path, standby: Standby | None
) -> Generator[None, None, int | None]:
    """Return code of the worker (negative: a signal's number); None if it exceeded its time or its log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    plan, processes = request.candidate.plan, _processes(module, request)
    standby = standby if processes == 1 else None
    worker, words = standby.take(request, log) if standby else None, f"{module}\n{to_json(request)}"
    if worker is None and processes == 1:
        worker, words = _start(child_command(module), log, plan.allocator), to_json(request)
    elif worker is None:  # all of them must read it
        file, words = Path(request.result_path).with_name("request.json"), ""
        write_atomically(file, to_json(request), durable=False)
        worker = _start(torchrun(module, processes, file), log, plan.allocator)
    try:
        assert worker.stdin is not None
        with suppress(BrokenPipeError), worker.stdin as pipe:  # a dead worker is reported below
            pipe.write(words.encode())
        if standby:
            standby.start(log)
        return (yield from _wait(worker, request, log, standby))
    finally:
        _end(worker)
        if standby:
            standby.resume()


def _start(command: list[str], log: Path, allocator: str) -> _Process:
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group of its own, so that its children are killed with it
            env=worker_environment(compile_cache_dir(), allocator),
        )


def _wait(
    worker: _Process, request: TrialRequest, log: Path, standby: Standby | None
) -> Generator[None, None, int | None]:
    """Wait until the worker ends, exceeds its time or prints too much; see `_run_worker`."""
    deadline, result = time.monotonic() + request.timeout_seconds, Path(request.result_path)
    while (code := worker.poll()) is None and time.monotonic() < deadline:
        yield
        if log.stat().st_size > LOG_BYTES:
            return None
        if standby and result.exists() and any(phase in result.read_bytes() for phase in _TIMED):
            standby.pause()
            standby = None
    return code


def _end(worker: _Process) -> None:
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children")
    with suppress(OSError):  # each process that torchrun has started has a group of its own
        for child in children.read_text().split():
            with suppress(ProcessLookupError):
                os.killpg(int(child), signal.SIGKILL)
    with suppress(ProcessLookupError):  # the group includes the worker's compilers and data loaders
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def _last_line(log: Path) -> str:
    """What a worker printed last, the profiler's own log aside."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if not _PROFILER.match(line)]
    return next((line[:300] for line in reversed(lines) if line), "no output")


def _death(returncode: int, who: str = "worker") -> str:
    if returncode >= 0:
        return f"{who} ended with exit code {returncode}"
    return f"{who} killed by {signal.Signals(-returncode).name}"

"""Trials in worker processes: each outcome has its own status, and no process or file is left behind."""

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from background import begin
from precision import FAST

from autotune.cgroup import ControlGroups
from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.measure import runner
from autotune.measure.runner import run_trial, trials_in_a_row, until_ended
from autotune.measure.types import Steps, TrialRequest, TrialResult, from_json, to_json
from autotune.measure.worker import failure

WORKER = "autotune.measure.child"
SHAPE = Shape(n_layer=2, n_head=2, n_embd=64, block_size=64)
RECIPE = Recipe(shape=SHAPE, global_batch_size=7)
REQUEST = TrialRequest(
    candidate=Candidate(
        recipe=RECIPE, plan=Plan(micro_batch_size=3, compile="off", dtype=FAST, loss="chunked", loss_chunk_tokens=192)
    ),
    device="cpu",
    result_path="",
    measure_seconds=1.0,
    timeout_seconds=120.0,
)


def with_plan(**changes: object) -> TrialRequest:
    candidate = REQUEST.candidate
    return replace(REQUEST, candidate=replace(candidate, plan=replace(candidate.plan, **changes)))  # type: ignore[arg-type]


MARK = f"AUTOTUNE_TESTS={os.getpid()}"
"""In the environment of every process that these tests start, to tell them from those of other test processes."""


@pytest.fixture(autouse=True)
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*MARK.split("="))


def workers(words: str = WORKER) -> list[int]:
    """Processes of these tests with these words on their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if words in command and MARK.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> TrialResult:
    return run_trial(REQUEST, tmp_path_factory.mktemp("logs") / "trial.log")


def test_a_good_candidate_is_measured(measured: TrialResult) -> None:
    assert (measured.status, measured.phase, measured.message) == ("ok", "done", "")
    assert measured.steps == "composed"
    assert measured.tokens_per_second is not None
    assert measured.tokens_per_second * (measured.step_seconds_p50 or 0) == pytest.approx(RECIPE.tokens_per_step)
    assert measured.first_loss == pytest.approx(math.log(SHAPE.vocab_size), abs=0.1)
    assert measured.trial_seconds is not None
    assert measured.trial_seconds > measured.compile_seconds + measured.build_seconds  # type: ignore[operator]
    assert sum(measured.phase_seconds.values()) == pytest.approx(measured.trial_seconds)
    assert set(measured.phase_seconds) == {"start", "build", "verify", "compile", "warmup", "measure", "done"}
    assert measured.mfu is None  # no data sheet peak for this processor


def test_the_peak_counts_weights_moments_gradients_and_more(measured: TrialResult) -> None:
    steady = measured.memory["steady"]
    assert steady.allocated_bytes is not None
    assert steady.device_bytes is not None
    assert 16 * SHAPE.parameters < steady.allocated_bytes < steady.device_bytes
    assert measured.peak("allocated_bytes") == steady.allocated_bytes
    assert measured.peak("reserved_bytes") is None


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["whole", "composed"])
def test_a_finalist_covers_evaluation_and_checkpoint(tmp_path: Path, steps: Steps) -> None:
    long = replace(REQUEST.candidate, recipe=replace(RECIPE, global_batch_size=19))  # seven micro steps
    asked = replace(REQUEST, candidate=long, final=True, steps=None if steps == "whole" else steps)
    result = run_trial(asked, tmp_path / "log")
    assert (result.status, result.steps) == ("ok", steps)
    assert (result.tokens_per_second or 0) * (result.step_seconds_p50 or 0) == pytest.approx(19 * 64)
    assert set(result.memory) == {"first_step", "steady", "evaluation", "checkpoint"}


@pytest.mark.slow
def test_timing_of_a_candidate_that_cannot_win_ends_early(measured: TrialResult, tmp_path: Path) -> None:
    least = 1000 * (measured.tokens_per_second or 0.0)  # beyond the widest interval of a busy machine
    patient = replace(REQUEST, measure_seconds=300.0, timeout_seconds=400.0)
    slow = run_trial(replace(patient, stop_below_tokens_per_second=least), tmp_path / "log")
    assert (slow.status, slow.phase) == ("ok", "done")
    assert "timing ended early" in slow.message
    assert (slow.tokens_per_second_ci95 or 0.0) > 0
    assert slow.phase_seconds["measure"] < 300


@pytest.mark.slow
def test_losses_that_are_not_finite_are_incorrect(tmp_path: Path) -> None:
    wild = replace(REQUEST.candidate.recipe, learning_rate=1e38)
    result = run_trial(replace(REQUEST, candidate=replace(REQUEST.candidate, recipe=wild)), tmp_path / "log")
    assert (result.status, result.phase) == ("incorrect", "measure")
    assert "loss is nan" in result.message


@pytest.mark.slow
def test_trials_in_a_row_start_in_a_worker_that_has_loaded_torch(tmp_path: Path) -> None:
    compiled = with_plan(compile="block")
    with trials_in_a_row() as (start, _):

        def measure(request: TrialRequest, log: Path) -> TrialResult:
            return until_ended(start(request, log))  # type: ignore[arg-type]

        first = measure(compiled, tmp_path / "1.log")
        waiting = workers()
        assert len(waiting) == 1
        second = measure(compiled, tmp_path / "2.log")
        assert workers() != waiting
        waiting = workers()
        with pytest.raises(KeyboardInterrupt):
            interrupted(lambda: measure(REQUEST, tmp_path / "3.log"))
        assert workers() == waiting  # an eager trial must not hold the compiler's memory
    assert [first.status, second.status] == ["ok", "ok"]
    assert second.phase_seconds["start"] < first.phase_seconds["start"]
    assert second.peak("allocated_bytes") == first.peak("allocated_bytes")
    assert workers() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.log", "2.log", "3.log"]


def interrupted(work: Callable[[], object]) -> None:
    """`work`, with Ctrl-C after a second; a shell's background jobs ignore it from birth."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    try:
        work()
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)


def test_the_message_of_an_out_of_memory_error_is_short() -> None:
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.2 GiB is "
        "free. If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=..."
    )
    short = "CUDA out of memory. Tried to allocate 1.50 GiB."
    assert failure(error) == {"status": "oom", "message": short, "wanted_bytes": 3 << 29}
    short = "can't allocate memory: you tried to allocate 512 bytes. Error code 12 (Cannot allocate memory)"
    error = RuntimeError(f"[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: {short}")
    assert failure(error) == {"status": "oom", "message": short, "wanted_bytes": 512}


@pytest.mark.slow
def test_needing_more_than_the_limit_says_how_much(measured: TrialResult, tmp_path: Path) -> None:
    need = with_plan(loss="full", micro_batch_size=7)
    tight = run_trial(replace(need, memory_limit_bytes=500 << 20), tmp_path / "log")
    assert tight.status in ("oom", "over_limit")
    if tight.status == "oom":
        assert tight.wanted_bytes is not None
        assert tight.wanted_bytes > 0
    # the next trial is not affected
    after = run_trial(with_plan(), tmp_path / "log")
    assert after.status == "ok"
    assert after.peak("allocated_bytes") == measured.peak("allocated_bytes")


def test_what_the_machine_lacks_is_unsupported_with_the_reason(tmp_path: Path) -> None:
    result = run_trial(with_plan(attention="sdpa_flash"), tmp_path / "log")
    assert result.status == "unsupported"
    assert "needs cuda, this is cpu" in result.message


def test_a_worker_that_takes_too_long_is_killed_with_all_it_started(tmp_path: Path) -> None:
    started = time.monotonic()
    result = run_trial(replace(REQUEST, timeout_seconds=1.0), tmp_path / "log")
    assert result.status == "timeout"
    assert time.monotonic() - started < 5
    assert workers() == []


def test_the_result_of_a_killed_worker_names_its_phase(tmp_path: Path) -> None:
    def kill() -> None:
        eventually(lambda: any(map(has_torch, workers())))
        os.kill(workers()[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    result = run_trial(replace(REQUEST, measure_seconds=60.0), tmp_path / "log")
    killer.join()
    assert result.status == "crashed"
    assert "SIGKILL" in result.message
    assert result.phase in result.message


def test_all_workers_die_with_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from autotune.measure.runner import Standby, run_trial; "
        "from autotune.measure.types import TrialRequest, from_json; "
        f"run_trial(from_json(TrialRequest, sys.stdin.read()), Path({str(tmp_path / 'log')!r}), Standby())"
    )
    parent = begin([sys.executable, "-c", code], stdin=subprocess.PIPE)
    assert parent.stdin is not None
    parent.stdin.write(to_json(replace(REQUEST, measure_seconds=60.0)))
    parent.stdin.close()
    eventually(lambda: len(workers()) == 2 and all(map(has_torch, workers())))  # one measures, the other stands by
    parent.kill()
    parent.wait()
    eventually(lambda: workers() == [])


def has_torch(process: int) -> bool:
    """Its libraries are mapped."""
    with contextlib.suppress(OSError):  # it has ended meanwhile
        return b"libtorch_cpu" in Path(f"/proc/{process}/maps").read_bytes()
    return False


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


MISBEHAVING = {
    "garbage on stdout": ("print('{' * 1000000); sys.exit(3)", "exit code 3"),
    "a malformed result": (
        "import json; request = json.load(sys.stdin); open(request['result_path'], 'w').write('{\"status\": NaN')",
        "the worker's result cannot be read",
    ),
    "an endless log": ("while True: print('x' * (1 << 20))", "printed more than 16 MiB"),
    "a child that survives": ("subprocess.Popen(['sleep', '1000']); os._exit(4)", "exit code 4"),
    "a segmentation fault": ("os.kill(os.getpid(), 11)", "SIGSEGV"),
    "the profiler's own log": (
        "print('said\\nUSDT:2026-11-26 12:58:24 89:89 Handler.cpp:59] profiler_stop', flush=True); os._exit(5)",
        "ended with exit code 5 in phase start: said; see log",
    ),
}


@pytest.mark.parametrize("what", MISBEHAVING)
def test_a_misbehaving_worker_is_a_crash_and_leaves_no_process(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, expected = MISBEHAVING[what]
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\nimport os, subprocess, sys\n{code}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    result = run_trial(REQUEST, tmp_path / "log")
    assert result.status == "crashed"
    assert expected in result.message
    assert (tmp_path / "log").stat().st_size <= runner.LOG_BYTES
    eventually(lambda: workers("sleep 1000") == [])


@pytest.mark.parametrize(("kills", "status"), [(4, "oom"), (3, "crashed")])
def test_what_the_kernel_kills_for_memory_is_oom(
    kills: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "self").write_text("0::/\n")
    events = tmp_path / "memory.events"
    events.write_text("oom_kill 3\n")
    fake = tmp_path / "python"
    dies = f"open({str(events)!r}, 'w').write('oom_kill {kills}')\nos.kill(os.getpid(), 9)"
    fake.write_text(f"#!{sys.executable}\nimport os\n{dies}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    groups = ControlGroups(root=tmp_path, membership=tmp_path / "self")
    result = run_trial(REQUEST, tmp_path / "log", groups=groups)
    assert result.status == status
    assert ("the kernel killed it for memory in phase start" in result.message) == (status == "oom")


@pytest.mark.parametrize(
    ("name", "compile"),
    [
        ("TORCHDYNAMO_DISABLE", "full"),
        pytest.param("TORCH_COMPILE_DISABLE", "block", marks=pytest.mark.slow),
    ],
)
def test_a_plan_that_was_not_compiled_as_requested_is_unsupported(
    name: str, compile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    result = run_trial(with_plan(compile=compile), tmp_path / "log")
    assert result.status == "unsupported"
    assert result.message == f"plan.compile = '{compile}', but Inductor compiled nothing; unset {name}"
    assert result.tokens_per_second is None


@pytest.mark.slow
def test_a_profile_of_another_plan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    result, found = runner.run_profile(with_plan(compile="full"), tmp_path / "out", tmp_path / "log")
    assert (result.status, found) == ("unsupported", None)


@pytest.mark.slow
def test_the_memory_limit_does_not_apply_to_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled in a folder whose files have the names of Python modules."""
    for name in ("profile", "random", "queue", "torch", "autotune"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working folder')")
    compiler, limits = tmp_path / "bin" / "g++", tmp_path / "limits"
    compiler.parent.mkdir()
    compiler.write_text(f'#!/bin/sh\nulimit -S -d >> {limits}\nexec {shutil.which("g++")} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "cache"))  # empty, so that the compiler runs
    monkeypatch.chdir(tmp_path)
    small = replace(SHAPE, n_layer=1, vocab_size=256)
    candidate = replace(with_plan(compile="block", loss="full").candidate, recipe=replace(RECIPE, shape=small))
    result = run_trial(replace(REQUEST, candidate=candidate, memory_limit_bytes=3 << 30), tmp_path / "log")
    assert result.status == "ok", result.message
    assert set(limits.read_text().split()) == {"unlimited"}


def test_the_memory_limit_applies_to_the_candidate(tmp_path: Path) -> None:
    large = replace(SHAPE, vocab_size=400_000, n_embd=512)
    candidate = replace(REQUEST.candidate, recipe=replace(RECIPE, shape=large))
    result = run_trial(replace(REQUEST, candidate=candidate, memory_limit_bytes=700 << 20), tmp_path / "log")
    assert (result.status, result.phase) == ("oom", "build")
    assert result.wanted_bytes == 4 * 400_000 * 512


def test_requests_and_results_survive_json(measured: TrialResult) -> None:
    assert from_json(TrialRequest, to_json(REQUEST)) == REQUEST
    assert from_json(TrialResult, to_json(measured)) == measured

"""Whose fault a failure is: the machine's, with what to do about it, or the candidate's."""

import errno
import os
import subprocess
from pathlib import Path

import pytest
from precision import FAST
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.measure.blame import remedy, start_remedy
from autotune.measure.runner import run_trial
from autotune.measure.types import TrialRequest
from autotune.measure.worker import failure

CACHE = "/somewhere/cache"


def wrapped(inner: Exception) -> BaseException:
    return InductorError(inner, None)


def os_error(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path) if path else OSError(number, os.strerror(number))


MACHINES = {
    "no compiler": (InvalidCxxCompiler(), "install g++"),
    "no compiler for Triton": (RuntimeError("Failed to find C compiler. Please specify via CC"), "install g++"),
    "no headers of Python": (
        CppCompileError(["g++"], "x.cpp:1:10: fatal error: Python.h: No such file"),
        "python3-dev",
    ),
    "no headers for clang": (CppCompileError(["clang"], "fatal error: 'omp.h' file not found"), "has omp.h"),
    "noexec": (OSError(f"{CACHE}/a.so: failed to map segment from shared object"), "mounted noexec"),
    "noexec module": (ImportError(f"{CACHE}/a.so: failed to map segment from shared object"), "AUTOTUNE_CACHE_DIR"),
    "read-only": (os_error(errno.EROFS, f"{CACHE}/locks/x"), f"{CACHE}/locks/x cannot be written (Read-only"),
    "not ours": (os_error(errno.EACCES, f"{CACHE}/x"), "Permission denied"),
    "full": (os_error(errno.ENOSPC), f"{CACHE} cannot be written (No space left"),
    "full elsewhere": (os_error(errno.ENOSPC, "/tmp/tmp1/state.pt"), "/tmp/tmp1/state.pt cannot be written"),
    "a file in its place": (os_error(errno.ENOTDIR, f"{CACHE}/x"), "Not a directory"),
}


@pytest.mark.parametrize("what", MACHINES)
def test_failures_of_the_machine_come_with_a_remedy(what: str) -> None:
    error, said = MACHINES[what]
    for one in (error, wrapped(error)):
        found = remedy(one, CACHE)
        assert said in found
        assert "\n" not in found
        assert ("--choices compile=off" in found) == (what != "full elsewhere")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("boom"),
        os_error(errno.ENOENT, "/data/train_000.bin"),
        CppCompileError(["g++"], "x.cpp:1:1: error: expected ';'"),
        subprocess.CalledProcessError(1, "g++", output="Killed signal terminated program cc1plus"),
    ],
)
def test_other_failures_are_the_candidates(error: Exception) -> None:
    assert remedy(wrapped(error), CACHE) == ""
    assert remedy(error, "") == ""


def test_the_worker_says_it_in_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", CACHE)
    told = failure(wrapped(os_error(errno.EROFS, f"{CACHE}/locks/x")))
    assert told["status"] == "unsupported"
    assert "AUTOTUNE_CACHE_DIR" in str(told["remedy"])
    assert "remedy" not in failure(ValueError("boom"))


def test_what_ends_before_the_request_is_the_machines() -> None:
    assert "autotune doctor" in start_remedy("NotADirectoryError: [Errno 20] Not a directory: '/a/b'")
    assert "torch" in start_remedy("ModuleNotFoundError: No module named 'torch'")
    assert start_remedy("Segmentation fault") == ""


def trial(log: Path, compile: str) -> TrialRequest:
    shape = Shape(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=512)
    plan = Plan(micro_batch_size=2, compile=compile, dtype=FAST)  # type: ignore[arg-type]
    return TrialRequest(
        candidate=Candidate(recipe=Recipe(shape=shape, global_batch_size=4), plan=plan), device="cpu", result_path="",
        measure_seconds=0.5, timeout_seconds=120.0,
    )  # fmt: skip


@pytest.mark.slow
def test_without_a_compiler_compiled_trials_say_so_and_eager_ones_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "cache"))
    compiled = run_trial(trial(tmp_path, "block"), tmp_path / "compiled.log")
    assert (compiled.status, compiled.phase) == ("unsupported", "compile")
    assert "no working C++ compiler" in compiled.remedy
    assert "--choices compile=off" in compiled.remedy
    eager = run_trial(trial(tmp_path, "off"), tmp_path / "eager.log")
    assert (eager.status, eager.remedy) == ("ok", "")


def test_a_cache_that_cannot_be_made_is_an_error_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    result = run_trial(trial(tmp_path, "block"), tmp_path / "log")
    assert (result.status, result.phase) == ("unsupported", "start")
    assert "Not a directory" in result.remedy

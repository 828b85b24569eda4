"""Where caches go: with a home, without one, and where nothing can be written."""

import os
import pwd
import tempfile
from pathlib import Path

import pytest

from autotune import places
from autotune.environment import worker_environment
from autotune.errors import ConfigError
from autotune.model.compile_cache import compile_cache_dir, make_cache


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user without passwd entry and home; -> the folder of temporary files."""

    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in (*places._XDG, *places._USER, "HOME", "AUTOTUNE_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_without_a_home_everything_has_a_place_of_its_own(nobody: Path) -> None:
    own = nobody / f"autotune-{os.getuid()}"
    variables = worker_environment()
    assert (variables["HOME"], variables["XDG_CACHE_HOME"]) == (str(own), str(own / "cache"))
    assert variables["LOGNAME"] == f"uid{os.getuid()}"  # getpass.getuser would raise
    assert compile_cache_dir() == own / "cache" / "autotune" / "inductor"
    assert own.stat().st_mode & 0o777 == 0o700
    assert "as there is no home" in places.settle({})


def test_a_home_that_cannot_be_written(nobody: Path) -> None:
    (nobody / "file").write_text("")
    variables = {"HOME": str(nobody / "file" / "home")}
    said = places.settle(variables)
    own = nobody / f"autotune-{os.getuid()}"
    assert f"{nobody / 'file' / 'home' / '.cache'} cannot be written" in said
    assert variables["HOME"] == str(nobody / "file" / "home")  # what can be read there is still wanted
    assert variables["XDG_CACHE_HOME"] == str(own / "cache")
    assert (variables["TRITON_HOME"], variables["MPLCONFIGDIR"]) == (str(own), str(own / "matplotlib"))


@pytest.mark.parametrize("value", ["", "relative", "./x"])
def test_empty_and_relative_xdg_variables_count_as_unset(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AUTOTUNE_CACHE_DIR")
    for name in places._XDG:
        monkeypatch.setenv(name, value)
    assert compile_cache_dir() == tmp_path / ".cache" / "autotune" / "inductor"
    assert not worker_environment().keys() & set(places._XDG)
    variables = dict(os.environ)
    assert places.settle(variables) == ""
    assert variables["HOME"] == str(tmp_path)


@pytest.mark.parametrize("value", ["", "relative"])
def test_an_empty_home_counts_as_unset(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HOME", value)
    assert worker_environment()["HOME"] == pwd.getpwuid(os.getuid()).pw_dir


def test_what_the_user_has_chosen_stays(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"HOME": "/proc/none", "XDG_CACHE_HOME": str(nobody / "c"), "MPLCONFIGDIR": "/m", "TRITON_HOME": "/t"}
    variables = {**chosen, "USER": "me"}
    assert places.settle(variables) == ""
    assert variables == {**chosen, "USER": "me"}
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", "here")
    assert compile_cache_dir() == Path.cwd() / "here"


@pytest.mark.parametrize("damage", ["link", "open", "file"])
def test_a_folder_that_others_may_write_is_refused(nobody: Path, damage: str) -> None:
    """Libraries are loaded from it."""
    own = nobody / f"autotune-{os.getuid()}"
    if damage == "link":
        own.symlink_to(nobody)
    elif damage == "file":
        own.write_text("")
    else:
        own.mkdir()
        own.chmod(0o777)
    with pytest.raises(ConfigError, match=f"{own} (is not a private folder of this user|cannot be made)"):
        places.own_folder()


def test_no_temporary_folder_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    with pytest.raises(ConfigError, match="no folder for temporary files can be written; set TMPDIR"):
        make_cache(tmp_path)


def test_a_cache_is_made_or_refused(tmp_path: Path) -> None:
    make_cache(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/c cannot be written: .*; set AUTOTUNE_CACHE_DIR"):
        make_cache(tmp_path / "file" / "c")

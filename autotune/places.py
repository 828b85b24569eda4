"""Folders of caches and temporary files, also for users without a home or with one that cannot be written."""

import os
import pwd
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from autotune.errors import ConfigError

_XDG = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")
_USER = ("LOGNAME", "USER", "LNAME", "USERNAME")
"""Variables that `getpass.getuser` reads before the passwd entry."""


def settle(variables: MutableMapping[str, str]) -> str:
    """Set the variables by which libraries find the user's folders. Without a usable home, torch, Triton, matplotlib
    and datasets each fail in their own way or write to the working directory. Returns a note for the user; empty if
    nothing important was changed.

    Empty or relative XDG variables are dropped, as their specification requires. Folders that cannot be written are
    replaced by a folder of this user among the temporary files. Raises ConfigError if that is impossible.
    """
    wanted, cache = _wanted_cache(variables), cache_home(variables)
    for name in _XDG:
        if not Path(variables.get(name, "/")).is_absolute():
            del variables[name]
    if _passwd_entry() is None and not any(variables.get(name) for name in _USER):
        variables["LOGNAME"] = f"uid{os.getuid()}"
    variables["HOME"] = str(_home(variables) or own_folder())
    if not writable(Path(variables["HOME"])):
        variables.setdefault("TRITON_HOME", str(own_folder()))
        variables.setdefault("MPLCONFIGDIR", str(own_folder() / "matplotlib"))
    if cache == wanted:
        return ""
    variables["XDG_CACHE_HOME"] = str(cache)
    reason = "there is no home" if wanted is None else f"{wanted} cannot be written"
    return f"caches go to {cache}, as {reason}; AUTOTUNE_CACHE_DIR chooses another folder for compiled kernels"


def cache_home(variables: Mapping[str, str]) -> Path:
    """The folder of caches: XDG_CACHE_HOME, else ~/.cache; if it cannot be written, one among the temporary files.
    Raises ConfigError if that cannot be created either."""
    wanted = _wanted_cache(variables)
    return wanted if wanted is not None and writable(wanted) else own_folder() / "cache"


def _wanted_cache(variables: Mapping[str, str]) -> Path | None:
    asked, home = variables.get("XDG_CACHE_HOME", ""), _home(variables)
    return Path(asked) if Path(asked).is_absolute() else home and home / ".cache"


def _home(variables: Mapping[str, str]) -> Path | None:
    """The user's home; None for a user without one, for example a numeric id in a container."""
    entry = _passwd_entry()
    asked = variables.get("HOME", "")
    return Path(asked) if Path(asked).is_absolute() else Path(entry.pw_dir) if entry else None


def _passwd_entry() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(os.getuid())
    except KeyError:
        return None


def writable(folder: Path) -> bool:
    """Whether the folder can be written, or created if it does not exist."""
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))  # noqa: PTH110 - never raises
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def own_folder() -> Path:
    """A folder of this user among the temporary files. Libraries are loaded from it, so nobody else may write to it."""
    folder = Path(temporary_folder(), f"autotune-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}; set TMPDIR to a folder that can be") from None
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or folder.is_symlink():
        raise ConfigError(f"{folder} is not a private folder of this user; remove it, or set HOME or TMPDIR")
    return folder


def temporary_folder() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:
        raise ConfigError("no folder for temporary files can be written; set TMPDIR to one that can") from None

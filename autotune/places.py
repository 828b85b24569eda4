"""Where caches and temporary files go, also for users without a home, and where nothing of it can be written."""

import os
import pwd
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from autotune.errors import ConfigError

_XDG = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")
_USER = ("LOGNAME", "USER", "LNAME", "USERNAME")
"""What `getpass.getuser` looks for before it asks for a passwd entry."""


def settle(variables: MutableMapping[str, str]) -> str:
    """Complete the environment in which libraries look for the user's folders, as torch, Triton, matplotlib and
    datasets all have a way of their own to fail (or to write into the working folder) where there is no usable home.
    Returns what to say about it; empty where nothing had to be changed that matters.

    XDG variables that are empty or relative are dropped, as their specification asks. What cannot be written is
    replaced by a folder of the user's own among the temporary files. Raises ConfigError where there is none.
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
    """The folder of caches: XDG_CACHE_HOME, else ~/.cache; where neither can be written, one among the temporary
    files. Raises ConfigError where that cannot be made either."""
    wanted = _wanted_cache(variables)
    return wanted if wanted is not None and writable(wanted) else own_folder() / "cache"


def _wanted_cache(variables: Mapping[str, str]) -> Path | None:
    asked, home = variables.get("XDG_CACHE_HOME", ""), _home(variables)
    return Path(asked) if Path(asked).is_absolute() else home and home / ".cache"


def _home(variables: Mapping[str, str]) -> Path | None:
    """None for a user who has none, such as a number given to a container."""
    entry = _passwd_entry()
    asked = variables.get("HOME", "")
    return Path(asked) if Path(asked).is_absolute() else Path(entry.pw_dir) if entry else None


def _passwd_entry() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(os.getuid())
    except KeyError:
        return None


def writable(folder: Path) -> bool:
    """Whether the folder can be written, or made where it does not exist."""
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))  # noqa: PTH110 - never raises
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def own_folder() -> Path:
    """A folder of this user's among the temporary files. Libraries are loaded from it: nobody else may write there."""
    folder = Path(temporary_folder(), f"autotune-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}; set TMPDIR to a folder that can be") from None
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or folder.is_symlink():
        raise ConfigError(f"{folder} is not this user's alone; remove it, or set HOME or TMPDIR to another folder")
    return folder


def temporary_folder() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:
        raise ConfigError("no folder for temporary files can be written; set TMPDIR to one that can be") from None

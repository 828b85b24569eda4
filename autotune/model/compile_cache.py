"""The folder of compiled kernels shared by all processes: its location, torn files, hits and misses.

Imports no torch, because the searching process uses it.
"""

import contextlib
import os
import struct
import tempfile
import time
from pathlib import Path

from autotune import places
from autotune.errors import ConfigError


def compile_cache_dir() -> Path:
    """The folder of compiled kernels: AUTOTUNE_CACHE_DIR, else a subfolder of the user's caches."""
    chosen = os.environ.get("AUTOTUNE_CACHE_DIR")
    return Path(chosen).absolute() if chosen else places.cache_home(os.environ) / "autotune" / "inductor"


def make_cache(folder: Path) -> None:
    """Create `folder` and check that it and the folder of temporary files can be written. Raises ConfigError."""
    places.temporary_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        raise ConfigError(
            f"the compile cache {folder} cannot be written: {error.strerror}; "
            "set AUTOTUNE_CACHE_DIR to a folder that can be, with room for some hundred MiB"
        ) from None


def drop_torn_libraries(cache_dir: Path, older_than_seconds: float = 3.0) -> list[Path]:
    """Remove shared libraries that a killed linker left unfinished, and return them. Inductor takes any file of the
    right name for a compiled kernel, so one torn file would crash every later process that needs it. Files changed
    within `older_than_seconds` may belong to a running linker and stay."""
    torn = []
    for folder, _, names in os.walk(cache_dir):  # skips folders that another process removes meanwhile
        for path in (Path(folder, name) for name in names if name.endswith(".so")):
            with contextlib.suppress(OSError):  # another process was faster
                status = path.stat()
                if time.time() - status.st_mtime > older_than_seconds and not _is_whole(path, status.st_size):
                    path.unlink()
                    torn.append(path)
    return torn


def _is_whole(path: Path, size: int) -> bool:
    """Whether an ELF file is complete: its section table is at the end (System V ABI: e_shoff, e_shentsize, e_shnum)"""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return False
    sections, entry_bytes, entries = struct.unpack_from("<Q10xHH", header, 0x28)
    return bool(sections) and size >= sections + entry_bytes * entries


def compile_cache() -> tuple[int, int] | None:
    """Graphs of this process found in the compile cache, and graphs it had to compile; None: no graph yet."""
    from torch._dynamo.utils import counters

    counts = counters["inductor"]
    hits = counts["fxgraph_cache_hit"]
    misses = counts["fxgraph_cache_miss"] + counts["fxgraph_cache_bypass"]
    return (hits, misses) if hits + misses else None

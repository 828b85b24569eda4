"""Failures of the machine rather than of the candidate: no compiler, an unusable compile cache.

Every trial that compiles would fail in the same way, so the first one ends a search.
"""

import errno
import re
from collections.abc import Iterator

from autotune.errors import one_line

_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
_NOT_THERE = {errno.ENOTDIR, errno.ENOENT}
_NO_EXEC = "failed to map segment"
"""Message of the dynamic loader for a library on a file system mounted noexec."""
_MISSING_HEADER = re.compile(r"fatal error: (\S+?): No such file|fatal error: '(\S+?)' file not found")

EAGER = "or search eager plans only with --choices compile=off"
_CACHE = f"set AUTOTUNE_CACHE_DIR to a folder of yours that can be written and executed, {EAGER}"
_COMPILER = "install g++ (Debian, Ubuntu: apt install g++) or name a compiler in CXX"


def remedy(error: BaseException, cache_dir: str) -> str:
    """What is wrong with the machine and what to do about it; empty for a failure of the candidate.

    cache_dir: the folder of compiled kernels."""
    return next(filter(None, (_remedy(cause, cache_dir) for cause in _chain(error))), "")


def start_remedy(last_line: str) -> str:
    """Remedy for a worker that ended before it read its request, from the last line it printed."""
    if not re.match(
        r"(\w+\.)*(OSError|\w*(Permission|FileNotFound|NotADirectory|Import|ModuleNotFound)Error): ", last_line
    ):
        return ""
    return f"a worker cannot start on this machine: {last_line}; see `autotune doctor`"


_LOST_CARD = re.compile(
    r"(CUDA|driver|device).*(fallen off the bus|GPU is lost|uncorrectable ECC|unknown error|busy or unavailable"
    r"|initialization error|no CUDA-capable device)|No CUDA GPUs are available",
    re.IGNORECASE,
)
"""Messages of CUDA about a card that serves nobody any more; what a kernel does wrong has others."""


def card_remedy(message: str, device: str) -> str:
    """Remedy for a crash with this message, where the card is at fault; empty where the candidate may be."""
    if device == "cpu" or not _LOST_CARD.search(message):
        return ""
    return f"{device} fails: {one_line(message)}; look at `nvidia-smi`, reset the card or leave it out with --device"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, the errors it wraps (Inductor's `inner_exception`) and its causes."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        cause = waiting.pop(0)
        if cause is not None and not any(cause is other for other in seen):
            seen.append(cause)
            yield cause
            waiting += [getattr(cause, "inner_exception", None), cause.__cause__, cause.__context__]


def _remedy(error: BaseException, cache_dir: str) -> str:
    # Inductor's types by name: importing them would load the compiler into eager trials.
    kinds, text = {kind.__name__ for kind in type(error).__mro__}, str(error)
    if "InvalidCxxCompiler" in kinds or "Failed to find C compiler" in text:
        return f"torch.compile finds no working C++ compiler; {_COMPILER}, {EAGER}"
    if "CppCompileError" in kinds or "CalledProcessError" in kinds:
        output = f"{getattr(error, 'output', '') or ''}{getattr(error, 'stderr', '') or ''}"
        if match := _MISSING_HEADER.search(output):
            header = match[1] or match[2]
            package = "python3-dev" if header == "Python.h" else f"the package that has {header}"
            return f"the C++ compiler finds no {header}; install {package}, {EAGER}"
    if isinstance(error, OSError | ImportError) and _NO_EXEC in text:
        return f"compiled kernels cannot be loaded from {cache_dir} (is it mounted noexec?); {_CACHE}"
    if isinstance(error, OSError) and (
        error.errno in _UNWRITABLE or (error.errno in _NOT_THERE and _in_cache(error.filename, cache_dir))
    ):
        where = error.filename or cache_dir
        return f"{where} cannot be written ({error.strerror}); {_CACHE if _in_cache(where, cache_dir) else _SPACE}"
    return ""


_SPACE = "make room, or make it writable"


def _in_cache(where: object, cache_dir: str) -> bool:
    return bool(cache_dir) and str(where).startswith(cache_dir)

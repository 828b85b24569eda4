"""Reading files that a user named, atomic writes, digests and locks."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from autotune.errors import ConfigError, one_line


def read_text(path: Path, advice: str = "") -> str:
    """The text of a file. Raises ConfigError, which ends with `advice`."""
    end = f"; {advice}" if advice else ""
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows editors write a byte order mark
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist{end}") from None
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError(f"{path} cannot be read: {one_line(reason)}{end}") from None


def write_atomically(
    path: Path, *parts: str | bytes | memoryview, temporary: Path | None = None, durable: bool = True
) -> str:
    """Replace `path` atomically by the concatenated parts: a reader sees the old content or the new one. Returns the
    sha256 of the content. Raises OSError and leaves `path` unchanged.

    temporary: file that is written first; by default a name with this process's id in the same directory.
    durable: wait for the disk, so that the file outlives a power failure. A killed process loses nothing either way.
    """
    temporary = temporary or path.with_name(f".{path.name}.{os.getpid()}.tmp")
    digest = hashlib.sha256()
    try:
        with temporary.open("wb") as handle:
            for part in parts:
                content = part.encode() if isinstance(part, str) else part
                handle.write(content)
                digest.update(content)
            handle.flush()
            if durable:
                os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the directory itself may have been removed
            temporary.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Write a file's content, or a directory's entries, from the kernel's cache to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(file: Path, taken: Exception) -> Iterator[None]:
    """Hold a lock on `file` (created if missing) or on a directory during the block. The kernel releases it however the
    process ends. Raises `taken` if another process holds it, and OSError."""
    handle = os.open(file, os.O_RDONLY if file.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise taken from None
        yield
    finally:
        os.close(handle)

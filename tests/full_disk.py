"""A full disk, as a limit on the size of the files that this process may write."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def disk_of(file_bytes: int) -> Iterator[None]:
    """No file may grow beyond this: the writer meets an error in mid-file, as on a full disk.

    It holds for every file, pytest's own output too where that is a file: so never longer than one call.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

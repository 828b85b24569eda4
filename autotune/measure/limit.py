"""A memory limit that the operating system keeps: of this process, not of the compilers that it starts."""

import resource
import subprocess
import threading
from typing import Any


def limit_data(limit_bytes: int) -> None:
    """From now on this process can allocate no more than `limit_bytes`. What it starts can: a C++ compiler needs
    hundreds of MiB, which a training never holds.

    Processes inherit the soft limit, so it is lifted while one is started, for a few milliseconds.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
    starting = threading.Lock()

    class Popen(subprocess.Popen[Any]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            with starting:  # Inductor compiles in several threads
                resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
                try:
                    super().__init__(*arguments, **options)
                finally:
                    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))

    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    subprocess.Popen = Popen  # type: ignore[misc]  # Inductor has no place to say how its compiler is started

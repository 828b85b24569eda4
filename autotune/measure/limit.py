"""A memory limit enforced by the operating system, for this process but not for the compilers that it starts."""

import resource
import subprocess
import threading
from typing import Any

_limited = False


def is_limited() -> bool:
    """Whether this process was given a limit, lifted since or not."""
    return _limited


def lift_limit() -> None:
    """Let this process take what it needs to report a failure."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def limit_data(limit_bytes: int) -> None:
    """Limit this process to `limit_bytes` of memory from now on. Child processes are not limited: a C++ compiler needs
    hundreds of MiB that a training never holds.

    Child processes inherit the soft limit, so it is lifted for the few milliseconds in which one starts.
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

    global _limited
    _limited = True
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    subprocess.Popen = Popen  # type: ignore[misc]  # Inductor has no option for how its compiler is started

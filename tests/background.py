"""Processes that a test starts and that end with it, whatever becomes of the test."""

import contextlib
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

_STARTED: list["subprocess.Popen[str]"] = []


def begin(command: Sequence[str], **options: Any) -> "subprocess.Popen[str]":
    """A process that heeds signals, with text for its pipes. Options are those of Popen."""
    process = subprocess.Popen(command, text=True, preexec_fn=heed_signals, **options)
    _STARTED.append(process)
    return process


def end_all() -> None:
    for process in _STARTED:
        with contextlib.suppress(OSError), process:
            process.kill()
    _STARTED.clear()


def heed_signals() -> None:
    """Tests may themselves run under nohup, or in the background of a shell, which ignores Ctrl-C there."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)

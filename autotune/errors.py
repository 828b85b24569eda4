"""The exceptions a user can meet; the exit code is 1 where nothing else is said.

A message is one line: what, the value, what is allowed, what to do next.
"""

import difflib
from collections.abc import Iterable


class AutotuneError(Exception):
    """Base of all errors meant for the user's eyes."""

    exit_code = 1


class ConfigError(AutotuneError):
    """A file, key or flag value that is not allowed."""


class DataError(AutotuneError):
    """A data source or data directory that cannot be read or written."""


class CheckpointError(AutotuneError):
    """A checkpoint that is missing, damaged, or belongs to another training."""


class UnsupportedError(AutotuneError):
    """This machine cannot run what was asked for; the message is the reason."""


class MachineError(AutotuneError):
    """This machine lacks what every trial needs; the message says what to do."""


class NoFeasibleError(AutotuneError):
    """A search ended without one candidate that fits."""

    exit_code = 3


class InterruptedByUser(AutotuneError):  # noqa: N818 - an interruption is not an error
    """Ctrl-C or SIGTERM; everything so far is kept."""

    exit_code = 130


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, else the list of what is allowed."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"

"""Exceptions that a user can meet. The exit code is 1 unless a class sets another.

A message is one line: what, the value, what is allowed, what to do next.
"""

import difflib
import reprlib
from collections.abc import Iterable

LONGEST = 4000
"""Maximum characters of a message."""


class AutotuneError(Exception):
    """Base class of all errors that are shown to the user."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        # `shown` truncates values; this limits paths and messages of other libraries.
        super().__init__(one_line(message, LONGEST))


class ConfigError(AutotuneError):
    """Invalid file, key or flag value."""


class DataError(AutotuneError):
    """Data source or data directory that cannot be read or written."""


class CheckpointError(AutotuneError):
    """Checkpoint that is missing, damaged, or of another training."""


class UnsupportedError(AutotuneError):
    """This machine cannot run the request; the message is the reason."""


class MachineError(AutotuneError):
    """This machine lacks a requirement of every trial; the message says what to do."""


class NoFeasibleError(AutotuneError):
    """A search ended without a feasible candidate."""

    exit_code = 3


class InterruptedByUser(AutotuneError):  # noqa: N818 - an interruption is not an error
    """Ctrl-C, SIGTERM or a closed terminal; everything so far is kept."""

    exit_code = 130


SHOWN = 80
"""Maximum characters of a value in a message."""
_HUGE = 10**60
"""Larger integers are described instead of printed: Python refuses to print thousands of digits."""


class _Short(reprlib.Repr):
    """`repr` of any value in bounded time; long or nested values are truncated."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, SHOWN, SHOWN

    def repr_int(self, x: int, level: int) -> str:
        del level
        return repr(x) if abs(x) < _HUGE else f"a number of {x.bit_length()} bits"


def shown(value: object) -> str:
    """`repr` of a value for a message: control characters escaped, truncated to SHOWN characters."""
    return _cut(_Short().repr(value), SHOWN)


def one_line(text: str, most: int = 200) -> str:
    """Foreign text (another library's error, a file name) for a message: without line breaks and control characters,
    truncated."""
    return _cut(" ".join("".join(c if c.isprintable() else " " for c in text[: 4 * most]).split()), most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def suggest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the nearest known word, else the list of allowed words."""
    known = sorted(known)
    near = difflib.get_close_matches(word[:SHOWN], known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"

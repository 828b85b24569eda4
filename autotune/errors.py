"""The exceptions a user can meet; the exit code is 1 where nothing else is said.

A message is one line: what, the value, what is allowed, what to do next.
"""

import difflib
import reprlib
from collections.abc import Iterable

LONGEST = 4000
"""Characters of a message."""


class AutotuneError(Exception):
    """Base of all errors meant for the user's eyes."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        # Values are cut by `shown` where the message is made; this is for paths and for what others say.
        super().__init__(one_line(message, LONGEST))


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
    """Ctrl-C, SIGTERM or a terminal that was closed; everything so far is kept."""

    exit_code = 130


SHOWN = 80
"""Characters of a value in a message."""
_HUGE = 10**60
"""A whole number beyond this is described: Python refuses to print one of some thousand digits."""


class _Short(reprlib.Repr):
    """`repr` of anything at all, in a fixed time: of what is long or nested, the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, SHOWN, SHOWN

    def repr_int(self, x: int, level: int) -> str:
        del level
        return repr(x) if abs(x) < _HUGE else f"a number of {x.bit_length()} bits"


def shown(value: object) -> str:
    """A value as a message shows it: its `repr`, with control characters escaped, cut to fit a line."""
    return _cut(_Short().repr(value), SHOWN)


def one_line(text: str, most: int = 200) -> str:
    """A text of somebody else's (another library's error, a file's name) as a part of a message: without line breaks
    and control characters, cut."""
    return _cut(" ".join("".join(c if c.isprintable() else " " for c in text[: 4 * most]).split()), most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, else the list of what is allowed."""
    known = sorted(known)
    near = difflib.get_close_matches(word[:SHOWN], known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"

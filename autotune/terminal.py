"""Where text meets a terminal: what is printed is visible, in the terminal's encoding and within its width.

Nothing else prints. Text that a stranger may have written (messages of compilers, names in files) can hold sequences
that a terminal would execute; a stream may be closed, full, or unable to encode what is written.
"""

import codecs
import io
import os
import shutil
import sys
import textwrap
import unicodedata
from typing import TYPE_CHECKING, TextIO

from autotune.errors import AutotuneError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_ASCII = {
    "±": "+-", "\N{MULTIPLICATION SIGN}": "x", "→": "->", "←": "<-", "…": "...", "·": ".", "─": "-", "│": "|",
    "━": "=", "╸": "-", "╺": "-", "\N{NO-BREAK SPACE}": " ", "\N{EN DASH}": "-", "\N{EM DASH}": "-",
}  # fmt: skip
"""What is written in their place where an encoding lacks them."""
_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
"""Format characters that some languages are spelled with."""


def visible(text: str, keep: str = "") -> str:
    r"""The text with everything that would act on a terminal instead of being shown written as an escape (`\x1b`):
    control characters, changes of the writing direction, separators of lines, halves of characters. `keep`: those of
    them that stay."""
    if text.isprintable():
        return text
    return "".join(c if c in keep or not _acts(c) else c.encode("unicode_escape").decode() for c in text)


def _acts(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS


def encodable(text: str) -> str:
    """The text as stdout will show it, for what is laid out before it is written."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, _REPLACED).decode(encoding)


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lost), error.end


_REPLACED = "autotune.replaced"
codecs.register_error(_REPLACED, _replace)


def width(stream: TextIO | None = None) -> int | None:
    """Columns of the terminal that stdout (or another stream) is; None where it is none, and lines may be as long as
    they are."""
    return shutil.get_terminal_size().columns if (stream or sys.stdout).isatty() else None


def wrapped(text: str, columns: int | None) -> str:
    """Lines broken between words; values of `name  value` lines stay below each other. A word that is longer, such as
    a path or a command's argument, stays whole, so that it can be copied."""
    if columns is None:
        return text
    return "\n".join(part for line in text.split("\n") for part in _wrapped_line(line, columns))


def _wrapped_line(line: str, columns: int) -> list[str]:
    if len(line) <= columns:
        return [line]
    _, gap, value = line.partition("  ")
    indent = len(line) - len(value.lstrip()) if gap and value.strip() else 0
    indent = indent if indent <= columns // 2 else 2
    return textwrap.wrap(
        line, columns, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False,
        drop_whitespace=True, replace_whitespace=False,
    )  # fmt: skip


def write(text: str, end: str = "\n") -> None:
    """A result, as it is, to stdout. Raises BrokenPipeError for a reader that has left, AutotuneError for any other
    reason why it cannot be written."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        silence(sys.stdout)
        raise AutotuneError(
            f"stdout cannot be written: {error.strerror}; send it elsewhere, files that were written are whole"
        ) from None


def write_lines(text: str) -> None:
    """Lines for people, to stdout: visible, and broken between words where the terminal ends. Raises as `write`."""
    write(wrapped(encodable(visible(text, keep="\n")), width()))


def say(text: str) -> None:
    """Progress, a note or an error: one line to stderr."""
    print(wrapped(visible(text), width(sys.stderr)), file=sys.stderr, flush=True)


def silence(stream: TextIO) -> None:
    """Send what a stream still holds, and all that follows, nowhere: Python would complain of it once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def flush(stream: TextIO) -> None:
    """Write what the stream still holds; where that is impossible, forget it."""
    try:
        stream.flush()
    except OSError:
        silence(stream)


class _Unheard(io.FileIO):
    """Stderr, for which it is no error that nobody can read it: a search does not end with the terminal's window."""

    def write(self, content: "ReadableBuffer", /) -> int:
        try:
            return super().write(content) or 0
        except OSError:
            return memoryview(content).nbytes


def open_streams() -> None:
    """Make this process's standard streams fit for use. Closed ones lead nowhere: otherwise the next file to be
    opened would take their number, and get whatever a library prints."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=_REPLACED)
    encoding = sys.stderr.encoding if sys.stderr else "utf-8"
    raw = io.BufferedWriter(_Unheard(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(raw, encoding=encoding, errors=_REPLACED, line_buffering=True, write_through=True)

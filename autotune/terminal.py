"""Output to terminals and streams: escaped control characters, the terminal's encoding and width.

All printing goes through this module. Foreign text (messages of compilers, names in files) may contain terminal control
sequences; a stream may be closed, full, or unable to encode a character.
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
"""Replacements for characters that an encoding lacks."""
_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
"""Format characters that the spelling of some languages needs."""


def visible(text: str, keep: str = "") -> str:
    r"""The text with control characters, direction changes, line separators and lone surrogates escaped (`\x1b`), so
    that nothing in it acts on a terminal. keep: characters that are not escaped."""
    if text.isprintable():
        return text
    return "".join(c if c in keep or not _acts(c) else c.encode("unicode_escape").decode() for c in text)


def _acts(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS


def encodable(text: str) -> str:
    """The text as stdout will show it, for computing a layout."""
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
    """Columns of the terminal behind stdout (or another stream); None if it is not a terminal, so that lines are not
    wrapped."""
    return shutil.get_terminal_size().columns if (stream or sys.stdout).isatty() else None


def wrapped(text: str, columns: int | None) -> str:
    """Wrap lines between words; values of `name  value` lines stay aligned. Longer words, such as paths, are not
    broken, so that they can be copied."""
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
    """Write a result to stdout, unchanged. Raises BrokenPipeError if the reader has closed the pipe, AutotuneError for
    any other failure."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        silence(sys.stdout)
        raise AutotuneError(
            f"stdout cannot be written: {error.strerror}; redirect it elsewhere, files that were written are complete"
        ) from None


def write_lines(text: str) -> None:
    """Write lines for people to stdout: escaped, and wrapped to the terminal. Raises as `write`."""
    write(wrapped(encodable(visible(text, keep="\n")), width()))


def say(text: str) -> None:
    """Write progress, a note or an error as one line to stderr."""
    print(wrapped(visible(text), width(sys.stderr)), file=sys.stderr, flush=True)


def silence(stream: TextIO) -> None:
    """Discard the buffer of a stream and everything written later; Python would report the error again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def flush(stream: TextIO) -> None:
    """Flush the stream; discard its buffer if that fails."""
    try:
        stream.flush()
    except OSError:
        silence(stream)


class _Unheard(io.FileIO):
    """Stderr that ignores write errors: a search does not end when its terminal is closed."""

    def write(self, content: "ReadableBuffer", /) -> int:
        try:
            return super().write(content) or 0
        except OSError:
            return memoryview(content).nbytes


def open_streams() -> None:
    """Prepare the standard streams of this process. Closed ones are opened on /dev/null: otherwise the next file to be
    opened would get their number, and with it everything that libraries print."""
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

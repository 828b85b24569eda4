"""Text and tables for a terminal of any width."""

import io
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from autotune import terminal

Line = Mapping[str, str]
"""Line of a table: texts by column header. A text under the header "" marks the best line."""

FIGURES = {
    "trial", "predicted loss", "tokens/s", "MFU", "peak", "allocated", "predicted", "batch", "count",
    "ok/trials", "best", "gain", "least memory", "share", "reserved", "device", "retries",
    "without drift", "chunk tokens", "rival", "loss", "length", "nats",
}  # fmt: skip
"""Headers of numeric columns: right-aligned, never broken."""
_WORD = 20
"""Least width of a column of words whose longest word is longer; such words are folded."""


def print_text(content: RenderableType, width: int | None = None) -> None:
    """Write to stdout: coloured and within its width on a terminal, as wide as needed elsewhere. Raises BrokenPipeError
    if the reader is gone (rich itself would exit)."""
    width = width or terminal.width()
    console = Console(
        file=io.StringIO(), force_terminal=sys.stdout.isatty(), width=width or _UNLIMITED, highlight=False
    )  # fmt: skip
    with console.capture() as capture:
        console.print(content, crop=False)
    terminal.write("\n".join(line.rstrip() for line in capture.get().splitlines()))


_UNLIMITED = 1 << 16


def cell(text: str, style: str = "") -> Text:
    """The text with terminal control characters escaped."""
    return Text(terminal.encodable(terminal.visible(text)), style=style)


@dataclass(frozen=True)
class Prose:
    """Line that is wrapped between words at the terminal's width, but not within a path."""

    text: str
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield command(terminal.wrapped(cell(self.text).plain, options.max_width), self.style)


def command(text: str, style: str = "") -> Text:
    """Line that the terminal wraps, so that it can be copied as one line."""
    return Text(text, style=style, no_wrap=True, overflow="ignore")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Table for any width. Figures are never broken, words are if there is too little room; columns that do not fit
    go into a further table below, which repeats the key columns. (rich would truncate or fold the figures.)"""

    lines: Sequence[Line]
    figures: Collection[str]
    key: int
    """Number of leading columns that identify a line."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for headers in self._blocks(options.max_width):
            widths, table = self._widths(headers, options.max_width), Table(box=_BOX, show_edge=False, pad_edge=False)
            table.padding = (0, _GAP - 1, 0, 0)  # the box has one column of its own
            for header in headers:
                right = "right" if header in self.figures else "left"
                table.add_column(cell(header), justify=right, width=widths[header], overflow="fold")  # type: ignore[arg-type]
            for row in self.lines:
                table.add_row(*(cell(row[header]) for header in headers), style=_BEST if row.get("") else "")
            yield Group("", table)

    def _blocks(self, width: int) -> list[list[str]]:
        """Headers of each table."""
        named = [header for header in self.lines[0] if header]
        key = [header for header in ("", *named[: self.key]) if header in self.lines[0]]
        blocks = [list(key)]
        for header in named[self.key :]:
            if self._room([*blocks[-1], header], width) < 0 and blocks[-1] != key:
                blocks.append(list(key))
            blocks[-1].append(header)
        return blocks

    def _room(self, headers: Sequence[str], width: int) -> int:
        """Columns of the terminal left over by the narrowest table of these headers."""
        return width - sum(self._least(header) + _GAP for header in headers) + _GAP

    def _least(self, header: str) -> int:
        """Least width: longest figure or word."""
        if header in self.figures or not header:
            return self._whole(header)
        words = [cell_len(word) for text in self._texts(header) for word in text.split()]
        return min(_WORD, max(words, default=1))

    def _whole(self, header: str) -> int:
        """Width of the longest text."""
        return max(map(cell_len, self._texts(header)))

    def _texts(self, header: str) -> list[str]:
        return [cell(text).plain for text in (header, *(row[header] for row in self.lines))]

    def _widths(self, headers: Sequence[str], width: int) -> dict[str, int]:
        """Width by header; spare room goes first to the columns that want least of it."""
        widths, room = {header: self._least(header) for header in headers}, self._room(headers, width)
        wishes = sorted((self._whole(header) - least, header) for header, least in widths.items())
        for served, (wish, header) in enumerate(wishes):
            given = min(wish, room // (len(wishes) - served)) if room > 0 else 0
            widths[header] += given
            room -= given
        widths[headers[-1]] = max(1, widths[headers[-1]] + min(room, 0))  # too narrow for the key and one column
        return widths


_GAP = 2
_BEST = "bold green"
_BOX = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
"""Rule below the headers, in ASCII."""


def make_table(lines: Sequence[Line], figures: Collection[str] = FIGURES, key: int = 1) -> Listing:
    """Table of lines with the same headers; the first `key` columns identify a line."""
    return Listing(lines=lines, figures=figures, key=key)


def fmt(value: float | None, spec: str, unit: str = "") -> str:
    """Formatted value with its unit; - for an unknown one."""
    return "-" if value is None else format(value, spec) + unit

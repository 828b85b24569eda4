"""Progress of a running search: live on a terminal, plain lines on stderr otherwise."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from autotune.config.candidate import Candidate
from autotune.runs.races import Reading
from autotune.runs.records import TrialRecord
from autotune.search.space import in_words
from autotune.search.state import Event, Notify
from autotune.terminal import say, visible
from autotune.units import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from rich.console import RenderableType


@contextlib.contextmanager
def show_progress(remarks: Sequence[str] = ()) -> Iterator[Notify]:
    """A `notify` for `search`: a budget bar, the current trial and the best so far, or one line a trial. The remarks
    come before the first one."""
    if not sys.stderr.isatty():
        yield _after(remarks, print_event)
        return
    from rich.console import Console
    from rich.live import Live

    seen: list[tuple[float, Event]] = []  # when the latest event came, and the event

    running: dict[tuple[bool, int], tuple[float, Event]] = {}  # since when, by number of the trial or rung

    def draw() -> "RenderableType":
        return _picture(*seen[0], list(running.values())) if seen else ""

    # Live calls `draw` by itself, so that the bar moves while a trial runs.
    with Live(get_renderable=draw, console=Console(stderr=True), refresh_per_second=4, transient=True) as live:

        def notify(event: Event) -> None:
            seen[:] = [(time.monotonic(), event)]
            running[event.role == "race", event.trial] = seen[0]
            if ended := _ended(event):
                del running[event.role == "race", event.trial]
                live.console.print(visible(ended), markup=False, highlight=False)

        yield _after(remarks, notify)


def _after(remarks: Sequence[str], notify: Notify) -> Notify:
    left = list(remarks)

    def tell(event: Event) -> None:
        while left:
            print(f"warning: {left.pop(0)}", file=sys.stderr, flush=True)
        notify(event)

    return tell


def print_event(event: Event) -> None:
    """One plain line for each trial and rung that has ended."""
    if ended := _ended(event):
        clock = f"[{format_duration(event.elapsed_seconds)}/{format_duration(event.budget_seconds)}]"
        say(f"{clock} {ended}")


def _ended(event: Event) -> str:
    """What has ended, on one line; empty where something begins."""
    verdict, record = event.verdict, event.record
    if event.reading is not None:
        first = verdict.race is not None and verdict.race.order[:1] == (event.reading.rival,)
        return reading_line(event.reading, event.candidate) + ("  <- first" if first else "")
    if record is None:
        return ""
    best = verdict.winner is not None and verdict.winner.trial == record.trial
    return trial_line(record) + ("  <- best" if best else "")


def reading_line(reading: Reading, candidate: Candidate) -> str:
    """A rung on one line: number, rival, length, outcome, recipe."""
    if reading.loss is None:
        outcome = reading.status + (f" ({reading.message})" if reading.message else "")
    else:
        outcome = f"loss {reading.loss:.3f} after {format_count(reading.tokens or 0)} tokens"
    length = f"{reading.fraction:.1%} of the training"
    return f"rung {reading.reading:>4} rival {reading.rival:>2} {length}, {outcome}: {candidate.recipe}"


def trial_line(record: TrialRecord) -> str:
    """A record on one line: number, role, outcome, candidate."""
    result = record.result
    if record.objective is None:
        outcome = result.status + (f" ({result.message})" if result.message else f" ({result.phase})")
    else:
        peak = format_bytes(result.peak_bytes)
        outcome = f"{result.tokens_per_second:,.0f} tokens/s, {peak}"
        if record.predicted_loss is not None:
            outcome += f", predicted loss {record.predicted_loss:.3f}"
    return f"trial {record.trial:>3} {record.role:<8} {outcome}: {in_words(record.candidate)}"


def _picture(since: float, event: Event, running: Sequence[tuple[float, Event]]) -> "RenderableType":
    """Budget bar at `event`, which came at `since`; what is running since when; best so far."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    waited = time.monotonic() - since
    elapsed = min(event.elapsed_seconds + waited, event.budget_seconds)
    bar = Table.grid(padding=(0, 1))
    clock = f"{format_duration(elapsed)} of {format_duration(event.budget_seconds)}"
    bar.add_row("budget", ProgressBar(total=event.budget_seconds, completed=elapsed), clock)
    lines = [Text(visible(_running(*one)), style="cyan") for one in running] or [Text("between trials")]
    if event.verdict.winner is not None:
        lines.append(Text(visible("best so far: " + trial_line(event.verdict.winner)), style="green"))
    return Group(bar, *lines)


def _running(since: float, event: Event) -> str:
    what = f"rung {event.trial}" if event.role == "race" else f"trial {event.trial} {event.role}"
    return f"{what} for {format_duration(time.monotonic() - since)}: {in_words(event.candidate)}"

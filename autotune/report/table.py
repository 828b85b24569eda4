"""Runs as text for a terminal: the verdict, the trials, what failed and why, and what to do next."""

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
from autotune.config.candidate import Shape
from autotune.kernels import registry
from autotune.measure.types import cache_text
from autotune.report.run import (
    Row,
    Run,
    at_first_speed,
    baseline_speed,
    baseline_trial,
    best_speed,
    best_trial,
    failures,
    gain,
    next_command,
    peak_view,
    ranked,
    trade_offs,
)
from autotune.runs.records import COLUMNS, PLAN_FIELDS
from autotune.runs.verdict import Review
from autotune.units import format_bytes, format_count, format_duration

Line = Mapping[str, str]
"""One line of a table: its texts by column header. A text under the header "" marks the best."""

_FIGURES = {
    "trial", "predicted loss", "tokens/s", "MFU", "peak", "allocated", "predicted", "batch", "count",
    "ok/trials", "best", "gain", "least memory", "share", "reserved", "device", "retries",
    "without drift", "chunk tokens",
}  # fmt: skip
_SPENT = {
    "compiling": ("compile",),
    "warming up": ("warmup",),
    "measuring": ("measure",),
    "between trials": ("idle",),
    "starting trials": ("start", "build", "verify", "done"),
}
"""Phases of trials, as they are shown."""
_HEADERS = {"activation_checkpointing": "recompute", "loss_chunk_tokens": "chunk tokens"}
"""Of columns that have a shorter name."""
_PLAN = {
    _HEADERS.get(name, name): name for name in COLUMNS if name in (*PLAN_FIELDS, "optimizer")
    and name != "micro_batch_size"  # it stands under `batch`
}  # fmt: skip
"""Columns of trials.csv that say how a step is executed, by header."""
_ALIKE = ("model", *_PLAN)
"""What trials often share."""
_WORD = 20
"""A column of words is at least as wide as its longest word up to this length; longer words are folded."""


def print_text(content: RenderableType, width: int | None = None) -> None:
    """Write to stdout: coloured and within its width on a terminal, as wide as needed elsewhere. A reader that leaves
    early raises BrokenPipeError, which rich itself would turn into an exit."""
    width = width or terminal.width()
    console = Console(
        file=io.StringIO(), force_terminal=sys.stdout.isatty(), width=width or _UNLIMITED, highlight=False
    )  # fmt: skip
    with console.capture() as capture:
        console.print(content, crop=False)
    terminal.write("\n".join(line.rstrip() for line in capture.get().splitlines()))


_UNLIMITED = 1 << 16


def cell(text: str, style: str = "") -> Text:
    """A text as it can be shown: what would act on the terminal is written as an escape."""
    return Text(terminal.encodable(terminal.visible(text)), style=style)


@dataclass(frozen=True)
class Prose:
    """A line that is broken between words where the terminal ends, but not within a path."""

    text: str
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield command(terminal.wrapped(cell(self.text).plain, options.max_width), self.style)


def command(text: str, style: str = "") -> Text:
    """A line that is left to the terminal to wrap, so that it can be copied whole."""
    return Text(text, style=style, no_wrap=True, overflow="ignore")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Lines with the same headers. Figures are never broken, words are where there is too little room; columns that
    do not fit go into a further table below, beside the first ones again."""

    lines: Sequence[Line]
    figures: Collection[str]
    key: int
    """How many columns say which line it is."""

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
        """The headers of each table."""
        named = [header for header in self.lines[0] if header]
        key = [header for header in ("", *named[: self.key]) if header in self.lines[0]]
        blocks = [list(key)]
        for header in named[self.key :]:
            if self._room([*blocks[-1], header], width) < 0 and blocks[-1] != key:
                blocks.append(list(key))
            blocks[-1].append(header)
        return blocks

    def _room(self, headers: Sequence[str], width: int) -> int:
        """What a table of these would leave, as narrow as it can be."""
        return width - sum(self._least(header) + _GAP for header in headers) + _GAP

    def _least(self, header: str) -> int:
        """Columns for the longest figure or word."""
        if header in self.figures or not header:
            return self._whole(header)
        words = [cell_len(word) for text in self._texts(header) for word in text.split()]
        return min(_WORD, max(words, default=1))

    def _whole(self, header: str) -> int:
        """Columns for the longest text."""
        return max(map(cell_len, self._texts(header)))

    def _texts(self, header: str) -> list[str]:
        return [cell(text).plain for text in (header, *(row[header] for row in self.lines))]

    def _widths(self, headers: Sequence[str], width: int) -> dict[str, int]:
        """Of each column: what room there is goes to those that want little first."""
        widths, room = {header: self._least(header) for header in headers}, self._room(headers, width)
        wishes = sorted((self._whole(header) - least, header) for header, least in widths.items())
        for served, (wish, header) in enumerate(wishes):
            given = min(wish, room // (len(wishes) - served)) if room > 0 else 0
            widths[header] += given
            room -= given
        widths[headers[-1]] = max(1, widths[headers[-1]] + min(room, 0))  # not even the key and one column fit
        return widths


_GAP = 2
_BEST = "bold green"
_BOX = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
"""A line below the headers, in characters that every encoding has."""


def plain(lines: Sequence[Line], figures: Collection[str] = _FIGURES, key: int = 1) -> Listing:
    """Lines with the same headers as a table for any width; the first `key` columns say which line it is."""
    return Listing(lines=lines, figures=figures, key=key)


def number(value: float | None, spec: str, unit: str = "") -> str:
    """The value in a format; - for an unknown one."""
    return "-" if value is None else format(value, spec) + unit


def run_report(run: Run, top: int) -> Group:
    """One run, its `top` best trials in full."""
    feasible = ranked(run)
    parts: list[RenderableType] = [Prose(heading(run), "bold"), *map(Prose, verdict(run))]
    if feasible:
        lines = [cells(run, row) for row in feasible[:top]]
        same = _constant(lines)
        parts.append(plain([{h: text for h, text in line.items() if h not in same} for line in lines]))
        if notes := ", ".join(f"{header} {text}" for header, text in same.items() if text != "-"):
            parts.append(Prose(f"All of these: {notes}."))
    if len(feasible) > top:
        parts.append(Prose(f"{len(feasible) - top} more in {run.path / 'trials.csv'}, or with --top {len(feasible)}."))
    parts += [plain(lines) for lines in sections(run).values() if lines]
    return Group(*parts, "", command(cell(f"next: {next_command(run)}").plain, "bold"))


def comparison(runs: Sequence[Run]) -> Group:
    """Several runs side by side, a line each."""
    notes = []
    if len({run.environment.fingerprint for run in runs}) > 1:
        notes.append("These runs are of different machines or versions: their numbers do not compare plans alone.")
    if len({run.settings.objective for run in runs}) > 1:
        notes.append("These runs have different objectives.")
    summaries = plain([_summary(run) for run in runs])
    return Group(summaries, *map(Prose, notes), *(command(cell(f"next: {next_command(run)}").plain) for run in runs))


def heading(run: Run) -> str:
    """What was asked: where, on what, for what, for how long."""
    asked, machine = run.settings, run.environment
    objective = "least predicted loss" if run.lower_is_better else "most tokens/s"
    limit, budget = format_bytes(asked.memory_limit_bytes), format_duration(asked.budget_seconds)
    return (
        f"{run.path}: {objective} within {limit} on {machine.device_name} ({machine.device}), "
        f"torch {machine.torch}, budget {budget}"
    )


def verdict(run: Run) -> list[str]:
    """The answer in a few lines, without markup."""
    ended = len([row for row in run.trials if row["status"] == "ok"])
    lines = [f"trials: {len(run.trials)}, of which {ended} ran to their end"]
    best, baseline = best_trial(run), baseline_trial(run)
    if best is None and run.candidate is None:
        what = (run.review and run.review.remedy) or "give more memory, a longer budget or a smaller model."
        lines.append(f"No candidate is feasible: {what}")
    elif best is None:
        lines.append("best.toml is of none of these trials: mend the run with `autotune report --rebuild`.")
    else:
        confirmed = _standing(run, best)
        cached = cache_text(run.measured.get("compile_cache_hits"), run.measured.get("compile_cache_misses"))
        found = f", {cached} from the compile cache" if cached else ""
        lines.append(f"best: trial {best['trial']}{confirmed}: {_measured(run, best, best_speed(run, best))}{found}")
        if run.review and run.review.unsettled:
            lines.append(f"warning: not settled: {run.review.unsettled}")
    tried = baseline or next((row for row in run.trials if row["role"] == "baseline"), None)
    figures = _measured(run, tried, baseline_speed(run, tried)) if tried else ""
    lines.append(f"baseline: trial {tried['trial']}: {figures}" if tried else "baseline: not measured")
    if best and baseline:
        lines.append(f"gain: {_gain_text(run, best, baseline)}")
    lines += _review_lines(run.review) if run.review else []
    return lines


def _review_lines(review: Review) -> list[str]:
    lines = []
    if review.tied_with:
        trials = ", ".join(map(str, review.tied_with))
        lines.append(f"a tie: trial {trials} cannot be told from the best, which needs the least memory of them")
    if review.fell_through:
        trials = ", ".join(map(str, review.fell_through))
        lines.append(f"trial {trials} was better, but failed its confirmation")
    if review.drift is not None:
        lines.append(
            f"warning: the baseline ran at {review.drift:.2f}x its first speed when it was confirmed: the machine "
            "changed during the search" + (", trials are ranked without its drift" if review.at_first_speed else "")
        )
    if review.law:
        lines.append(f"predicted losses are by the law {review.law}")
    if review.overhead is not None:
        lines.append(_time_text(review))
    return lines + [f"note: {note}" for note in review.notes]


def _time_text(review: Review) -> str:
    """Where the budget went."""
    spent = {name: sum(review.seconds.get(phase, 0.0) for phase in phases) for name, phases in _SPENT.items()}
    shares = ", ".join(f"{name} {seconds / review.spent_seconds:.0%}" for name, seconds in spent.items())
    return (
        f"time: {format_duration(review.spent_seconds)}: {shares}; harness overhead {review.overhead:.0%}, "
        f"{review.trials_per_hour:.0f} trials an hour"
    )


def sections(run: Run) -> dict[str, list[Line]]:
    """What there is to say beside the ranked trials, by title; a table with nothing in it is empty."""
    front, review = trade_offs(run), run.review
    same = _constant([cells(run, row) for row in ranked(run)]) if front else {}
    shown = {"tokens/s", "predicted loss", "batch", *_ALIKE} - same.keys()
    objective, change = ("predicted loss", "+.3f") if run.lower_is_better else ("tokens/s", "+.1%")
    return {
        # of one trial that beats all others in both there is nothing to choose
        "Speed against memory": [
            {"least memory": format_bytes(row[peak_view(front)]), "trial": str(row["trial"])}
            | {header: text for header, text in cells(run, row).items() if header in shown}
            for row in (front if len(front) > 1 else ())
        ],
        "One step from the best": [
            {
                "one step from the best": f"{step.knob} {step.winner} -> {step.value}",
                "trial": str(step.trial),
                objective: format(step.objective, change),
                "peak": "-" if step.peak is None else f"{step.peak - 1:+.1%}",
            }
            for step in (review.steps if review else ())
        ],
        "What matters": [
            {"what matters": name, "share": f"{share:.0%}"}
            for name, share in (review.importance.items() if review else ())
        ],
        "Not feasible": [
            {
                "not feasible": failure.status,
                "count": str(len(failure.trials)),
                "trials": ", ".join(map(str, failure.trials[:4])) + (", ..." if len(failure.trials) > 4 else ""),
                "reason": failure.reason or "-",
            }
            for failure in failures(run)
        ],
    }


def _standing(run: Run, best: Row) -> str:
    if best["role"] != "final":
        return ", not confirmed in a second process"
    composed = " by composed steps" if run.measured.get("steps") == "composed" else ""  # whole ones did not fit
    review = run.review
    if review and review.unsettled:
        return f", measured again{composed}, not settled"
    return f", confirmed{composed}" + (f" in {review.speed.measurements} processes" if review and review.speed else "")


def _measured(run: Run, row: Row, speed: tuple[float | None, float | None]) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row['message'] or '-'}"
    loss = f"predicted loss {number(row['predicted_loss'], '.3f')}, " if run.lower_is_better else ""
    return f"{loss}{_rate(*speed)} tokens/s, peak {format_bytes(row[peak_view([row])])}"


def _gain_text(run: Run, best: Row, baseline: Row) -> str:
    if best["candidate_id"] == baseline["candidate_id"]:
        return "none, the baseline is the best that was found"
    gained = gain(run, best, baseline)
    loss = f"{number(gained.loss, '+.3f')} predicted loss; " if run.lower_is_better else ""
    speed = number(gained.speed, ".2f", "x") + ("" if gained.speed_ci95 is None else f" ± {gained.speed_ci95:.2f}")
    return f"{loss}{speed} the baseline's tokens/s at {number(gained.memory, '.2f', 'x')} its peak memory"


def cells(run: Run, row: Row) -> dict[str, str]:
    """A trial as it is shown, by column header."""
    best = best_trial(run)
    loss = {"predicted loss": number(row["predicted_loss"], ".3f")} if run.lower_is_better else {}
    corrected = number(at_first_speed(run, row), ".3f" if run.lower_is_better else ",.0f")
    drifted = {"without drift": corrected} if run.review and run.review.at_first_speed else {}
    return {
        "": "*" if best is not None and row["trial"] == best["trial"] else "",
        "trial": str(row["trial"]),
        "role": row["role"],
        **loss,
        "tokens/s": _rate(row["tokens_per_second"], row["tokens_per_second_ci95"]),
        **drifted,
        "MFU": number(row["mfu"], ".1%"),
        "peak": format_bytes(row[peak_view([row])]),
        "allocated": format_bytes(row["peak_allocated_bytes"]),
        "predicted": format_bytes(row["predicted_peak_bytes"]),
        "batch": f"{row['micro_batch_size']} x {row['gradient_accumulation_steps']}",
        "model": _model(row),
        **{header: _plan_text(row, name) for header, name in _PLAN.items()},
    }


def _model(row: Row) -> str:
    words = row["vocab_size"]
    vocabulary = "" if words in (None, Shape().vocab_size) else f"vocab {words}, "
    shape = f"{row['n_layer']}x{row['n_head']}x{row['n_embd']}, T {row['block_size']}"
    return f"{shape}, {vocabulary}{format_count(row['parameters'])}"


def _plan_text(row: Row, column: str) -> str:
    """- for what the trial's loss does not read, and for a column that an older file lacks."""
    value = row[column]
    whole = {kernel.name for kernel in registry.kernels("loss") if not kernel.chunked}
    unread = column == "loss_chunk_tokens" and row["loss"] in whole
    return "-" if value in (None, "") or unread else str(value)


def _rate(speed: float | None, half: float | None) -> str:
    return number(speed, ",.0f") + ("" if half is None else f" ± {half:,.0f}")


def _constant(lines: Sequence[Line]) -> dict[str, str]:
    """What all lines share of the plan, and columns in which nothing is known: said once, below the table."""
    first = lines[0]
    shared = {header for header in first if all(line[header] == first[header] for line in lines)}
    return {h: first[h] for h in first if h in shared and (h in _ALIKE or first[h] == "-")}


def _summary(run: Run) -> Line:
    best, baseline = best_trial(run), baseline_trial(run)
    gained = gain(run, best, baseline) if best and baseline else None
    ok = len([row for row in run.trials if row["status"] == "ok"])
    shown = cells(run, best) if best else {}
    return {
        "run": str(run.path),
        "machine": run.environment.device_name,
        "ok/trials": f"{ok}/{len(run.trials)}",
        "objective": run.settings.objective,
        "best": shown.get("trial", "-"),
        "gain": number(gained.speed if gained else None, ".2f", "x"),
        **{header: shown.get(header, "-") for header in ("predicted loss", "tokens/s", "peak", "batch", *_ALIKE)},
    }

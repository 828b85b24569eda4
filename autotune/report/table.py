"""Runs as text for a terminal: the verdict, the trials, what failed and why, and what to do next."""

import sys
from collections.abc import Collection, Mapping, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from autotune.measure.review import Review
from autotune.measure.types import cache_text
from autotune.report.run import (
    Row,
    Run,
    at_first_speed,
    baseline_trial,
    best_trial,
    failures,
    gain,
    next_command,
    peak_view,
    ranked,
    trade_offs,
)
from autotune.units import format_bytes, format_count, format_duration

Line = Mapping[str, str]
"""One line of a table: its texts by column header. A text under the header "" marks the best."""

_FIGURES = {
    "trial", "predicted loss", "tokens/s", "MFU", "peak", "allocated", "predicted", "batch", "count",
    "ok/trials", "best", "gain", "least memory", "share", "reserved", "device", "retries",
    "without drift",
}  # fmt: skip
_SPENT = {
    "compiling": ("compile",),
    "warming up": ("warmup",),
    "measuring": ("measure",),
    "between trials": ("idle",),
    "starting trials": ("start", "build", "verify", "done"),
}
"""Phases of trials, as they are shown."""
_PLAN = ("attention", "loss", "compile", "dtype", "optimizer", "allocator")
_ALIKE = ("model", "recompute", *_PLAN)
"""What trials often share."""


def print_text(content: RenderableType, width: int | None = None) -> None:
    """Write to stdout: coloured on a terminal and as wide as needed elsewhere. A reader that leaves
    early raises BrokenPipeError, which rich itself would turn into an exit."""
    console = Console(width=width or (None if sys.stdout.isatty() else 220), highlight=False)
    with console.capture() as capture:
        console.print(content)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def plain(lines: Sequence[Line], figures: Collection[str] = _FIGURES) -> Table:
    """Lines with the same headers. Figures are never broken, words are where the terminal is narrow."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in lines[0]:
        narrow = header in figures
        table.add_column(header, justify="right" if narrow else "left", no_wrap=narrow or not header, overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line.values()), style="bold green" if line.get("") else "")
    return table


def number(value: float | None, spec: str, unit: str = "") -> str:
    """The value in a format; - for an unknown one."""
    return "-" if value is None else format(value, spec) + unit


def run_report(run: Run, top: int) -> Group:
    """One run, its `top` best trials in full."""
    feasible = ranked(run)
    parts: list[RenderableType] = [_line(heading(run), "bold"), *map(_line, verdict(run))]
    if feasible:
        lines = [cells(run, row) for row in feasible[:top]]
        same = _constant(lines)
        parts.append(plain([{h: text for h, text in line.items() if h not in same} for line in lines]))
        if notes := ", ".join(f"{header} {text}" for header, text in same.items() if text != "-"):
            parts.append(Text(f"All of these: {notes}."))
    if len(feasible) > top:
        parts.append(_line(f"{len(feasible) - top} more in {run.path / 'trials.csv'}, or with --top {len(feasible)}."))
    parts += [plain(lines) for lines in sections(run).values() if lines]
    return Group(*parts, _line(f"next: {next_command(run)}", "bold"))


def comparison(runs: Sequence[Run]) -> Group:
    """Several runs side by side, a line each."""
    notes = []
    if len({run.environment.fingerprint for run in runs}) > 1:
        notes.append("These runs are of different machines or versions: their numbers do not compare plans alone.")
    if len({run.settings.objective for run in runs}) > 1:
        notes.append("These runs have different objectives.")
    summaries = plain([_summary(run) for run in runs])
    return Group(summaries, *map(_line, notes), *(_line(f"next: {next_command(run)}") for run in runs))


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
        confirmed = ", confirmed" if best["role"] == "final" else ", not confirmed in a second process"
        if best["role"] == "final" and run.measured.get("steps") == "composed":
            confirmed += " by composed steps"  # whole ones did not fit in the time left
        cached = cache_text(run.measured.get("compile_cache_hits"), run.measured.get("compile_cache_misses"))
        found = f", {cached} from the compile cache" if cached else ""
        lines.append(f"best: trial {best['trial']}{confirmed}: {_measured(run, best)}{found}")
    tried = baseline or next((row for row in run.trials if row["role"] == "baseline"), None)
    lines.append(f"baseline: trial {tried['trial']}: {_measured(run, tried)}" if tried else "baseline: not measured")
    if best and baseline:
        lines.append(f"gain: {_gain_text(run, best, baseline)}")
    lines += _review_lines(run.review) if run.review else []
    return lines


def _review_lines(review: Review) -> list[str]:
    lines = []
    if review.tied_with:
        trials = ", ".join(map(str, review.tied_with))
        lines.append(f"a tie: trial {trials} lies within the intervals; the best needs the least memory of them")
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
    shown = ("tokens/s", "predicted loss", "batch", "model", "recompute", *_PLAN[:4])
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


def _measured(run: Run, row: Row) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row['message'] or '-'}"
    loss = f"predicted loss {number(row['predicted_loss'], '.3f')}, " if run.lower_is_better else ""
    return f"{loss}{_rate(row)} tokens/s, peak {format_bytes(row[peak_view([row])])}"


def _gain_text(run: Run, best: Row, baseline: Row) -> str:
    if best["candidate_id"] == baseline["candidate_id"]:
        return "none, the baseline is the best that was found"
    gained = gain(best, baseline)
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
        "tokens/s": _rate(row),
        **drifted,
        "MFU": number(row["mfu"], ".1%"),
        "peak": format_bytes(row[peak_view([row])]),
        "allocated": format_bytes(row["peak_allocated_bytes"]),
        "predicted": format_bytes(row["predicted_peak_bytes"]),
        "batch": f"{row['micro_batch_size']} x {row['gradient_accumulation_steps']}",
        "model": f"{row['n_layer']}x{row['n_head']}x{row['n_embd']}, T {row['block_size']}, "
        + format_count(row["parameters"]),
        "recompute": row["activation_checkpointing"],
        **{name: row[name] for name in _PLAN},
    }


def _rate(row: Row) -> str:
    half = row["tokens_per_second_ci95"]
    return number(row["tokens_per_second"], ",.0f") + ("" if half is None else f" ± {half:,.0f}")


def _constant(lines: Sequence[dict[str, str]]) -> dict[str, str]:
    """What all lines share of the plan, and columns in which nothing is known: said once, below the table."""
    first = lines[0]
    shared = {header for header in first if all(line[header] == first[header] for line in lines)}
    return {h: first[h] for h in first if h in shared and (h in _ALIKE or first[h] == "-")}


def _line(text: str, style: str = "") -> Text:
    """Left to the terminal to wrap, so that a path or a command can be copied whole."""
    return Text(text, style=style, no_wrap=True, overflow="ignore")


def _summary(run: Run) -> Line:
    best, baseline = best_trial(run), baseline_trial(run)
    gained = gain(best, baseline) if best and baseline else None
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

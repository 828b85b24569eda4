"""A run as text: verdict, ranked trials, failures, next command; as tables for a terminal or a page, and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.console import Group, RenderableType

from autotune.config.candidate import Shape
from autotune.config.toml import BEST_TOML
from autotune.config.train_settings import train_command
from autotune.environment import NOT_MEASURED
from autotune.kernels import registry
from autotune.measure.types import cache_text
from autotune.report.table import Line, Prose, cell, command, fmt, make_table
from autotune.runs.directory import TRIALS_CSV, VERDICT_JSON, trial_in_flight
from autotune.runs.races import Change, RaceVerdict, Rival, by_rival
from autotune.runs.read import Row, Run, advice, peak_bytes
from autotune.runs.records import COLUMNS, PLAN_FIELDS, TrialRecord
from autotune.runs.verdict import IDLE, RACING, Speed, Verdict
from autotune.units import format_bytes, format_count, format_duration

SPENT = {
    "compiling": ("compile",),
    "warming up": ("warmup",),
    "measuring": ("measure",),
    "racing": (RACING,),
    "between trials": (IDLE,),
    "starting trials": ("start", "build", "verify", "done"),
}
"""Phases of trials by their name in the report."""
_HEADERS = {"activation_checkpointing": "recompute", "loss_chunk_tokens": "chunk tokens"}
"""Shorter headers of some columns."""
PLAN_COLUMNS = {
    _HEADERS.get(name, name): name for name in COLUMNS if name in (*PLAN_FIELDS, "optimizer")
    and name != "micro_batch_size"  # shown under `batch`
}  # fmt: skip
"""Columns of trials.csv that say how a step is executed, by header."""
COUNT_COLUMNS = {
    "layers": "n_layer", "heads": "n_head", "width": "n_embd", "block": "block_size", "vocabulary": "vocab_size",
    "micro batch": "micro_batch_size", "accumulation": "gradient_accumulation_steps",
    "global batch": "global_batch_size",
}  # fmt: skip
"""Columns of trials.csv that say what is executed, by header."""
_SHARED = ("model", *PLAN_COLUMNS)
"""Headers that are shown once below the table if all trials have the same text."""


def run_report(run: Run, top: int) -> Group:
    """One run, with its `top` best trials in full."""
    ranking = run.verdict.ranking
    parts: list[RenderableType] = [Prose(heading(run), "bold"), *map(Prose, verdict_lines(run))]
    if lines := [cells(run, row) for row in run.select(ranking[:top])]:
        same = _constant(lines)
        parts.append(make_table([{h: text for h, text in line.items() if h not in same} for line in lines]))
        if notes := ", ".join(f"{header} {text}" for header, text in same.items() if text != "-"):
            parts.append(Prose(f"All of these: {notes}."))
    if len(ranking) > top:
        parts.append(Prose(f"{len(ranking) - top} more in {run.path / TRIALS_CSV}, or with --top {len(ranking)}."))
    parts += [make_table(lines) for lines in sections(run).values() if lines]
    return Group(*parts, "", command(cell(f"next: {next_command(run)}").plain, "bold"))


def heading(run: Run) -> str:
    """Objective, limits and machine of the search."""
    settings, machine = run.settings, run.environment
    objective = "least predicted loss" if run.lower_is_better else "most tokens/s"
    objective = "lowest loss, raced" if run.verdict.raced else objective
    limit, budget = format_bytes(settings.memory_limit_bytes), format_duration(settings.budget_seconds)
    return (
        f"{run.path}: {objective} within {limit} on {machine.device_name} ({machine.device}), "
        f"torch {machine.torch}, budget {budget}"
    )


def verdict_lines(run: Run) -> list[str]:
    """The verdict in a few lines, without markup."""
    verdict, winner, baseline = run.verdict, run.verdict.winner, run.verdict.baseline
    lines = [f"damaged: {line}" for line in run.damage]
    lines.append(f"trials: {len(run.rows)}, of which {_ok(run)} ran to their end")
    lines += [f"warning: {NOT_MEASURED}; no speed or loss below was measured"] * run.environment.stand_in
    lines += [line] if (line := state(run)) else []
    if winner is None and not run.rows:
        lines.append("nothing has been measured yet")
    elif winner is None:
        what = verdict.remedy or "give more memory, a longer budget or a smaller model."
        lines.append(f"No candidate is feasible: {what}")
    else:
        cached = cache_text(winner.result.compile_cache_hits, winner.result.compile_cache_misses)
        graphs = f", {cached} from the compile cache" if cached else ""
        figures = _figures(winner, verdict.speed, raced=verdict.raced)
        lines.append(f"best: trial {winner.trial}, {_status(verdict)}: {figures}{graphs}")
        lines += race_lines(verdict.race) if verdict.race else []
        if verdict.unsettled:
            lines.append(f"warning: not settled: {verdict.unsettled}")
        if run.best is not None and run.best.candidate.id != winner.candidate.id:
            lines.append(f"warning: {BEST_TOML} is not the best trial: repair it with `autotune report --rebuild`")
    figures = _figures(baseline, verdict.baseline_speed, raced=verdict.raced) if baseline else ""
    lines.append(f"baseline: trial {baseline.trial}: {figures}" if baseline else "baseline: not measured")
    lines += _gain(verdict)
    if verdict.tied_with:
        trials = ", ".join(map(str, verdict.tied_with))
        lines.append(f"tie: trial {trials} cannot be distinguished from the best, which needs the least memory of them")
    if verdict.fell_through:
        trials = ", ".join(map(str, verdict.fell_through))
        lines.append(f"trial {trials} was better, but its confirmation failed")
    if verdict.drift is not None:
        lines.append(
            f"warning: the baseline's confirmation ran at {verdict.drift:.2f}x the speed of its trial: the machine "
            "changed during the search" + ("; the ranking is corrected for it" if verdict.drift_corrected else "")
        )
    if verdict.law and not verdict.raced:
        lines.append(f"the winner is by the law, not raced; predicted losses are by the law {verdict.law}")
    lines += _time(verdict)
    return lines + [f"note: {note}" for note in verdict.notes]


def state(run: Run) -> str:
    """What the search is doing, in one line; empty if it has ended."""
    if run.searching is not None:
        budget = format_duration(run.settings.budget_seconds)
        trial = trial_in_flight(run.path, run.rows.keys())
        flying = "" if trial is None else f", trial {trial} is being measured"
        return f"the search is running: {format_duration(run.searching)} of {budget}{flying}; this is its state so far"
    if run.verdict.ended or any(line.startswith(VERDICT_JSON) for line in run.damage):
        return ""
    return "the search has not ended; this is its state so far"


def _status(verdict: Verdict) -> str:
    """`confirmed in 2 processes`"""
    if verdict.status == "stand-in":
        return "not measured"
    if not verdict.confirmed or verdict.winner is None or verdict.speed is None:
        return "not confirmed in a second process"
    composed = " by composed steps" if verdict.winner.result.steps == "composed" else ""  # whole ones did not fit
    if verdict.unsettled:
        return f"measured again{composed}, not settled"
    return f"confirmed{composed} in {verdict.speed.measurements} processes"


def race_lines(race: RaceVerdict) -> list[str]:
    """What was raced, who is first, and by how much."""
    lines = [
        f"race: {len(race.rivals)} rivals in {len(race.readings)} trainings of "
        f"{min(r.fraction for r in race.readings):.2%} to {max(r.fraction for r in race.readings):.2%} of the whole, "
        f"{format_duration(race.seconds)}, on {race.rivals[0].candidate.recipe.data}"
    ]
    if not race.order:
        return lines
    best = race.best
    lines.append(
        f"first: rival {race.winner.rival}, {recipe_words(race.winner)}: validation loss {best.loss:.3f} after "
        f"{format_count(best.tokens or 0)} tokens"
    )
    if race.expected_loss is not None and best.fraction < 1.0:
        lines.append(
            f"after the whole training: {race.expected_loss:.2f} ± {race.expected_ci95:.2f} nats expected on that text"
        )
    if (against := race.against_baseline) is not None and against.nats is not None:
        over = (
            "expected after the whole training; it was not raced" if against.fraction is None
            else f"both trained for {against.fraction:.2%} of the time"
        )  # fmt: skip
        lines.append(f"against the baseline's recipe: {_nats(against)} nats, {over}")
    elif all(change.what == "schedule" for change in race.changes):
        lines.append("against the baseline's recipe: it is the same, but for the schedule")
    else:
        lines.append("against the baseline's recipe: not raced")
    if race.tied_with:
        rivals = ", ".join(map(str, race.tied_with))
        lines.append(f"tie: rival {rivals} cannot be distinguished from the first on this validation text")
    return lines


def recipe_words(rival: Rival) -> str:
    """What a rival learns with, on one line."""
    return f"{rival.candidate.recipe} ({rival.rate_factor:.3g} x the rule's rate)"


def _nats(change: Change) -> str:
    if change.nats is None:
        return "not raced"
    return f"{change.nats:+.3f}" + ("" if change.ci95 is None else f" ± {change.ci95:.3f}")


def _figures(record: TrialRecord, speed: Speed | None, *, raced: bool = False) -> str:
    """Loss, speed and peak memory, or why there are none. A race's losses take the place of the law's."""
    if record.result.status != "ok" or speed is None:
        return f"{record.result.status}: {record.result.message or '-'}"
    loss = "" if record.predicted_loss is None or raced else f"predicted loss {record.predicted_loss:.3f}, "
    peak = format_bytes(record.result.peak_bytes)
    return f"{loss}{rate(speed.tokens_per_second, speed.ci95)} tokens/s, peak {peak}"


def _gain(verdict: Verdict) -> list[str]:
    gain = verdict.gain
    if gain is None or verdict.winner is None or verdict.baseline is None:
        return []
    if verdict.winner.candidate.id == verdict.baseline.candidate.id:
        return ["gain: none, the baseline is the best candidate found"]
    loss = "" if gain.loss is None else f"{gain.loss:+.3f} predicted loss; "
    return [
        f"gain: {loss}{gain.speed:.2f}x ± {gain.speed_ci95:.2f} the baseline's tokens/s "
        f"at {fmt(gain.memory, '.2f', 'x')} its peak memory"
    ]


def _time(verdict: Verdict) -> list[str]:
    """Where the budget went."""
    if verdict.overhead is None:
        return []
    spent = {name: sum(verdict.seconds.get(phase, 0.0) for phase in phases) for name, phases in SPENT.items()}
    spent = {name: seconds for name, seconds in spent.items() if seconds or name != "racing"}
    shares = ", ".join(f"{name} {seconds / verdict.spent_seconds:.0%}" for name, seconds in spent.items())
    return [
        f"time: {format_duration(verdict.spent_seconds)}: {shares}; harness overhead {verdict.overhead:.0%}, "
        f"{verdict.trials_per_hour:.0f} trials an hour"
    ]


def sections(run: Run) -> dict[str, list[Line]]:
    """Tables beside the ranked trials, by title; empty ones included."""
    verdict, front = run.verdict, run.select(run.verdict.trade_offs)
    same = _constant([cells(run, row) for row in run.select(verdict.ranking)])
    shown = {"tokens/s", "predicted loss", "batch", *_SHARED} - same.keys()
    objective, change = ("predicted loss", "+.3f") if run.lower_is_better else ("tokens/s", "+.1%")
    return {
        **(race_sections(verdict.race) if verdict.race else {}),
        # a single trial that beats all others in both leaves nothing to choose
        "Speed against memory": [
            {"least memory": format_bytes(peak_bytes(row)), "trial": str(row["trial"])}
            | {header: text for header, text in cells(run, row).items() if header in shown}
            for row in (front if len(front) > 1 else ())
        ],
        "One step from the best": [
            {
                "one step from the best": f"{neighbour.knob} {neighbour.winner} -> {neighbour.value}",
                "trial": str(neighbour.trial),
                objective: format(neighbour.objective, change),
                "peak": fmt(neighbour.peak and neighbour.peak - 1, "+.1%"),
            }
            for neighbour in verdict.neighbours
        ],
        "What matters": [{"what matters": name, "share": f"{share:.0%}"} for name, share in verdict.importance.items()],
        "Not feasible": [
            {
                "not feasible": failure.status,
                "count": str(len(failure.trials)),
                "trials": ", ".join(map(str, failure.trials[:4])) + (", ..." if len(failure.trials) > 4 else ""),
                "reason": failure.reason or "-",
            }
            for failure in verdict.failures
        ],
    }


def race_sections(race: RaceVerdict) -> dict[str, list[Line]]:
    """The rivals, best first, and what each change of the recipe gained alone."""
    known, found = {rival.rival: rival for rival in race.rivals}, by_rival(race.readings)
    failed = {reading.rival: reading for reading in race.readings if reading.loss is None}
    return {
        "Race": [
            {
                "": "*" if number in race.order[:1] else "",
                "rival": str(number),
                "loss": f"{found[number][-1].loss:.3f}" if number in found else failed[number].status,
                "length": f"{(found[number][-1] if number in found else failed[number]).fraction:.2%}",
                "recipe": recipe_words(known[number]),
            }
            for number in (*race.order, *(number for number in known if number not in found))
        ],
        "What each change gained alone": [
            {
                "gained alone": change.what,
                "nats": _nats(change),
                "length": "expected" if change.fraction is None and change.nats is not None
                else fmt(change.fraction, ".2%"),
                "from": change.before,
                "to": change.after,
                "rivals": ", ".join(map(str, change.rivals)) or "-",
            }
            for change in race.changes
        ],
    }


def cells(run: Run, row: Row) -> dict[str, str]:
    """Texts of a trial by column header."""
    winner, corrected = run.verdict.winner, run.verdict.drift_corrected
    by_law = run.lower_is_better and not run.verdict.raced  # a race has measured losses, beside which the law's mislead
    objective = corrected.get(str(row["trial"]), row["objective"])
    return {
        "": "*" if winner is not None and row["trial"] == winner.trial else "",
        "trial": str(row["trial"]),
        "role": row["role"],
        **({"predicted loss": fmt(row["predicted_loss"], ".3f")} if by_law else {}),
        "tokens/s": rate(row["tokens_per_second"], row["tokens_per_second_ci95"]),
        **({"without drift": fmt(objective, ".3f" if run.lower_is_better else ",.0f")} if corrected else {}),
        "MFU": fmt(row["mfu"], ".1%"),
        "peak": format_bytes(peak_bytes(row)),
        "allocated": format_bytes(row["peak_allocated_bytes"]),
        "predicted": format_bytes(row["predicted_peak_bytes"]),
        "batch": f"{row['micro_batch_size']} x {row['gradient_accumulation_steps']}",
        "model": _model(row),
        **{header: plan_text(row, name) for header, name in PLAN_COLUMNS.items()},
    }


def changes(run: Run, row: Row, other: Row) -> dict[str, tuple[str, str]]:
    """Choices in which two trials differ, by header: text of `row`, text of `other`; model and batch first."""
    before, after = cells(run, row), cells(run, other)
    names = ("model", "batch", *PLAN_COLUMNS)
    return {name: (before[name], after[name]) for name in names if before[name] != after[name]}


def memory_left(run: Run, peak: int | None) -> str:
    """`3.00 GiB of 24.00 GiB left`; empty for an unknown peak."""
    limit = run.settings.memory_limit_bytes
    return "" if peak is None else f"{format_bytes(limit - peak)} of {format_bytes(limit)} left"


def _model(row: Row) -> str:
    words = row["vocab_size"]
    vocabulary = "" if words in (None, Shape().vocab_size) else f"vocab {words}, "
    shape = f"{row['n_layer']}x{row['n_head']}x{row['n_embd']}, T {row['block_size']}"
    return f"{shape}, {vocabulary}{format_count(row['parameters'])}"


def plan_text(row: Row, column: str) -> str:
    """A value of the plan; - where the trial's loss does not use it, and for a column that an older file lacks."""
    whole = {kernel.name for kernel in registry.kernels("loss") if not kernel.chunked}
    unused = column == "loss_chunk_tokens" and row["loss"] in whole
    return "-" if row[column] in (None, "") or unused else str(row[column])


def rate(speed: float | None, half: float | None) -> str:
    """`8,302 ± 310`"""
    return fmt(speed, ",.0f") + ("" if half is None else f" ± {half:,.0f}")


def _constant(lines: Sequence[Line]) -> dict[str, str]:
    """Texts that are the same in all lines, of the columns in _SHARED and of those in which nothing is known."""
    first = lines[0] if lines else {}
    return {
        header: text for header, text in first.items()
        if (header in _SHARED or text == "-") and all(line[header] == text for line in lines)
    }  # fmt: skip


def _ok(run: Run) -> int:
    return sum(row["status"] == "ok" for row in run.rows.values())


def as_json(run: Run) -> dict[str, Any]:
    """The whole report in bytes, seconds and tokens; unknown values are null."""
    verdict = run.verdict
    return {
        "run": str(run.path),
        "settings": asdict(replace(run.settings, storage="")),  # its URL may contain a password
        "environment": vars(run.environment),
        "best": verdict.winner and run.rows[verdict.winner.trial],
        "measured": dict(run.best.measured) if run.best else None,
        "baseline": verdict.baseline and run.rows[verdict.baseline.trial],
        "verdict": {**asdict(verdict), "overhead": verdict.overhead, "trials_per_hour": verdict.trials_per_hour},
        "training": dict(run.training) or None,
        "trials": list(run.rows.values()),
        "next_command": next_command(run),
        "damage": list(run.damage),
        "searching_seconds": run.searching,
    }


def training_command(run: Run) -> str:
    """Command that trains the winner."""
    return train_command(run.path, run.best.candidate.plan.processes if run.best else 1)


def next_command(run: Run) -> str:
    """Command to continue with; never one that has just failed."""
    verdict = run.verdict
    if run.damage and (verdict.winner is None or run.best is None):
        return advice(run)
    if verdict.winner is not None:
        return f"autotune sample {run.path}" if run.training else training_command(run)
    if run.searching is not None:
        return f"autotune report {run.path}"
    longer = f" --budget {verdict.budget_wanted}" if verdict.budget_wanted else ""
    return verdict.remedy or f"autotune search --resume {run.path}{longer}"

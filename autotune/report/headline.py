"""What a reader of a run asks first: the verdict and five numbers, why the runner-up lost, what did not fit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autotune.measure.types import Status
from autotune.report.run import cells, changes, memory_left, rate, recipe_words
from autotune.runs.races import RaceVerdict, by_rival
from autotune.runs.read import Row, Run, peak_bytes
from autotune.runs.verdict import Speed
from autotune.units import format_bytes, format_count, format_duration

TOO_LARGE: tuple[Status, ...] = ("oom", "over_limit", "predicted_over_limit")
"""Statuses of trials that need more memory than there is."""
_LISTED = 5
"""Trials that did not fit and are listed one by one."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One of the five numbers."""

    name: str
    value: str
    note: str = ""


def sentence(run: Run) -> str:
    """The verdict in one sentence."""
    verdict, winner, gain = run.verdict, run.verdict.winner, run.verdict.gain
    count = f"{len(run.rows)} trial{'s' * (len(run.rows) != 1)}"
    if winner is None or verdict.speed is None:
        if not run.rows:
            return "Nothing has been measured yet."
        return f"No candidate is feasible: none of {count} ran within {format_bytes(run.settings.memory_limit_bytes)}."
    over = ""
    if verdict.baseline and winner.candidate.id == verdict.baseline.candidate.id:
        over = "; nothing beat the baseline"
    elif gain is not None:
        over = f", {gain.speed:.2f} times the baseline's speed"
        if gain.loss is not None:
            over = f", {abs(gain.loss):.3f} {'below' if gain.loss < 0 else 'above'} the baseline's"
    status = {
        "confirmed": f"confirmed in {verdict.speed.measurements} processes",
        "not settled": f"measured again, but not settled: {verdict.unsettled}",
    }.get(verdict.status, "not confirmed in a second process")
    speed = f"{rate(verdict.speed.tokens_per_second, verdict.speed.ci95)} tokens/s"
    if (race := raced(run)) is not None:
        speed = f"{_reached(race)} at {speed}"
        against = race.against_baseline
        if against is not None and against.nats is not None:
            side = "below" if against.nats < 0 else "above"
            when = "as is expected after the whole training" if against.fraction is None else "after equal training"
            over = f", {abs(against.nats):.3f} {side} the baseline's recipe {when}"
    elif winner.predicted_loss is not None:
        speed = f"predicted loss {winner.predicted_loss:.3f} at {speed}"
    return f"Trial {winner.trial} is the best of {count}: {speed}{over}; {status}."


def raced(run: Run) -> RaceVerdict | None:
    """The race that elected the winner, if one did; beside its losses those of the law mislead."""
    return run.verdict.race if run.verdict.raced else None


def _reached(race: RaceVerdict) -> str:
    """The loss of the first rival, and what is expected of its whole training."""
    reached = f"validation loss {race.best.loss:.3f} after {format_count(race.best.tokens or 0)} tokens"
    if race.expected_loss is None or race.best.fraction >= 1.0:
        return reached
    return f"{reached} ({race.expected_loss:.2f} ± {race.expected_ci95:.2f} expected after the whole training)"


def figures(run: Run) -> list[Figure]:
    """What to run, how fast it is, what it needs, what it gains, how long it takes. Empty without a winner."""
    verdict, winner, speed = run.verdict, run.verdict.winner, run.verdict.speed
    if winner is None or speed is None:
        return []
    row, base, peak = run.rows[winner.trial], verdict.baseline, winner.result.peak_bytes
    changed = changes(run, run.rows[base.trial], row) if base else {}
    what = _in_words(changed) or "as the baseline"
    left = memory_left(run, peak)
    race = raced(run)
    loss = "" if winner.predicted_loss is None else f"predicted loss {winner.predicted_loss:.3f}"
    loss = _reached(race) if race else loss
    return [
        Figure(name="what to run", value=f"trial {winner.trial}", note=what),
        Figure(name="tokens/s", value=f"{rate(speed.tokens_per_second, speed.ci95)}", note=loss or "95 % interval"),
        Figure(name="peak memory", value=format_bytes(peak), note=left),
        _gain(run),
        _hours(run),
    ]


def _in_words(changed: Mapping[str, tuple[str, str]]) -> str:
    """`batch 24 x 3, loss chunked`"""
    return ", ".join(f"{name} {after}" for name, (_, after) in changed.items() if after != "-")


def _gain(run: Run) -> Figure:
    gain, base = run.verdict.gain, run.verdict.baseline
    if gain is None:
        why = f"the baseline is {base.result.status}" if base else "no baseline was measured"
        return Figure(name="gain", value="-", note=why)
    notes = [f"over trial {base.trial}, {run.settings.baseline_source}"] if base else []
    speed = f"{gain.speed:.2f}x ± {gain.speed_ci95:.2f}"
    against = race.against_baseline if (race := raced(run)) else None
    nats = gain.loss if against is None else against.nats
    if against is not None and against.fraction is None and nats is not None:
        notes.append("expected after the whole training, not raced")
    if nats is not None:
        notes.append(f"{speed} its tokens/s")
    if gain.memory is not None:
        notes.append(f"at {gain.memory:.2f}x its memory")
    guide = next((row for row in run.rows.values() if row["role"] == "guide"), None)
    if guide is not None and run.verdict.winner is not None:
        notes.append(f"over the guide's row (trial {guide['trial']}): {_over(run, guide)}")
    return Figure(name="gain", value=speed if nats is None else f"{nats:+.3f} nats", note="; ".join(notes))


def _over(run: Run, other: Row) -> str:
    """The winner against another trial, by the objective."""
    winner, speed = run.verdict.winner, run.verdict.speed
    if winner is None or speed is None or not other["tokens_per_second"]:
        return str(other["status"])
    if raced(run) is None and winner.predicted_loss is not None and other["predicted_loss"] is not None:
        return f"{winner.predicted_loss - other['predicted_loss']:+.3f} predicted loss"
    return f"{speed.tokens_per_second / other['tokens_per_second']:.2f}x"


def _hours(run: Run) -> Figure:
    speed = run.verdict.speed
    if run.best is None or speed is None:
        return Figure(name="to completion", value="-", note="there is no best.toml")
    recipe = run.best.candidate.recipe
    seconds = recipe.max_tokens / speed.tokens_per_second
    note = f"{format_count(recipe.max_tokens)} tokens, {recipe.max_iters:,} iterations"
    return Figure(name="to completion", value=format_duration(seconds), note=note)


def runner_up(run: Run) -> str:
    """The best other candidate, and why it is not the winner; empty without one."""
    verdict, winner, speed = run.verdict, run.verdict.winner, run.verdict.speed
    if winner is None or speed is None:
        return ""
    if (race := raced(run)) is not None:
        return _second_rival(race)
    if verdict.fell_through:
        trial = verdict.fell_through[0]
        failed = [row for row in _same(run, run.rows[trial]) if row["status"] != "ok"]
        why = f": {failed[-1]['status']}: {failed[-1]['message']}" if failed else ""
        return f"Trial {trial} was better when it was searched, but its confirmation failed{why}."
    best = run.rows[winner.trial]
    second = next((row for row in run.select(verdict.ranking) if row["candidate_id"] != winner.candidate.id), None)
    if second is None:
        return "No other candidate ran within the limit."
    second = [row for row in _same(run, second) if row["status"] == "ok"][-1]  # its confirmation, if it has one
    changed = _in_words(changes(run, best, second))
    who = f"Trial {second['trial']}" + (f" (with {changed})" if changed else "")
    return f"{who} {_why_not(run, second, speed, peak_bytes(best))}."


def _second_rival(race: RaceVerdict) -> str:
    if len(race.order) < 2:
        return "No other rival of the race came to the end of a rung."
    number, found = race.order[1], by_rival(race.readings)
    rival, last = next(rival for rival in race.rivals if rival.rival == number), found[number][-1]
    loss = f"validation loss {last.loss:.3f} after {format_count(last.tokens or 0)} tokens"
    why = "cannot be told apart from the first on this validation text" if number in race.tied_with else "is behind"
    return f"Rival {number} of the race ({recipe_words(rival)}) {why}: {loss}."


def _same(run: Run, row: Row) -> list[Row]:
    """All trials of the row's candidate."""
    return [other for other in run.rows.values() if other["candidate_id"] == row["candidate_id"]]


def _why_not(run: Run, second: Row, best: Speed, best_peak: int | None) -> str:
    theirs, half = second["tokens_per_second"], second["tokens_per_second_ci95"] or 0.0
    shown = f"{rate(theirs, half)} tokens/s"
    if any(row["trial"] in run.verdict.tied_with for row in _same(run, second)):
        peaks = f"{format_bytes(best_peak)} against {format_bytes(peak_bytes(second))}"
        return f"cannot be told apart from the winner ({shown}); the winner needs the least memory: {peaks}"
    if run.lower_is_better:
        return f"has a predicted loss of {second['predicted_loss']:.3f}, no lower than the winner's, at {shown}"
    change = theirs / best.tokens_per_second - 1
    if change >= 0:
        return f"measured {shown}; all measurements together put it below the winner"
    noise = math.hypot(half / best.tokens_per_second, best.relative_ci95)
    return f"is {-change:.1%} slower ({shown}), {'beyond' if -change > noise else 'within'} the noise of ±{noise:.1%}"


def too_large(run: Run) -> list[str]:
    """A line for each of the trials that needed too much memory, up to a few."""
    rows = [row for row in run.rows.values() if row["status"] in TOO_LARGE]
    ran = [row for row in rows if row["status"] != "predicted_over_limit"]
    lines = [f"trial {row['trial']} ({_what(run, row)}): {_too_large(row)}" for row in ran[:_LISTED]]
    if len(ran) > _LISTED:
        lines.append(f"{len(ran) - _LISTED} more that ran out of memory or over the limit")
    if skipped := len(rows) - len(ran):
        lines.append(f"{skipped} that were not run: their predicted memory is beyond the limit")
    return lines


def _what(run: Run, row: Row) -> str:
    """What sets the row apart from the winner, or its batch."""
    winner = run.verdict.winner
    changed = changes(run, run.rows[winner.trial], row) if winner else {}
    return _in_words(changed) or f"batch {cells(run, row)['batch']}"


def _too_large(row: Row) -> str:
    if row["status"] == "over_limit":
        return f"ran, but peaks at {format_bytes(peak_bytes(row))}"
    return str(row["message"]) or "out of memory"


def in_short(run: Run) -> Sequence[tuple[str, list[str]]]:
    """Question and answers."""
    rest = [f"{len(f.trials)} {f.status}: {f.reason or '-'}" for f in run.verdict.failures if f.status not in TOO_LARGE]
    answers = {
        "Why the runner-up lost": [runner_up(run)] if runner_up(run) else [],
        "What ran out of memory": too_large(run) or (["Nothing."] if run.rows else []),
        "What else failed": rest,
    }
    return [(question, lines) for question, lines in answers.items() if lines]

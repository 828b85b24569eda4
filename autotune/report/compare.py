"""Several runs side by side: what changed, by how much, and whether that is beyond the noise."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType

from autotune.measure.types import Z95
from autotune.report.run import PLAN_COLUMNS, cells, next_command, rate
from autotune.report.table import Line, Prose, cell, command, fmt, make_table
from autotune.runs.read import Run
from autotune.units import format_bytes, format_duration

_NOT_COMPARED = ("name", "storage", "command", "notes", "out_dir")
_WINNERS = "winner's "
_ALIKE = 3
"""Candidates in common from which on their scatter gives the interval."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio of speeds and the half width of its 95 % interval."""

    value: float
    half: float

    @property
    def beyond(self) -> bool:
        """Whether the interval excludes 1."""
        return abs(self.value - 1) > self.half

    def __str__(self) -> str:
        return f"{self.value:.3f}x ± {self.half:.3f}, {'beyond' if self.beyond else 'within'} the noise"


def names(runs: Sequence[Run]) -> list[str]:
    """Name of each run's directory; its whole path where two are called the same."""
    short = [run.path.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.path) for run in runs]


def of_winners(run: Run, first: Run) -> Ratio | None:
    """Tokens/s of the winner relative to that of the first run's."""
    ours, theirs = run.verdict.speed, first.verdict.speed
    if ours is None or theirs is None:
        return None
    value = ours.tokens_per_second / theirs.tokens_per_second
    return Ratio(value=value, half=value * math.hypot(ours.relative_ci95, theirs.relative_ci95))


def of_common(run: Run, first: Run) -> tuple[int, Ratio | None]:
    """Candidates that both measured, and the run's speed with them relative to the first run's: what the machine, its
    versions and its load changed, apart from the choice of the candidate."""
    ours, theirs = _speeds(run), _speeds(first)
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return 0, None
    logs = [math.log(ours[name][0] / theirs[name][0]) for name in common]
    spread = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) >= _ALIKE else 0.0
    within = math.hypot(*(half for name in common for half in (ours[name][1], theirs[name][1]))) / len(common)
    value = math.exp(statistics.fmean(logs))
    return len(common), Ratio(value=value, half=value * max(Z95 * spread, within))


def _speeds(run: Run) -> dict[str, tuple[float, float]]:
    """Tokens/s and its relative interval by candidate; of several measurements the last."""
    measured = (row for row in run.rows.values() if row["status"] == "ok" and row["tokens_per_second"])
    speeds = ((row["candidate_id"], row["tokens_per_second"], row["tokens_per_second_ci95"] or 0.0) for row in measured)
    return {candidate: (speed, half / speed) for candidate, speed, half in speeds}


def differences(runs: Sequence[Run]) -> list[Line]:
    """One line per run: its winner, and that relative to the first run's."""
    first, lines = runs[0], list[Line]()
    for name, run in zip(names(runs), runs, strict=True):
        speed, winner, gain = run.verdict.speed, run.verdict.winner, run.verdict.gain
        count, common = of_common(run, first)
        peak = winner.result.peak_bytes if winner else None
        base = first.verdict.winner and first.verdict.winner.result.peak_bytes
        loss = winner.predicted_loss if winner else None
        lines.append({
            "run": name,
            "winner": str(winner.trial) if winner else "-",
            "tokens/s": rate(speed.tokens_per_second, speed.ci95) if speed else "-",
            "against the first": "-" if run is first else str(of_winners(run, first) or "-"),
            "same candidates": "-" if run is first else f"{count}: {common}" if common else "none in common",
            "peak": format_bytes(peak),
            "peak, relative": fmt(peak / base if peak and base and run is not first else None, ".3f", "x"),
            "gain": f"{gain.speed:.2f}x ± {gain.speed_ci95:.2f}" if gain else "-",
            **({"predicted loss": fmt(loss, ".3f")} if any(r.lower_is_better for r in runs) else {}),
            "ok/trials": f"{sum(row['status'] == 'ok' for row in run.rows.values())}/{len(run.rows)}",
            "time": format_duration(run.verdict.spent_seconds),
        })  # fmt: skip
    return lines


def changed(runs: Sequence[Run]) -> tuple[list[Line], dict[str, str]]:
    """What differs in settings, machine or winner, by run; and what is the same, by name."""
    tables = [_facts(run) for run in runs]
    every = dict.fromkeys(name for table in tables for name in table)
    texts = {name: [table.get(name, "-") for table in tables] for name in every}
    lines: list[Line] = [
        {"what changed": name, **dict(zip(names(runs), values, strict=True))}
        for name, values in texts.items()
        if len(set(values)) > 1
    ]
    return lines, {name: values[0] for name, values in texts.items() if len(set(values)) == 1}


def _facts(run: Run) -> Mapping[str, str]:
    """What a run was: the winner's choices, the machine, the settings."""
    winner = run.verdict.winner
    shown = cells(run, run.rows[winner.trial]) if winner else {}
    chosen = {f"{_WINNERS}{name}": shown[name] for name in ("model", "batch", *PLAN_COLUMNS) if name in shown}
    return {**chosen, **readable(vars(run.environment)), **settings(run, _NOT_COMPARED)}


def settings(run: Run, without: Sequence[str] = ("storage", "command")) -> dict[str, str]:
    """Settings of the search by name; never its storage, which may be secret."""
    return readable({name: value for name, value in asdict(run.settings).items() if name not in without})


def readable(table: Mapping[str, Any]) -> dict[str, str]:
    """Texts by dotted name, without the unknown values; sizes and times have units instead of a suffix."""
    texts = {}
    for name, value in pd.json_normalize(dict(table)).to_dict("records")[0].items():
        if value not in (None, "", (), {}):
            size, time = str(name).endswith("_bytes"), str(name).endswith("_seconds")
            shown = format_bytes(value) if size else format_duration(value) if time else str(value)
            texts[str(name).removesuffix("_bytes").removesuffix("_seconds")] = shown
    return texts


def comparison(runs: Sequence[Run]) -> Group:
    """For a terminal."""
    lines, same = changed(runs)
    parts: list[RenderableType] = [Prose(sentence(runs), "bold"), make_table(differences(runs))]
    parts += [make_table(lines)] if lines else []
    alike = ", ".join(f"{name} {text}" for name, text in same.items() if name.startswith(_WINNERS) and text != "-")
    parts += [Prose(f"The same in all: {alike}.")] if alike else []
    commands = [command(cell(f"next: {next_command(run)}").plain) for run in runs]
    return Group(*parts, *map(Prose, notes(runs)), *commands)


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """Ratios to the first run, and what changed; unknown values are null."""
    ratios = []
    for run in runs:
        count, common = of_common(run, runs[0])
        winners = of_winners(run, runs[0])
        ratios.append({
            "run": str(run.path),
            "speed": winners and {**asdict(winners), "beyond_noise": winners.beyond},
            "same_candidates": common and {"count": count, **asdict(common), "beyond_noise": common.beyond},
        })  # fmt: skip
    return {"ratios": ratios, "changed": changed(runs)[0]}


def notes(runs: Sequence[Run]) -> list[str]:
    """Reasons to be careful."""
    found = []
    if len({run.environment.fingerprint for run in runs}) > 1:
        found.append("These runs are of different machines or versions: their numbers do not compare plans alone.")
    if len({run.settings.objective for run in runs}) > 1:
        found.append("These runs have different objectives.")
    if len({run.settings.memory_limit_bytes for run in runs}) > 1:
        found.append("These runs have different memory limits.")
    return found + [f"{run.path}: {line}" for run in runs for line in run.damage]


def sentence(runs: Sequence[Run]) -> str:
    """The fastest winner against that of the first run."""
    known = [
        (run.verdict.speed.tokens_per_second, name, run)
        for name, run in zip(names(runs), runs, strict=True)
        if run.verdict.speed is not None
    ]
    if len(known) < 2:
        return f"Of {len(runs)} runs, {len(known)} found a winner."
    known.sort(key=lambda one: one[0])
    (_, worst, slowest), (_, best, fastest) = known[0], known[-1]
    ratio = of_winners(fastest, slowest)
    if ratio is None or not ratio.beyond:
        return f"The winners of {len(known)} runs do not differ beyond the noise in tokens/s."
    return f"The winner of {best} runs at {ratio.value:.2f} ± {ratio.half:.2f} times the tokens/s of that of {worst}."

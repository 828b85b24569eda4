"""A run directory, read back: its trials, its best candidate, its machine; and what they say."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import pandas as pd

from autotune.config.candidate import Candidate, Plan
from autotune.config.search import SearchSettings, read_settings
from autotune.config.tables import read_json, read_table
from autotune.config.toml import read_candidate
from autotune.environment import Environment
from autotune.errors import ConfigError, one_line
from autotune.runs.records import COLUMNS, OPTIONAL_COLUMNS, PLAN_FIELDS, read_text
from autotune.runs.verdict import Review, Speed, read_review
from autotune.units import format_duration

T = TypeVar("T")
Row = Mapping[str, Any]
"""One line of trials.csv by column; unknown values are None."""

_PLAN_TYPES = {name: hint for name, hint in get_type_hints(Plan).items() if name in PLAN_FIELDS}
_TEXT = (
    "role", "status", "phase", "optimizer", "started_at", "candidate_id", "message",
    *(name for name, hint in _PLAN_TYPES.items() if hint not in (int, float, bool)),
)  # fmt: skip
_NUMBERS = (
    "objective", "tokens_per_second", "tokens_per_second_ci95", "mfu", "step_seconds_p50", "predicted_loss",
    "compile_seconds", "trial_seconds", "first_loss", *(name for name, hint in _PLAN_TYPES.items() if hint is float),
)  # fmt: skip
_FLAGS = tuple(name for name, hint in _PLAN_TYPES.items() if hint is bool)
_DTYPES = dict.fromkeys(COLUMNS, "Int64") | {
    **dict.fromkeys(_TEXT, "string"), **dict.fromkeys(_NUMBERS, "Float64"), **dict.fromkeys(_FLAGS, "boolean")
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """What lies in a run directory."""

    path: Path
    """As the user wrote it, for the commands that are printed."""
    trials: tuple[Row, ...]
    """trials.csv."""
    candidate: Candidate | None
    """Of best.toml; None where no trial is feasible yet."""
    measured: Mapping[str, Any]
    """Of best.toml: numbers of the best trial, of which some are no columns."""
    environment: Environment
    settings: SearchSettings
    """search.toml."""
    review: Review | None
    """verdict.json; None until the search has ended."""
    training: Mapping[str, Any]
    """train/summary.json; empty where nothing was trained yet."""

    @property
    def lower_is_better(self) -> bool:
        return self.settings.objective == "loss"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Trials that failed in one way for one reason: that of the first, the others differ at most in their numbers."""

    status: str
    reason: str
    trials: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Gain:
    """The best trial against the baseline: tokens/s and peak memory as ratios, predicted loss in nats as a difference.
    None: unknown."""

    speed: float | None
    speed_ci95: float | None
    """Half width, from both intervals."""
    memory: float | None
    """In the view of `peak_view`."""
    loss: float | None


def load_run(path: Path) -> Run:
    """Read a run directory. Raises ConfigError where it is none, or where a file of it is damaged."""
    if not path.is_dir():
        raise ConfigError(f"{path} is not a directory; give a run, for example results/<run>")
    settings = read_settings(path / "search.toml")
    best = read_candidate(path) if (path / "best.toml").exists() else None
    verdict, summary = path / "verdict.json", path / "train" / "summary.json"
    return Run(
        path=path,
        trials=_read(path / "trials.csv", _read_trials),
        candidate=best.candidate if best else None,
        measured=best.measured if best else {},
        environment=_read(path / "environment.json", _read_environment),
        settings=settings,
        review=_read(verdict, read_review) if verdict.exists() else None,
        training=_read(summary, read_json) if summary.exists() else {},
    )


def _read(file: Path, reader: Callable[[Path], T]) -> T:
    try:
        return reader(file)
    except (ConfigError, OSError, ValueError, TypeError, OverflowError) as error:  # pandas knows many for a damaged CSV
        why = "it does not exist" if isinstance(error, FileNotFoundError) else one_line(str(error))
        raise ConfigError(
            f"{file.parent} is not a readable run: {file.name}: {why}; "
            "give the directory of a search, or mend it with `autotune report --rebuild`"
        ) from None


def _read_environment(file: Path) -> Environment:
    table = read_json(file)
    table.pop("fingerprint", None)  # it follows from the rest
    return read_table(Environment, table, "environment")


def _read_trials(file: Path) -> tuple[Row, ...]:
    # Only an empty cell is unknown: "none" and "null" are words that a plan or a message may hold.
    frame = pd.read_csv(file, dtype=_DTYPES, keep_default_na=False, na_values=[""])
    if missing := [name for name in COLUMNS if name not in frame and name not in OPTIONAL_COLUMNS]:
        raise ValueError(f"it has no column {missing[0]!r}")
    lacking = [name for name in COLUMNS if name not in frame]
    frame = frame.reindex(columns=[*frame.columns, *lacking]).astype({name: _DTYPES[name] for name in lacking})
    frame = frame.fillna(dict.fromkeys(_TEXT, ""))
    for name in _TEXT:
        frame[name] = frame[name].map(read_text)
    plain = frame.astype(object).where(frame.notna(), None)
    rows = tuple({str(key): value for key, value in row.items()} for row in plain.to_dict("records"))
    for number, row in enumerate(rows, 2):
        if row["trial"] is None or (row["objective"] is not None and row["tokens_per_second"] is None):
            raise ValueError(f"line {number} has no trial, or an objective without tokens/s")
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"line {number}: {name} = {value} is not a finite number")
    return rows


def ranked(run: Run) -> list[Row]:
    """The feasible trials: the verdict's own first, then by objective, the machine's drift taken out."""
    best, sign = best_trial(run), 1 if run.lower_is_better else -1
    return sorted(_feasible(run), key=lambda row: (row is not best, sign * at_first_speed(run, row)))


def at_first_speed(run: Run, row: Row) -> float:
    """The trial's objective, the machine's drift taken out where the search found one."""
    corrected = run.review.at_first_speed if run.review else {}
    return float(corrected.get(str(row["trial"]), row["objective"]))


def _feasible(run: Run) -> list[Row]:
    return [row for row in run.trials if row["status"] == "ok" and row["objective"] is not None]


def best_trial(run: Run) -> Row | None:
    """The measurement behind best.toml, the last confirmation where there is one. None: nothing is feasible."""
    feasible = _feasible(run)
    if run.candidate is None or not feasible:
        return None
    return _last_word(feasible, run.candidate.id)


def baseline_trial(run: Run) -> Row | None:
    """The baseline, confirmed where it was run again; None where it did not run to its end."""
    ended = [row for row in run.trials if row["status"] == "ok"]
    first = next((row for row in ended if row["role"] == "baseline"), None)
    return first and _last_word(ended, first["candidate_id"])


def _last_word(measured: list[Row], candidate_id: str) -> Row | None:
    same = [row for row in measured if row["candidate_id"] == candidate_id]
    return max(same, key=lambda row: (row["role"] == "final", row["trial"]), default=None)


def gain(run: Run, best: Row, baseline: Row) -> Gain:
    """What tuning brought."""
    view = peak_view([best, baseline])
    (ours, our_half), (theirs, their_half) = best_speed(run, best), baseline_speed(run, baseline)
    speed = _ratio(ours, theirs)
    relative = [part for part in (_ratio(our_half, ours), _ratio(their_half, theirs)) if part is not None]
    losses = (best["predicted_loss"], baseline["predicted_loss"])
    return Gain(
        speed=speed,
        speed_ci95=speed * math.hypot(*relative) if speed and len(relative) == 2 else None,
        memory=_ratio(best[view], baseline[view]),
        loss=None if None in losses else losses[0] - losses[1],
    )


def best_speed(run: Run, best: Row) -> tuple[float | None, float | None]:
    """Tokens/s and its half width: from all measurements of the winner where the search has ended."""
    return _estimated(run.review.speed if run.review else None, best)


def baseline_speed(run: Run, baseline: Row) -> tuple[float | None, float | None]:
    """The same for the baseline."""
    return _estimated(run.review.baseline if run.review else None, baseline)


def _estimated(speed: Speed | None, row: Row) -> tuple[float | None, float | None]:
    if speed is None:
        return row["tokens_per_second"], row["tokens_per_second_ci95"]
    return speed.tokens_per_second, speed.ci95


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def peak_view(rows: Sequence[Row]) -> str:
    """The column of the widest view of peak memory that is known for all of them."""
    views = ("peak_device_bytes", "peak_reserved_bytes", "peak_allocated_bytes")
    return next((view for view in views if all(row[view] is not None for row in rows)), views[-1])


def pareto_front(rows: Sequence[Row], view: str, column: str = "tokens_per_second", sign: int = 1) -> list[Row]:
    """The trials that no other beats in both `column` (times `sign`) and memory, the smallest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row[view], -sign * row[column])):
        if not front or sign * row[column] > sign * front[-1][column]:
            front.append(row)
    return front


def trade_offs(run: Run) -> list[Row]:
    """What less memory costs: the Pareto front of the objective against peak memory, each candidate once."""
    feasible = _feasible(run)
    if not feasible:
        return []
    last = [row for name in {row["candidate_id"] for row in feasible} if (row := _last_word(feasible, name))]
    column, sign = ("predicted_loss", -1) if run.lower_is_better else ("tokens_per_second", 1)
    view = peak_view(last)
    return pareto_front([row for row in last if None not in (row[view], row[column])], view, column, sign)


def failures(run: Run) -> list[Failure]:
    """The trials that are not `ok`, grouped by status and reason, the most frequent first."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in run.trials:
        if row["status"] != "ok":
            groups.setdefault((row["status"], re.sub(r"\d[\d.,]*", "#", row["message"])), []).append(row)
    found = [
        Failure(status=status, reason=same[0]["message"], trials=tuple(row["trial"] for row in same))
        for (status, _), same in groups.items()
    ]
    return sorted(found, key=lambda failure: (-len(failure.trials), failure.trials))


def as_json(run: Run) -> dict[str, Any]:
    """Everything that the report says, in bytes, seconds and tokens; unknown values are null."""
    best, baseline, review = best_trial(run), baseline_trial(run), run.review
    return {
        "run": str(run.path),
        "settings": asdict(replace(run.settings, storage="")),  # its URL may hold a password
        "environment": vars(run.environment),
        "best": best,
        "measured": dict(run.measured) or None,
        "baseline": baseline,
        "gain": vars(gain(run, best, baseline)) if best and baseline else None,
        "review": review and {**asdict(review), "overhead": review.overhead, "trials_per_hour": review.trials_per_hour},
        "trade_offs": [row["trial"] for row in trade_offs(run)],
        "failures": [vars(failure) for failure in failures(run)],
        "training": dict(run.training) or None,
        "trials": list(run.trials),
        "next_command": next_command(run),
    }


def next_command(run: Run) -> str:
    """What to do with this run now; never what has just failed."""
    if run.candidate is None:
        if run.review is None:  # the search did not come to its end: it has time left
            return f"autotune search --resume {run.path}"
        longer = run.review.budget_wanted or format_duration(2 * run.settings.budget_seconds)
        return run.review.remedy or f"autotune search --resume {run.path} --budget {longer}"
    return f"autotune sample {run.path}" if run.training else f"autotune train {run.path}"

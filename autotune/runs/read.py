"""A run directory, read back."""

import contextlib
import math
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import pandas as pd

from autotune.config.candidate import Plan, Recipe, Shape
from autotune.config.search_settings import SearchSettings, read_settings
from autotune.config.tables import read_json, read_table
from autotune.config.toml import BEST_TOML, CandidateFile, read_candidate
from autotune.config.train_settings import SUMMARY, TRAINING
from autotune.environment import Environment
from autotune.errors import ConfigError, one_line
from autotune.measure.types import PEAK_VIEWS, TrialResult
from autotune.runs import directory
from autotune.runs.records import COLUMNS, OPTIONAL_COLUMNS, TrialRecord, read_text
from autotune.runs.records import row as values_of
from autotune.runs.verdict import Verdict, read_verdict

T = TypeVar("T")
Row = Mapping[str, Any]
"""One line of trials.csv by column; unknown values are None."""

_HINTS = {
    name: hint for cls in (TrialResult, TrialRecord, Recipe, Shape, Plan) for name, hint in get_type_hints(cls).items()
} | {"candidate_id": str}
_DTYPES = {int: "Int64", float: "Float64", bool: "boolean"}


def _dtype(column: str) -> str:
    """pandas' type of a column: that of the field it is named after; columns without a field are counts."""
    hint = _HINTS.get(column, int)
    return next((_DTYPES[kind] for kind in (hint, *get_args(hint)) if kind in _DTYPES), "string")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Files of one run directory."""

    path: Path
    """As the user wrote it, for the commands that are printed."""
    settings: SearchSettings
    environment: Environment
    verdict: Verdict
    rows: Mapping[int, Row]
    """trials.csv by trial number."""
    best: CandidateFile | None
    """best.toml; None while no trial is feasible."""
    training: Mapping[str, Any]
    """summary.json of the training in this run; empty if there is none."""
    damage: tuple[str, ...] = ()
    """Files that could not be read, each with the reason and what is missing for it."""
    searching: float | None = None
    """Seconds of the search that runs at this moment; None: none does."""

    @property
    def lower_is_better(self) -> bool:
        return self.settings.objective == "loss"

    def select(self, trials: Sequence[int]) -> list[Row]:
        """Rows of the given trials, in that order."""
        return [self.rows[trial] for trial in trials]


UNKNOWN = Environment(
    device="-", device_name="an unknown machine", device_memory_bytes=0, torch="-", python="-", autotune="-",
    cpu_count=0, platform="-",
)  # fmt: skip
"""Machine of a run whose environment.json is damaged."""


def load_run(path: Path) -> Run:
    """Read a run directory. What is damaged is left out and named in `damage`. Raises ConfigError if it is no run."""
    if not path.is_dir():
        raise ConfigError(f"{path} is not a directory; give a run, for example results/<run>")
    settings, damage = read_settings(path / directory.SEARCH_TOML), list[str]()

    def known(name: str, reader: Callable[[Path], T], otherwise: T, lost: str) -> T:
        try:
            return reader(path / name)
        except (ConfigError, OSError, ValueError, TypeError, OverflowError) as error:  # pandas knows many
            why = "it does not exist" if isinstance(error, FileNotFoundError) else one_line(str(error))
            why = why.removeprefix(f"{path / name} ")
            damage.append(f"{name}: {why} ({lost})")
            return otherwise

    # the verdict first: every trial that it names has a row by the time the rows are read
    verdict = known(directory.VERDICT_JSON, read_verdict, Verdict(), "no winner, ranking or gain is shown")
    none: dict[int, Row] = {}
    rows = known(directory.TRIALS_CSV, _read_trials, none, "only trials of the verdict are shown")
    named = [record for record in (verdict.winner, verdict.baseline) if record]
    rows = {record.trial: _plain(record) for record in named if record.trial not in rows} | rows
    if lost := sorted({*verdict.ranking, *verdict.trade_offs} - rows.keys()):
        if directory.TRIALS_CSV not in " ".join(damage):
            damage.append(f"{directory.VERDICT_JSON}: it names trial {lost[0]}, which has no row (it is left out)")
        ranking, front = ([t for t in trials if t in rows] for trials in (verdict.ranking, verdict.trade_offs))
        verdict = replace(verdict, ranking=tuple(ranking), trade_offs=tuple(front))
    if not settings.storage and (path / directory.STUDY_DB).exists():
        known(directory.STUDY_DB, _probe_study, None, "what other files hold is shown; the search cannot be resumed")
    has_best, summary = (path / BEST_TOML).exists(), f"{TRAINING}/{SUMMARY}"
    return Run(
        path=path,
        settings=settings,
        environment=known(directory.ENVIRONMENT_JSON, _read_environment, UNKNOWN, "the machine is not known"),
        verdict=verdict,
        rows=rows,
        best=known(BEST_TOML, read_candidate, None, "it cannot be trained") if has_best else None,
        training=known(summary, read_json, {}, "no training is shown") if (path / summary).exists() else {},
        damage=tuple(damage),
        searching=directory.searching_seconds(path),
    )


def advice(run: Run) -> str:
    """What to do about a damaged run."""
    if any(line.startswith(directory.STUDY_DB) for line in run.damage):
        return "keep a copy of the directory; search again with another --name"
    return f"repair it with `autotune report --rebuild {run.path}`"


def _plain(record: TrialRecord) -> Row:
    """The record as a row that was read; texts are never None there."""
    return {
        name: "" if value is None and _dtype(name) == "string" else value for name, value in values_of(record).items()
    }


def _probe_study(file: Path) -> None:
    """Raise ValueError for a file that is not the database of a study."""
    idle = not file.with_name(f"{file.name}-wal").exists()  # then nothing is created beside it
    try:
        address = f"{file.absolute().as_uri()}?mode=ro{'&immutable=1' * idle}"
        with contextlib.closing(sqlite3.connect(address, uri=True)) as database:
            database.execute("SELECT COUNT(*) FROM trials").fetchone()
    except sqlite3.DatabaseError as error:
        if "locked" not in str(error):  # by a search that writes
            raise ValueError(str(error)) from None


def _read_environment(file: Path) -> Environment:
    table = read_json(file)
    table.pop("fingerprint", None)  # derived from the other fields
    return read_table(Environment, table, "environment")


def _read_trials(file: Path) -> dict[int, Row]:
    # Only an empty cell is unknown: "none" and "null" are words that a plan or a message may hold.
    dtypes = {column: _dtype(column) for column in COLUMNS}
    frame = pd.read_csv(file, dtype=dtypes, keep_default_na=False, na_values=[""])
    if missing := [name for name in COLUMNS if name not in frame and name not in OPTIONAL_COLUMNS]:
        raise ValueError(f"it has no column {missing[0]!r}")
    frame = frame.reindex(columns=[*frame.columns, *(name for name in COLUMNS if name not in frame)]).astype(dtypes)
    for name in COLUMNS:
        if dtypes[name] == "string":
            frame[name] = frame[name].fillna("").map(read_text)
    plain = frame.astype(object).where(frame.notna(), None)
    rows: dict[int, Row] = {}
    for number, row in enumerate(plain.to_dict("records"), 2):
        if row["trial"] is None or (row["objective"] is not None and row["tokens_per_second"] is None):
            raise ValueError(f"line {number} has no trial, or an objective without tokens/s")
        for column, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"line {number}: {column} = {value} is not a finite number")
        rows[row["trial"]] = {str(name): value for name, value in row.items()}
    return rows


def peak_bytes(row: Row) -> int | None:
    """`TrialResult.peak_bytes` of a row."""
    return max((peak for view in PEAK_VIEWS if (peak := row[f"peak_{view}"]) is not None), default=None)

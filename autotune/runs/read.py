"""A run directory, read back."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

    @property
    def lower_is_better(self) -> bool:
        return self.settings.objective == "loss"

    def select(self, trials: Sequence[int]) -> list[Row]:
        """Rows of the given trials, in that order."""
        return [self.rows[trial] for trial in trials]


def load_run(path: Path) -> Run:
    """Read a run directory. Raises ConfigError if it is none, or if one of its files is damaged."""
    if not path.is_dir():
        raise ConfigError(f"{path} is not a directory; give a run, for example results/<run>")
    summary = path / TRAINING / SUMMARY
    settings = read_settings(path / directory.SEARCH_TOML)
    verdict = _read(path / directory.VERDICT_JSON, read_verdict)  # first: every trial it names has a row by now
    run = Run(
        path=path,
        settings=settings,
        environment=_read(path / directory.ENVIRONMENT_JSON, _read_environment),
        verdict=verdict,
        rows=_read(path / directory.TRIALS_CSV, _read_trials),
        best=read_candidate(path) if (path / BEST_TOML).exists() else None,
        training=_read(summary, read_json) if summary.exists() else {},
    )
    measured = [record.trial for record in (verdict.winner, verdict.baseline) if record]
    if missing := {*measured, *verdict.ranking, *verdict.trade_offs} - run.rows.keys():
        raise _unreadable(path / directory.VERDICT_JSON, f"it names trial {min(missing)}, which has no row")
    return run


def _read(file: Path, reader: Callable[[Path], T]) -> T:
    try:
        return reader(file)
    except (ConfigError, OSError, ValueError, TypeError, OverflowError) as error:  # pandas knows many for a damaged CSV
        why = "it does not exist" if isinstance(error, FileNotFoundError) else one_line(str(error))
        raise _unreadable(file, why) from None


def _unreadable(file: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{file.parent} is not a readable run: {file.name}: {why}; "
        "give the directory of a search, or repair it with `autotune report --rebuild`"
    )


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

"""The Optuna study: the store of truth, to which every trial is written before and after it is measured.

Parameters are a candidate's own values. The exact request and the TrialRecord are user attributes too, so that every
file of a run can be rebuilt; status, speed and memory are attributes of their own, for Optuna's tables and plots.

TPE reads COMPLETE and PRUNED trials and ignores FAIL ones, so an infeasible trial is PRUNED, with its violation as a
constraint. TPE ranks it below all feasible trials, the smaller violation first (optuna 5, `_split_trials`), which leads
towards memory that fits while nothing does yet.
"""

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.config.search_settings import SearchSettings
from autotune.config.tables import parse_json, read_json, read_table
from autotune.environment import Environment
from autotune.errors import ConfigError, one_line, shown
from autotune.files import write_atomically
from autotune.measure.types import TrialRequest, TrialResult
from autotune.runs.directory import STUDY_DB
from autotune.runs.objective import maximised
from autotune.runs.races import Lineup, Reading
from autotune.runs.records import Role, TrialRecord
from autotune.runs.verdict import Verdict
from autotune.search.space import Space
from autotune.search.storage import Patience, in_a_minute, open_storage
from autotune.units import GIB

if TYPE_CHECKING:  # importing optuna takes a quarter of a second; only a search pays it
    import optuna

_MARK, _VERSION = "autotune", 2
"""User attribute of a study of ours, and the version of what it holds. 1: numbers were recorded by their index."""
SETTINGS, ENVIRONMENT, SPENT = "settings", "environment", "spent_seconds"
NOTES, REMARKS = "notes", "remarks"
_CHOICES, _VERDICT = "choices", "verdict"
_LINEUP, _RIVAL, _READING = "race", "race_rival_", "race_reading_"
"""Attributes of a race: what it is evaluated on, and with a number behind, one for each rival and each reading."""
_REQUEST, _ROLE, _NUMBER, _RECORD = "request", "role", "trial", "record"

PENDING = "pending_record.json"
"""File beside the study: the record of a trial that has ended, until the study holds it."""

_FAILED = 10.0
"""Violation of a trial that failed for another reason than memory: worse than any overshoot seen."""
_INTERRUPTED = 0.01
"""Violation of an interrupted trial, which says next to nothing about its candidate."""


@dataclass(frozen=True, kw_only=True)
class _State:
    """User attributes of a study."""

    spent_seconds: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """Content of the file PENDING."""

    number: int
    """Optuna's number of the trial."""
    record: TrialRecord


def create_study(
    run_dir: Path,
    settings: SearchSettings,
    *,
    url: str = "",
    patience: Patience = in_a_minute,
    storage: "optuna.storages.BaseStorage | None" = None,
) -> "optuna.Study":
    """A new study in `storage`; None: in that of `url`, or of the settings, which hold no password.
    Raises ConfigError for a storage that does not open, or a name that is taken."""
    import optuna

    opened = storage or open_storage(run_dir, url or settings.storage, patience)
    directions = optuna.study.StudyDirection
    direction = directions.MAXIMIZE if maximised(settings) else directions.MINIMIZE
    try:
        study = optuna.create_study(storage=opened, study_name=settings.name, direction=direction)
    except optuna.exceptions.DuplicatedStudyError:
        message = f"the storage has a study {settings.name!r} already; go on with --resume or give another --name"
        raise ConfigError(message) from None
    study.set_user_attr(_MARK, _VERSION)
    with _experimental():
        study.set_metric_names(["tokens/s" if maximised(settings) else "predicted loss"])
    return study


@contextlib.contextmanager
def _experimental() -> Iterator[None]:
    """Without Optuna's warning that a feature is experimental."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def load_study(
    run_dir: Path, settings: SearchSettings | None, patience: Patience = in_a_minute
) -> "optuna.Study":
    """The study of an earlier search; where its settings are lost, the only one of the run directory.
    Raises ConfigError for a storage that does not open or is not ours."""
    import optuna

    name, url = (settings.name, settings.storage) if settings else ("", "")
    if not url and not (run_dir / STUDY_DB).exists():
        raise ConfigError(f"{run_dir} has no {STUDY_DB}; give the directory of a run")
    storage = open_storage(run_dir, url, patience)
    names = optuna.get_all_study_names(storage)
    if not name and len(names) == 1:
        name = names[0]
    if name not in names:
        there = one_line(", ".join(sorted(names))) or "none"
        raise ConfigError(f"the storage has no study {shown(name)}; it has: {there}")
    study = optuna.load_study(study_name=name, storage=storage, sampler=optuna.samplers.RandomSampler())
    if _MARK not in study.user_attrs:
        raise ConfigError(f"the study {shown(name)} is not one of autotune's; give another --storage or --name")
    return study


def refuse_older(study: "optuna.Study", run_dir: Path) -> None:
    """Raise ConfigError for a study whose parameters an earlier version recorded in another way."""
    if study.user_attrs[_MARK] != _VERSION:
        raise ConfigError(
            f"{run_dir} was written by another version of autotune; its report can be read, start a new search"
        )


def records(study: "optuna.Study") -> list[TrialRecord]:
    """Every finished measurement, in the order of the trials."""
    found = [record for trial in study.get_trials(deepcopy=False) if (record := _record(trial)) is not None]
    return sorted(found, key=lambda record: record.trial)


def _record(trial: "optuna.trial.FrozenTrial") -> TrialRecord | None:
    attributes, where = trial.user_attrs, f"the study's trial {trial.number}"
    if _RECORD in attributes:
        return read_table(TrialRecord, _parsed(attributes[_RECORD], where), f"{where}: record")
    if _REQUEST not in attributes or not trial.state.is_finished():
        return None
    request = read_table(TrialRequest, _parsed(attributes[_REQUEST], where), f"{where}: request")
    killed = TrialResult(status="interrupted", phase="start", message="the search ended during this trial")
    table = {"trial": attributes.get(_NUMBER), "role": attributes.get(_ROLE), "candidate": asdict(request.candidate)}
    return read_table(TrialRecord, {**table, "result": asdict(killed)}, where)


def _parsed(attribute: object, where: str) -> Any:
    if not isinstance(attribute, str):
        raise ConfigError(f"{where} is damaged: {shown(attribute)} is not a record of autotune's")
    return parse_json(attribute, where)


def settings_of(study: "optuna.Study") -> SearchSettings:
    """The search settings that the study holds. Raises ConfigError for a damaged study."""
    return read_table(SearchSettings, study.user_attrs.get(SETTINGS), "the study's settings")


def environment_of(study: "optuna.Study") -> Environment:
    """The machine that the study was measured on. Raises ConfigError for a damaged study."""
    return read_table(Environment, study.user_attrs.get(ENVIRONMENT), "the study's environment")


def spent_seconds(study: "optuna.Study") -> float:
    """Wall clock of the search so far. Raises ConfigError for a damaged study."""
    return read_table(_State, {"spent_seconds": study.user_attrs.get(SPENT, 0.0)}, "the study").spent_seconds


def notes_of(study: "optuna.Study", attribute: str = NOTES) -> tuple[str, ...]:
    """NOTES: what could not be done; REMARKS: what was known before. Raises ConfigError for a damaged study."""
    return read_table(_State, {"notes": study.user_attrs.get(attribute, ())}, "the study").notes


def keep_choices(study: "optuna.Study", space: Space) -> None:
    """Write the choices of the space into the study."""
    study.set_user_attr(_CHOICES, {name: list(choices) for name, choices in space.choices.items()})


def as_begun(study: "optuna.Study", space: Space) -> Space:
    """`space` with the choices that the study began with: kernels and knobs that are new since are not tried, and a
    kernel that has gone is tried and found unsupported. Raises ConfigError for a damaged study."""
    begun, knobs = study.user_attrs.get(_CHOICES), vars(space.plan).keys()
    if not isinstance(begun, dict) or begun.keys() - knobs != space.choices.keys() - knobs or not all(begun.values()):
        raise ConfigError(f"the study is damaged: its choices are {shown(begun)}; start a new search")
    return replace(space, choices={name: tuple(choices) for name, choices in begun.items()})


def keep_lineup(study: "optuna.Study", lineup: Lineup) -> None:
    """Write a race's lineup into the study, each rival as an attribute of its own: some storages limit their size."""
    for rival in lineup.rivals:
        study.set_user_attr(f"{_RIVAL}{rival.rival:02d}", json.dumps(asdict(rival), allow_nan=False))
    rest = {"chunk_tokens": lineup.chunk_tokens, "chunks": lineup.chunks, "rivals": len(lineup.rivals)}
    study.set_user_attr(_LINEUP, rest)  # last: a lineup in part does not count


def keep_reading(study: "optuna.Study", reading: Reading) -> None:
    """Write a reading into the study."""
    study.set_user_attr(f"{_READING}{reading.reading:04d}", json.dumps(asdict(reading), allow_nan=False))


def lineup_of(study: "optuna.Study") -> Lineup | None:
    """The race's lineup; None where none has begun. Raises ConfigError for a damaged study."""
    attributes = study.user_attrs
    rest = attributes.get(_LINEUP)
    if rest is None:
        return None
    if not isinstance(rest, dict) or not isinstance(rest.get("rivals"), int):
        raise ConfigError(f"the study is damaged: its race is {shown(rest)}; start a new search")
    names = [f"{_RIVAL}{number:02d}" for number in range(rest["rivals"])]
    rivals = [_parsed(attributes.get(name), f"the study's {name}") for name in names]
    return read_table(Lineup, {**rest, "rivals": rivals}, "the study's race")


def readings_of(study: "optuna.Study") -> list[Reading]:
    """The race's readings so far. Raises ConfigError for a damaged study."""
    attributes = study.user_attrs
    names = sorted(name for name in attributes if name.startswith(_READING))
    return [read_table(Reading, _parsed(attributes[name], name), f"the study's {name}") for name in names]


def requested(number: int, role: Role, request: TrialRequest) -> dict[str, object]:
    """Attributes of a trial that is about to be measured, by which a killed search knows what was in flight."""
    exact = json.dumps(asdict(request), allow_nan=False)
    return {_NUMBER: number, _ROLE: role, "candidate_id": request.candidate.id, _REQUEST: exact}


def finish(study: "optuna.Study", trial: "optuna.Trial", record: TrialRecord, limit_bytes: int, pending: Path) -> None:
    """Write the record and end the trial. Until the study holds it, the file `pending` does."""
    kept = json.dumps({"number": trial.number, "record": asdict(record)}, allow_nan=False)
    with contextlib.suppress(OSError):  # a full disk: the study may have room still, and raises if not
        write_atomically(pending, kept + "\n", durable=False)
    _finish(study, trial, record, limit_bytes)
    pending.unlink(missing_ok=True)


def _finish(study: "optuna.Study", trial: "optuna.Trial", record: TrialRecord, limit_bytes: int) -> None:
    trial.set_user_attr(_RECORD, json.dumps(asdict(record), allow_nan=False))
    for name, value in readable(record).items():
        if value not in (None, ""):
            trial.set_user_attr(name, value)
    tell(study, trial, record, limit_bytes)


def readable(record: TrialRecord) -> dict[str, object]:
    """Attributes of a finished trial for Optuna's tables and plots; None or empty where unknown."""
    result, predicted, peak = record.result, record.predicted_peak_bytes, record.result.peak_bytes
    return {
        "status": result.status,
        "reason": result.message,
        "tokens_per_second": result.tokens_per_second,
        "peak_gib": peak and round(peak / GIB, 3),
        "predicted_peak_gib": predicted and round(predicted / GIB, 3),
        "mfu": result.mfu,
    }


def tell(study: "optuna.Study", trial: "optuna.Trial", record: TrialRecord, limit_bytes: int) -> None:
    """End the trial with its objective, or as PRUNED, and with its violation."""
    import optuna

    trial.set_constraint("feasible", violation(record.result, limit_bytes))
    if record.objective is not None:
        study.tell(trial, record.objective)
    else:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)


def repeat(study: "optuna.Study", trial: "optuna.Trial", answer: TrialRecord, limit_bytes: int) -> None:
    """End a trial whose candidate needs no measurement, with the record that answers for it."""
    trial.set_user_attr(_ROLE, "repeat")
    trial.set_user_attr("answered_by", answer.trial)
    tell(study, trial, answer, limit_bytes)


def _take_in(study: "optuna.Study", pending: Path, limit_bytes: int) -> None:
    """Give the study the record that it lacked when the search ended. Raises ConfigError for a damaged file."""
    import optuna

    if not pending.exists():
        return
    kept = read_table(_Pending, read_json(pending, "delete it to go on without that trial"), pending.name)
    for frozen in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        if frozen.number == kept.number and frozen.user_attrs.get(_NUMBER) == kept.record.trial:
            _finish(study, optuna.trial.Trial(study, frozen._trial_id), kept.record, limit_bytes)
    pending.unlink()


def numbers(study: "optuna.Study") -> dict[int, int]:
    """Optuna's number of each trial that was measured, by ours."""
    trials = study.get_trials(deepcopy=False)
    return {trial.user_attrs[_NUMBER]: trial.number for trial in trials if _NUMBER in trial.user_attrs}


def mark_verdict(study: "optuna.Study", verdict: Verdict, numbers: Mapping[int, int]) -> None:
    """Write the leader into the study's user attribute `verdict`: Optuna's own `best_trial` knows only the objective,
    neither confirmations nor ties. (A finished trial takes no more attributes.) `numbers`: Optuna's, by ours."""
    winner = verdict.winner
    attribute = winner and {
        "trial": winner.trial,
        "number": numbers.get(winner.trial),
        "candidate_id": winner.candidate.id,
        "status": verdict.status,
        "objective": winner.objective,
    }
    study.set_user_attr(_VERDICT, attribute)


def violation(result: TrialResult, limit_bytes: int) -> float:
    """How far beyond feasible, as a fraction of the memory limit; 0 or less where the trial is feasible."""
    if result.status == "interrupted":
        return _INTERRUPTED
    share = ((result.peak_bytes or 0) + (result.wanted_bytes or 0)) / limit_bytes - 1.0
    if result.status == "ok":
        return min(share, 0.0)
    if result.status in ("oom", "over_limit", "predicted_over_limit"):
        # An allocator that gives up below the limit met other processes or fragmentation: still too much.
        return max(share, 0.05)
    return _FAILED


def close_stale(study: "optuna.Study", pending: Path, limit_bytes: int) -> None:
    """End the trials that a killed search left running or waiting, beginning with the one whose record is in `pending`.
    A measurement that was in flight counts as interrupted."""
    import optuna

    _take_in(study, pending, limit_bytes)
    states = optuna.trial.TrialState
    while study.get_trials(deepcopy=False, states=(states.WAITING,)):
        study.tell(study.ask(), state=states.FAIL)
    for frozen in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        # killed between writing the record and ending the trial
        record = _record(frozen) if _RECORD in frozen.user_attrs else None
        if record is not None and record.objective is not None:
            study.tell(frozen.number, record.objective)
        else:  # one without a request may lack values too, and Optuna reads only those that all trials have
            study.tell(frozen.number, state=states.PRUNED if _REQUEST in frozen.user_attrs else states.FAIL)

"""The Optuna study: the store of truth, to which every trial is written before and after it is measured.

Parameters are a candidate's own values. The exact request and the TrialRecord are user attributes too, so that every
file of a run can be rebuilt; status, speed and memory are attributes of their own, for Optuna's tables and plots.

TPE reads COMPLETE and PRUNED trials and ignores FAIL ones, so an infeasible trial is PRUNED, with its violation as a
constraint. TPE ranks it below all feasible trials, the smaller violation first (optuna 5, `_split_trials`), which leads
towards memory that fits while nothing does yet.
"""

import contextlib
import json
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.config.candidate import Candidate
from autotune.config.search_settings import SearchSettings
from autotune.config.storage import is_server
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
from autotune.search.storage import Patience, heartbeats, in_a_minute, open_storage
from autotune.units import GIB

if TYPE_CHECKING:  # importing optuna takes a quarter of a second; only a search pays it
    import optuna
    from optuna.distributions import BaseDistribution

_MARK, _VERSION = "autotune", 2
"""User attribute of a study of ours, and the version of what it holds. 1: numbers were recorded by their index."""
SETTINGS, ENVIRONMENT, SPENT, DATA = "settings", "environment", "spent_seconds", "data"
NOTES, REMARKS = "notes", "remarks"
_CHOICES, _VERDICT = "choices", "verdict"
_LINEUP, _RIVAL, _READING = "race", "race_rival_", "race_reading_"
"""Attributes of a race: what it is evaluated on, and with a number behind, one for each rival and each reading."""
_REQUEST, _ROLE, _NUMBER, _RECORD = "request", "role", "trial", "record"

PENDING = "pending_records.json"
"""File of a run: records of trials that have ended, until the study holds them."""
WITHDRAWN = "withdrawn"
"""Role of a trial that another process had begun with already."""

_FEASIBLE = "feasible"
"""Name of the constraint."""
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

    records: tuple[TrialRecord, ...]


class Journal:
    """The file PENDING of a run."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / PENDING
        self._records: dict[int, TrialRecord] = {}

    def add(self, record: TrialRecord) -> None:
        self._records[record.trial] = record
        kept = json.dumps({"records": [asdict(record) for record in self._records.values()]}, allow_nan=False)
        with contextlib.suppress(OSError):  # a full disk: the study may have room still, and raises if not
            write_atomically(self._file, kept + "\n", durable=False)

    def told(self, record: TrialRecord) -> None:
        """The study holds the record."""
        self._records.pop(record.trial, None)
        if not self._records:
            self._file.unlink(missing_ok=True)

    def read(self) -> tuple[TrialRecord, ...]:
        """What a killed search left. Raises ConfigError for a damaged file."""
        if not self._file.exists():
            return ()
        kept = read_json(self._file, "delete it to go on without those trials")
        return read_table(_Pending, kept, self._file.name).records


def create_study(
    run_dir: Path,
    settings: SearchSettings,
    *,
    url: str = "",
    patience: Patience = in_a_minute,
    storage: "optuna.storages.BaseStorage | None" = None,
) -> "optuna.Study | None":
    """A new study in `storage`; None: in that of `url`, or of the settings, which hold no password. None where a
    database server has a study of this name, which may be joined.
    Raises ConfigError for a storage that does not open, or a name that is taken."""
    import optuna

    opened = storage or open_storage(run_dir, url or settings.storage, patience)
    directions = optuna.study.StudyDirection
    direction = directions.MAXIMIZE if maximised(settings) else directions.MINIMIZE
    try:
        study = optuna.create_study(storage=opened, study_name=settings.name, direction=direction)
    except optuna.exceptions.DuplicatedStudyError:
        if is_server(url or settings.storage):
            return None
        message = f"the storage has a study {settings.name!r} already; go on with --resume or give another --name"
        raise ConfigError(message) from None
    study.set_user_attr(_MARK, _VERSION)
    with _experimental():
        study.set_metric_names(["tokens/s" if maximised(settings) else "predicted loss"])
    return study


@contextlib.contextmanager
def _experimental() -> Iterator[None]:
    """Without Optuna's warnings that a feature is experimental, or meant for its own loop."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage")
        yield


def load_study(
    run_dir: Path, settings: SearchSettings | None, patience: Patience = in_a_minute, url: str = ""
) -> "optuna.Study":
    """The study of an earlier search; where its settings are lost, the only one of the run directory.
    Raises ConfigError for a storage that does not open or is not ours."""
    import optuna

    name, url = (settings.name, url or settings.storage) if settings else ("", "")
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
    if _MARK not in study.user_attrs and not is_server(url):
        raise ConfigError(f"the study {shown(name)} is not one of autotune's; give another --storage or --name")
    return study


def refuse_older(study: "optuna.Study", name: Path | str) -> None:
    """Raise ConfigError for a study whose parameters an earlier version recorded in another way."""
    if study.user_attrs[_MARK] != _VERSION:
        raise ConfigError(
            f"{name} was written by another version of autotune; its report can be read, start a new search"
        )


def records(study: "optuna.Study") -> list[TrialRecord]:
    """Every finished measurement, in the order of the trials."""
    found = [record for trial in study.get_trials(deepcopy=False) if (record := record_of(trial)) is not None]
    return sorted(found, key=lambda record: record.trial)


def record_of(trial: "optuna.trial.FrozenTrial") -> TrialRecord | None:
    """The record of a trial that was measured or interrupted; None for others. Raises ConfigError for a damaged one."""
    attributes, where = trial.user_attrs, f"the study's trial {trial.number}"
    number = attributes.get(_NUMBER, trial.number)  # earlier versions had numbers of their own
    if _RECORD in attributes:
        table = _parsed(attributes[_RECORD], where)
        return read_table(
            TrialRecord, {**table, "trial": number} if isinstance(table, dict) else table, f"{where}: record"
        )
    candidate = requested_candidate(trial) if trial.state.is_finished() else None
    if candidate is None:
        return None
    killed = TrialResult(status="interrupted", phase="start", message="the search ended during this trial")
    table = {"trial": number, "role": attributes.get(_ROLE), "candidate": asdict(candidate), "result": asdict(killed)}
    return read_table(TrialRecord, table, where)


def requested_candidate(trial: "optuna.trial.FrozenTrial") -> Candidate | None:
    """The candidate that a trial measures; None for a trial that measures nothing. Raises ConfigError."""
    attributes, where = trial.user_attrs, f"the study's trial {trial.number}"
    if _REQUEST not in attributes or attributes.get(_ROLE) == WITHDRAWN:
        return None
    return read_table(TrialRequest, _parsed(attributes[_REQUEST], where), f"{where}: request").candidate


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
    told = [study.user_attrs, *(trial.user_attrs for trial in study.get_trials(deepcopy=False))]
    spent = ({"spent_seconds": attributes[SPENT]} for attributes in told if SPENT in attributes)
    return max((read_table(_State, table, "the study").spent_seconds for table in spent), default=0.0)


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


def requested(role: Role, request: TrialRequest, fingerprint: str, spent: float) -> dict[str, object]:
    """Attributes of a trial that is about to be measured, by which a killed search and other machines know what was in
    flight. `fingerprint`: of the environment; `spent`: seconds of the search so far, which a kill must not return."""
    exact = json.dumps(asdict(replace(request, result_path="")), allow_nan=False)
    return {
        _ROLE: role, "candidate_id": request.candidate.id, ENVIRONMENT: fingerprint, SPENT: round(spent, 3),
        _REQUEST: exact,
    }  # fmt: skip


def claim(
    study: "optuna.Study", parameters: Mapping[str, Any], kinds: "Mapping[str, BaseDistribution]",
    attributes: Mapping[str, object],
) -> "optuna.Trial":  # fmt: skip
    """A new running trial, written in one transaction. Its number is the database's."""
    import optuna

    template = optuna.trial.create_trial(
        state=optuna.trial.TrialState.RUNNING, params=dict(parameters),
        distributions={name: kinds[name] for name in parameters}, user_attrs=dict(attributes),
    )  # fmt: skip
    trial = optuna.trial.Trial(study, study._storage.create_new_trial(study._study_id, template))
    heartbeat(trial)
    return trial


def ask(study: "optuna.Study", kinds: "Mapping[str, BaseDistribution]") -> "optuna.Trial":
    """A running trial with the parameters that the study's sampler proposes."""
    with _experimental():
        return study.ask(dict(kinds))


def withdraw(study: "optuna.Study", trial: "optuna.Trial") -> None:
    """End a trial that another process had begun with already."""
    import optuna

    trial.set_user_attr(_ROLE, WITHDRAWN)
    study.tell(trial, state=optuna.trial.TrialState.FAIL)


def interrupt(study: "optuna.Study", trial: "optuna.Trial") -> None:
    """End a trial that was stopped."""
    import optuna

    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError, ValueError):  # it has ended already
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)


def when_begun(study: "optuna.Study") -> "optuna.Study":
    """The study, once the process that has just created it has described it. Raises ConfigError where that was killed
    before."""
    for _ in range(100):
        if SETTINGS in study.user_attrs:
            return study
        time.sleep(0.1)
    raise ConfigError(f"the search that created the study {study.study_name!r} was killed at once; give another --name")


def heartbeat(trial: "optuna.Trial") -> None:
    """Say that the machine of a running trial lives, where the storage is a server."""
    from optuna.storages._heartbeat import BaseHeartbeat

    if is_shared(trial.study):
        assert isinstance(trial.storage, BaseHeartbeat)
        trial.storage.record_heartbeat(trial._trial_id)


def is_shared(study: "optuna.Study") -> bool:
    """Whether the storage is a server, which several machines use."""
    from optuna.storages._heartbeat import is_heartbeat_enabled

    return bool(is_heartbeat_enabled(study._storage))


def fail_dead(study: "optuna.Study", old: Collection[int]) -> None:
    """End the trials of machines that have died: those whose heartbeat is overdue, and of the `old` ones, by number,
    those that never had one: their machine died as they began."""
    import optuna

    with _experimental():
        optuna.storages.fail_stale_trials(study)
    if not old:
        return
    beating = heartbeats(study)
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        if trial.number in old and trial._trial_id not in beating:
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                study._storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.FAIL)


def finish(
    study: "optuna.Study", trial: "optuna.Trial", record: TrialRecord, limit_bytes: int, journal: Journal
) -> TrialRecord | None:
    """Write the record and end the trial. Until the study holds it, the journal does. Returns the record as it is kept:
    a trial that was given to another machine meanwhile, because this one seemed dead, gets another number; None where
    the other has begun with it."""
    import optuna

    journal.add(record)
    kept: TrialRecord | None = record
    try:
        for name, value in _attributes(record).items():
            trial.set_user_attr(name, value)
        tell(study, trial, record, limit_bytes)
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError):  # Optuna's own for a trial that has ended
        kept = _finish_late(study, trial, record, limit_bytes)
    journal.told(record)
    return kept


def _finish_late(
    study: "optuna.Study", trial: "optuna.Trial", record: TrialRecord, limit_bytes: int
) -> TrialRecord | None:
    ended = study._storage.get_trial(trial._trial_id)
    if not ended.state.is_finished():
        raise AssertionError(f"trial {ended.number} cannot be told")
    if _RECORD in ended.user_attrs:
        return record
    mine = record.candidate.id
    others = (t for t in study.get_trials(deepcopy=False) if t.user_attrs.get("candidate_id") == mine)
    if record.role != "final" and any(t.number > ended.number and t.state.name != "FAIL" for t in others):
        return None
    kept = (_ROLE, "candidate_id", ENVIRONMENT, _REQUEST)
    before = {name: ended.user_attrs[name] for name in kept if name in ended.user_attrs}
    number = add_ended(study, ended.params, ended.distributions, record, limit_bytes, {**before, **_attributes(record)})
    return replace(record, trial=number)


def add_ended(
    study: "optuna.Study", parameters: Mapping[str, Any], kinds: "Mapping[str, BaseDistribution]", record: TrialRecord,
    limit_bytes: int, attributes: Mapping[str, object],
) -> int:  # fmt: skip
    """Add a trial that has ended, with the record's objective; in one transaction. Returns its number."""
    import optuna

    states = optuna.trial.TrialState
    template = optuna.trial.create_trial(
        state=states.PRUNED if record.objective is None else states.COMPLETE, value=record.objective,
        params=dict(parameters), distributions=dict(kinds), user_attrs=dict(attributes),
        constraints={_FEASIBLE: violation(record.result, limit_bytes)},
    )  # fmt: skip
    storage = study._storage
    return int(storage.get_trial(storage.create_new_trial(study._study_id, template)).number)


def _attributes(record: TrialRecord) -> dict[str, object]:
    told = {name: value for name, value in readable(record).items() if value not in (None, "")}
    return {_RECORD: json.dumps(asdict(record), allow_nan=False), **told}


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

    trial.set_constraint(_FEASIBLE, violation(record.result, limit_bytes))
    if record.objective is not None:
        study.tell(trial, record.objective)
    else:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)


def repeat(study: "optuna.Study", trial: "optuna.Trial", answer: TrialRecord, limit_bytes: int) -> None:
    """End a trial whose candidate needs no measurement, with the record that answers for it."""
    trial.set_user_attr(_ROLE, "repeat")
    trial.set_user_attr("answered_by", answer.trial)
    tell(study, trial, answer, limit_bytes)


def take_in(study: "optuna.Study", run_dir: Path, limit_bytes: int) -> None:
    """Give the study the records that it lacked when the search of `run_dir` ended. Raises ConfigError for a damaged
    file."""
    import optuna

    journal = Journal(run_dir)
    by_number = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    for record in journal.read():
        frozen = by_number.get(record.trial)
        if frozen is not None and not (frozen.state.is_finished() and _RECORD in frozen.user_attrs):
            finish(study, optuna.trial.Trial(study, frozen._trial_id), record, limit_bytes, journal)
    (run_dir / PENDING).unlink(missing_ok=True)


def mark_verdict(study: "optuna.Study", verdict: Verdict) -> None:
    """Write the leader into the study's user attribute `verdict`: Optuna's own `best_trial` knows only the objective,
    neither confirmations nor ties. (A finished trial takes no more attributes.)"""
    winner = verdict.winner
    attribute = winner and {
        "trial": winner.trial,
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


def close_stale(study: "optuna.Study", run_dir: Path, limit_bytes: int) -> None:
    """End the trials that a killed search left running or waiting, beginning with those whose records are on the disk.
    A measurement that was in flight counts as interrupted. In a database server others run, and heartbeats decide."""
    import optuna

    take_in(study, run_dir, limit_bytes)
    if is_shared(study):
        return
    states = optuna.trial.TrialState
    while study.get_trials(deepcopy=False, states=(states.WAITING,)):
        study.tell(study.ask(), state=states.FAIL)
    for frozen in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        # killed between writing the record and ending the trial
        record = record_of(frozen) if _RECORD in frozen.user_attrs else None
        if record is not None and record.objective is not None:
            study.tell(frozen.number, record.objective)
        else:  # one without a request may lack values too, and Optuna reads only those that all trials have
            study.tell(frozen.number, state=states.PRUNED if _REQUEST in frozen.user_attrs else states.FAIL)

"""The study's trials, each written before and after it is measured, and read back as records.

Parameters are a candidate's own values. The exact request and the TrialRecord are user attributes too, so that every
file of a run can be rebuilt; status, speed and memory are attributes of their own, for Optuna's tables and plots.

TPE reads COMPLETE and PRUNED trials and ignores FAIL ones, so an infeasible trial is PRUNED, with its violation as a
constraint. TPE ranks it below all feasible trials, the smaller violation first (optuna 5, `_split_trials`), which leads
towards memory that fits while nothing does yet.
"""

import contextlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.config.candidate import Candidate
from autotune.config.tables import read_json, read_table
from autotune.files import write_atomically
from autotune.measure.types import TrialRequest, TrialResult
from autotune.runs.records import Role, TrialRecord
from autotune.search import tables
from autotune.search.study import ENVIRONMENT, SPENT, is_shared, parsed, unwarned
from autotune.units import GIB

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, TrialState

_REQUEST, _ROLE, _NUMBER, _RECORD = "request", "role", "trial", "record"
KEPT = _REQUEST, _ROLE, _NUMBER, _RECORD
"""Attributes from which `record_of` and `requested_candidate` read."""

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
class OpenTrial:
    """A trial of the study that runs."""

    trial_id: int
    """The database's, by which Optuna's storage names it."""
    number: int
    asked: bool = False
    """Whether an Optuna sampler proposed it, which must hear of its end."""


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


def records(study: "optuna.Study") -> list[TrialRecord]:
    """Every finished measurement, in the order of the trials."""
    found = [record for trial in study.get_trials(deepcopy=False) if (record := record_of(trial)) is not None]
    return sorted(found, key=lambda record: record.trial)


def record_of(trial: "FrozenTrial | tables.Row") -> TrialRecord | None:
    """The record of a trial that was measured or interrupted; None for others. Raises ConfigError for a damaged one."""
    attributes, where = trial.user_attrs, f"the study's trial {trial.number}"
    number = attributes.get(_NUMBER, trial.number)  # earlier versions had numbers of their own
    if _RECORD in attributes:
        table = parsed(attributes[_RECORD], where)
        return read_table(
            TrialRecord, {**table, "trial": number} if isinstance(table, dict) else table, f"{where}: record"
        )
    candidate = requested_candidate(trial) if trial.state.is_finished() else None
    if candidate is None:
        return None
    killed = TrialResult(status="interrupted", phase="start", message="the search ended during this trial")
    table = {"trial": number, "role": attributes.get(_ROLE), "candidate": asdict(candidate), "result": asdict(killed)}
    return read_table(TrialRecord, table, where)


def requested_candidate(trial: "FrozenTrial | tables.Row") -> Candidate | None:
    """The candidate that a trial measures; None for a trial that measures nothing. Raises ConfigError."""
    attributes, where = trial.user_attrs, f"the study's trial {trial.number}"
    if _REQUEST not in attributes or attributes.get(_ROLE) == WITHDRAWN:
        return None
    return read_table(TrialRequest, parsed(attributes[_REQUEST], where), f"{where}: request").candidate


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
) -> OpenTrial:  # fmt: skip
    """A new running trial. Its number is the database's. On a server it has had its first heartbeat."""
    import optuna

    template = optuna.trial.create_trial(
        state=optuna.trial.TrialState.RUNNING, params=dict(parameters),
        distributions={name: kinds[name] for name in parameters}, user_attrs=dict(attributes),
    )  # fmt: skip
    trial_id, number = tables.insert(study, template, beats=is_shared(study))
    return OpenTrial(trial_id=trial_id, number=number)


def ask(study: "optuna.Study", kinds: "Mapping[str, BaseDistribution]") -> tuple[OpenTrial, dict[str, Any]]:
    """A running trial, and the parameters that the study's sampler proposes for it."""
    with unwarned():
        trial = study.ask(dict(kinds))
    return OpenTrial(trial_id=trial._trial_id, number=trial.number, asked=True), trial.params


def claim_asked(study: "optuna.Study", trial: OpenTrial, attributes: Mapping[str, object]) -> None:
    """Say what a trial measures that Optuna's sampler proposed."""
    tables.update(study, trial.trial_id, user_attrs=attributes)
    heartbeat(study, trial)


def heartbeat(study: "optuna.Study", trial: OpenTrial) -> None:
    """Say that the machine of a running trial lives, where the storage is a server."""
    from optuna.storages._heartbeat import BaseHeartbeat

    if is_shared(study):
        assert isinstance(study._storage, BaseHeartbeat)
        study._storage.record_heartbeat(trial.trial_id)


def withdraw(study: "optuna.Study", trial: OpenTrial) -> None:
    """End a trial that another process had begun with already."""
    import optuna

    _end(study, trial, optuna.trial.TrialState.FAIL, attributes={_ROLE: WITHDRAWN})


def interrupt(study: "optuna.Study", trial: OpenTrial) -> None:
    """End a trial that was stopped."""
    import optuna

    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError, ValueError):  # it has ended already
        _end(study, trial, optuna.trial.TrialState.PRUNED)


def repeat(study: "optuna.Study", trial: OpenTrial, answer: TrialRecord, limit_bytes: int) -> None:
    """End a trial whose candidate needs no measurement, with the record that answers for it."""
    tell(study, trial, answer, limit_bytes, {_ROLE: "repeat", "answered_by": answer.trial})


def finish(
    study: "optuna.Study", trial: OpenTrial, record: TrialRecord, limit_bytes: int, journal: Journal
) -> TrialRecord | None:
    """Write the record and end the trial. Until the study holds it, the journal does. Returns the record as it is kept:
    a trial that was given to another machine meanwhile, because this one seemed dead, gets another number; None where
    the other has begun with it."""
    import optuna

    journal.add(record)
    kept: TrialRecord | None = record
    try:
        tell(study, trial, record, limit_bytes, _attributes(record))
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError):  # Optuna's own for a trial that has ended
        kept = _finish_late(study, trial, record, limit_bytes)
    journal.told(record)
    return kept


def _finish_late(
    study: "optuna.Study", trial: OpenTrial, record: TrialRecord, limit_bytes: int
) -> TrialRecord | None:
    import optuna

    states = optuna.trial.TrialState
    ended = study._storage.get_trial(trial.trial_id)
    if not ended.state.is_finished():
        raise AssertionError(f"trial {ended.number} cannot be told")
    if _RECORD in ended.user_attrs:
        return record
    mine = record.candidate.id
    others = (t for t in study.get_trials(deepcopy=False) if t.user_attrs.get("candidate_id") == mine)
    if record.role != "final" and any(t.number > ended.number and t.state.name != "FAIL" for t in others):
        return None
    kept = _ROLE, "candidate_id", ENVIRONMENT, _REQUEST
    before = {name: ended.user_attrs[name] for name in kept if name in ended.user_attrs}
    template = optuna.trial.create_trial(
        state=states.PRUNED if record.objective is None else states.COMPLETE, value=record.objective,
        params=ended.params, distributions=ended.distributions, user_attrs={**before, **_attributes(record)},
        constraints={_FEASIBLE: violation(record.result, limit_bytes)},
    )  # fmt: skip
    _, number = tables.insert(study, template, beats=False)
    return replace(record, trial=number)


def _attributes(record: TrialRecord) -> dict[str, object]:
    """The record, and for Optuna's tables and plots what is known of it."""
    result, predicted, peak = record.result, record.predicted_peak_bytes, record.result.peak_bytes
    readable = {
        "status": result.status,
        "reason": result.message,
        "tokens_per_second": result.tokens_per_second,
        "peak_gib": peak and round(peak / GIB, 3),
        "predicted_peak_gib": predicted and round(predicted / GIB, 3),
        "mfu": result.mfu,
    }
    known = {name: value for name, value in readable.items() if value not in (None, "")}
    return {_RECORD: json.dumps(asdict(record), allow_nan=False), **known}


def tell(
    study: "optuna.Study", trial: OpenTrial, record: TrialRecord, limit_bytes: int,
    attributes: Mapping[str, object] = {},
) -> None:  # fmt: skip
    """End the trial with its objective, or as PRUNED, and with its violation."""
    import optuna

    states, objective = optuna.trial.TrialState, record.objective
    state, values = (states.PRUNED, ()) if objective is None else (states.COMPLETE, (objective,))
    _end(study, trial, state, values, attributes, {_FEASIBLE: violation(record.result, limit_bytes)})


def _end(
    study: "optuna.Study", trial: OpenTrial, state: "TrialState", values: Sequence[float] = (),
    attributes: Mapping[str, object] = {}, constraints: Mapping[str, float] = {},
) -> None:  # fmt: skip
    """End the trial in one transaction; through Optuna where its sampler is to hear of it."""
    import optuna

    ended = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, constraints=dict(constraints))
    if not trial.asked:
        tables.update(study, trial.trial_id, state, values, attributes, ended.system_attrs)
        return
    tables.update(study, trial.trial_id, user_attrs=attributes, system_attrs=ended.system_attrs)
    study.tell(trial.number, list(values) or None, state)


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

    _take_in(study, run_dir, limit_bytes)
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


def _take_in(study: "optuna.Study", run_dir: Path, limit_bytes: int) -> None:
    """Give the study the records that it lacked when the search of `run_dir` ended. Raises ConfigError for a damaged
    file."""
    journal = Journal(run_dir)
    by_number = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    for record in journal.read():
        frozen = by_number.get(record.trial)
        if frozen is not None and not (frozen.state.is_finished() and _RECORD in frozen.user_attrs):
            finish(
                study, OpenTrial(trial_id=frozen._trial_id, number=frozen.number), record, limit_bytes, journal
            )
    (run_dir / PENDING).unlink(missing_ok=True)


def fail_dead(study: "optuna.Study", old: Collection[int]) -> None:
    """End the trials of machines that have died: those whose heartbeat is overdue, and of the `old` ones, by number,
    those that never had one: their machine died as they began."""
    import optuna

    with unwarned():
        optuna.storages.fail_stale_trials(study)
    if not old:
        return
    beating = tables.heartbeats(study)
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        if trial.number in old and trial._trial_id not in beating:
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                study._storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.FAIL)

"""The Optuna study: the store of truth, to which every trial is written before and after it is measured.

Each Optuna trial carries its TrialRecord as a user attribute, so that every file of a run can be rebuilt.

What an infeasible trial is told: TPE reads COMPLETE and PRUNED trials and ignores FAIL ones, so it is
PRUNED, with its violation as a constraint. TPE then ranks it below all feasible trials, the smaller
violation first (optuna 5, `_split_trials`), which leads towards memory that fits while nothing does yet.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.config.candidate import Candidate
from autotune.config.search_settings import SearchSettings
from autotune.config.tables import parse_json, read_json, read_table
from autotune.environment import Environment
from autotune.errors import ConfigError, one_line, shown
from autotune.files import write_atomically
from autotune.measure.types import TrialRequest, TrialResult
from autotune.runs.directory import STUDY_DB
from autotune.runs.objective import maximised
from autotune.runs.records import Role, TrialRecord
from autotune.runs.verdict import Verdict
from autotune.search.space import Space, Value, ordered, values_of
from autotune.search.storage import Patience, in_a_minute, open_storage

if TYPE_CHECKING:  # importing optuna takes a quarter of a second; only a search pays it
    import optuna

_MARK = "autotune"
SETTINGS, ENVIRONMENT, SPENT = "settings", "environment", "spent_seconds"
NOTES, REMARKS = "notes", "remarks"
_VERDICT = "verdict"
_REQUEST, _ROLE, _NUMBER, _RECORD = "request", "role", "trial", "record"

UNTOLD = "untold.json"
"""Beside the study: the record of a trial that has ended, until the study has it."""

_FAILED = 10.0
"""Violation of a trial that failed for another reason than memory: worse than any overshoot seen."""
_INTERRUPTED = 0.01
"""An interrupted trial says next to nothing of its candidate."""


@dataclass(frozen=True, kw_only=True)
class _State:
    """User attributes of a study."""

    spent_seconds: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Untold:
    """What the file `untold.json` holds."""

    number: int
    """Optuna's."""
    record: TrialRecord


def create_study(
    run_dir: Path, settings: SearchSettings, *, storage: str = "", patience: Patience = in_a_minute
) -> "optuna.Study":
    """A new study, in the settings' storage; `storage` is its URL with the password, which settings do not hold.
    Raises ConfigError for a storage that does not open, or a name that is taken."""
    import optuna

    opened = open_storage(run_dir, storage or settings.storage, patience)
    sampler = optuna.samplers.RandomSampler()  # asked for nothing
    directions = optuna.study.StudyDirection
    direction = directions.MAXIMIZE if maximised(settings) else directions.MINIMIZE
    try:
        study = optuna.create_study(storage=opened, study_name=settings.name, direction=direction, sampler=sampler)
    except optuna.exceptions.DuplicatedStudyError:
        message = f"the storage has a study {settings.name!r} already; go on with --resume or give another --name"
        raise ConfigError(message) from None
    study.set_user_attr(_MARK, 1)
    return study


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


def records(study: "optuna.Study") -> list[TrialRecord]:
    """Every ended measurement, in the order of the trials."""
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
    """What the search was asked, as the study keeps it. Raises ConfigError for a damaged study."""
    return read_table(SearchSettings, study.user_attrs.get(SETTINGS), "the study's settings")


def environment_of(study: "optuna.Study") -> Environment:
    """Of which machine the study is. Raises ConfigError for a damaged study."""
    return read_table(Environment, study.user_attrs.get(ENVIRONMENT), "the study's environment")


def spent_seconds(study: "optuna.Study") -> float:
    """Wall clock of the search so far. Raises ConfigError for a damaged study."""
    return read_table(_State, {"spent_seconds": study.user_attrs.get(SPENT, 0.0)}, "the study").spent_seconds


def notes_of(study: "optuna.Study") -> tuple[str, ...]:
    """What could not be done. Raises ConfigError for a damaged study."""
    return read_table(_State, {"notes": study.user_attrs.get(NOTES, ())}, "the study").notes


def remarks_of(study: "optuna.Study") -> tuple[str, ...]:
    """What was known before the search. Raises ConfigError for a damaged study."""
    return read_table(_State, {"notes": study.user_attrs.get(REMARKS, ())}, "the study").notes


def as_begun(study: "optuna.Study", space: Space) -> Space:
    """`space` with the names that the study began with, which optuna cannot change: what has been installed since is
    not tried, and what has gone is tried and found unsupported."""
    known = {name: was for trial in study.trials for name, was in trial.distributions.items()}
    choices = {name: getattr(known.get(name), "choices", here) for name, here in space.choices.items()}
    return replace(space, choices=choices)


def begin(study: "optuna.Study", space: Space, number: int, role: Role, request: TrialRequest) -> "optuna.Trial":
    """Write down what is about to be measured, so that a killed search knows what was in flight."""
    asked = json.dumps(asdict(request), allow_nan=False)
    return ask_for(study, space, request.candidate, {_NUMBER: number, _ROLE: role, _REQUEST: asked})


def ask_for(
    study: "optuna.Study", space: Space, candidate: Candidate, attributes: dict[str, Any] | None = None
) -> "optuna.Trial":
    """A running trial for a given candidate, filed under the nearest values of the space. It is written in one
    transaction: `enqueue_trial` and `ask` would need one for each value and each attribute."""
    import optuna

    values, kinds = values_of(space, candidate), optuna.distributions
    study.add_trial(
        optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING,
            params={n: c.index(values[n]) if ordered(c) else values[n] for n, c in space.choices.items()},
            distributions={
                n: kinds.IntDistribution(0, len(c) - 1) if ordered(c) else kinds.CategoricalDistribution(c)
                for n, c in space.choices.items()
            },
            user_attrs=attributes,
        )
    )
    return optuna.Trial(study, study.get_trials(deepcopy=False)[-1]._trial_id)


def suggest(trial: "optuna.Trial", space: Space) -> dict[str, Value]:
    """The trial's values. Ordered choices are told to Optuna as their index, so that it knows of neighbours."""
    values: dict[str, Value] = {}
    for name, choices in space.choices.items():
        if ordered(choices):
            values[name] = choices[trial.suggest_int(name, 0, len(choices) - 1)]
        else:
            values[name] = str(trial.suggest_categorical(name, choices))
    return values


def finish(study: "optuna.Study", trial: "optuna.Trial", record: TrialRecord, limit_bytes: int, untold: Path) -> None:
    """Tell the study. Until it has the record, the file `untold` keeps it."""
    kept = json.dumps({"number": trial.number, "record": asdict(record)}, allow_nan=False)
    with contextlib.suppress(OSError):  # a full disk: the study may have room still, and says it if not
        write_atomically(untold, kept + "\n")
    _tell_all(study, trial, record, limit_bytes)
    untold.unlink(missing_ok=True)


def _tell_all(study: "optuna.Study", trial: "optuna.Trial", record: TrialRecord, limit_bytes: int) -> None:
    trial.set_user_attr(_RECORD, json.dumps(asdict(record), allow_nan=False))
    tell(study, trial, record, limit_bytes)


def _take_in(study: "optuna.Study", untold: Path, limit_bytes: int) -> None:
    """Tell the study what it was not told when the search ended. Raises ConfigError for a damaged file."""
    import optuna

    if not untold.exists():
        return
    kept = read_table(_Untold, read_json(untold, "delete it to go on without that trial"), untold.name)
    for frozen in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        if frozen.number == kept.number and frozen.user_attrs.get(_NUMBER) == kept.record.trial:
            _tell_all(study, optuna.trial.Trial(study, frozen._trial_id), kept.record, limit_bytes)
    untold.unlink()


def mark_verdict(study: "optuna.Study", verdict: Verdict) -> None:
    """Write who leads into the study's user attribute `verdict`: Optuna's own `best_trial` knows only the objective,
    neither confirmations nor ties. (A trial that has ended takes no attributes any more.)"""
    number = {trial.user_attrs.get(_NUMBER): trial.number for trial in study.get_trials(deepcopy=False)}
    winner = verdict.winner
    attribute = winner and {
        "trial": winner.trial,
        "number": number.get(winner.trial),  # Optuna's, by which its dashboards count
        "status": verdict.status,
        "objective": winner.objective,
        "candidate_id": winner.candidate.id,
    }
    if study.user_attrs.get(_VERDICT) != attribute:
        study.set_user_attr(_VERDICT, attribute)


def tell(study: "optuna.Study", trial: "optuna.Trial", record: TrialRecord, limit_bytes: int) -> None:
    import optuna

    trial.set_constraint("feasible", violation(record.result, limit_bytes))
    if record.objective is not None:
        study.tell(trial, record.objective)
    else:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)


def violation(result: TrialResult, limit_bytes: int) -> float:
    """How far beyond feasible, as a fraction of the memory limit; 0 or less where the trial is feasible."""
    if result.status == "interrupted":
        return _INTERRUPTED
    share = ((result.peak_bytes or 0) + (result.wanted_bytes or 0)) / limit_bytes - 1.0
    if result.status == "ok":
        return min(share, 0.0)
    if result.status in ("oom", "over_limit", "predicted_over_limit"):
        # An allocator that gives up below the limit met other processes or fragments: still too much.
        return max(share, 0.05)
    return _FAILED


def close_stale(study: "optuna.Study", untold: Path, limit_bytes: int) -> None:
    """End the trials that a killed search left running or waiting, first of all the one whose record lies in `untold`.
    A measurement that was in flight counts as interrupted from then on."""
    import optuna

    _take_in(study, untold, limit_bytes)
    states = optuna.trial.TrialState
    while study.get_trials(deepcopy=False, states=(states.WAITING,)):
        study.tell(study.ask(), state=states.FAIL)
    for frozen in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        # killed between keeping the record and telling it
        record = _record(frozen) if _RECORD in frozen.user_attrs else None
        if record is not None and record.objective is not None:
            study.tell(frozen.number, record.objective)
        else:  # without its request it may lack values too, and Optuna reads only those that all its trials have
            study.tell(frozen.number, state=states.PRUNED if _REQUEST in frozen.user_attrs else states.FAIL)


def answered(found: Sequence[TrialRecord]) -> dict[str, TrialRecord]:
    """Searched candidates by id. Interrupted ones have no answer yet, confirmations are always run again."""
    return {r.candidate.id: r for r in found if r.role != "final" and r.result.status != "interrupted"}

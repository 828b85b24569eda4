"""The Optuna study: the store of truth, to which every trial is written before and after it is measured.

Each Optuna trial carries its TrialRecord as a user attribute, so that every file of a run can be rebuilt.

What an infeasible trial is told: TPE reads COMPLETE and PRUNED trials and ignores FAIL ones, so it is
PRUNED, with its violation as a constraint. TPE then ranks it below all feasible trials, the smaller
violation first (optuna 5, `_split_trials`), which leads towards memory that fits while nothing does yet.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.config.candidate import Candidate
from autotune.config.search import SearchSettings
from autotune.config.tables import read_table
from autotune.errors import ConfigError
from autotune.measure.records import Role, TrialRecord
from autotune.measure.types import TrialRequest, TrialResult
from autotune.search.objective import maximised
from autotune.search.space import Space, Value, ordered, values_of

if TYPE_CHECKING:  # importing optuna takes a quarter of a second; only a search pays it
    import optuna

_MARK = "autotune"
_REQUEST, _ROLE, _NUMBER, _RECORD = "request", "role", "trial", "record"

_FAILED = 10.0
"""Violation of a trial that failed for another reason than memory: worse than any overshoot seen."""
_INTERRUPTED = 0.01
"""An interrupted trial says next to nothing of its candidate."""


def create_study(run_dir: Path, settings: SearchSettings) -> "optuna.Study":
    """A new study. Raises ConfigError for a storage that does not open, or a name that is taken."""
    import optuna

    storage, sampler = _open(run_dir, settings.storage), optuna.samplers.RandomSampler()  # asked for nothing
    directions = optuna.study.StudyDirection
    direction = directions.MAXIMIZE if maximised(settings) else directions.MINIMIZE
    try:
        study = optuna.create_study(storage=storage, study_name=settings.name, direction=direction, sampler=sampler)
    except optuna.exceptions.DuplicatedStudyError:
        message = f"the storage has a study {settings.name!r} already; go on with --resume or give another --name"
        raise ConfigError(message) from None
    study.set_user_attr(_MARK, 1)
    return study


def load_study(run_dir: Path, settings: SearchSettings | None) -> "optuna.Study":
    """The study of an earlier search; where its settings are lost, the only one of the run directory.
    Raises ConfigError for a storage that does not open or is not ours."""
    import optuna

    name, url = (settings.name, settings.storage) if settings else ("", "")
    if not url and not (run_dir / "study.db").exists():
        raise ConfigError(f"{run_dir} has no study.db; give the directory of a run")
    storage = _open(run_dir, url)
    names = optuna.get_all_study_names(storage)
    if not name and len(names) == 1:
        name = names[0]
    if name not in names:
        raise ConfigError(f"the storage has no study {name!r}; it has: {', '.join(sorted(names)) or 'none'}")
    study = optuna.load_study(study_name=name, storage=storage, sampler=optuna.samplers.RandomSampler())
    if _MARK not in study.user_attrs:
        raise ConfigError(f"the study {name!r} is not one of autotune's; give another --storage or --name")
    return study


def _open(run_dir: Path, url: str) -> "optuna.storages.BaseStorage":
    """The storage of that URL; where it is empty, the SQLite file of the run directory."""
    import optuna
    import sqlalchemy
    import sqlalchemy.event
    import sqlalchemy.exc

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = url or sqlalchemy.URL.create("sqlite", database=str((run_dir / "study.db").resolve())).render_as_string()
    try:
        engine = sqlalchemy.create_engine(url)
        tables = sqlalchemy.inspect(engine).get_table_names()
        engine.dispose()
        if tables and "studies" not in tables:  # Optuna would add its own tables to somebody's database
            raise ConfigError(f"--storage {url!r} holds something else ({tables[0]}); give a database of its own")
        storage = optuna.storages.RDBStorage(url)
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        message = f"--storage {url!r} cannot be opened: {first}; give for example sqlite:///studies.db"
        raise ConfigError(message) from None
    if storage.engine.dialect.name == "sqlite":
        # Some thirty commits a trial, 5 to 10 ms each where they wait for the disk. Without waiting nothing is
        # lost when a process is killed; `sync` after each trial is for the machine itself.
        sqlalchemy.event.listen(storage.engine, "connect", lambda new, _: new.execute("PRAGMA synchronous = OFF"))
        storage.engine.dispose()  # connections that were made before
    return storage


def sync(run_dir: Path) -> None:
    """Wait until the run's own study.db, if it has one, is on the disk."""
    file = run_dir / "study.db"
    if file.exists():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def records(study: "optuna.Study") -> list[TrialRecord]:
    """Every ended measurement, in the order of the trials."""
    found = [record for trial in study.get_trials(deepcopy=False) if (record := _record(trial)) is not None]
    return sorted(found, key=lambda record: record.trial)


def _record(trial: "optuna.trial.FrozenTrial") -> TrialRecord | None:
    attributes = trial.user_attrs
    if _RECORD in attributes:
        return read_table(TrialRecord, json.loads(attributes[_RECORD]), "record")
    if _REQUEST not in attributes or not trial.state.is_finished():
        return None
    request = read_table(TrialRequest, json.loads(attributes[_REQUEST]), "request")
    killed = TrialResult(status="interrupted", phase="start", message="the search ended during this trial")
    return TrialRecord(trial=attributes[_NUMBER], role=attributes[_ROLE], candidate=request.candidate, result=killed)


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


def finish(study: "optuna.Study", trial: "optuna.Trial", record: TrialRecord, limit_bytes: int) -> None:
    """Keep the record, then tell the study."""
    trial.set_user_attr(_RECORD, json.dumps(asdict(record), allow_nan=False))
    tell(study, trial, record, limit_bytes)


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
    known = [peak for view in ("allocated_bytes", "reserved_bytes", "device_bytes") if (peak := result.peak(view))]
    share = (max(known, default=0) + (result.wanted_bytes or 0)) / limit_bytes - 1.0
    if result.status == "ok":
        return min(share, 0.0)
    if result.status in ("oom", "over_limit", "predicted_over_limit"):
        # An allocator that gives up below the limit met other processes or fragments: still too much.
        return max(share, 0.05)
    return _FAILED


def close_stale(study: "optuna.Study") -> None:
    """End the trials that a killed search left running or waiting. A measurement that was in flight counts
    as interrupted from then on."""
    import optuna

    states = optuna.trial.TrialState
    while study.get_trials(deepcopy=False, states=(states.WAITING,)):
        study.tell(study.ask(), state=states.FAIL)
    for frozen in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        kept = frozen.user_attrs.get(_RECORD)  # killed between keeping the record and telling it
        objective = json.loads(kept)["objective"] if kept else None
        if objective is not None:
            study.tell(frozen.number, objective)
        else:  # without its request it may lack values too, and Optuna reads only those that all its trials have
            study.tell(frozen.number, state=states.PRUNED if _REQUEST in frozen.user_attrs else states.FAIL)


def answered(found: Sequence[TrialRecord]) -> dict[str, TrialRecord]:
    """Searched candidates by id. Interrupted ones have no answer yet, confirmations are always run again."""
    return {r.candidate.id: r for r in found if r.role != "final" and r.result.status != "interrupted"}

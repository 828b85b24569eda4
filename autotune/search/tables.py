"""Optuna's tables, written and read in few statements.

Optuna's own calls write each parameter and each attribute in a transaction of its own: some eighty statements a trial,
which would limit a study that many share. What is written here is the same, row for row, through Optuna's models of its
tables (tests/search/test_tables.py), so that its calls and its tools read it.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from autotune.search.storage import outlasted

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, TrialState
    from sqlalchemy.orm import Session

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A trial, as far as it was asked for."""

    number: int
    state: "TrialState"
    user_attrs: dict[str, Any]


def insert(study: "optuna.Study", trial: "FrozenTrial", *, beats: bool) -> tuple[int, int]:
    """Write a trial, and return its id and its number. `beats`: with its first heartbeat."""
    from optuna.distributions import distribution_to_json
    from optuna.storages._rdb import models

    parameters = [
        {
            "param_name": name, "param_value": kind.to_internal_repr(trial.params[name]),
            "distribution_json": distribution_to_json(kind),
        }
        for name, kind in trial.distributions.items()
    ]  # fmt: skip

    def work(session: "Session") -> tuple[int, int]:
        # As Optuna does: the number is the count of the trials before, and the lock keeps others from counting too.
        models.StudyModel.find_or_raise_by_id(study._study_id, session, for_update=True)
        row: Any = models.TrialModel(study_id=study._study_id, state=trial.state)
        row.datetime_start = trial.datetime_start
        row.datetime_complete = trial.datetime_complete
        session.add(row)
        session.flush()
        row.number = row.count_past_trials(session)
        _add(session, models.TrialParamModel, row.trial_id, parameters)
        _add(session, models.TrialUserAttributeModel, row.trial_id, _encoded(trial.user_attrs))
        _add(session, models.TrialSystemAttributeModel, row.trial_id, _encoded(trial.system_attrs))
        _add(session, models.TrialValueModel, row.trial_id, _values(trial.values or ()))
        if beats:
            session.add(models.TrialHeartbeatModel(trial_id=row.trial_id))
        return row.trial_id, row.number

    return _in_transaction(study, work)


def update(
    study: "optuna.Study", trial_id: int, state: "TrialState | None" = None, values: Sequence[float] = (),
    user_attrs: Mapping[str, object] = {}, system_attrs: Mapping[str, object] = {},
) -> None:  # fmt: skip
    """Write attributes of a running trial, and end it where a state is given. Raises UpdateFinishedTrialError for one
    that has ended, unless with just this: by a try whose answer was lost."""
    import optuna
    from optuna.storages._rdb import models

    def work(session: "Session") -> None:
        row = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
        attributes = _encoded(user_attrs)
        if row.state.is_finished():
            there = {(attribute.key, attribute.value_json) for attribute in row.user_attributes}
            if row.state == state and there >= {(each["key"], each["value_json"]) for each in attributes}:
                return
            raise optuna.exceptions.UpdateFinishedTrialError(f"trial {row.number} has ended")
        _replace(session, models.TrialUserAttributeModel, trial_id, attributes)
        _replace(session, models.TrialSystemAttributeModel, trial_id, _encoded(system_attrs))
        _add(session, models.TrialValueModel, trial_id, _values(values))
        if state is not None:
            row.state, row.datetime_complete = state, datetime.now()

    _in_transaction(study, work)


def read(
    study: "optuna.Study", after: int, names: Collection[str], again: Collection[int] = (), ended: Collection[int] = ()
) -> list[Row]:
    """The trials with a number above `after`, those with the numbers `again`, and those of `ended` that have, in the
    order of their numbers, with the user attributes of these names."""
    from optuna.storages._rdb.models import TrialModel, TrialUserAttributeModel
    from optuna.trial import TrialState
    from sqlalchemy import select

    trial, attribute = TrialModel, TrialUserAttributeModel
    runs = trial.state.in_((TrialState.RUNNING, TrialState.WAITING))
    wanted = (trial.number > after) | trial.number.in_(again) | (trial.number.in_(ended) & ~runs)
    query = (
        select(trial.number, trial.state, attribute.key, attribute.value_json)
        .outerjoin(attribute, (attribute.trial_id == trial.trial_id) & attribute.key.in_(names))
        .where((trial.study_id == study._study_id) & wanted)
        .order_by(trial.number)
    )

    def work(session: "Session") -> list[Row]:
        found: dict[int, Row] = {}
        for number, state, key, value in session.execute(query):
            row = found.setdefault(number, Row(number=number, state=state, user_attrs={}))
            if key is not None:
                row.user_attrs[key] = json.loads(value)
        return list(found.values())

    return _in_transaction(study, work)


def heartbeats(study: "optuna.Study") -> set[int]:
    """Ids of the trials that ever had a heartbeat."""
    from optuna.storages._rdb.models import TrialHeartbeatModel
    from sqlalchemy import select

    return _in_transaction(study, lambda session: set(session.scalars(select(TrialHeartbeatModel.trial_id))))


def _in_transaction(study: "optuna.Study", work: "Callable[[Session], T]") -> T:
    """The result of `work`, which is repeated whole while a server is away."""
    from optuna.storages import _CachedStorage
    from sqlalchemy.orm import Session

    cached = study._storage
    assert isinstance(cached, _CachedStorage)
    engine = cached._backend.engine

    def once() -> T:
        with Session(engine) as session, session.begin():
            return work(session)

    return outlasted(engine, once)


def _encoded(attributes: Mapping[str, object]) -> list[dict[str, Any]]:
    return [{"key": key, "value_json": json.dumps(value)} for key, value in attributes.items()]


def _values(values: Sequence[float]) -> list[dict[str, Any]]:
    from optuna.storages._rdb.models import TrialValueModel

    stored = [TrialValueModel.value_to_stored_repr(value) for value in values]
    return [{"objective": n, "value": value, "value_type": kind} for n, (value, kind) in enumerate(stored)]


def _replace(session: "Session", model: Any, trial_id: int, attributes: list[dict[str, Any]]) -> None:
    from sqlalchemy import delete

    if attributes:
        keys = [attribute["key"] for attribute in attributes]
        session.execute(delete(model.__table__).where(model.trial_id == trial_id, model.key.in_(keys)))
    _add(session, model, trial_id, attributes)


def _add(session: "Session", model: Any, trial_id: int, rows: list[dict[str, Any]]) -> None:
    import sqlalchemy

    if rows:
        session.execute(sqlalchemy.insert(model.__table__), [{"trial_id": trial_id, **row} for row in rows])

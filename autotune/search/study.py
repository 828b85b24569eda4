"""The Optuna study, the store of truth: how it is opened, and what it says of its search.

Everything is a user attribute. Its trials are in `autotune.search.study_trials`.
"""

import contextlib
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.config.search_settings import SearchSettings
from autotune.config.storage import is_server
from autotune.config.tables import parse_json, read_table
from autotune.environment import Environment
from autotune.errors import ConfigError, one_line, shown
from autotune.runs.directory import STUDY_DB
from autotune.runs.objective import maximised
from autotune.runs.races import Lineup, Reading
from autotune.runs.verdict import Verdict
from autotune.search.space import Space
from autotune.search.storage import Patience, in_a_minute, open_storage, soon

if TYPE_CHECKING:  # importing optuna takes a quarter of a second; only a search pays it
    import optuna

_MARK, _VERSION = "autotune", 2
"""User attribute of a study of ours, and the version of what it holds. 1: numbers were recorded by their index."""
SETTINGS, ENVIRONMENT, SPENT, DATA = "settings", "environment", "spent_seconds", "data"
NOTES, REMARKS = "notes", "remarks"
_CHOICES, _VERDICT = "choices", "verdict"
_LINEUP, _RIVAL, _READING = "race", "race_rival_", "race_reading_"
"""Attributes of a race: what it is evaluated on, and with a number behind, one for each rival and each reading."""


@dataclass(frozen=True, kw_only=True)
class _State:
    """User attributes of a study."""

    spent_seconds: float = 0.0
    notes: tuple[str, ...] = ()


def create_study(
    run_dir: Path,
    settings: SearchSettings,
    *,
    url: str = "",
    patience: Patience = in_a_minute,
) -> "optuna.Study | None":
    """A new study in the storage of `url`, or of the settings, which hold no password. None where a database server has
    a study of this name, which may be joined.
    Raises ConfigError for a storage that does not open, or a name that is taken."""
    import optuna

    opened = open_storage(run_dir, url or settings.storage, patience)
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
    with unwarned():
        study.set_metric_names(["tokens/s" if maximised(settings) else "predicted loss"])
    return study


def load_study(
    run_dir: Path, settings: SearchSettings | None, patience: Patience = in_a_minute, url: str = "",
    at_first: Patience = soon,
) -> "optuna.Study":  # fmt: skip
    """The study of an earlier search; where its settings are lost, the only one of the run directory. `at_first`:
    patience with a server that is not reached at the start.
    Raises ConfigError for a storage that does not open or is not ours."""
    import optuna

    name, url = (settings.name, url or settings.storage) if settings else ("", "")
    if not url and not (run_dir / STUDY_DB).exists():
        raise ConfigError(f"{run_dir} has no {STUDY_DB}; give the directory of a run")
    storage = open_storage(run_dir, url, patience, at_first)
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


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """Without Optuna's warnings that a feature is experimental, or meant for its own loop."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage")
        yield


def refuse_older(study: "optuna.Study", name: Path | str) -> None:
    """Raise ConfigError for a study whose parameters an earlier version recorded in another way."""
    if study.user_attrs[_MARK] != _VERSION:
        raise ConfigError(
            f"{name} was written by another version of autotune; its report can be read, start a new search"
        )


def when_begun(study: "optuna.Study") -> "optuna.Study":
    """The study, once the process that has just created it has described it. Raises ConfigError where that was killed
    before."""
    for _ in range(100):
        if SETTINGS in study.user_attrs:
            return study
        time.sleep(0.1)
    raise ConfigError(f"the search that created the study {study.study_name!r} was killed at once; give another --name")


def is_shared(study: "optuna.Study") -> bool:
    """Whether the storage is a server, which several machines use."""
    from optuna.storages._heartbeat import is_heartbeat_enabled

    return bool(is_heartbeat_enabled(study._storage))


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


def describe(
    study: "optuna.Study", settings: SearchSettings, environment: Environment, space: Space,
    remarks: Sequence[str] = (), data: str = "",
) -> None:  # fmt: skip
    """Write into a new study what is searched and where. `data`: id of the tokens."""
    study.set_user_attr(ENVIRONMENT, asdict(environment))
    study.set_user_attr(REMARKS, remarks)
    study.set_user_attr(DATA, data)
    study.set_user_attr(_CHOICES, {name: list(choices) for name, choices in space.choices.items()})
    study.set_user_attr(SETTINGS, asdict(settings))  # last: others may join from now on


def as_begun(study: "optuna.Study", space: Space) -> Space:
    """`space` with the choices that the study began with: kernels and knobs that are new since are not tried, and a
    kernel that has gone is tried and found unsupported. Raises ConfigError for a damaged study."""
    begun, knobs = study.user_attrs.get(_CHOICES), vars(space.plan).keys()
    if not isinstance(begun, dict) or begun.keys() - knobs != space.choices.keys() - knobs or not all(begun.values()):
        raise ConfigError(f"the study is damaged: its choices are {shown(begun)}; start a new search")
    return replace(space, choices={name: tuple(choices) for name, choices in begun.items()})


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


def keep_lineup(study: "optuna.Study", lineup: Lineup) -> None:
    """Write a race's lineup into the study, each rival as an attribute of its own: some storages limit their size."""
    for rival in lineup.rivals:
        study.set_user_attr(f"{_RIVAL}{rival.rival:02d}", json.dumps(asdict(rival), allow_nan=False))
    rest = {"chunk_tokens": lineup.chunk_tokens, "chunks": lineup.chunks, "rivals": len(lineup.rivals)}
    study.set_user_attr(_LINEUP, rest)  # last: a lineup in part does not count


def lineup_of(study: "optuna.Study") -> Lineup | None:
    """The race's lineup; None where none has begun. Raises ConfigError for a damaged study."""
    attributes = study.user_attrs
    rest = attributes.get(_LINEUP)
    if rest is None:
        return None
    if not isinstance(rest, dict) or not isinstance(rest.get("rivals"), int):
        raise ConfigError(f"the study is damaged: its race is {shown(rest)}; start a new search")
    names = [f"{_RIVAL}{number:02d}" for number in range(rest["rivals"])]
    rivals = [parsed(attributes.get(name), f"the study's {name}") for name in names]
    return read_table(Lineup, {**rest, "rivals": rivals}, "the study's race")


def keep_reading(study: "optuna.Study", reading: Reading) -> None:
    """Write a reading into the study."""
    study.set_user_attr(f"{_READING}{reading.reading:04d}", json.dumps(asdict(reading), allow_nan=False))


def readings_of(study: "optuna.Study") -> list[Reading]:
    """The race's readings so far. Raises ConfigError for a damaged study."""
    attributes = study.user_attrs
    names = sorted(name for name in attributes if name.startswith(_READING))
    return [read_table(Reading, parsed(attributes[name], name), f"the study's {name}") for name in names]


def parsed(attribute: object, where: str) -> Any:
    """The JSON of an attribute. Raises ConfigError for a damaged one."""
    if not isinstance(attribute, str):
        raise ConfigError(f"{where} is damaged: {shown(attribute)} is not a record of autotune's")
    return parse_json(attribute, where)

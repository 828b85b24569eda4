"""best.toml and every other candidate file: tables [model] [training] [plan] [measured] [environment].

[training] holds the recipe and the settings of its evaluation, checkpoints and trackers, in one flat table.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import tomli_w

from autotune.config.candidate import TRAINING_PARTS, Candidate, Plan, Recipe, Shape, split_training
from autotune.config.tables import check_keys, parse_toml, read_table
from autotune.errors import SHOWN, ConfigError, one_line, shown, suggest
from autotune.files import read_text

BEST_TOML = "best.toml"
"""Candidate file of a run directory."""


@dataclass(frozen=True, kw_only=True)
class CandidateFile:
    """A candidate on disk, with its measurement if there is one."""

    candidate: Candidate
    measured: Mapping[str, Any] = field(default_factory=dict)
    """Figures by name, with units in the names; empty for a file that a person wrote."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """The machine that measured it."""


_FIGURES = r"trial|mfu|predicted_loss|tokens_per_second.*|.*_(seconds|bytes|hits|misses|p50)"
"""Keys of [measured] that are read as numbers."""
_LARGEST_FIGURE = 1e30
_TABLES = ("model", "training", "plan", "measured", "environment")


def parse_candidate(text: str, where: str, overrides: tuple[str, ...] = ()) -> CandidateFile:
    """Read a candidate file; `overrides` are `plan.loss=chunked` assignments. Raises ConfigError."""
    tables = parse_toml(text, where)
    for name, table in tables.items():
        if name not in _TABLES or not isinstance(table, dict):
            raise ConfigError(f"{where}: [{one_line(name, SHOWN)}] is not a known table; {suggest(name, _TABLES)}")
    for name in ("model", "plan"):
        if name not in tables:
            raise ConfigError(f"{where} has no table [{name}]; a candidate needs [model], [training] and [plan]")
    for assignment in overrides:
        _assign(tables, assignment)
    shape = read_table(Shape, tables["model"], "model")
    training = tables.get("training", {})
    if "shape" in training:
        raise ConfigError("training.shape is not a known key; write the shape's values in [model]")
    check_keys(training, [f.name for cls in (Recipe, *TRAINING_PARTS.values()) for f in fields(cls)], "training")
    parts = split_training({"recipe": training})
    candidate = Candidate(
        recipe=read_table(Recipe, {**parts["recipe"], "shape": asdict(shape)}, "training"),
        plan=read_table(Plan, tables["plan"], "plan"),
        **{part: read_table(cls, parts.get(part, {}), "training") for part, cls in TRAINING_PARTS.items()},
    )
    measured, environment = tables.get("measured", {}), tables.get("environment", {})
    for name, table in (("measured", measured), ("environment", environment)):
        for key, value in table.items():
            figure = name == "measured" and re.fullmatch(_FIGURES, key)
            if not (_is_number(value) if figure else _is_plain(value)):
                what, key = "not a number" if figure else "neither text nor a number", one_line(key, SHOWN)
                raise ConfigError(f"{where}: {name}.{key} = {shown(value)} is {what}; correct it or leave it out")
    return CandidateFile(candidate=candidate, measured=measured, environment=environment)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST_FIGURE


def _is_plain(value: object) -> bool:
    """Whether JSON can hold the value, too."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, str | bool) or _is_number(value)


def read_candidate(path: Path, overrides: tuple[str, ...] = ()) -> CandidateFile:
    """Read a candidate file, or the best.toml of a run directory. Raises ConfigError."""
    file = path / BEST_TOML if path.is_dir() else path
    in_run = file.name == BEST_TOML and file.parent.is_dir()
    hint = "the run has no feasible trial yet" if in_run else "give a run directory or a TOML file"
    return parse_candidate(read_text(file, hint), str(file), overrides)


def _assign(tables: dict[str, Any], assignment: str) -> None:
    target, equals, value = assignment.partition("=")
    table, dot, key = target.strip().partition(".")
    if not (equals and dot and key) or table not in ("model", "training", "plan"):
        raise ConfigError(f"--set {shown(assignment)} is not understood; write for example plan.loss=chunked")
    try:
        parsed = parse_toml(f"value = {value.strip()}", "--set")["value"]
    except ConfigError:
        parsed = value.strip()  # a bare word is a string
    tables.setdefault(table, {})[key] = parsed


def format_candidate(file: CandidateFile) -> str:
    """The text of a candidate file, without unknown (None) values."""
    candidate = file.candidate
    table = asdict(candidate)
    model = table["recipe"].pop("shape")
    tables = {
        "model": model,
        "training": table["recipe"] | {key: value for part in TRAINING_PARTS for key, value in table[part].items()},
        "plan": table["plan"],
        "measured": file.measured,
        "environment": file.environment,
    }
    return tomli_w.dumps({name: without_none(table) for name, table in tables.items() if table})


def without_none(value: Any) -> Any:
    """A table without the keys whose value is None, as TOML has no null."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return value

"""best.toml and every other candidate file: tables [model] [training] [plan] [measured] [environment]."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.config.tables import parse_toml, read_table
from autotune.errors import SHOWN, ConfigError, one_line, shown, suggest
from autotune.files import read_text


@dataclass(frozen=True, kw_only=True)
class CandidateFile:
    """A candidate as it lies on disk, with what was measured of it, where it was."""

    candidate: Candidate
    measured: Mapping[str, Any] = field(default_factory=dict)
    """Units in the names; empty for a file that a person wrote."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """The machine of the measurement."""


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
        raise ConfigError("training.shape is not a known key; the shape stands in [model]")
    recipe = read_table(Recipe, {**training, "shape": asdict(shape)}, "training")
    plan = read_table(Plan, tables["plan"], "plan")
    measured, environment = tables.get("measured", {}), tables.get("environment", {})
    for name, table in (("measured", measured), ("environment", environment)):
        for key, value in table.items():
            figure = name == "measured" and re.fullmatch(_FIGURES, key)
            if not (_is_number(value) if figure else _is_plain(value)):
                what, key = "not a number" if figure else "neither text nor a number", one_line(key, SHOWN)
                raise ConfigError(f"{where}: {name}.{key} = {shown(value)} is {what}; correct it or leave it out")
    return CandidateFile(candidate=Candidate(recipe=recipe, plan=plan), measured=measured, environment=environment)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST_FIGURE


def _is_plain(value: object) -> bool:
    """What JSON can hold too."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, str | bool) or _is_number(value)


def read_candidate(path: Path, overrides: tuple[str, ...] = ()) -> CandidateFile:
    """Read a candidate file, or the best.toml of a run directory. Raises ConfigError."""
    file = path / "best.toml" if path.is_dir() else path
    in_run = file.name == "best.toml" and file.parent.is_dir()
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
    """The text of a candidate file; unknown (None) values are left out, as TOML has no null."""
    candidate = file.candidate
    training = {key: value for key, value in asdict(candidate.recipe).items() if key != "shape"}
    tables = {
        "model": asdict(candidate.shape),
        "training": training,
        "plan": asdict(candidate.plan),
        "measured": file.measured,
        "environment": file.environment,
    }
    return tomli_w.dumps({name: without_none(table) for name, table in tables.items() if table})


def without_none(value: Any) -> Any:
    """Tables without the keys whose value is None: TOML has no null."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return value

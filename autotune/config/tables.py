"""Dataclasses from plain tables (TOML, JSON), with their types checked."""

import json
import math
import sys
import tomllib
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from autotune.errors import SHOWN, ConfigError, one_line, shown, suggest
from autotune.files import read_text

T = TypeVar("T")


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """The tables of a TOML text that messages call `where`. Raises ConfigError."""
    tables: dict[str, Any] = _parsed(tomllib.loads, text.removeprefix("\ufeff"), f"{where} is not valid TOML", "")
    return tables


def parse_json(text: str, where: str, advice: str = "") -> Any:
    """The value of a JSON text that messages call `where`. Raises ConfigError, which ends with `advice`."""
    loads = partial(json.loads, parse_float=_finite, parse_constant=_finite)
    return _parsed(loads, text, f"{where} cannot be read: it is not JSON", advice)


def read_json(path: Path, advice: str = "") -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError, which ends with `advice`."""
    value = parse_json(read_text(path, advice), str(path), advice)
    if not isinstance(value, dict):
        end = f"; {advice}" if advice else ""
        raise ConfigError(f"{path} is damaged: it holds {shown(value)}, not an object{end}")
    return value


def _parsed(loads: Callable[[str], Any], text: str, problem: str, advice: str) -> Any:
    try:
        return loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits raises a plain ValueError
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else one_line(str(error))
        reason = "a number has too many digits" if "integer string conversion" in reason else reason
        end = f"; {advice}" if advice else ""
        raise ConfigError(f"{problem}: {reason}{end}") from None


def _finite(word: str) -> float:
    number = float(word)
    if not math.isfinite(number):
        raise ValueError(f"{one_line(word, SHOWN)} is not a finite number")
    return number


LARGEST = 2**63 - 1
"""Largest whole number in a file: 64 bits, as in TOML."""


def check_keys(table: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise ConfigError for a key that is not known, with the nearest known one."""
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}.{one_line(str(key), SHOWN)} is not a known key; {suggest(str(key), known)}")


def read_table(cls: type[T], table: Mapping[str, Any] | None, where: str) -> T:
    """Build the dataclass `cls` from `table`, whose place is called `where` in messages. A method `upgrade` of the
    class turns tables of older versions into today's form.

    Raises ConfigError for an unknown key (with the nearest known one), a missing key, or a value of another type than
    the field's.
    """
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} = {shown(table)} is not a table; write it as [{where}]")
    table = getattr(cls, "upgrade", dict)(table)
    check_keys(table, known, where)
    hints = get_type_hints(cls)
    values = {}
    for name, spec in known.items():
        if name in table:
            values[name] = _checked(hints[name], table[name], f"{where}.{name}")
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise ConfigError(f"{where}.{name} is missing; add it")
    return cls(**values)


def _checked(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint):
        return read_table(hint, value, where)  # type: ignore[arg-type]
    if hint is Any:
        return value
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _checked(next(a for a in args if a is not type(None)), value, where)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} = {shown(value)} is not a table")
        return {str(k): _checked(args[1], item, f"{where}.{one_line(str(k), SHOWN)}") for k, item in value.items()}
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} = {shown(value)} is not a list; write it in brackets")
        return tuple(_checked(args[0], item, where) for item in value)
    if origin is Literal:
        if value not in args:
            allowed = suggest(value if isinstance(value, str) else "", args)
            raise ConfigError(f"{where} = {shown(value)} is not known; {allowed}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < sys.float_info.max else math.inf
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} = {value} is not a finite number; write one")
    if hint is int and isinstance(value, int) and abs(value) > LARGEST:
        raise ConfigError(f"{where} = {shown(value)} is not allowed; the largest number is {LARGEST}")
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ConfigError(f"{where} = {shown(value)} is of type {type(value).__name__}; write a {hint.__name__}")
    return value

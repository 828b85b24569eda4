"""Dataclasses from plain tables (TOML, JSON) and back; the boundary where types are checked."""

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from autotune.errors import ConfigError, suggest

T = TypeVar("T")


def read_table(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """Build the dataclass `cls` from `table`, whose place is called `where` in messages.

    Raises ConfigError for an unknown key (with the nearest known one), a missing key, or a value
    of another type than the field's.
    """
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}.{key} is not a known key; {suggest(key, known)}")
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
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} = {value!r} is not a table; write it as [{where}]")
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
            raise ConfigError(f"{where} = {value!r} is not a table")
        return {str(key): _checked(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} = {value!r} is not a list; write it in brackets")
        return tuple(_checked(args[0], item, where) for item in value)
    if origin is Literal:
        return value  # the dataclass itself says what is allowed, with a suggestion
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} = {value} is not a finite number; write one")
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ConfigError(f"{where} = {value!r} is of type {type(value).__name__}; write a {hint.__name__}")
    return value

"""Dataclasses from tables: round trips of every type, and errors that name the key."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.config.candidate import Plan, Recipe, Shape
from autotune.config.tables import LARGEST, read_table
from autotune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    count: int
    name: str = "none"


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    by_name: Mapping[str, Inner] = field(default_factory=dict)
    share: float = 0.5
    limit: int | None = None
    pair: tuple[int, ...] = ()
    on: bool = False


integers = st.integers(-LARGEST, LARGEST)
inners = st.builds(Inner, count=integers, name=st.text())
outers = st.builds(
    Outer,
    inner=inners,
    by_name=st.dictionaries(st.text(), inners, max_size=3),
    share=st.floats(allow_nan=False, allow_infinity=False),
    limit=st.none() | integers,
    pair=st.lists(integers, max_size=3).map(tuple),
    on=st.booleans(),
)


@given(outers)
def test_what_goes_out_through_json_comes_back(value: Outer) -> None:
    assert read_table(Outer, json.loads(json.dumps(asdict(value))), "outer") == value


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"inner": {"count": 1}, "shrae": 1.0}, "outer.shrae is not a known key; did you mean 'share'?"),
        ({"inner": {"count": 1, "xyzzy": 1}}, "outer.inner.xyzzy is not a known key; allowed: count, name"),
        ({}, "outer.inner is missing; add it"),
        ({"inner": 3}, "outer.inner = 3 is not a table; write it as [outer.inner]"),
        ({"inner": {"count": "1"}}, "outer.inner.count = '1' is of type str; write a int"),
        ({"inner": {"count": True}}, "outer.inner.count = True is of type bool; write a int"),
        ({"inner": {"count": 1.0}}, "outer.inner.count = 1.0 is of type float; write a int"),
        ({"inner": {"count": 1}, "share": float("nan")}, "outer.share = nan is not a finite number; write one"),
        ({"inner": {"count": 1}, "by_name": 1}, "outer.by_name = 1 is not a table"),
        ({"inner": {"count": 1}, "by_name": {"a": {}}}, "outer.by_name.a.count is missing; add it"),
    ],
)
def test_mistakes_are_named(table: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_table(Outer, table, "outer")
    assert str(caught.value) == said


def test_a_whole_number_serves_as_a_float_and_none_as_unknown() -> None:
    value = read_table(Outer, {"inner": {"count": 1}, "share": 1, "limit": None}, "outer")
    assert (value.share, type(value.share), value.limit) == (1.0, float, None)


@pytest.mark.parametrize(
    ("cls", "table", "said"),
    [
        (Plan, {"compile": "ful"}, "x.compile = 'ful' is not known; did you mean 'full'?"),
        (Plan, {"micro_batch_size": 0}, "plan.micro_batch_size = 0 is not allowed; the smallest value is 1"),
        (Plan, {"activation_checkpointing": "every_1"}, "plan.activation_checkpointing = 'every_1' is not"),
        (Plan, {"activation_checkpointing": "budget_1.5"}, "budget_0.5 (any number from 0 to 1"),
        (Plan, {"activation_checkpointing": "budget_0.50"}, "zeros at its end"),
        (Recipe, {"optimizer": "mun"}, "x.optimizer = 'mun' is not known; did you mean 'muon'?"),
        (Shape, {"n_embd": 100, "n_head": 12}, "model.n_embd = 100 is not a multiple of model.n_head = 12"),
        (Shape, {"dropout": 1.0}, "model.dropout = 1.0 is not allowed"),
    ],
)
def test_values_are_checked(cls: type, table: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_table(cls, table, "x")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [1, "text", {"a": 1}, None])
def test_a_field_of_a_list_needs_a_list(value: object) -> None:
    with pytest.raises(ConfigError, match=r"outer\.pair"):
        read_table(Outer, {"inner": {"count": 1}, "pair": value}, "outer")

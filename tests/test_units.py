"""Units: what people write, what is shown, and that nothing is lost on the way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.errors import ConfigError
from autotune.units import (
    GIB,
    MIB,
    format_bytes,
    format_count,
    format_duration,
    parse_bytes,
    parse_count,
    parse_duration,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("1h", 3600), ("1h30m", 5400), ("2d", 172800), (" 1 H ", 3600), ("0.5m", 30), ("0", 0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GiB", 24 * GIB), ("512MiB", 512 * MIB), ("24GB", 24 * 10**9), ("1073741824", GIB), ("1.5 gib", 3 * GIB // 2)],
)
def test_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    ("text", "count"), [("10B", 10**10), ("2.5M", 2_500_000), ("1000", 1000), ("1e9", 10**9), ("1_000,000", 10**6)]
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("parse", [parse_duration, parse_bytes, parse_count])
@pytest.mark.parametrize("text", ["", "x", "-1", "1 parsec", "1h2", "h", "1..2", "inf", "nan", "\u0661h"])
def test_nonsense_is_named_with_an_example(parse: object, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)  # type: ignore[operator]
    message = str(caught.value)
    assert repr(text) in message
    assert "for example" in message
    assert "\n" not in message


def test_unknown_is_a_dash_and_zero_is_not() -> None:
    assert format_bytes(None) == format_duration(None) == format_count(None) == "-"
    assert "-" not in {format_bytes(0), format_duration(0), format_count(0)}


@given(st.floats(min_value=0, max_value=1e7))
def test_a_shown_duration_reads_back(seconds: float) -> None:
    shown = parse_duration(format_duration(seconds))
    assert shown == pytest.approx(seconds, abs=0.51 if seconds < 3599 else 60 if seconds < 86399 else 3600)


@given(st.integers(min_value=2 * MIB, max_value=1 << 50))
def test_shown_bytes_read_back(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, abs=0.051 * MIB, rel=0.006)


@given(st.integers(min_value=0, max_value=10**15))
def test_a_shown_count_reads_back(count: int) -> None:
    assert parse_count(format_count(count)) == pytest.approx(count, abs=0.5, rel=0.06)


@given(st.integers(min_value=MIB, max_value=10**12))
def test_plain_numbers_are_exact(number: int) -> None:
    assert parse_bytes(str(number)) == parse_count(str(number)) == parse_duration(str(number)) == number


@pytest.mark.parametrize(
    ("parse", "text", "said"),
    [
        (parse_bytes, "24", "memory size '24' is 24 bytes; did you mean 24GiB?"),
        (parse_bytes, "16KB", "memory size '16KB' is 16,000 bytes; did you mean 16GiB?"),
        (parse_bytes, "1.5", "did you mean 1.5GiB?"),
        (parse_bytes, "9" * 400, "is not understood"),
        (parse_bytes, "9e99TiB", "is beyond 1e+18"),
        (parse_duration, "1", "duration '1' has no unit; did you mean 1h, 1m or 1s?"),
        (parse_duration, "9" * 400 + "h", "is not understood"),
        (parse_count, "9" * 5000, "is not understood"),
    ],
)
def test_sizes_that_nobody_means_are_refused_with_what_was_meant(parse: object, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)  # type: ignore[operator]
    assert said in str(caught.value)
    assert len(str(caught.value)) < 200


def test_small_sizes_with_their_unit_and_none_at_all_are_what_they_say() -> None:
    assert (parse_bytes("0"), parse_bytes("1MiB"), parse_duration("1s"), parse_duration("0")) == (0, MIB, 1.0, 0.0)

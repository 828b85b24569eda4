"""Parsing and formatting of durations, byte sizes and counts.

Inside the program: seconds, bytes, tokens. On screen: GiB (2^30), B/M/K counts, 1h05m.
"""

import re

from autotune.errors import ConfigError, shown

GIB = 1 << 30
MIB = 1 << 20

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {
    "": 1, "B": 1,
    "KIB": 1 << 10, "MIB": MIB, "GIB": GIB, "TIB": 1 << 40,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_LONGEST = 18
"""Maximum characters of a number."""
_LARGEST = 1e18
_LEAST_BARE_SECONDS = 10.0
"""A number without a unit is seconds; smaller ones are refused, because hours or minutes are more likely meant."""
_NUMBER = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)"


def parse_duration(text: str) -> float:
    """`"90"`, `"90s"`, `"1h"`, `"1h30m"`, `"2d"` -> seconds. Raises ConfigError."""
    compact = text.strip().lower().replace(" ", "")
    if re.fullmatch(_NUMBER, compact) and len(compact) <= _LONGEST:
        if 0 < float(compact) < _LEAST_BARE_SECONDS:
            raise ConfigError(f"duration {shown(text)} has no unit; did you mean {compact}h, {compact}m or {compact}s?")
        return float(compact)
    parts = re.findall(_NUMBER + r"([smhd])", compact[: 4 * _LONGEST])
    if not parts or "".join(n + u for n, u in parts) != compact or any(len(n) > _LONGEST for n, _ in parts):
        raise ConfigError(f"duration {shown(text)} is not understood; write for example 90s, 15m, 1h or 1h30m")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def parse_bytes(text: str) -> int:
    """`"24GiB"`, `"512MiB"`, `"24GB"` (10^9), `"1073741824"` -> bytes. Raises ConfigError."""
    count = _scaled(text, text, _BYTES, "memory size", "24GiB, 512MiB or 24GB")
    if 0 < count < MIB:
        number = re.match(_NUMBER, text.strip())
        meant = f"{number[0]}GiB" if number else "24GiB"
        raise ConfigError(f"memory size {shown(text)} is {count:,} bytes; did you mean {meant}?")
    return count


def parse_count(text: str) -> int:
    """`"10B"`, `"2.5M"`, `"1000"`, `"1e9"` -> integer. Raises ConfigError."""
    return _scaled(text, text.replace("_", "").replace(",", ""), _COUNTS, "count", "10B, 300M or 1000000")


def _scaled(text: str, compact: str, units: dict[str, int], what: str, examples: str) -> int:
    match = re.fullmatch(_NUMBER + r"(?:[eE]\+?([0-9]{1,2}))?\s*([A-Za-z]*)", compact.strip())
    if match is None or match[3].upper() not in units or len(match[1]) > _LONGEST:
        raise ConfigError(f"{what} {shown(text)} is not understood; write for example {examples}")
    if float(match[1]) * 10.0 ** int(match[2] or 0) * units[match[3].upper()] > _LARGEST:
        raise ConfigError(f"{what} {shown(text)} is beyond {_LARGEST:.0e}; write for example {examples}")
    return round(float(match[1]) * 10.0 ** int(match[2] or 0) * units[match[3].upper()])


def format_bytes(count: float | None) -> str:
    """Bytes -> `"21.30 GiB"` (`"512.0 MiB"` below 1 GiB); `"-"` for an unknown value."""
    if count is None:
        return "-"
    return f"{count / GIB:.2f} GiB" if abs(count) >= GIB else f"{count / MIB:.1f} MiB"


def format_duration(seconds: float | None) -> str:
    """Seconds -> `"0.4s"`, `"42s"`, `"3m05s"`, `"1h05m"`, `"2d03h"`; `"-"` for an unknown value."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_count(count: float | None) -> str:
    """Tokens or parameters -> `"124.4M"`, `"2.60B"`, `"950"`; `"-"` for an unknown value."""
    if count is None:
        return "-"
    for limit, unit, digits in ((1e12, "T", 2), (1e9, "B", 2), (1e6, "M", 1), (1e4, "K", 1)):
        if abs(count) >= limit:
            return f"{count / limit if unit != 'K' else count / 1e3:.{digits}f}{unit}"
    return f"{count:,.0f}"

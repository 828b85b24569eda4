"""Every table says what else the machine was doing when its benchmark began."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

SAMPLE_SECONDS = 1.0


def busy_cores() -> float:
    """Cores at work during a second in which this process sleeps (man 5 proc, /proc/stat)."""

    def ticks() -> tuple[int, int]:
        all_cores = Path("/proc/stat").read_text().splitlines()[0]
        user, nice, system, idle, iowait, *rest = map(int, all_cores.split()[1:9])
        return user + nice + system + sum(rest), idle + iowait

    busy, idle = ticks()
    time.sleep(SAMPLE_SECONDS)
    later_busy, later_idle = ticks()
    return (os.cpu_count() or 1) * (later_busy - busy) / max(1, later_busy - busy + later_idle - idle)


@pytest.fixture(autouse=True)
def load(benchmark: Any) -> None:
    """Printed before each table, and kept with its figures."""
    cores = busy_cores()
    benchmark.extra_info["busy_cores"] = cores
    state = "quiet" if cores < 0.2 else "BUSY, do not quote these figures"
    print(f"\nother programs use {cores:.1f} of {os.cpu_count()} cores: {state}")

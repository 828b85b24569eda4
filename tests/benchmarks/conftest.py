"""Every table says what else the machine was doing when its benchmark began."""

import os
from typing import Any

import pytest

from autotune.environment import busy_cores


@pytest.fixture(autouse=True)
def load(benchmark: Any) -> None:
    """Printed before each table, and kept with its figures."""
    cores = busy_cores(seconds=1.0)
    benchmark.extra_info["busy_cores"] = cores
    state = "quiet" if cores < 0.2 else "BUSY, do not quote these figures"
    print(f"\nother programs use {cores:.1f} of {os.cpu_count()} cores: {state}")

"""Run directories for the tests of this folder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import recorded_run


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """`recorded_run.write_run` in a folder of the test's own."""
    return partial(recorded_run.write_run, tmp_path)

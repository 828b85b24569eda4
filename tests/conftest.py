"""Shared by all tests: one compile cache, and tests for a GPU that skip with their reason."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import background
import pytest

_CACHE = Path(__file__).parent.parent / ".cache" / "inductor"
# set before torch loads; worker processes inherit it, so that a graph is compiled once in a checkout
os.environ.setdefault("AUTOTUNE_CACHE_DIR", str(_CACHE))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.environ["AUTOTUNE_CACHE_DIR"])
# threads that spin while they wait make tiny models forty times slower where another program wants a core
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(autouse=True, scope="module")
def compiled_code_is_forgotten() -> Iterator[None]:
    """Dynamo compiles a function only so many times in one process, so each test file begins without any."""
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """A test that fails leaves none running."""
    yield
    background.end_all()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting or config.getoption("dry_run_cpu", default=False):
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, none here"))

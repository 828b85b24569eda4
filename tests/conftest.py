"""Shared by all tests: one compile cache, and GPU-only tests that skip with their reason."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_CACHE = Path(__file__).parent.parent / ".cache" / "inductor"
# set before torch loads; worker processes inherit it, so that a shape is compiled once a checkout
os.environ.setdefault("AUTOTUNE_CACHE_DIR", str(_CACHE))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.environ["AUTOTUNE_CACHE_DIR"])
# threads that spin while they wait make tiny models forty times slower where another program wants a core
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(autouse=True, scope="module")
def compiled_anew() -> Iterator[None]:
    """No file of tests sees what another has compiled: in one process, code can be compiled only so many times."""
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, none here"))

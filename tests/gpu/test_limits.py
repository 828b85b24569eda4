"""A smaller card emulated on this one: what fits runs below the limit, what does not fit is refused."""

from dataclasses import replace

import pytest
from gpu.bench import CHUNKED, EAGER, Bench

from autotune.units import GIB

pytestmark = [pytest.mark.gpu, pytest.mark.seconds(40)]


@pytest.mark.parametrize("fits", [True, False], ids=["fits", "does not fit"])
@pytest.mark.parametrize("gib", [24, pytest.param(16, marks=pytest.mark.card_only)])
def test_limit(gib: int, fits: bool, bench: Bench) -> None:
    plan = replace(CHUNKED, micro_batch_size=8) if fits else replace(EAGER, micro_batch_size=64)
    shape, limit = bench.shape(12, 12, 768), gib * GIB
    if bench.dry:
        limit = 2 * GIB
        shape = replace(shape, vocab_size=shape.vocab_size if fits else 1_000_000)  # a gigabyte of logits and more
    result = bench.trial(bench.candidate(shape, plan), limit=limit)
    peak = result.peak("device_bytes")
    bench.row.update({"limit_bytes": limit})
    assert result.status in (("ok",) if fits else ("oom", "over_limit")), result.message
    assert peak is not None or not fits  # what runs out of memory in its first step has no peak
    assert peak is None or peak <= limit

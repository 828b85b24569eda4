"""The largest micro batch of the guide's shapes that runs below an emulated limit."""

from dataclasses import replace

import pytest
from gpu.bench import PLANS, Bench

from autotune.config.candidate import Candidate
from autotune.config.presets import GUIDE, GuideRow
from autotune.memory.model import calibrate, predict
from autotune.units import GIB

pytestmark = [pytest.mark.gpu, pytest.mark.long, pytest.mark.seconds(120)]
ROWS = [pytest.param(row, id=row.name, marks=[pytest.mark.card_only] * (row != GUIDE[0])) for row in GUIDE]


@pytest.mark.parametrize("gib", [24, pytest.param(16, marks=pytest.mark.card_only)])
@pytest.mark.parametrize("plan", ["compiled", "chunked loss, compiled"])
@pytest.mark.parametrize("row", ROWS)
def test_largest_micro_batch(row: GuideRow, plan: str, gib: int, bench: Bench) -> None:
    """Two small micro batches are measured, the largest is predicted from them, then tried and moved up or down."""
    shape = bench.shape(row.shape.n_layer, row.shape.n_head, row.shape.n_embd)
    sequences, limit = (8, GIB) if bench.dry else (512, gib * GIB)

    def at(micro: int) -> Candidate:
        return bench.candidate(shape, replace(PLANS[plan], micro_batch_size=micro), sequences)

    known = [(at(micro), bench.trial(at(micro), measure_seconds=0.1)) for micro in (2, 4)]
    model = calibrate(bench.device_kind, known, bench.environment)
    fitting = [micro for micro in range(1, sequences) if predict(model, at(micro)).peak_device_bytes * 1.01 <= limit]
    micro, best, failed = max(fitting, default=1), 0, sequences
    result = known[0][1]
    for _ in range(5):
        tried = bench.trial(at(micro), limit=limit, measure_seconds=0.5)
        if tried.status == "ok":
            best, result = micro, tried
        else:
            failed = micro
        if failed - best <= max(1, best // 50):
            break
        micro = best + max(1, best // 50) if tried.status == "ok" else micro - max(1, micro // 50)
        if not 0 < micro < sequences:
            break
    bench.row.update({"limit_bytes": limit, "largest_micro_batch": best, "smallest_that_failed": failed})
    bench.row.update({"tokens_per_second": result.tokens_per_second, "status": result.status})
    assert best > 0

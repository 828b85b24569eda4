"""One step's memory on the card: known sizes to the byte, and all of the peak explained."""

from dataclasses import replace
from pathlib import Path

import pytest
from gpu.bench import Bench

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.measure.runner import run_profile
from autotune.measure.types import TrialRequest

pytestmark = [pytest.mark.gpu, pytest.mark.seconds(60)]
SHAPE = Shape(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=1024)
PLAN = Plan(micro_batch_size=6, compile="off", loss_chunk_tokens=64)
PLANS = {"plain": PLAN, "chunked": replace(PLAN, loss="chunked"), "compiled": replace(PLAN, compile="full")}


@pytest.mark.parametrize("plan", PLANS)
def test_every_byte_of_the_peak_is_explained(plan: str, bench: Bench, tmp_path: Path) -> None:
    recipe = Recipe(shape=SHAPE, global_batch_size=12)  # two micro steps
    candidate = Candidate(recipe=recipe, plan=replace(PLANS[plan], dtype=bench.half))
    request = TrialRequest(
        candidate=candidate, device=bench.device, result_path="", measure_seconds=0.1, timeout_seconds=300
    )
    result, found = run_profile(request, tmp_path, tmp_path / "log")
    assert found is not None, result.message
    bench.row.update({"unexplained": found.unexplained, "peak_bytes": found.peak_bytes})
    assert found.unexplained < 0.02
    assert found.peak_bytes["parameters"] == found.peak_bytes["gradients"] == 4 * SHAPE.parameters
    assert sum(found.peak_bytes.values()) == found.measured_peak_bytes
    assert bench.dry or (tmp_path / found.snapshot).stat().st_size > 0  # the CPU's profiler makes no snapshot

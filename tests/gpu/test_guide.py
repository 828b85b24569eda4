"""The guide's rows as they stand, plain and with a chunked loss: do they fit the cards they are meant for?"""

from dataclasses import replace

import pytest
from gpu.bench import PLANS, Bench

from autotune.config.presets import GUIDE, GuideRow

pytestmark = [pytest.mark.gpu, pytest.mark.seconds(40)]
ROWS = [pytest.param(row, id=row.name, marks=[pytest.mark.card_only] * (row != GUIDE[0])) for row in GUIDE]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("row", ROWS)
def test_guide(row: GuideRow, plan: str, bench: Bench) -> None:
    shape = bench.shape(row.shape.n_layer, row.shape.n_head, row.shape.n_embd)
    advised = replace(PLANS[plan], micro_batch_size=row.micro_batch_size)
    result = bench.trial(bench.candidate(shape, advised, row.micro_batch_size * row.gradient_accumulation_steps))
    peak, memory = result.peak("device_bytes"), row.memory_bytes
    fits = None if peak is None else result.status == "ok" and peak <= memory
    bench.row.update({"claimed": row.claimed, "parameters": shape.parameters, "card_bytes": memory, "fits": fits})
    if bench.dry:
        assert (result.status, fits) == ("ok", True), result.message
    else:  # that the card is too small for the row is an answer
        assert result.status in ("ok", "oom", "over_limit"), result.message

"""What was measured is what is trained: the search's winner, trained for some steps, against its verdict."""

import json
import shutil

import pytest
from gpu.bench import Bench

from autotune.config.toml import format_candidate

pytestmark = [pytest.mark.gpu, pytest.mark.seconds(180)]


@pytest.mark.parametrize("model", ["124M", pytest.param("354M", marks=pytest.mark.card_only)])
def test_training_is_as_fast_and_as_large_as_its_verdict(model: str, bench: Bench) -> None:
    """Tokens/s within 2 % (or the verdict's interval, where that is wider), peaks within 1 %."""
    file = bench.winner(model)
    steps = 12 if bench.dry else {"124M": 60, "354M": 20}[model]
    toml, out = bench.scratch / f"winner-{model}.toml", bench.scratch / f"train-{model}-{steps}"
    toml.write_text(format_candidate(file))
    tokens = steps * file.candidate.recipe.tokens_per_step
    shutil.rmtree(out, ignore_errors=True)  # an earlier call's
    bench.autotune("train", toml, "--device", bench.device, "--out", out, "--max-tokens", tokens)
    summary = json.loads((out / "summary.json").read_text())
    keys = ("iterations", "tokens_per_second", "peak_allocated_bytes", "peak_device_bytes", "seconds", "comparison")
    bench.row.update({key: summary[key] for key in keys} | {"comparison_text": "; ".join(summary["comparison"])})
    warnings = summary["warnings"]
    assert summary["iterations"] == steps
    assert len(summary["comparison"]) == (2 if bench.dry else 3)  # tokens/s, and each peak that the device tells
    if bench.dry:  # a CPU that is shared with other programs promises no speed; its peaks are exact
        warnings = [line for line in warnings if not line.startswith("tokens/s")]
        assert 0.2 < summary["tokens_per_second"] / file.measured["tokens_per_second"] < 5
    assert not warnings

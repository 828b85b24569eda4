"""Where the winner's step spends the device's time."""

import json
import sys

import pytest
from gpu.bench import ROOT, Bench

from autotune.config.toml import format_candidate
from autotune.environment import worker_environment
from autotune.model.compile_cache import compile_cache_dir

pytestmark = [pytest.mark.gpu, pytest.mark.seconds(90)]


@pytest.mark.parametrize("model", ["124M", pytest.param("354M", marks=pytest.mark.card_only)])
def test_step_breakdown(model: str, bench: Bench) -> None:
    file, toml = bench.winner(model), bench.scratch / f"breakdown-{model}.toml"
    toml.write_text(format_candidate(file))
    variables = worker_environment(compile_cache_dir(), file.candidate.plan.allocator)
    command = [sys.executable, str(ROOT / "scripts" / "step_breakdown"), str(toml), bench.device]
    table = json.loads(bench.output(command, variables))
    bench.row.update(table)
    assert sum(table["shares"].values()) == pytest.approx(1.0)
    assert table["shares"]["matmul"] > 0.01
    assert 1 <= table["micro_steps"] <= file.candidate.gradient_accumulation_steps

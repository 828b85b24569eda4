"""The promise: a training's peak memory is the verdict's, within 1 %, whatever the plan."""

from dataclasses import replace
from pathlib import Path

import pytest
from precision import FAST
from trainings import changed, settings

from autotune.config.candidate import Candidate, Plan, Shape
from autotune.measure.runner import run_trial
from autotune.measure.types import TrialRequest
from autotune.train.trainer import train

PLANS = {
    "eager": {"compile": "off", "loss": "chunked", "loss_chunk_tokens": 128, "micro_batch_size": 8},
    "full logits": {"loss": "full", "micro_batch_size": 8},
    "chunked": {"loss": "chunked", "loss_chunk_tokens": 128, "micro_batch_size": 8},
    "checkpointed": {"activation_checkpointing": "block", "micro_batch_size": 8},
    "accumulated": {"loss": "chunked", "loss_chunk_tokens": 64, "micro_batch_size": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_a_training_with_evaluation_and_checkpoint_peaks_as_measured(
    name: str, candidate: Candidate, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as this process: each thread has buffers of its own
    compiled = name != "eager"
    shape, steps = Shape(n_layer=2, n_head=2, n_embd=64, block_size=64), 50 if compiled else 10
    trained = changed(
        candidate, shape=shape, global_batch_size=8, max_iters=steps, eval_interval=steps // 2, log_interval=10
    )
    plan = Plan(**{"compile": "block", "dtype": FAST} | PLANS[name])  # type: ignore[arg-type]
    candidate = replace(trained, plan=plan)
    request = TrialRequest(candidate=candidate, device="cpu", result_path="", measure_seconds=0.5, final=True)
    verdict = run_trial(request, tmp_path / "trial.log")
    assert verdict.status == "ok", verdict.message
    assert ((verdict.compile_cache_hits or 0) + (verdict.compile_cache_misses or 0) > 0) == compiled
    summary = train(settings(trained, tmp_path / "train", plan=plan))
    assert summary.iterations == steps
    assert ("graphs from the compile cache" in capsys.readouterr().err) == compiled
    assert summary.peak_allocated_bytes == pytest.approx(verdict.peak("allocated_bytes"), rel=0.01)

"""What cannot run says why in one line, the same from a trial, a training and a search."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_machine import CPU
from trainings import settings as training

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.data.shards import write_shard
from autotune.errors import NoFeasibleError, UnsupportedError
from autotune.measure.runner import run_trial
from autotune.measure.types import TrialRequest, TrialResult
from autotune.search.loop import search
from autotune.search.resolve import resolve
from autotune.train.trainer import train

RECIPE = Recipe(shape=Shape(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=256), global_batch_size=2)
REASON = "plan.loss_chunk_tokens = 4096 is more than a micro batch has (64); lower it"


def test_a_chunk_larger_than_the_batch(tmp_path: Path) -> None:
    plan = Plan(micro_batch_size=2, loss="chunked", loss_chunk_tokens=4096)
    request = TrialRequest(candidate=Candidate(recipe=RECIPE, plan=plan), device="cpu", result_path="")
    result = run_trial(request, tmp_path / "log")
    assert (result.status, result.message) == ("unsupported", REASON)

    for split in ("train", "val"):
        write_shard(tmp_path / f"x_{split}_000000.bin", np.arange(256))
    with pytest.raises(UnsupportedError) as caught:
        train(training(replace(RECIPE, data=str(tmp_path)), tmp_path / "out", plan))
    assert str(caught.value) == REASON

    now = [0.0]

    def measure(request: TrialRequest, log: Path) -> TrialResult:
        assert request.candidate.plan == plan
        now[0] += 60.0  # the budget
        return result

    asked = resolve(CPU, model="1x2x32x32", budget="60s", name="paper")
    asked = replace(asked, recipe=RECIPE, baseline=plan)
    with pytest.raises(NoFeasibleError) as none:
        search(asked, tmp_path / "run", CPU, measure=measure, clock=lambda: now[0])
    assert f"unsupported, {REASON}; see logs/trial-0000.log" in str(none.value)

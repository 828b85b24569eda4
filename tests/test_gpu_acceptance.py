"""GPU acceptance without a card: it skips with the reason; calls stop in time, go on, and record failures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_machine import CUDA, OLD_CUDA, settings
from gpu.bench import EAGER, EXHAUSTIVE, LIKELY, Bench

from autotune.environment import Environment
from autotune.search.space import build_space, every_candidate

ROOT = Path(__file__).parents[1]


def accept(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [str(ROOT / "scripts" / "gpu_acceptance"), *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHON": sys.executable}
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
def test_without_a_card_every_test_is_skipped_with_the_reason() -> None:
    run = accept("-k", "limits or guide")
    assert run.returncode == 0, run.stdout
    assert "needs a CUDA device, none here" in run.stdout
    assert "19 skipped" in run.stdout


@pytest.mark.slow
def test_calls_stop_in_time_go_on_and_repeat_failures_when_asked(tmp_path: Path) -> None:
    """No search is recorded, so there is no winner to train: that is a failure, with its row."""
    words = ("--dry-run-cpu", "--out", str(tmp_path), "-k", "promise or breakdown")
    stopped = accept(*words, "--minutes", "0")
    assert stopped.returncode == 2
    assert "the time is over; call again to go on" in stopped.stdout
    assert list(tmp_path.iterdir()) == []

    failed = accept(*words, "-k", "promise")
    assert failed.returncode == 1
    (row,) = json.loads((tmp_path / "promise.json").read_text())["rows"]
    assert row["ok"] is False
    assert "no winner of 124M is recorded; run scripts/gpu_acceptance -k" in row["why"]
    assert (tmp_path / "promise.csv").read_text().startswith("test,ok,outcome,seconds")

    left = accept(*words, "--collect-only", "-q").stdout
    assert "test_breakdown.py::" in left
    assert "test_promise.py::" not in left
    assert "test_promise.py::" in accept(*words, "--collect-only", "-q", "--again").stdout


@pytest.mark.parametrize("card", [CUDA, OLD_CUDA], ids=["card", "card without bfloat16"])
@pytest.mark.parametrize("choices", [LIKELY, EXHAUSTIVE], ids=["LIKELY", "EXHAUSTIVE"])
def test_what_it_searches_is_in_a_cards_space(choices: tuple[str, ...], card: Environment, tmp_path: Path) -> None:
    """A dry run searches other choices, so only a card would meet one that does not exist."""
    bench = Bench(environment=card, directory=tmp_path, scratch=tmp_path, dry=False, deadline=0.0)
    found = settings(card, choices=bench.runnable(choices))
    plans = [candidate.plan for candidate in every_candidate(build_space(found, card)).values()]
    assert len(plans) > 8
    assert {plan.dtype for plan in plans} <= {bench.half, f"{bench.half}_residual"}
    shape = bench.shape(12, 12, 768)
    assert bench.candidate(shape, EAGER).plan.dtype == bench.half

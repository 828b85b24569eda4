"""Speeds by the roofline: held to published ones, and to what must make a step faster or slower."""

import json
import math
import sys
from dataclasses import asdict, replace
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.config.cards import cards, find
from autotune.search.roofline import fitted, log_speed, predict

SCRIPT = Path(__file__).parents[2] / "scripts" / "fit_throughput"
RECIPE = Recipe(shape=Shape(), global_batch_size=512)
PLAN = Plan(micro_batch_size=16)


@pytest.fixture(scope="module")
def script() -> Any:
    loader = SourceFileLoader("fit_throughput", str(SCRIPT))
    spec = spec_from_loader("fit_throughput", loader)
    assert spec
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fit_throughput", module)  # dataclasses look their module up
        loader.exec_module(module)
        yield module


def test_the_file_is_what_the_script_writes(script: Any) -> None:
    written, _ = script.efficiencies()
    assert written.provenance == fitted().provenance
    assert written.cpu_peaks == fitted().cpu_peaks
    assert asdict(written.cuda) == pytest.approx(asdict(fitted().cuda), rel=0.02)
    assert written.log_half_width == pytest.approx(fitted().log_half_width, rel=0.02)


def test_published_speeds_are_predicted(script: Any) -> None:
    """llm.c is not torch and was not fitted, but its speeds are held to the same."""
    anchors = script.anchors()
    speeds = [predict(one.card, one.candidate) for one in anchors]
    inside = [s.low <= one.tokens_per_second <= s.high for one, s in zip(anchors, speeds, strict=True)]
    assert len(anchors) >= 17
    assert sum(inside) >= 0.8 * len(inside)
    for one, found in zip(anchors, speeds, strict=True):
        assert found.tokens_per_second == pytest.approx(one.tokens_per_second, rel=0.35), one.source


def test_a_source_that_was_left_out_is_predicted_within_the_interval(script: Any) -> None:
    known, unseen = script.efficiencies()
    assert sum(abs(off) <= known.log_half_width for _, off in unseen) >= 0.8 * len(unseen)


def speed(card: str = "4090", recipe: Recipe = RECIPE, **plan: object) -> float:
    return predict(find(card), Candidate(recipe=recipe, plan=replace(PLAN, **plan))).tokens_per_second  # type: ignore[arg-type]


def test_what_takes_longer_is_slower() -> None:
    assert speed(compile="off") < speed(compile="full")
    assert speed(activation_checkpointing="block") < speed(activation_checkpointing="every_2") < speed()
    assert speed(activation_checkpointing="budget_0") < speed(activation_checkpointing="budget_0.5") < speed()
    dtypes = [speed("H100", dtype=word) for word in ("float32", "tfloat32", "bfloat16", "bfloat16_residual")]
    assert dtypes == sorted(set(dtypes))
    assert speed(attention="sdpa_math") < speed()
    assert speed(micro_batch_size=1) < speed(micro_batch_size=4) < speed(micro_batch_size=64)
    assert speed(loss="chunked", loss_chunk_tokens=1024) < speed(loss="chunked", loss_chunk_tokens=8192)
    assert speed(recipe=replace(RECIPE, shape=Shape(n_layer=24))) < speed()
    assert speed(recipe=replace(RECIPE, optimizer="muon")) < speed()
    assert speed("T4", dtype="float16") < speed("3090") < speed("4090") < speed("A100 80GB") < speed("H100")


def test_no_card_beats_its_data_sheet() -> None:
    for card in cards():
        found = predict(card, Candidate(recipe=RECIPE, plan=replace(PLAN, dtype="float16")))
        assert 0.2 < found.tokens_per_second * Shape().flops_per_token / card.peak_flops < 0.9, card.name


def test_a_type_that_tensor_cores_lack_runs_at_float32s_rate() -> None:
    assert speed("T4", dtype="bfloat16") < 0.4 * speed("T4", dtype="float16")


def test_a_cpu_is_compared_only() -> None:
    eager, compiled = (
        log_speed(Candidate(recipe=RECIPE, plan=replace(PLAN, compile=word)), None)  # type: ignore[arg-type]
        for word in ("off", "full")
    )
    assert eager < compiled
    assert math.isfinite(compiled)


def test_records_name_no_machine_path() -> None:
    for path in (SCRIPT.parents[1] / "results" / "reference").rglob("*"):
        if path.suffix in (".csv", ".json") and path.name in ("speeds.csv", "cpu-rates.json"):
            assert "/home" not in path.read_text()
            assert "/work" not in path.read_text()
    assert "results/reference" in json.dumps(asdict(fitted().provenance))

"""A predicted peak by category adds up to the prediction."""

import pytest

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.measure.types import CATEGORIES
from autotune.memory.breakdown import OUTSIDE, predicted_breakdown
from autotune.memory.model import MemoryModel, predict

RECIPE = Recipe(shape=Shape(n_layer=6, n_head=6, n_embd=384), global_batch_size=64)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "plan",
    [
        Plan(micro_batch_size=64, loss="full"),
        Plan(micro_batch_size=8, loss="full", compile="off"),
        Plan(micro_batch_size=2, loss="chunked", activation_checkpointing="block"),
        Plan(micro_batch_size=4, loss="liger", attention="sdpa_math"),
    ],
)
def test_categories_add_up_to_the_prediction(device: str, plan: Plan) -> None:
    model, candidate = MemoryModel(device=device), Candidate(recipe=RECIPE, plan=plan)
    parts = predicted_breakdown(model, candidate)
    assert sum(parts.values()) == pytest.approx(predict(model, candidate).peak_device_bytes, abs=2)
    assert parts.keys() <= {*CATEGORIES, OUTSIDE}
    assert parts["parameters"] == 4 * RECIPE.shape.parameters
    assert list(parts.values()) == sorted(parts.values(), reverse=True)


def test_whole_logits_lead_where_the_loss_keeps_them() -> None:
    model = MemoryModel(device="cuda")
    full = predicted_breakdown(model, Candidate(recipe=RECIPE, plan=Plan(micro_batch_size=64, loss="full")))
    chunked = predicted_breakdown(model, Candidate(recipe=RECIPE, plan=Plan(micro_batch_size=64, loss="chunked")))
    assert full["logits and loss"] > 5 * chunked["logits and loss"]

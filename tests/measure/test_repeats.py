"""Text that repeats its tokens is no sign of a wrong model."""

import torch

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.measure.worker import verify
from autotune.model.step import build


def test_a_sequence_of_one_token_is_correct_though_its_loss_is_lower() -> None:
    shape = Shape(n_layer=2, n_head=2, n_embd=128, block_size=64)
    plan = Plan(micro_batch_size=1, compile="off", dtype="float32")
    step = build(Candidate(recipe=Recipe(shape=shape), plan=plan), torch.device("cpu"))
    spaces = torch.full((1, 64), 220)  # what GPT-2's tokenizer makes of deep indentation
    assert 9.5 < verify(step, (spaces, spaces, 1.0)) < 10.5

from pathlib import Path

import pytest

from autotune.config.nanogpt import parse_nanogpt
from autotune.config.presets import GUIDE, LARGER_24GB, PRESETS, GuideRow, guide_row, preset
from autotune.errors import ConfigError
from autotune.units import GIB


@pytest.mark.parametrize("row", PRESETS, ids=lambda row: row.name)
def test_a_row_is_a_config_file_of_nanogpt(row: GuideRow) -> None:
    file = parse_nanogpt(row.config, row.name, "cuda:0", (8, 9))
    candidate, recipe = file.candidate, file.candidate.recipe
    assert file.notes == ()
    assert recipe.shape == row.shape
    assert candidate.plan.micro_batch_size == row.micro_batch_size
    assert candidate.gradient_accumulation_steps == row.gradient_accumulation_steps
    assert (recipe.learning_rate, recipe.max_iters, recipe.beta2) == (row.learning_rate, row.max_iters, 0.99)


def test_the_guides_own_file_for_24_gb_is_its_row() -> None:
    """The file as the guide prints it, except for what only tracks a training."""
    text = """
out_dir='out-fineweb-160M'
eval_interval=1000
eval_iters=200
log_interval=100
always_save_checkpoint=True
dataset='fineweb'
gradient_accumulation_steps=16
batch_size=32
block_size=1024
n_layer=10
n_head=10
n_embd=640
dropout=0.0
learning_rate=6e-4
max_iters=50000
warmup_iters=2000
lr_decay_iters=50000
min_lr=6e-5
beta2=0.99
"""
    own = parse_nanogpt(text, "guide.py", "cuda:0", (8, 9)).candidate
    assert parse_nanogpt(preset("24GB").config, "24GB", "cuda:0", (8, 9)).candidate == own


@pytest.mark.parametrize(("word", "row"), [("24gb", GUIDE[2]), ("24 GB", GUIDE[2]), ("24GB-large", LARGER_24GB)])
def test_rows_are_found_by_their_names(word: str, row: GuideRow) -> None:
    assert preset(word) is row


def test_an_unknown_row_is_one_line_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'32GB' is not a row of the guide; .*24GB") as error:
        preset("32GB")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("gib", "name"), [(79.2, "80GB"), (44.4, "24GB"), (23.6, "24GB"), (15.7, "16GB"), (8, "12GB")])
def test_a_card_has_the_row_of_its_class(gib: float, name: str) -> None:
    assert guide_row(int(gib * GIB)).name == name


def test_the_config_keeps_another_vocabulary(tmp_path: Path) -> None:
    from dataclasses import replace

    small = replace(GUIDE[0], shape=replace(GUIDE[0].shape, vocab_size=512))
    assert parse_nanogpt(small.config, "small", "cpu").candidate.shape.vocab_size == 512

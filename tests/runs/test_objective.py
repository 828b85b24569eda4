import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from fake_machine import CPU, CUDA, settings
from hypothesis import given
from hypothesis import strategies as st

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.config.search_settings import SearchSettings
from autotune.errors import ConfigError
from autotune.measure.types import TrialResult
from autotune.runs.law import LAWS, Law, find_law, large_batch_loss, predict_loss
from autotune.runs.objective import (
    finish_candidate,
    interval,
    loss_at,
    plan_training,
    score,
    speed_needed,
    training_tokens,
)
from autotune.search.space import baseline

RACES = Path(__file__).parents[2] / "results" / "reference" / "cpu-torch-2.13" / "races.jsonl"
PUBLISHED = Path(__file__).parents[2] / "results" / "reference" / "losses-published" / "losses.csv"


def observations() -> pd.DataFrame:
    return pd.read_csv(PUBLISHED)


def one_recipe() -> pd.DataFrame:
    table = observations()
    return table[table["recipe"] == "learning rate and batch size tuned"]


def predictions(law: Law, table: pd.DataFrame) -> pd.Series:
    losses = [law.loss(n, d) for n, d in zip(table.parameters_non_embedding, table.tokens, strict=True)]
    return pd.Series(losses, index=table.index)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_each_law_ranks_the_runs_of_one_recipe(law: Law) -> None:
    table = one_recipe()
    spearman = predictions(law, table).rank().corr(table.final_loss.rank())
    assert len(table) == 21
    assert spearman >= 0.95


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_published_losses_lie_within_the_band_of_each_law(law: Law) -> None:
    table = observations()
    errors = predictions(law, table) - table.final_loss
    print(f"{law.name}: {errors.min():+.3f} to {errors.max():+.3f} nats, band {law.band}")
    assert errors.abs().max() <= law.band


def test_the_default_law_fits_the_runs_it_was_fitted_to() -> None:
    table = one_recipe()
    errors = predictions(find_law("lingle"), table) - table.final_loss
    assert (errors**2).mean() ** 0.5 < 0.02


def recorded_short() -> pd.DataFrame:
    """The least loss of AdamW by shape and length, of trainings with 65,536 tokens and more."""
    table = pd.read_json(RACES, lines=True)
    table = table[(table.optimizer == "adamw") & (table.tokens >= 2**16)]
    return table.groupby(["shape", "tokens"], as_index=False).loss.min()


def test_short_trainings_are_predicted_by_what_short_trainings_showed() -> None:
    for row in recorded_short().itertuples():
        layers, heads, width, block = map(int, str(row.shape).split("x"))
        shape = Shape(n_layer=layers, n_head=heads, n_embd=width, block_size=block)
        assert predict_loss(find_law("lingle"), shape, row.tokens) == pytest.approx(row.loss, abs=0.17)


@given(
    layers=st.integers(1, 48), width=st.integers(1, 32), block=st.integers(16, 4096),
    tokens=st.floats(1.0, 1e13), more=st.floats(1.0, 100.0), law=st.sampled_from(LAWS),
)  # fmt: skip
def test_more_tokens_never_predict_a_higher_loss(
    layers: int, width: int, block: int, tokens: float, more: float, law: Law
) -> None:
    shape = Shape(n_layer=layers, n_head=1, n_embd=64 * width, block_size=block)
    assert predict_loss(law, shape, more * tokens) <= predict_loss(law, shape, tokens) + 1e-9


def test_an_unknown_law_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean 'hoffmann'"):
        find_law("hofmann")


def loss_settings(**words: object) -> SearchSettings:
    return settings(CUDA, model="", **words)


def test_more_speed_predicts_a_lower_loss_for_the_same_shape() -> None:
    asked = loss_settings(train_time="1h")
    slow, fast = (score(asked, baseline(asked), speed) for speed in (1e5, 2e5))
    assert fast < slow
    assert fast == loss_at(asked, baseline(asked), 2e5)


def test_with_tokens_given_speed_only_decides_between_plans_of_one_shape() -> None:
    asked = loss_settings(train_tokens="1B")
    small = baseline(asked)
    large = replace(small, recipe=replace(small.recipe, shape=Shape(n_layer=16)))
    assert score(asked, small, 2e5) < score(asked, small, 1e5)
    assert loss_at(asked, small, 2e5) == loss_at(asked, small, 1e5)
    assert score(asked, large, 1e4) < score(asked, small, 1e6)


def test_a_race_has_no_use_for_micro_batches_larger_than_the_best_batch() -> None:
    law, raced = loss_settings(train_time="3m"), replace(loss_settings(train_time="3m"), race="on")
    sizes = [replace(baseline(law), plan=Plan(micro_batch_size=size)) for size in (1, 16, 32)]
    assert len({loss_at(law, one, 2e3) for one in sizes}) == 1
    one, many, more = (loss_at(raced, candidate, 2e3) or math.inf for candidate in sizes)
    assert one < many < more
    assert more - one == pytest.approx(large_batch_loss(2e3 * 180, 32 * 1024))
    divided = replace(sizes[1], plan=replace(sizes[1].plan, processes=2))
    assert loss_at(raced, divided, 2e3) == more
    assert loss_at(raced, sizes[-1], 1e7) == loss_at(raced, sizes[0], 1e7)  # a long training has larger ones


@given(st.floats(1e3, 1e12), st.floats(1.0, 1e7))
def test_the_best_batch_grows_with_the_training(tokens: float, batch: float) -> None:
    assert 0.0 <= large_batch_loss(2 * tokens, batch) <= large_batch_loss(tokens, batch) or tokens < 1e8 <= 2 * tokens
    assert large_batch_loss(tokens, batch) <= large_batch_loss(tokens, 2 * batch)


def test_short_blocks_are_not_free() -> None:
    law = find_law("lingle")
    losses = [predict_loss(law, Shape(block_size=block), 1e9) for block in (64, 256, 1024)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(law.loss(Shape().parameters_non_embedding, 1e9), abs=0.002)


def test_no_training_is_predicted_to_end_above_an_untrained_model() -> None:
    law = find_law("lingle")
    losses = [predict_loss(law, Shape(), tokens) for tokens in (1e3, 1e4, 1e5, 1e6, 1e7)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] <= math.log(Shape().vocab_size)


def test_the_interval_of_a_loss_comes_from_the_interval_of_the_speed() -> None:
    asked = loss_settings(train_time="1h")
    low, high = interval(asked, baseline(asked), 1e5, 1e3)
    assert low < score(asked, baseline(asked), 1e5) < high


@pytest.mark.parametrize("words", [{"train_time": "1h"}, {"train_tokens": "1B"}])
def test_the_speed_that_is_needed_reaches_the_objective(words: dict[str, str]) -> None:
    asked = loss_settings(**words)
    candidate = baseline(asked)
    wanted = score(asked, candidate, 123_456.0)
    assert speed_needed(asked, candidate, wanted) == pytest.approx(123_456.0, rel=1e-6)
    assert speed_needed(asked, candidate, 0.0) == pytest.approx(1e15, rel=1e-6)  # no speed reaches it
    fixed = settings(CUDA)
    assert speed_needed(fixed, baseline(fixed), 5e4) == pytest.approx(5e4)


def test_the_training_is_as_long_as_was_asked() -> None:
    assert training_tokens(loss_settings(train_tokens="1B"), 1e5) == 1e9
    assert training_tokens(loss_settings(train_time="1h"), 1e5) == 3.6e8
    assert training_tokens(loss_settings(train_time="1h"), 1e5, start_seconds=600.0) == 3e8


def test_a_training_of_given_time_has_room_for_its_start_and_its_evaluations() -> None:
    phases = {"start": 3.0, "measure": 9.0}
    result = TrialResult(status="ok", phase="done", build_seconds=2.0, compile_seconds=15.0, phase_seconds=phases)
    asked, speed = loss_settings(train_time="180s"), 2e5
    planned = plan_training(asked, baseline(asked), speed, result)
    recipe, evaluation = planned.recipe, planned.evaluation
    assert recipe.train_seconds == 180.0
    evaluated = evaluation.eval_iters * planned.plan.micro_batch_size * recipe.shape.block_size
    seconds = (recipe.max_tokens + recipe.max_iters / evaluation.eval_interval * evaluated / 3) / speed
    assert seconds == pytest.approx(160.0, rel=0.02)
    by_tokens = loss_settings(train_tokens="20M")
    given = plan_training(by_tokens, baseline(by_tokens), speed, result).recipe
    assert (given.train_seconds, given.max_iters) == (0.0, round(20e6 / given.tokens_per_step))
    timed = replace(baseline(by_tokens), recipe=replace(by_tokens.recipe, train_seconds=180.0))
    assert plan_training(by_tokens, timed, speed, result).recipe.train_seconds == 0.0


@pytest.mark.parametrize("tokens", [1, 5_000, 300_000, 10**7, 10**10])
def test_a_finished_recipe_is_sane_for_any_length(tokens: int) -> None:
    given = Candidate(recipe=settings(CPU, model="").recipe, plan=Plan(micro_batch_size=16))
    finished = finish_candidate(given, tokens)
    recipe, evaluation = finished.recipe, finished.evaluation
    assert recipe.max_iters == max(1, round(tokens / 4096))
    assert recipe.lr_decay_iters == recipe.max_iters
    assert recipe.warmup_iters <= recipe.max_iters // 10
    assert 1 <= evaluation.eval_interval <= recipe.max_iters
    between = evaluation.eval_interval * recipe.global_batch_size
    assert evaluation.eval_iters * 16 <= max(16, 0.15 * between)
    assert 1e-4 <= recipe.learning_rate <= 3e-3
    assert recipe.min_lr == pytest.approx(recipe.learning_rate / 10)


def test_larger_models_learn_at_a_lower_rate() -> None:
    shapes = [Shape(n_layer=layers, n_embd=width) for layers, width in ((12, 768), (24, 1536))]
    rates = [finish_candidate(Candidate(recipe=Recipe(shape=shape)), 2.5e9).recipe.learning_rate for shape in shapes]
    assert rates[0] == pytest.approx(3e-3, rel=0.05)
    assert rates[1] < rates[0]


def test_finishing_changes_nothing_that_a_step_executes() -> None:
    recipe = settings(CUDA).recipe
    assert finish_candidate(Candidate(recipe=recipe), 1e9).id == Candidate(recipe=recipe).id

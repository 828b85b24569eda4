"""What short trainings say of long ones."""

import math
from dataclasses import replace

import numpy as np
import pytest

from autotune.config.candidate import Optimizer, Recipe, Shape
from autotune.runs.curves import Priors, Training, learn, predict, priors

SHAPE = Shape(n_layer=4, n_head=4, n_embd=128, block_size=128)


def training(
    tokens: int, *, rate: float = 0.006, batch: int = 2048, optimizer: Optimizer = "muon", full: int = 2**19
) -> Training:
    recipe = Recipe(
        shape=SHAPE, global_batch_size=batch // SHAPE.block_size, max_iters=full // batch, learning_rate=rate,
        optimizer=optimizer,
    )  # fmt: skip
    return Training(recipe=recipe, tokens=tokens, rival=f"{optimizer} {rate} {batch}")


def world(seed: int) -> tuple[Priors, list[Training], np.ndarray]:
    """Rivals at three lengths, and losses drawn from a prior, narrow enough for the law to be linear in it."""
    usual = priors(2**19)
    narrow = {name: replace(belief, sd=0.3 * belief.sd) for name, belief in usual.constants.items()}
    known = replace(usual, constants=narrow)
    rivals = [{"rate": rate, "batch": batch} for rate in (0.003, 0.012) for batch in (1024, 4096)]
    every = [training(tokens, **rival) for rival in rivals for tokens in (2**16, 2**17, 2**19)]  # type: ignore[arg-type]
    prior, generator = predict(known, [], every), np.random.default_rng(seed)
    losses = generator.multivariate_normal(prior.means, prior.covariance + known.noise_sd**2 * np.eye(len(every)))
    return known, every, losses


def test_intervals_hold_what_comes() -> None:
    inside = []
    for seed in range(30):
        known, every, losses = world(seed)
        shown = [(one, loss) for one, loss in zip(every, losses, strict=True) if one.tokens < 2**19]
        long = [(one, loss) for one, loss in zip(every, losses, strict=True) if one.tokens == 2**19]
        found = predict(known, shown, [one for one, _ in long])
        truth = np.array([loss for _, loss in long])
        inside += (np.abs(truth - found.means) < 1.96 * found.sd).tolist()
    assert 0.85 < np.mean(inside) <= 1.0


def test_a_training_that_was_shown_is_known_up_to_its_scatter() -> None:
    known, one = priors(2**19), training(2**17)
    found = predict(known, [(one, 7.0)], [one])
    assert found.means[0] == pytest.approx(7.0, abs=0.1)
    assert found.sd[0] < 1.5 * found.widening * math.sqrt(found.scatter[0])


def test_without_evidence_an_interval_is_wide_and_with_it_narrower() -> None:
    target = training(2**19)
    before = predict(priors(2**19), [], [target])
    after = predict(priors(2**19), [(training(2**17), 7.1), (training(2**18), 6.8)], [target])
    assert after.sd[0] < before.sd[0] / 2
    assert after.means[0] < 6.8


def test_an_easier_text_is_not_taken_for_a_flatter_curve() -> None:
    """Most of what it is easier by after a short training, it is easier by after a long one."""
    target, short = training(2**19), training(2**17)
    usual, easier = (predict(priors(2**19), [(short, loss)], [target]) for loss in (7.1, 6.1))
    assert 0.8 < usual.means[0] - easier.means[0] < 1.1


def test_a_small_batch_leads_in_short_trainings_and_loses_long_ones() -> None:
    short, long = 2**15, 2**21
    first = predict(priors(2**19), [], [training(short, batch=1024), training(short, batch=8192)])
    last = predict(priors(2**19), [], [training(long, batch=1024), training(long, batch=8192)])
    assert first.means[0] < first.means[1]
    assert last.means[0] > last.means[1]


def test_muon_is_expected_ahead_of_adamw() -> None:
    found = predict(priors(2**19), [], [training(2**18), training(2**18, optimizer="adamw")])
    assert found.means[0] < found.means[1]


def test_constants_are_learned_from_losses() -> None:
    known = replace(priors(2**19), text_sd=0.0)  # else a text that is harder would explain them as well
    every = [training(2**power, batch=batch) for power in (16, 18, 20) for batch in (1024, 4096)]
    moved = replace(
        known, constants={**known.constants, "e": replace(known.constants["e"], mean=known.constants["e"].mean + 0.3)}
    )
    losses = predict(moved, [], every).means
    learned = learn(known, list(zip(every, losses.tolist(), strict=True)))
    again = predict(replace(known, constants=learned), [], every).means
    assert np.abs(again - losses).max() < 0.1
    assert all(learned[name].sd <= belief.sd * 1.001 for name, belief in known.constants.items())


def test_rivals_do_not_share_their_own_deviation() -> None:
    """A surprise of one rival says more about itself than about another one of its recipe."""
    known, one = priors(2**19), training(2**17)
    usual = float(predict(known, [], [one]).means[0])
    shown = [(one, usual + 0.5)]
    other = Training(recipe=one.recipe, tokens=one.tokens, rival="another")
    found = predict(known, shown, [one, other])
    assert found.means[0] - usual > found.means[1] - usual
    assert math.isfinite(found.means[1])

"""Our sampler, in autotune's own studies and in anybody's."""

import random
from dataclasses import replace

import numpy as np
import optuna
import pytest
from fake_machine import CUDA, settings
from proposals import SMALL, Trials, formulas

from autotune.measure.types import Status, TrialResult
from autotune.search import acquisition, gp
from autotune.search.sampler import AdditiveGPSampler, draw
from autotune.search.simulation import speed
from autotune.search.space import build_space, every_candidate


def test_four_trials_gain_over_the_baseline() -> None:
    trials = Trials(settings(CUDA)).run(5)
    assert trials.records[0].objective is not None
    assert trials.best() > 1.05 * trials.records[0].objective
    assert all(record.candidate.plan.compile != "off" for record in trials.records)


@pytest.mark.slow
def test_over_shapes_ours_beats_random_search_with_half_the_trials() -> None:
    ours = Trials(settings(CUDA, model="")).run(10).best()
    assert ours > Trials(settings(CUDA, model="", sampler="random")).run(20).best()


@pytest.mark.parametrize("status", ["over_limit", "crashed"])
def test_what_fails_is_not_proposed_again_and_again(status: Status) -> None:
    """A third of the space, the third that would be the fastest, fails for one reason or another."""
    asked = settings(CUDA, choices=SMALL)
    measure = formulas(asked)
    failure = TrialResult(status=status, phase="compile", trial_seconds=5.0)
    trials = Trials(asked, lambda c: failure if c.plan.compile == "full" else measure(c)).run(25)
    failed = [record.result.status == status for record in trials.records]
    assert sum(failed) <= 6
    assert sum(failed[12:]) <= 1


def test_while_nothing_works_the_search_moves_away() -> None:
    crashed = TrialResult(status="crashed", phase="build", trial_seconds=5.0)
    plans = [r.candidate.plan for r in Trials(settings(CUDA, choices=SMALL), lambda _: crashed).run(10).records]
    assert len({plan.compile for plan in plans}) == 3
    assert len({plan.micro_batch_size for plan in plans}) >= 3


def test_a_pending_trial_counts_as_far_as_it_is_likely_to_fit() -> None:
    """It is expected to be the best by far: beside one that is sure to fit, what is worse is worth next to nothing, but
    not beside one that will run out of memory."""
    zeros = np.zeros((3, 2))
    at = np.array([[0.0], [1.0], [2.0]])

    def values(fits: float) -> gp.Array:
        observed = acquisition.Observed(
            parameters=at, answers=np.array([0.0, 0.1, 0.05]), log_seconds=np.zeros(3), failed=np.zeros(3, bool),
            prior=zeros,
        )  # fmt: skip
        running = acquisition.Choices(parameters=np.array([[6.0]]), prior=np.array([[2.0, 0.0]]))
        pending = acquisition.Pending(choices=running, fits=np.array([fits]), objective=np.asarray)
        choices = acquisition.Choices(parameters=np.array([[4.0], [5.0]]), prior=np.array([[0.5, 0.0], [0.3, 0.0]]))
        fitted = acquisition.fit(observed, np.array([False]))
        return acquisition.value(fitted, choices, np.asarray, 0.1, pending)

    never, perhaps, surely = values(0.0), values(0.5), values(1.0)
    assert (surely < 0.1 * never).all()
    assert perhaps == pytest.approx((never + surely) / 2)


def test_the_same_records_give_the_same_candidate() -> None:
    trials = Trials(settings(CUDA, model="", seed=5)).run(4)
    trials.records = random.Random(0).sample(trials.records, len(trials.records))
    chosen = [proposal[1].id for _ in range(2) if (proposal := trials.propose())]
    assert len(chosen) == 2
    assert chosen[0] == chosen[1]


def test_after_hundreds_of_trials_the_process_is_fitted_to_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best are among them, and the search has found what there is to find."""
    asked, fitted = settings(CUDA, memory_limit="8GiB", choices=SMALL), list[int]()
    fit = gp.fit

    def counted(points: gp.Array, words: gp.Mask, answers: gp.Array) -> gp.Process:
        fitted.append(len(points))
        return fit(points, words, answers)

    monkeypatch.setattr(gp, "fit", counted)
    monkeypatch.setattr(acquisition, "FITTED", 16)
    trials = Trials(asked).run(60)
    assert max(fitted) == 16
    fastest = max(speed(formulas(asked)(c)) for c in every_candidate(build_space(asked, CUDA)).values())
    assert trials.best() == fastest
    assert trials.best(20) >= 0.95 * fastest


SPACE: dict[str, optuna.distributions.BaseDistribution] = {
    "rate": optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True),
    "momentum": optuna.distributions.FloatDistribution(-1.0, 1.0),
    "width": optuna.distributions.IntDistribution(16, 1024, log=True),
    "shift": optuna.distributions.IntDistribution(-4, 4, step=2),
    "kind": optuna.distributions.CategoricalDistribution(("a", "b", None)),
    "fixed": optuna.distributions.CategoricalDistribution(("only",)),
}


def foreign(trial: optuna.Trial) -> float:
    rate, width = trial.suggest_float("rate", 1e-5, 1e-1, log=True), trial.suggest_int("width", 16, 1024, log=True)
    momentum, shift = trial.suggest_float("momentum", -1.0, 1.0), trial.suggest_int("shift", -4, 4, step=2)
    kind = trial.suggest_categorical("kind", ("a", "b", None))
    trial.suggest_categorical("fixed", ("only",))
    trial.set_constraint("memory", width / 512 - 1)
    if kind is None:
        raise optuna.TrialPruned
    far = abs(rate / 1e-3 - 1) if rate > 1e-3 else abs(1e-3 / rate - 1)
    return -(far**0.5) - (momentum - 0.5) ** 2 - abs(shift - 2) / 4 + (width / 512 if kind == "b" else 0.0)


def test_anybody_may_use_it_in_a_study_of_his_own() -> None:
    """No candidates, no records: log scales, steps, categories, constraints, pruned and failed trials."""
    best = []
    for sampler in (AdditiveGPSampler(seed=0), optuna.samplers.RandomSampler(seed=0)):
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.optimize(foreign, n_trials=30)
        best.append(study.best_value)
        assert {trial.state.name for trial in study.trials} <= {"COMPLETE", "PRUNED"}
    assert best[0] > best[1]


def test_a_study_to_minimize_is_minimized_and_a_seed_repeats() -> None:
    values = []
    for _ in range(2):
        study = optuna.create_study(sampler=AdditiveGPSampler(seed=3))
        for _ in range(15):
            trial = study.ask({"x": optuna.distributions.FloatDistribution(-1.0, 1.0)})
            study.tell(trial, (trial.params["x"] - 0.3) ** 2)
        values.append([trial.value for trial in study.trials])
    assert values[0] == values[1]
    assert min(values[0]) < 0.01


def test_several_objectives_are_refused() -> None:
    study = optuna.create_study(directions=["minimize", "maximize"], sampler=AdditiveGPSampler(seed=0))
    with pytest.raises(ValueError, match="multi-objective"):
        study.ask({"x": optuna.distributions.FloatDistribution(0.0, 1.0)})


@pytest.mark.parametrize("name", SPACE)
def test_drawn_values_lie_in_their_distribution(name: str) -> None:
    rng, kind = random.Random(1), SPACE[name]
    for _ in range(200):
        assert kind._contains(kind.to_internal_repr(draw(rng, kind)))


def test_a_proposal_has_a_candidates_own_values() -> None:
    trials = Trials(replace(settings(CUDA, model=""), seed=1)).run(6)
    for trial, record in zip(trials.study.trials, trials.records, strict=True):
        shape, plan = record.candidate.shape, record.candidate.plan
        for name, value in trial.params.items():
            assert value == getattr(plan if hasattr(plan, name) else shape, name), name

"""A training of given time, counted by a clock of the test's own: it ends in time, its schedule complete."""

import random
from dataclasses import dataclass, field

import pytest

from autotune.config.candidate import Recipe
from autotune.model.optim import learning_rate
from autotune.train.deadline import APART, UNKNOWN, Deadline

INTERVAL = 50


@dataclass
class Simulated:
    """The trainer's use of a deadline, with seconds that pass only here."""

    asked: float = 180.0
    step_seconds: float = 0.1
    start_seconds: float = 20.0
    evaluation_seconds: float = 1.0
    recipe: Recipe = field(default_factory=lambda: Recipe(schedule="wsd", warmup_iters=100))
    noise: float = 0.1
    busy: tuple[float, float, float] = (0.0, 0.0, 1.0)
    """Begin, end and factor of a time in which everything takes longer."""
    now: float = 0.0
    iterations: int = 0
    schedule: float = 0.0
    rates: list[float] = field(default_factory=list)
    evaluated: list[float] = field(default_factory=list)

    def pass_time(self, seconds: float) -> None:
        begin, end, factor = self.busy
        self.now += seconds * (factor if begin <= self.now < end else 1.0)

    def train(self, until: float = float("inf")) -> "Simulated":
        """One process, from start to end, or killed at `until`."""
        drawn = random.Random(0)
        first, left, rehearsed = self.iterations, UNKNOWN, False
        deadline = Deadline(self.asked, lambda: self.now)
        self.pass_time(self.start_seconds)
        while left and self.now < until:
            self.schedule = 1 - (1 - self.schedule) * (1 - 1 / left)
            self.rates.append(learning_rate(self.recipe, self.schedule * self.recipe.lr_decay_iters))
            self.pass_time(self.step_seconds * drawn.uniform(1 - self.noise, 1 + self.noise))
            self.iterations += 1
            deadline.stepped(warm=self.iterations > first + 3)
            left = 0 if left == 1 else deadline.steps_left(INTERVAL)
            if deadline.step_seconds and not rehearsed:
                rehearsed = True
                deadline.took("evaluation", self.evaluation_seconds * self.factor)
                with deadline.timed("checkpoint"):
                    self.pass_time(0.2)
            due = rehearsed and self.iterations % INTERVAL == 0
            works = ("evaluation", "checkpoint")
            if left == 0 or (due and not deadline.too_soon(*works) and not deadline.too_late(*works)):
                self.evaluated.append(self.now)
                with deadline.timed("evaluation"):
                    self.pass_time(self.evaluation_seconds)
                with deadline.timed("checkpoint"):
                    self.pass_time(0.2)
        return self

    @property
    def factor(self) -> float:
        begin, end, factor = self.busy
        return factor if begin <= self.now < end else 1.0


def assert_complete(run: Simulated, within: float = 0.02) -> None:
    assert run.asked * (1 - within) <= run.now <= run.asked * (1 + within)
    assert run.rates[-1] == run.recipe.min_lr
    peak = run.rates.index(max(run.rates))
    assert run.rates[peak:] == sorted(run.rates[peak:], reverse=True)  # never up again


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@pytest.mark.parametrize("planned", [100, 1500, 10**6])
def test_it_ends_in_time_whatever_was_planned(schedule: str, planned: int) -> None:
    recipe = Recipe(schedule=schedule, max_iters=planned, lr_decay_iters=planned, warmup_iters=planned // 10)  # type: ignore[arg-type]
    run = Simulated(recipe=recipe).train()
    assert_complete(run)
    level = [rate for rate in run.rates if rate == recipe.learning_rate]
    assert len(level) == pytest.approx(0.7 * len(run.rates) if schedule == "wsd" else 0, rel=0.05, abs=2)
    warming = run.rates.index(max(run.rates))
    assert warming == pytest.approx(0.1 * len(run.rates), rel=0.1)


@pytest.mark.parametrize("busy", [(0.0, 999.0, 30.0), (60.0, 999.0, 3.0), (0.0, 90.0, 4.0), (170.0, 999.0, 3.0)])
def test_a_busy_machine_costs_steps_and_no_time(busy: tuple[float, float, float]) -> None:
    start = 2.0 if busy[2] == 30 else 20.0
    run = Simulated(busy=busy, start_seconds=start, step_seconds=0.02, evaluation_seconds=0.1, noise=0.5).train()
    assert_complete(run, within=0.05)
    quiet = Simulated(start_seconds=start, step_seconds=0.02, evaluation_seconds=0.1).train()
    assert run.iterations < quiet.iterations


def test_few_long_steps() -> None:
    run = Simulated(step_seconds=9.0, start_seconds=5.0, evaluation_seconds=3.0).train()
    assert run.asked - 9.0 - 3.0 <= run.now <= run.asked * 1.05
    assert run.rates[-1] == run.recipe.min_lr


def test_evaluations_take_a_tenth_at_most() -> None:
    """Each at its interval would take half of the time."""
    run = Simulated(evaluation_seconds=5.0).train()
    assert_complete(run)
    assert 2 <= len(run.evaluated) <= 4
    gaps = [after - before for before, after in zip(run.evaluated, run.evaluated[1:], strict=False)]
    assert min(gaps) >= APART * 5.0


def test_a_killed_training_keeps_its_time_and_schedule() -> None:
    run = Simulated()
    run.train(until=80.0)
    assert 0.2 < run.schedule < 0.5
    run.train()
    assert_complete(run)


def test_too_little_time_is_over() -> None:
    deadline = Deadline(10.0, lambda: 12.0)
    assert deadline.steps_left(INTERVAL) == 0
    assert Deadline(10.0, lambda: 2.0).steps_left(INTERVAL) == UNKNOWN

"""Objective: tokens/s (maximised), or the final loss that a scaling law predicts from them (minimised).

A predicted loss is for ranking only and is printed with its band. Also here: schedule and learning rate as functions
of the length of a training.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from autotune.config.candidate import Candidate, Shape
from autotune.config.search_settings import SearchSettings
from autotune.measure.types import TrialResult
from autotune.runs.law import Law, find_law, large_batch_loss, predict_loss
from autotune.runs.records import TrialRecord

T = TypeVar("T")


# Nats per factor e of speed, for a training whose length is given in tokens: far below the resolution of any law, but
# it ranks plans of one shape, for which the law predicts the same loss.
_SPEED_WEIGHT = 1e-3  # a convention


def law_of(settings: SearchSettings) -> Law:
    """Law of a search."""
    return find_law(settings.law)


def training_tokens(settings: SearchSettings, tokens_per_second: float, start_seconds: float = 0.0) -> float:
    """Length of the training in tokens at this speed. start_seconds: part of its time in which nothing is trained."""
    if settings.train_tokens is not None:
        return float(settings.train_tokens)
    if settings.train_seconds is not None:
        return tokens_per_second * max(0.0, settings.train_seconds - start_seconds)
    return float(settings.recipe.max_tokens)


def start_seconds(result: TrialResult) -> float:
    """Time until a training is at full speed, as measured in a trial: its process's start, build and compilation."""
    known = result.phase_seconds.get("start"), result.build_seconds, result.compile_seconds
    return sum(seconds for seconds in known if seconds is not None)


def plan_training(
    settings: SearchSettings, candidate: Candidate, speed: float, result: TrialResult, rate_factor: float = 1.0
) -> Candidate:
    """Candidate for the training that the settings ask for, at this many tokens/s. One of given time gets the steps
    that fit beside start and evaluations; a forward pass is a third of a step."""
    asked = settings.train_seconds
    tokens = training_tokens(settings, speed, start_seconds(result))
    planned = finish_candidate(candidate, tokens, rate_factor)
    if asked is None:  # a candidate file may have a time of its own
        return replace(planned, recipe=replace(planned.recipe, train_seconds=0.0))
    one, rows = planned.evaluation, planned.evaluation.eval_batch_size or planned.plan.micro_batch_size
    share = one.eval_iters * rows / 3 / (one.eval_interval * planned.recipe.global_batch_size)
    planned = finish_candidate(candidate, tokens / (1 + share), rate_factor)
    return replace(planned, recipe=replace(planned.recipe, train_seconds=asked))


def loss_at(settings: SearchSettings, candidate: Candidate, tokens_per_second: float) -> float | None:
    """Predicted loss at a measured speed; None for `throughput`. Before a race, which
    chooses the batch, a plan whose micro batch is larger than the best batch is predicted to lose by it."""
    if settings.objective == "throughput":
        return None
    tokens, plan = training_tokens(settings, tokens_per_second), candidate.plan
    loss = predict_loss(law_of(settings), candidate.shape, tokens, muon=races_muon(settings))
    if settings.race == "off":
        return loss
    return loss + large_batch_loss(tokens, plan.micro_batch_size * plan.processes * candidate.shape.block_size)


def races_muon(settings: SearchSettings) -> bool:
    """Whether rivals trained by Muon compete in the search's race, as nearly every winner was."""
    return settings.race == "on" and settings.target != "nanogpt"


def score(settings: SearchSettings, candidate: Candidate, tokens_per_second: float) -> float:
    """Objective at a measured speed."""
    loss = loss_at(settings, candidate, tokens_per_second)
    if loss is None:
        return tokens_per_second
    # For a training of given duration the speed is already in the number of tokens.
    return loss - (_SPEED_WEIGHT * math.log(tokens_per_second) if settings.train_tokens is not None else 0.0)


def interval(
    settings: SearchSettings, candidate: Candidate, tokens_per_second: float, ci95: float
) -> tuple[float, float]:
    """Objective at both ends of an interval of tokens/s, smaller value first."""
    ends = (tokens_per_second - ci95, tokens_per_second + ci95)
    scores = [score(settings, candidate, max(end, tokens_per_second * 0.01)) for end in ends]
    return min(scores), max(scores)


def speed_needed(settings: SearchSettings, candidate: Candidate, objective: float) -> float:
    """Tokens/s at which `candidate` would reach `objective`; by bisection, as the objective is monotonic in speed."""
    sign = 1 if maximised(settings) else -1
    low, high = -3.0, 15.0  # powers of ten, beyond any machine
    for _ in range(50):
        middle = (low + high) / 2
        reached = sign * score(settings, candidate, 10**middle) >= sign * objective
        low, high = (low, middle) if reached else (middle, high)
    return float(10**high)


def maximised(settings: SearchSettings) -> bool:
    """Whether a larger objective is better."""
    return settings.objective == "throughput"


def best_first(records: Sequence[TrialRecord], maximise: bool) -> list[TrialRecord]:
    """Feasible records by objective; equal ones by trial number."""
    feasible = [record for record in records if record.objective is not None]
    return sorted(feasible, key=lambda record: (_signed(record, maximise), record.trial))


def _signed(record: TrialRecord, maximise: bool) -> float:
    assert record.objective is not None
    return -record.objective if maximise else record.objective


def pareto_front(points: Iterable[tuple[float, float, T]]) -> list[T]:
    """Items of (cost, value, item) that no other item beats in both lower cost and higher value; lowest cost first."""
    front: list[tuple[float, T]] = []
    for _, value, item in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][0]:
            front.append((value, item))
    return [item for _, item in front]


def best_learning_rate(shape: Shape, tokens: float) -> float:
    """1.79 N^-0.713 D^0.307 for N non-embedding parameters and D tokens, fitted from 60M parameters up: Step Law,
    Li et al. 2025, arXiv:2503.04715."""
    return float(1.79 * shape.parameters_non_embedding**-0.713 * tokens**0.307)


def clamp_learning_rate(rate: float) -> float:
    """The rate within [1e-4, 3e-3], where trainings are known to work; extrapolated rules leave it."""
    return min(max(rate, 1e-4), 3e-3)


def batch_tokens(tokens: float) -> float:
    """Tokens of a step for a training over `tokens`: 0.58 D^0.571, by the same law."""
    return float(0.58 * tokens**0.571)


def finish_candidate(candidate: Candidate, tokens: float, rate_factor: float = 1.0) -> Candidate:
    """Candidate with iterations, learning rate, warm-up and intervals for a training over `tokens`.

    Learning rate: `best_learning_rate`, clamped, because the law was fitted from 60M parameters up, times
    `rate_factor`. Warm-up is a tenth of the iterations, at most llm.c's 700; the final rate is a tenth of it, as in
    nanoGPT, but 0 for `wsd` (Bergsma et al. 2025, arXiv:2502.15938; docs/race.md). Evaluations take a thirtieth of the
    time at most: a forward pass costs a third of a step, and each covers at most a tenth of the tokens trained since
    the last one.
    """
    recipe, evaluation = candidate.recipe, candidate.evaluation
    iterations = max(1, round(tokens / recipe.tokens_per_step))
    rate = best_learning_rate(recipe.shape, iterations * recipe.tokens_per_step)
    rate = float(f"{rate_factor * clamp_learning_rate(rate):.2g}")  # the rule is not more precise than that
    interval = max(1, min(250, iterations // 5))
    rows = evaluation.eval_batch_size or candidate.plan.micro_batch_size
    evaluated = round(0.1 * interval * recipe.global_batch_size / rows)
    return replace(
        candidate,
        recipe=replace(
            recipe,
            max_iters=iterations,
            lr_decay_iters=iterations,
            warmup_iters=min(700, iterations // 10),
            learning_rate=rate,
            min_lr=0.0 if recipe.schedule == "wsd" else float(f"{rate / 10:.2g}"),
        ),
        evaluation=replace(
            evaluation, eval_interval=interval, eval_iters=max(1, min(evaluation.eval_iters, evaluated))
        ),
        checkpointing=replace(candidate.checkpointing, checkpoint_interval=interval),
        tracking=replace(candidate.tracking, log_interval=max(1, min(10, iterations // 100))),
    )

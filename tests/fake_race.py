"""A race made of formulas, beside the machine of `fake_machine`."""

import math
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import numpy as np
from fake_machine import Beside, Machine, tokens_per_second

from autotune.config.candidate import Recipe
from autotune.measure.types import MemoryView, RungRequest, RungResult, TrialRequest, TrialResult


def final_loss(recipe: Recipe, tokens: float) -> float:
    """Muon learns more than AdamW, twice the rule's rate most of all, and a batch of 1,024 tokens."""
    rule = 1.79 * recipe.shape.parameters_non_embedding**-0.713 * recipe.max_tokens**0.307
    factor = recipe.learning_rate / min(max(rule, 1e-4), 3e-3)
    rate = 0.1 * math.log2(factor / 2) ** 2
    batch = 0.05 * math.log2(recipe.tokens_per_step / 1024) ** 2
    size = 0.1 * abs(math.log(recipe.shape.parameters / 5e6))
    return 4.0 + 60.0 * tokens**-0.25 + (0.0 if recipe.optimizer == "muon" else 0.4) + rate + batch + size


class Track:
    """`train_rung` for a search whose trials run on `machine`, whose clock it moves."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.requests: list[RungRequest] = []
        self.ends: list[float] = []
        """When each rung would have been ended."""
        self.fails: dict[int, RungResult] = {}
        """Answers by the number of the rung."""

    def train(self, request: RungRequest, log: Path) -> RungResult:
        number = len(self.requests)
        self.requests.append(request)
        self.ends.append(self.machine.now + request.timeout_seconds)
        recipe, speed = request.candidate.recipe, tokens_per_second(request.candidate) / 2e3
        tokens = request.target_tokens if request.target_seconds is None else request.target_seconds * speed
        stepping = 0.6 * tokens / speed
        seconds = 8.0 + stepping
        if number in self.fails:
            self.machine.now += 5.0
            return replace(self.fails[number], trial_seconds=5.0)
        if seconds > request.timeout_seconds:
            self.machine.now += request.timeout_seconds
            return RungResult(status="timeout", phase="measure", trial_seconds=request.timeout_seconds)
        self.machine.now += seconds
        noise = np.random.default_rng(0).normal(0, 0.3, request.chunks)
        own = np.random.default_rng(number).normal(0, 0.02, request.chunks)
        return RungResult(
            status="ok", phase="done", tokens_per_second=speed, tokens_per_second_ci95=0.01 * speed,
            step_seconds_p50=recipe.tokens_per_step / speed, steps="whole", trial_seconds=seconds,
            memory={"steady": MemoryView(allocated_bytes=1 << 28, device_bytes=1 << 29)},
            phase_seconds={"start": 8.0, "measure": stepping}, stepping_seconds=stepping,
            iterations=round(tokens / recipe.tokens_per_step),
            chunk_losses=tuple((final_loss(recipe, tokens) + noise + own).tolist()),
        )  # fmt: skip


class SideBySide(Track):
    """Rungs that run at the same time, on cards of `machine`."""

    machine: Beside

    def start(self, request: RungRequest, log: Path) -> Generator[None, None, RungResult]:
        began = self.machine.now
        result = self.train(request, log)
        end, self.machine.now = self.machine.now, began
        with self.machine.busy(request.device, end):
            while self.machine.now < end:
                yield
        return result


class Slow(Machine):
    """A machine as slow as the track, so that the lengths of trainings are those of a CPU."""

    def __init__(self) -> None:
        super().__init__(trial_seconds=20.0)

    def measure(self, request: TrialRequest, log: Path) -> TrialResult:
        result = super().measure(request, log)
        if result.tokens_per_second is None:
            return result
        speed = result.tokens_per_second / 2e3
        seconds = request.candidate.recipe.tokens_per_step / speed
        return replace(result, tokens_per_second=speed, tokens_per_second_ci95=0.01 * speed, step_seconds_p50=seconds)

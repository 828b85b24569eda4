"""A race: rivals, what was read of each, and what follows; races.csv has one row a reading.

A rival is a candidate that is ready for a full training. A rung trains it to a fraction of that training, and its
reading is the validation loss that was reached. All rivals of a race are evaluated on the same tokens, chunk by chunk,
so that differences between them are paired.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autotune.config.candidate import Candidate, Plan, Shape
from autotune.files import write_atomically
from autotune.measure.types import Z95, Status
from autotune.runs.records import csv_cell, csv_line


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A candidate in a race, with the schedule of its full training."""

    rival: int
    """Number, from 0; the most plausible first."""
    candidate: Candidate
    rate_factor: float = 1.0
    """Learning rate relative to the rule's (`autotune.runs.objective.finish_candidate`)."""
    seconds: float
    """Expected seconds of steps of the full training."""
    compiling_seconds: float = 0.0
    """Expected seconds that compiling its code adds to the first rung that runs it."""
    name: str = ""
    """Name of the user's candidate, in `autotune race`."""

    @property
    def code(self) -> tuple[Shape, Plan]:
        """Rivals that are alike in this run the same compiled code."""
        return self.candidate.shape, self.candidate.plan

    @property
    def kept_share(self) -> float:
        """Fraction of a rung that the next one need not train again: the level phase of `wsd`."""
        recipe = self.candidate.recipe
        return 1.0 - recipe.decay_share if recipe.schedule == "wsd" else 0.0


@dataclass(frozen=True, kw_only=True)
class Lineup:
    """What is raced, and on what it is evaluated."""

    rivals: tuple[Rival, ...]
    chunk_tokens: int
    """Validation tokens of one chunk, a multiple of every rival's block size."""
    chunks: int


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one rung showed."""

    reading: int
    """Number, from 0, in the order of time."""
    rival: int
    fraction: float
    """Length of the rung as a fraction of the full training."""
    status: Status
    message: str = ""
    iterations: int | None = None
    """Optimizer steps at the end of the rung, those of earlier rungs included."""
    tokens: int | None = None
    loss: float | None = None
    """Mean validation loss in nats; None for a rung that did not come to its end."""
    chunk_losses: tuple[float, ...] = ()
    """Losses by chunk of the validation tokens."""
    tokens_per_second: float | None = None
    tokens_per_second_ci95: float | None = None
    peak_allocated_bytes: int | None = None
    peak_device_bytes: int | None = None
    seconds: float = 0.0
    """Wall clock of the rung's process."""
    stepping_seconds: float = 0.0
    """Time of its steps; the rest of `seconds` is overhead."""
    started_at: str = ""
    """ISO 8601, UTC."""
    curve_tokens: tuple[int, ...] = ()
    curve_losses: tuple[float, ...] = ()
    """Validation losses along the way, and the tokens trained until then."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Difference of two validation losses on the same tokens, in nats."""

    nats: float
    ci95: float
    """Half width of its 95 % interval, by the spread over chunks: the noise of the validation text, not of the seed."""

    @property
    def significant(self) -> bool:
        return abs(self.nats) > self.ci95


def difference(one: Reading, other: Reading) -> Difference | None:
    """Loss of `one` minus that of `other`; None where one has no loss, or they were evaluated on different tokens."""
    pairs = list(zip(one.chunk_losses, other.chunk_losses, strict=False))
    if not pairs or len(one.chunk_losses) != len(other.chunk_losses):
        return None
    apart = [a - b for a, b in pairs]
    half = Z95 * statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.inf
    return Difference(nats=statistics.fmean(apart), ci95=half)


def interval95(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the half width of its 95 % interval by Student's distribution; None of a single value."""
    mean, freedom = statistics.fmean(values), len(values) - 1
    if freedom == 0:
        return mean, None
    if freedom == 1:
        quantile = math.tan(0.475 * math.pi)
    elif freedom == 2:
        quantile = 0.95 * math.sqrt(2.0 / (4 * 0.975 * 0.025))
    else:  # Abramowitz and Stegun 26.7.5, within 1 %
        z, v = Z95, freedom
        quantile = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        quantile += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def by_rival(readings: Sequence[Reading]) -> dict[int, list[Reading]]:
    """Readings that have a loss, by rival, shortest rung first."""
    found: dict[int, list[Reading]] = {}
    for reading in sorted(readings, key=lambda reading: reading.fraction):
        if reading.loss is not None:
            found.setdefault(reading.rival, []).append(reading)
    return found


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing in which two rivals differ, and what it alone did to the loss."""

    what: str
    before: str
    after: str
    rivals: tuple[int, ...]
    """One with `before` and one with `after`, which are otherwise alike; empty: no such pair was raced."""
    nats: float | None = None
    """Difference of the loss; negative is a gain. Without a pair that was raced: as expected after the whole training,
    from all readings of the race. None: unknown."""
    ci95: float | None = None
    fraction: float | None = None
    """Length of the rungs that were compared; None: none were."""


@dataclass(frozen=True, kw_only=True)
class RaceVerdict:
    """Outcome of a race, or its state so far."""

    rivals: tuple[Rival, ...]
    """Those that were raced."""
    readings: tuple[Reading, ...]
    """Without the losses by chunk."""
    order: tuple[int, ...]
    """Rivals, best first."""
    tied_with: tuple[int, ...] = ()
    """Rivals that cannot be distinguished from the best by the validation text."""
    against_baseline: Change | None = None
    """The winner against the baseline's recipe; as expected, where that was not raced. None: the baseline does not run,
    or is the winner."""
    changes: tuple[Change, ...] = ()
    """Each thing in which the winner's recipe differs from the baseline's."""
    seconds: float = 0.0
    """Wall clock of all rungs."""
    noise_ci95: float | None = None
    """Median half width of the 95 % interval of a difference; None with fewer than two rivals."""
    expected_loss: float | None = None
    """Loss of the first rival after its full training, on the race's validation tokens, as the posterior expects it."""
    expected_ci95: float | None = None

    @property
    def candidates(self) -> tuple[str, ...]:
        """Ids of the rivals' candidates, best first."""
        by_number = {rival.rival: rival for rival in self.rivals}
        return tuple(dict.fromkeys(by_number[number].candidate.id for number in self.order))

    def rival_of(self, candidate_id: str) -> Rival | None:
        """The best rival with a candidate; None: it was not raced, or only failed."""
        by_number = {rival.rival: rival for rival in self.rivals}
        best = (by_number[number] for number in self.order)
        return next((rival for rival in best if rival.candidate.id == candidate_id), None)

    @property
    def winner(self) -> Rival:
        return next(rival for rival in self.rivals if rival.rival == self.order[0])

    @property
    def best(self) -> Reading:
        """Longest rung of the winner."""
        return by_rival(self.readings)[self.order[0]][-1]


COLUMNS = (
    "reading", "rival", "name", "status", "fraction", "loss", "loss_ci95", "tokens", "iterations", "tokens_per_second",
    "tokens_per_second_ci95", "peak_allocated_bytes", "peak_device_bytes", "n_layer", "n_head", "n_embd", "block_size",
    "parameters", "optimizer", "learning_rate", "rate_factor", "global_batch_size", "tokens_per_step", "schedule",
    "warmup_iters", "decay_share", "weight_decay", "seed", "full_iterations", "stepping_seconds", "seconds",
    "started_at", "candidate_id", "message",
)  # fmt: skip


def row(reading: Reading, rival: Rival) -> dict[str, object]:
    """Values of races.csv by column; unknown values are None."""
    candidate = rival.candidate
    values = {
        **vars(candidate.shape), **vars(candidate.recipe), **vars(rival), **vars(reading),
        "loss_ci95": loss_ci95(reading),
        "parameters": candidate.shape.parameters,
        "tokens_per_step": candidate.recipe.tokens_per_step,
        "full_iterations": candidate.recipe.max_iters,
        "candidate_id": candidate.id,
    }  # fmt: skip
    return {column: values[column] for column in COLUMNS}


def loss_ci95(reading: Reading) -> float | None:
    """Half width of the 95 % interval of the loss by the spread over chunks; None if it is not known."""
    losses = reading.chunk_losses
    return Z95 * statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None


def write_races(path: Path, rivals: Sequence[Rival], readings: Sequence[Reading]) -> None:
    """Replace races.csv atomically, in the format of trials.csv."""
    known = {rival.rival: rival for rival in rivals}
    rows = [csv_line(map(csv_cell, row(reading, known[reading.rival]).values())) for reading in readings]
    write_atomically(path, csv_line(COLUMNS), *rows, durable=False)

"""A prediction of a candidate's peak memory from its structure, calibrated by measured trials.

The peak is the largest of a few sums (`autotune.memory.structure`) whose coefficients are normal variables. Their
priors are data (`autotune.memory.priors`); the trials of this machine move them (`autotune.memory.regression`). So an
interval is wide before calibration, and narrow where much was measured.
"""

import functools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from autotune.config.candidate import Candidate, one_of
from autotune.config.tables import read_json, read_table
from autotune.environment import STAND_IN_FINGERPRINT, Environment
from autotune.errors import ConfigError
from autotune.files import write_atomically
from autotune.measure.types import Z95, TrialResult
from autotune.memory import priors, regression
from autotune.memory.regression import Normal
from autotune.memory.structure import Arrays, arrays, keys, logits_bytes, overhead, peak_points, settled

Array = NDArray[np.float64]
T = TypeVar("T")
Measured = tuple[Arrays, float, float]
"""Sizes, the bytes of the largest sum, and their standard deviation."""

CALIBRATED = 256
"""Measured trials that move the coefficients: the latest half of them, and as many from all before."""
_REMEMBERED = 4096
"""Candidates whose sizes are kept: those of all trials are needed after each trial."""
_MEASURED = ("ok", "over_limit")
_SCATTER_WEIGHT, _SCATTER_ROUNDS = 0.1, 4
"""Trials that the priors' scatter of the overhead counts for, since most of it is between machines; and iterations."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A peak that was not measured."""

    peak_allocated_bytes: int
    peak_device_bytes: int
    """The peak as the card (or the resident size) would show it: what a limit is compared with."""
    low_device_bytes: int
    """2.5 % bound of it."""
    high_device_bytes: int
    """97.5 % bound of it."""
    half_width_allocated_bytes: int
    """Half of the 95 % interval of the allocated peak."""

    def p_within(self, limit_bytes: int) -> float:
        """Probability that the peak does not exceed a limit."""
        sd = (self.high_device_bytes - self.low_device_bytes) / (2 * Z95)
        return 0.5 * math.erfc((self.peak_device_bytes - limit_bytes) / (sd * math.sqrt(2)))


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """Coefficients that trials have moved; all others have their priors."""

    names: tuple[str, ...] = ()
    means: tuple[float, ...] = ()
    covariance: tuple[float, ...] = ()
    """Row by row."""


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """Coefficients and their uncertainty; `calibrate` makes one, `predict` reads it."""

    device: str
    """`cpu` or `cuda`."""
    fingerprint: str = ""
    """Environment of the trials; empty before calibration."""
    coefficients: Coefficients = Coefficients()
    overhead_scatter: float = 1.0
    """Scatter of the overhead in these trials, relative to that of the priors."""
    trials: int = 0
    """Measured trials behind the calibration; 0: priors only."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """Allocated peaks of the calibration, by candidate family and micro batch: for extrapolation."""

    @property
    def of_stand_in(self) -> bool:
        """Whether the trials ran where no card computes."""
        return self.fingerprint.startswith(STAND_IN_FINGERPRINT)

    @functools.cached_property
    def families(self) -> Mapping[str, Mapping[int, float]]:
        """`measured` by family, then by micro batch."""
        found: dict[str, dict[int, float]] = defaultdict(dict)
        for key, peak in self.measured.items():
            own, _, size = key.rpartition("@")
            found[own][int(size)] = peak
        return found

    @functools.cached_property
    def normal(self) -> Normal:
        """All coefficients: those that trials have moved, and the others, which follow by their correlation."""
        known, moved = priors.normal(self.device), self.coefficients
        if not moved.names:
            return known
        place = {name: i for i, name in enumerate(priors.of(self.device).coefficients)}
        held, count = np.array([place[name] for name in moved.names], dtype=np.intp), len(moved.names)
        new = Normal(means=np.array(moved.means), covariance=np.reshape(moved.covariance, (count, count)))
        return known.moved(held, new)


def calibrate(
    device: str, trials: Iterable[tuple[Candidate, TrialResult]], environment: Environment | None = None
) -> MemoryModel:
    """The priors, moved to what `trials` measured; trials without a measured peak are left out."""
    every = [(c, r, float(peak)) for c, r in trials if r.status in _MEASURED and (peak := r.peak("allocated_bytes"))]
    data = _bounded(every)
    wholes = [(c, peak, whole) for c, r, peak in data if (whole := r.peak("device_bytes")) is not None]
    known = [(_sizes(c, device)[0], peak, _noise(c, device, peak)) for c, _, peak in data]
    beyond = [(_sizes(c, device)[1], whole - peak, _overhead_noise(c, device, peak)) for c, peak, whole in wholes]
    scatter = _scatter(device, beyond)
    return MemoryModel(
        device=device,
        fingerprint=environment.fingerprint if environment else "",
        coefficients=_moved(device, [*known, *((rows, bytes_, scatter * sd) for rows, bytes_, sd in beyond)]),
        overhead_scatter=scatter,
        trials=len(every),
        measured={f"{family(c)}@{c.plan.micro_batch_size}": peak for c, _, peak in every},
    )


def _scatter(device: str, measured: Sequence[Measured]) -> float:
    """Scatter of the overhead within one machine, whose own overhead the same trials tell: residuals over their
    standard deviations, less what fitting takes from them. The prior, 1, counts for _SCATTER_WEIGHT trials."""
    scatter = 1.0
    if not measured:
        return scatter
    held, exact, sizes, seen, sd = _columns(measured)
    for _ in range(_SCATTER_ROUNDS):
        found = regression.fit(priors.normal(device).part(held), exact, sizes, seen, scatter * sd)
        expected, unsure = regression.largest(found, exact, sizes)
        free = len(seen) - float(((unsure / (scatter * sd)) ** 2).sum())
        squares = float((((seen - expected) / sd) ** 2).sum())
        scatter = math.sqrt((_SCATTER_WEIGHT + squares) / (_SCATTER_WEIGHT + free))
    return scatter


def _bounded(every: list[T]) -> list[T]:
    """At most CALIBRATED of them, so that the cost of calibrating is bounded."""
    if len(every) <= CALIBRATED:
        return every
    before, latest = every[: -CALIBRATED // 2], every[-CALIBRATED // 2 :]
    wanted = min(len(before), CALIBRATED // 2)
    return [before[i * len(before) // wanted] for i in range(wanted)] + latest


def _columns(measured: Sequence[Measured]) -> tuple[NDArray[np.intp], Array, Array, Array, Array]:
    """The coefficients that n measurements involve; exact bytes (n, points), sizes (n, points, held), measured bytes
    (n,) and their standard deviations (n,)."""
    exact, sizes = (np.array([rows[i] for rows, _, _ in measured]) for i in (0, 1))  # (n, points), (n, points, keys)
    held = np.flatnonzero(sizes.any((0, 1)))
    seen, sd = np.array([(peak, sd) for _, peak, sd in measured]).T
    return held, exact, sizes[:, :, held], seen, sd


def _moved(device: str, measured: Sequence[Measured]) -> Coefficients:
    """The coefficients that these measurements involve."""
    if not measured:
        return Coefficients()
    held, *columns = _columns(measured)
    found, known = regression.fit(priors.normal(device).part(held), *columns), list(priors.of(device).coefficients)
    return Coefficients(
        names=tuple(known[i] for i in held),
        means=tuple(found.means.tolist()),
        covariance=tuple(found.covariance.ravel().tolist()),
    )


@functools.lru_cache(maxsize=_REMEMBERED)
def _sizes(candidate: Candidate, device: str) -> tuple[Arrays, Arrays]:
    """Sizes of the allocated bytes, and of the overhead."""
    return arrays(peak_points(candidate, device), device), arrays([overhead(candidate, device)], device)


def _noise(candidate: Candidate, device: str, peak: float) -> float:
    """Standard deviation of a measured allocated peak around the structure's, in bytes."""
    noise = priors.of(device).noise
    return peak * (noise.peak if settled(candidate.plan) else noise.unsettled)


def _overhead_noise(candidate: Candidate, device: str, allocated: float) -> float:
    """Standard deviation of the overhead in bytes: fragmentation is not modelled."""
    noise = priors.of(device).noise
    base = allocated if device == "cpu" else logits_bytes(candidate)
    return math.hypot(noise.overhead_bytes, noise.overhead_share * base)


def predict(model: MemoryModel, candidate: Candidate) -> Prediction:
    """The peak of `candidate`, with its interval."""
    return predictions(model, [candidate])[0]


def predictions(model: MemoryModel, candidates: Sequence[Candidate]) -> list[Prediction]:
    """The peaks of `candidates`, with their intervals.

    Where two or more micro batches of the same shape and plan were measured, the peak is extrapolated from the
    two nearest (memory is affine in the micro batch); otherwise it comes from the structure.
    """
    rows = [_sizes(candidate, model.device) for candidate in candidates]
    exact, sizes = (np.array([row[which][i] for which in (0, 1) for row in rows]) for i in (0, 1))
    totals, sds = (part.reshape(2, -1).tolist() for part in regression.largest(model.normal, exact, sizes))
    numbers = zip(candidates, totals[0], sds[0], totals[1], sds[1], strict=True)
    return [_prediction(model, *each) for each in numbers]


def _prediction(
    model: MemoryModel, candidate: Candidate, total: float, unsure: float, beyond: float, scatter: float
) -> Prediction:
    """From the structure's bytes and the overhead, each with its standard deviation."""
    structure = total, math.hypot(unsure, _noise(candidate, model.device, total))
    allocated, sd = _from_neighbours(model, candidate) or structure
    device, noise = allocated + beyond, model.overhead_scatter * _overhead_noise(candidate, model.device, allocated)
    spread = Z95 * math.hypot(sd, scatter, noise)
    return Prediction(
        peak_allocated_bytes=round(allocated),
        peak_device_bytes=round(device),
        low_device_bytes=round(device - spread),
        high_device_bytes=round(device + spread),
        half_width_allocated_bytes=round(Z95 * sd),
    )


@functools.lru_cache(maxsize=_REMEMBERED)
def family(candidate: Candidate) -> str:
    """Equal for candidates that differ only in the micro batch, and both accumulate or both do not."""
    several = candidate.gradient_accumulation_steps > 1
    recipe = replace(candidate.recipe, global_batch_size=(1 + several) * candidate.plan.processes)
    return Candidate(recipe=recipe, plan=replace(candidate.plan, micro_batch_size=1)).id


def _from_neighbours(model: MemoryModel, candidate: Candidate) -> tuple[float, float] | None:
    """Allocated bytes and their standard deviation from other micro batches of the same family."""
    known, noise = model.families.get(family(candidate), {}), priors.of(model.device).noise.peak
    size = candidate.plan.micro_batch_size
    if size in known:
        return known[size], noise / 6 * known[size]
    if len(known) < 2:
        return None
    near, far = sorted(known, key=lambda other: abs(other - size))[:2]
    slope = (known[far] - known[near]) / (far - near)
    allocated = known[near] + slope * (size - near)
    # another peak point may take over further out: uncertainty grows with the distance
    return allocated, allocated * noise * (0.5 + abs(size - near) / max(near, far))


def save(model: MemoryModel, path: Path) -> None:
    write_atomically(path, json.dumps(asdict(model), indent=1) + "\n")


_LARGEST_FIGURE = 1e18
"""In a file: products of three of them are finite."""


def load(path: Path) -> MemoryModel:
    """Raises ConfigError for a file that is missing or not a memory model."""
    advice = "give a run, or the memory_model.json that a search writes"
    model = read_table(MemoryModel, read_json(path, advice), path.name)
    one_of(f"{path.name}.device", model.device, ("cpu", "cuda"))
    known = model.coefficients
    count, figures = len(known.names), (*known.means, *known.covariance, model.overhead_scatter)
    priors.check_names(f"{path.name}.coefficients", known.names, [str(key) for key in keys(model.device)])
    if (len(known.means), len(known.covariance)) != (count, count**2) or len(set(known.names)) != count:
        raise ConfigError(f"{path} is damaged: coefficients lack one mean and one row of covariance per name; {advice}")
    if any(abs(figure) > _LARGEST_FIGURE for figure in figures):
        raise ConfigError(f"{path} is damaged: coefficients have a figure beyond {_LARGEST_FIGURE:.0e}; {advice}")
    if any(abs(peak) > _LARGEST_FIGURE for peak in model.measured.values()):
        raise ConfigError(f"{path} is damaged: measured has a peak beyond {_LARGEST_FIGURE:.0e}; {advice}")
    return model

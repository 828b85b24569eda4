"""How fast a candidate is, from all its measurements: one estimate with an interval that holds for the next process.

Processes of one candidate differ in speed (by 2 to 4 % on the CPU) by more than steps within one process do. The
largest of many noisy figures is therefore too large, which is known as the winner's curse. Two things correct it: the
variance between processes, pooled over all candidates that were measured more than once, is part of every interval;
and each estimate is shrunk towards what the other candidates make the speed model expect (empirical Bayes; Efron and
Morris, Stein's Paradox in Statistics, 1977).
"""

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from autotune.config.search import SearchSettings
from autotune.runs.objective import maximised, score
from autotune.runs.records import TrialRecord
from autotune.runs.verdict import Z95, Speed
from autotune.search.sampler import expected_speeds

NOISY = 0.05
"""Relative half width of a 95 % interval beyond which a figure is not settled."""

DISAGREEMENT = 0.15
"""Difference in log speed between two measurements of one candidate that is no noise: something disturbed one."""

_PROCESS_SD = {"cpu": 0.025, "cuda": 0.005}
"""Standard deviation of log speed between processes before a run has repeated anything. CPU: two candidates, four fresh
processes each, spread by 2.6 and 3.1 % (8,405 to 8,948 and 12,860 to 13,669 tokens/s), less what is noise within
one process. CUDA: an assumption; no card was measured."""
_PROCESS_WEIGHT = 4.0
"""Repeats that `_PROCESS_SD` counts for."""
_MODEL_WORTH = 4.0
"""The speed model counts for at most so many measurements."""
_LEADERS = 64
"""The speed model is fitted to so many of the best candidates."""


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """Log speed of a candidate with its standard error."""

    mean: float
    se: float
    count: int


def estimate_speeds(records: Sequence[TrialRecord], settings: SearchSettings) -> dict[str, Speed]:
    """The speed of every feasible candidate, by its id. Candidates far from the best are not shrunk: nothing is
    chosen among them. The same records are asked about several times between two trials, and estimated once."""
    return _estimated(_Identical((*records, settings)))


class _Identical(tuple[Any, ...]):
    """Equal to a tuple of the very same objects; comparing what frozen records hold would cost more than it saves."""

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(tuple(map(id, self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identical) and list(map(id, self)) == list(map(id, other))


@functools.lru_cache(maxsize=2)
def _estimated(asked: _Identical) -> dict[str, Speed]:
    *records, settings = asked
    groups: dict[str, list[TrialRecord]] = {}
    for record in records:
        if record.objective is not None and record.result.tokens_per_second:
            groups.setdefault(record.candidate.id, []).append(record)
    groups = {name: _undisturbed(group) for name, group in groups.items()}
    process_sd = pooled_process_sd(list(groups.values()), settings.device.partition(":")[0])
    measured = {name: _combined(group, process_sd) for name, group in groups.items()}
    sign = -1.0 if maximised(settings) else 1.0
    objective = {n: score(settings, group[0].candidate, math.exp(measured[n].mean)) for n, group in groups.items()}
    leaders = sorted(groups, key=lambda name: sign * objective[name])[:_LEADERS]
    merged = [_as_one(groups[name][0], measured[name], objective[name]) for name in leaders]
    expected = expected_speeds(merged, settings)
    speeds = {name: _speed(found, None, process_sd) for name, found in measured.items()}
    for name, prior in zip(leaders, expected, strict=True):
        kept = _believable(groups[name], prior)
        if disagreement(kept) is None:
            speeds[name] = _speed(_combined(kept, process_sd), prior, process_sd)
    return speeds


def _as_one(record: TrialRecord, found: _Measured, objective: float) -> TrialRecord:
    """A record that says what all measurements of its candidate say together."""
    result = replace(record.result, tokens_per_second=math.exp(found.mean))
    return replace(record, result=result, objective=objective)


def _believable(group: Sequence[TrialRecord], prior: tuple[float, float]) -> list[TrialRecord]:
    """Where measurements contradict each other, those that the speed model expects; all of them if it expects none."""
    if disagreement(group) is None:
        return list(group)
    kept = [r for r, value in zip(group, _logs(group), strict=True) if abs(value - prior[0]) <= Z95 * prior[1]]
    return kept or list(group)


def pooled_process_sd(groups: Sequence[Sequence[TrialRecord]], device_kind: str) -> float:
    """Standard deviation of log speed between processes: from the repeats within each group, less the noise within
    a process, and a prior."""
    squares, repeats = _PROCESS_WEIGHT * _PROCESS_SD[device_kind] ** 2, _PROCESS_WEIGHT
    for group in groups:
        logs = _logs(group)
        if len(logs) < 2 or disagreement(group) is not None:
            continue
        within = statistics.fmean(_relative_se(record) ** 2 for record in group)
        mean = statistics.fmean(logs)
        squares += max(0.0, sum((value - mean) ** 2 for value in logs) - (len(logs) - 1) * within)
        repeats += len(logs) - 1
    return math.sqrt(squares / repeats)


def disagreement(records: Sequence[TrialRecord]) -> float | None:
    """Slowest over fastest measurement of one candidate, where they differ by more than noise; else None."""
    logs = _logs(records)
    return math.exp(min(logs) - max(logs)) if logs and max(logs) - min(logs) > DISAGREEMENT else None


def _combined(group: Sequence[TrialRecord], process_sd: float) -> _Measured:
    """Mean of log speeds, each weighted by its precision. Two that disagree: the faster one, as a disturbance only
    slows down, with an interval that holds both."""
    logs, weights = _logs(group), [1.0 / (process_sd**2 + _relative_se(record) ** 2) for record in group]
    if disagreement(group) is not None:
        return _Measured(mean=max(logs), se=(max(logs) - min(logs)) / Z95, count=len(group))
    mean = sum(weight * value for weight, value in zip(weights, logs, strict=True)) / sum(weights)
    return _Measured(mean=mean, se=sum(weights) ** -0.5, count=len(group))


def _undisturbed(group: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The measurements that agree with the median. Of two that disagree neither can be blamed."""
    if len(group) < 3:
        return list(group)
    middle = statistics.median(_logs(group))
    kept = [r for r, value in zip(group, _logs(group), strict=True) if abs(value - middle) <= DISAGREEMENT]
    return kept or list(group)


def _logs(records: Sequence[TrialRecord]) -> list[float]:
    return [math.log(r.result.tokens_per_second) for r in records if r.result.tokens_per_second]


def _relative_se(record: TrialRecord) -> float:
    """Standard error within the process, as a fraction of the speed."""
    speed = record.result.tokens_per_second or 1.0
    return (record.result.tokens_per_second_ci95 or 0.0) / (Z95 * speed)


def _speed(found: _Measured, prior: tuple[float, float] | None, process_sd: float) -> Speed:
    """`found`, shrunk towards the mean of `prior` (mean and standard deviation that the log of a
    measured speed should have)."""
    mean, se = found.mean, found.se
    if prior is not None:
        sd = math.sqrt(max(prior[1] ** 2 - process_sd**2, process_sd**2 / _MODEL_WORTH))  # the model's own error
        weight = 1.0 / (1.0 + (se / sd) ** 2)
        mean, se = prior[0] + weight * (mean - prior[0]), math.sqrt(weight) * se
    speed = math.exp(mean)
    return Speed(tokens_per_second=speed, ci95=Z95 * se * speed, process_sd=process_sd, measurements=found.count)


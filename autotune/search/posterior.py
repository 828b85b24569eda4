"""Speed of a candidate from all its measurements: one estimate, with an interval that holds for the next process.

Processes of one candidate differ in speed (by 2 to 4 % on the CPU) by more than steps within one process do, so the
largest of many noisy figures is biased upwards (the winner's curse). Two corrections: the variance between processes,
pooled over all candidates measured more than once, is part of every interval; and each estimate is shrunk towards the
prediction of the speed model (empirical Bayes; Efron and Morris, Stein's Paradox in Statistics, 1977).
"""

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from autotune.config.search_settings import SearchSettings
from autotune.measure.types import Z95
from autotune.runs.objective import maximised, score
from autotune.runs.records import TrialRecord
from autotune.runs.verdict import Speed
from autotune.search.outliers import expected_speeds

NOISY = 0.05
"""Relative half width of a 95 % interval beyond which a figure is not settled."""

DISAGREEMENT = 0.15
"""Difference in log speed of two measurements of one candidate that is no noise: something disturbed one."""

_PROCESS_SD = {"cpu": 0.025, "cuda": 0.005}
"""Prior standard deviation of log speed between processes. CPU: two candidates, four fresh processes each, spread by
2.6 and 3.1 % (8,405 to 8,948 and 12,860 to 13,669 tokens/s), less the noise within one process. CUDA: an assumption;
no card was measured."""
_PROCESS_WEIGHT = 4.0
"""Weight of `_PROCESS_SD` in repeated measurements."""
_MODEL_WEIGHT = 4.0
"""Weight of the speed model in measurements, at most."""
_LEADERS = 64
"""Number of the best candidates to which the speed model is fitted, and which are shrunk."""


@dataclass(frozen=True, kw_only=True)
class _Mean:
    """Mean log speed of a candidate with its standard error."""

    value: float
    se: float
    count: int


def group_by_candidate(records: Sequence[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """Feasible records by candidate id."""
    groups: dict[str, list[TrialRecord]] = {}
    for record in records:
        if record.objective is not None and record.result.tokens_per_second:
            groups.setdefault(record.candidate.id, []).append(record)
    return groups


def estimate_speeds(records: Sequence[TrialRecord], settings: SearchSettings) -> dict[str, Speed]:
    """Speed of every feasible candidate, by its id. Candidates far from the best are not shrunk: no decision depends
    on them. Cached, since several callers need the estimates of the same records between two trials."""
    return _estimated(_Identical((*records, settings)))


class _Identical(tuple[Any, ...]):
    """Tuple compared by the identity of its items; comparing the contents of records would cost more than it saves."""

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(tuple(map(id, self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identical) and list(map(id, self)) == list(map(id, other))


@functools.lru_cache(maxsize=2)
def _estimated(key: _Identical) -> dict[str, Speed]:
    *records, settings = key
    groups = {name: _undisturbed(group) for name, group in group_by_candidate(records).items()}
    process_sd = pooled_process_sd(list(groups.values()), settings.device_kind)
    means = {name: _combined(group, process_sd) for name, group in groups.items()}
    sign = -1.0 if maximised(settings) else 1.0
    objective = {n: score(settings, group[0].candidate, math.exp(means[n].value)) for n, group in groups.items()}
    same_recipe = [name for name, group in groups.items() if all(record.role != "race" for record in group)]
    leaders = sorted(same_recipe, key=lambda name: sign * objective[name])[:_LEADERS]
    merged = [_merged(groups[name][0], means[name], objective[name]) for name in leaders]
    expected = expected_speeds(merged, settings)
    speeds = {name: _speed(mean, None, process_sd) for name, mean in means.items()}
    for name, prior in zip(leaders, expected, strict=True):
        kept = _plausible(groups[name], prior)
        if disagreement(kept) is None:
            speeds[name] = _speed(_combined(kept, process_sd), prior, process_sd)
    return speeds


def _merged(record: TrialRecord, mean: _Mean, objective: float) -> TrialRecord:
    """One record with the combined speed of all measurements of its candidate."""
    result = replace(record.result, tokens_per_second=math.exp(mean.value))
    return replace(record, result=result, objective=objective)


def _plausible(group: Sequence[TrialRecord], prior: tuple[float, float]) -> list[TrialRecord]:
    """Contradicting measurements within the speed model's 95 % interval; all of them if none is."""
    if disagreement(group) is None:
        return list(group)
    kept = [r for r, value in zip(group, _logs(group), strict=True) if abs(value - prior[0]) <= Z95 * prior[1]]
    return kept or list(group)


def pooled_process_sd(groups: Sequence[Sequence[TrialRecord]], device_kind: str) -> float:
    """Standard deviation of log speed between processes: from the repeats within each group, less the noise within
    a process, pooled with the prior."""
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
    """Slowest over fastest measurement of one candidate if they differ by more than noise, else None."""
    logs = _logs(records)
    return math.exp(min(logs) - max(logs)) if logs and max(logs) - min(logs) > DISAGREEMENT else None


def _combined(group: Sequence[TrialRecord], process_sd: float) -> _Mean:
    """Precision-weighted mean of log speeds. Of contradicting ones the fastest, as a disturbance can only slow down,
    with an interval that contains all."""
    logs, weights = _logs(group), [1.0 / (process_sd**2 + _relative_se(record) ** 2) for record in group]
    if disagreement(group) is not None:
        return _Mean(value=max(logs), se=(max(logs) - min(logs)) / Z95, count=len(group))
    mean = sum(weight * value for weight, value in zip(weights, logs, strict=True)) / sum(weights)
    return _Mean(value=mean, se=sum(weights) ** -0.5, count=len(group))


def _undisturbed(group: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Measurements that agree with the median; all of fewer than three, where the median singles out none."""
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


def _speed(mean: _Mean, prior: tuple[float, float] | None, process_sd: float) -> Speed:
    """`mean` shrunk towards `prior`: the model's mean and standard deviation of the log of a measured speed."""
    value, se = mean.value, mean.se
    if prior is not None:
        sd = math.sqrt(max(prior[1] ** 2 - process_sd**2, process_sd**2 / _MODEL_WEIGHT))  # the model's own error
        weight = 1.0 / (1.0 + (se / sd) ** 2)
        value, se = prior[0] + weight * (value - prior[0]), math.sqrt(weight) * se
    speed = math.exp(value)
    return Speed(tokens_per_second=speed, ci95=Z95 * se * speed, process_sd=process_sd, measurements=mean.count)

"""Trials that were probably disturbed: far slower than all others make the speed model expect."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from autotune.config.search_settings import SearchSettings
from autotune.runs.objective import best_first, maximised, score
from autotune.runs.records import TrialRecord
from autotune.search import acquisition, gp
from autotune.search.features import NAMES, categorical, encode, value_of
from autotune.search.gp import Array

_OUTLIER_SD = 2.0
"""Standard deviations below the expected speed from which a trial may have been disturbed."""


def suspected_outliers(
    names: Iterable[str], records: Sequence[TrialRecord], settings: SearchSettings
) -> list[TrialRecord]:
    """Trials that would be the best of all at the speed that all others make the model expect, the best first. Another
    program that takes the device for as long as a trial is timed leaves no other trace."""
    timed = [record for record in records if record.objective is not None and record.result.tokens_per_second]
    if not timed:
        return []
    sign = 1.0 if maximised(settings) else -1.0
    mean, sd = _leave_one_out(tuple(names), timed, settings)
    residuals = _log_speeds(timed) - mean
    likely = np.exp(mean + sd).tolist()
    best = max(sign * (record.objective or 0.0) for record in timed)
    slow = np.flatnonzero(residuals < -_OUTLIER_SD * sd)
    objective = {i: sign * score(settings, timed[i].candidate, likely[i]) for i in slow}
    return [timed[i] for i in sorted(objective, key=lambda i: -objective[i]) if objective[i] > best]


def expected_speeds(records: Sequence[TrialRecord], settings: SearchSettings) -> list[tuple[float, float]]:
    """Mean and standard deviation of each record's log speed as all others make the model expect it. Where the records
    do not differ, or are too few, nothing can be learned: the speed itself, with an infinite deviation."""
    candidates = [record.candidate for record in records]
    names = tuple(name for name in NAMES if len({value_of(candidate, name) for candidate in candidates}) > 1)
    if len(records) < 3 or not names:
        return [(value, math.inf) for value in _log_speeds(records).tolist()]
    mean, sd = _leave_one_out(names, records, settings)
    return list(zip(mean.tolist(), sd.tolist(), strict=True))


def _leave_one_out(
    names: tuple[str, ...], timed: Sequence[TrialRecord], settings: SearchSettings
) -> tuple[Array, Array]:
    """Mean (m,) and standard deviation (m,) of each log speed given all others. Trials that the process is not fitted
    to are predicted."""
    features = encode([record.candidate for record in timed], names, settings.device_kind)
    words, answers = categorical(names, timed[0].candidate), _log_speeds(timed)
    place = {id(record): i for i, record in enumerate(timed)}
    ranked = [place[id(record)] for record in best_first(timed, maximised(settings))]
    fitted = np.zeros(len(timed), dtype=bool)
    fitted[acquisition.subset(ranked, len(timed))] = True
    residuals = answers - features.prior[:, 0]
    residuals -= np.median(residuals[fitted])
    process = gp.fit(features.parameters[fitted], words, residuals[fitted])
    above, sd = np.empty(len(timed)), np.empty(len(timed))
    above[fitted], sd[fitted] = gp.leave_one_out(process)
    if not fitted.all():
        mean, deviation = gp.predict(process, words, gp.points(features.parameters[~fitted]))
        above[~fitted], sd[~fitted] = residuals[~fitted] - mean, np.hypot(deviation, gp.noise_sd(process))
    return answers - above, sd


def _log_speeds(records: Sequence[TrialRecord]) -> Array:
    return np.log([record.result.tokens_per_second or 1.0 for record in records])

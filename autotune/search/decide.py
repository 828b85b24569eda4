"""Who won: estimates from all measurements of a candidate, ties named as ties, unreliable figures named as such."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from autotune.config.search_settings import SearchSettings
from autotune.runs.objective import best_first, interval, maximised, score
from autotune.runs.records import TrialRecord
from autotune.runs.verdict import Speed, Verdict
from autotune.search.posterior import DISAGREEMENT, NOISY, disagreement, estimate_speeds, group_by_candidate

FINALISTS = 3
"""Candidates that are confirmed before the verdict, besides the baseline."""

MOST_CONFIRMATIONS = 4
"""Confirmations per finalist at most, while its figure stays unsettled."""

DRIFT = 0.05
"""Relative change of the machine's speed beyond which trials are ranked by their drift-corrected objective."""


def searched(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Feasible trials of the search itself: neither confirmations nor rungs of its race."""
    return [record for record in records if record.role not in ("race", "final") and record.objective is not None]


def _finals(records: Sequence[TrialRecord]) -> dict[str, TrialRecord]:
    """Last confirmation of each candidate, by candidate id; one that the budget interrupted says nothing."""
    finals = (record for record in records if record.role == "final" and record.result.status != "interrupted")
    return {record.candidate.id: record for record in finals}


def _baseline(records: Sequence[TrialRecord]) -> TrialRecord | None:
    return next((record for record in searched(records) if record.role == "baseline"), None)


def _baseline_measured(records: Sequence[TrialRecord]) -> TrialRecord | None:
    """Last successful measurement of the baseline, a confirmation if possible; else the last attempt."""
    ids = {record.candidate.id for record in records if record.role == "baseline"}
    measured = (record for record in records if record.candidate.id in ids and record.role in ("baseline", "final"))
    return max(measured, key=lambda r: (r.result.status == "ok", r.role == "final", r.trial), default=None)


def _failed(finals: Iterable[TrialRecord]) -> set[str]:
    """Ids of candidates whose confirmation failed; an exhausted budget is not a failure."""
    return {record.candidate.id for record in finals if record.result.status not in ("ok", "interrupted")}


def drift_corrected(records: Sequence[TrialRecord], settings: SearchSettings) -> list[TrialRecord]:
    """The records; if the machine has drifted by more than DRIFT, with the drift divided out of their tokens/s.

    Drift is measured by the baseline's confirmation and assumed to grow linearly with the trial number.
    """
    finals = _finals(records)
    drift, first = _drift(searched(records), finals), _baseline(records)
    if drift is None or first is None or abs(drift - 1.0) <= DRIFT:
        return list(records)
    lasted = finals[first.candidate.id].trial - first.trial

    def corrected(record: TrialRecord) -> TrialRecord:
        speed = record.result.tokens_per_second
        if speed is None or record.objective is None:
            return record
        speed /= 1.0 + (drift - 1.0) * min(1.0, (record.trial - first.trial) / lasted)
        result = replace(record.result, tokens_per_second=speed)
        return replace(record, result=result, objective=score(settings, record.candidate, speed))

    return [corrected(record) for record in records]


def unconfirmed(
    records: Sequence[TrialRecord], settings: SearchSettings, elected: Sequence[str] = ()
) -> list[TrialRecord]:
    """Finalists that still need a confirmation, most urgent first.

    The best one leads, then the baseline, whose drift may reorder the others. The next best replaces a finalist whose
    confirmation failed. Those that were confirmed but are not settled come last. `elected`: ids of the candidates that
    a race prefers, of which the first is the only finalist beside the baseline.
    """
    finals = [record for record in records if record.role == "final"]
    failed = _failed(finals)
    corrected = drift_corrected(records, settings)
    speeds = estimate_speeds(corrected, settings)
    ranked = _ranked(searched(corrected), speeds, settings)
    ranked = [record for record in ranked if record.candidate.id not in failed]
    baseline = [record for record in ranked if record.role == "baseline"]
    if elected:
        ranked = [record for record in raced(records, elected) if record.candidate.id not in failed][:1]
    wanted = {record.candidate.id: record for record in (*ranked[:1], *baseline, *ranked[1:FINALISTS])}
    times = {name: sum(r.candidate.id == name and r.objective is not None for r in finals) for name in wanted}
    settled = _settled(corrected, speeds)
    unsettled = [name for name in wanted if 0 < times[name] < MOST_CONFIRMATIONS and name not in settled]
    return [wanted[name] for name in (*(name for name in wanted if not times[name]), *unsettled)]


def raced(records: Sequence[TrialRecord], elected: Sequence[str]) -> list[TrialRecord]:
    """Feasible measurements of a race's candidates, in the order of their ids in `elected`."""
    ran = (record for record in records if record.role == "race" and record.objective is not None)
    by_id = {record.candidate.id: record for record in ran}
    return [by_id[name] for name in elected if name in by_id]


def decide(records: Sequence[TrialRecord], settings: SearchSettings, elected: Sequence[str] = ()) -> Verdict:
    """Winner, estimates, ranking and status over all records so far; `conclude` adds the rest of the verdict.
    `elected`: ids of the candidates that a race prefers, best first; empty: the objective decides."""
    corrected, finals = drift_corrected(records, settings), _finals(records)
    speeds, failed = estimate_speeds(corrected, settings), _failed(finals.values())
    search, settled = _ranked(searched(records), speeds, settings), _settled(corrected, speeds)
    cautious = {name: speed if name in settled else _lowest(speed, finals.get(name)) for name, speed in speeds.items()}
    confirmed = _ranked([record for record in finals.values() if record.objective is not None], cautious, settings)
    if rivals_first := raced(records, elected):
        search = rivals_first
        confirmed = [final for r in search if (final := finals.get(r.candidate.id)) and final.objective is not None][:1]
    pool = confirmed or [record for record in search if record.candidate.id not in failed]
    ranking, first = [record.trial for record in best_first(corrected, maximised(settings))], _baseline(records)
    drift = _drift(searched(records), finals)
    drifted = corrected != list(records)
    pace = drift if drift is not None and drifted else 1.0
    verdict = Verdict(
        baseline=_baseline_measured(records),
        baseline_speed=_scaled(speeds[first.candidate.id], pace) if first is not None else None,
        drift=drift,
        drift_corrected={str(r.trial): r.objective for r in corrected if drifted and r.objective is not None},
        ranking=tuple(ranking),
        notes=tuple(_contradictions(records).values()),
    )
    if not pool:
        return verdict
    rivals = [record for record in pool[1:] if record.candidate.id in settled]
    tied = _tied(pool[0], rivals, speeds, settings) if confirmed else []
    winner = min((pool[0], *tied), key=_memory)
    better = search[: 1 + max((i for i, r in enumerate(search) if r.candidate.id == pool[0].candidate.id), default=-1)]
    unsettled = _unsettled(winner, records, speeds, settled) if confirmed else ""
    return replace(
        verdict,
        status="not confirmed" if not confirmed else "not settled" if unsettled else "confirmed",
        winner=winner,
        speed=_scaled(speeds[winner.candidate.id], pace),
        unsettled=unsettled,
        tied_with=tuple(record.trial for record in (pool[0], *tied) if record is not winner),
        fell_through=tuple(record.trial for record in better if record.candidate.id in failed),
        ranking=(winner.trial, *(trial for trial in ranking if trial != winner.trial)),
    )


def _scaled(speed: Speed, factor: float) -> Speed:
    return replace(speed, tokens_per_second=speed.tokens_per_second * factor, ci95=speed.ci95 * factor)


def _ranked(
    records: Sequence[TrialRecord], speeds: Mapping[str, Speed], settings: SearchSettings
) -> list[TrialRecord]:
    """Feasible records by estimated objective, best first; equal ones by trial number."""
    sign = -1.0 if maximised(settings) else 1.0

    def key(record: TrialRecord) -> tuple[float, int]:
        return sign * score(settings, record.candidate, speeds[record.candidate.id].tokens_per_second), record.trial

    return sorted(records, key=key)


def _tied(
    leader: TrialRecord, rivals: Sequence[TrialRecord], speeds: Mapping[str, Speed], settings: SearchSettings
) -> list[TrialRecord]:
    """Rivals whose difference from the leader lies within the 95 % interval of the difference."""

    def estimate(record: TrialRecord) -> tuple[float, float]:
        speed = speeds[record.candidate.id]
        low, high = interval(settings, record.candidate, speed.tokens_per_second, speed.ci95)
        return score(settings, record.candidate, speed.tokens_per_second), (high - low) / 2

    best, best_half = estimate(leader)
    estimates = [(record, *estimate(record)) for record in rivals]
    return [record for record, value, half in estimates if abs(value - best) <= math.hypot(half, best_half)]


def _lowest(speed: Speed, final: TrialRecord | None) -> Speed:
    """Conservative estimate of an unsettled candidate: lower end of the interval, or the confirmation if lower."""
    low = speed.tokens_per_second * math.exp(-speed.relative_ci95)
    confirmed = final.result.tokens_per_second if final is not None else None
    return replace(speed, tokens_per_second=min(low, confirmed or low))


def _settled(records: Sequence[TrialRecord], speeds: Mapping[str, Speed]) -> set[str]:
    """Ids of candidates whose figure is reliable: the estimate has a narrow interval, and so has one confirmation,
    which agrees with the estimate."""

    def agrees(final: TrialRecord) -> bool:
        speed, estimate = final.result.tokens_per_second, speeds[final.candidate.id]
        if not speed or (final.result.tokens_per_second_ci95 or 0.0) > NOISY * speed:
            return False
        return estimate.relative_ci95 <= NOISY and abs(math.log(speed / estimate.tokens_per_second)) <= DISAGREEMENT

    finals = [record for record in records if record.role == "final" and record.objective is not None]
    return {final.candidate.id for final in finals if agrees(final)}


def _contradictions(records: Sequence[TrialRecord]) -> dict[str, str]:
    """One line for each candidate whose measurements contradict each other, by candidate id."""
    notes = {}
    for name, group in group_by_candidate(records).items():
        if disagreement(group) is not None:
            speeds = [record.result.tokens_per_second or 0.0 for record in group]
            *others, last = (str(record.trial) for record in group)
            notes[name] = (
                f"trials {', '.join(others)} and {last} measured {min(speeds):,.0f} to {max(speeds):,.0f} tokens/s "
                "of one candidate: something disturbed one of them"
            )
    return notes


def _unsettled(
    winner: TrialRecord, records: Sequence[TrialRecord], speeds: Mapping[str, Speed], settled: set[str]
) -> str:
    """Why the confirmed winner may be slower than stated, or not the best; empty if there is no reason."""
    estimate, contradictions = speeds[winner.candidate.id], _contradictions(records)
    if winner.candidate.id not in settled:
        half, speed = winner.result.tokens_per_second_ci95 or 0.0, winner.result.tokens_per_second or 1.0
        width = max(estimate.relative_ci95, half / speed)
        times = f"{estimate.measurements} measurement{'s' if estimate.measurements > 1 else ''}"
        wide = f"its tokens/s are known to ±{width:.0%} only, after {times}"
        return f"{contradictions.get(winner.candidate.id, wide)}; search again on a quiet machine"
    for record in searched(records):
        name, speed = record.candidate.id, record.result.tokens_per_second or 0.0
        if name in contradictions and name not in settled and speed > estimate.tokens_per_second:
            return f"trial {record.trial} may be faster: {contradictions[name]}"
    return ""


def _memory(record: TrialRecord) -> tuple[float, int]:
    """Sort key: peak bytes, then trial number. Trials of one run know the same views."""
    peak = record.result.peak_bytes
    return math.inf if peak is None else peak, record.trial


def _drift(search: Sequence[TrialRecord], finals: Mapping[str, TrialRecord]) -> float | None:
    """Tokens/s of the baseline's confirmation over those of its trial; None if the intervals overlap."""
    first = _baseline(search)
    again = finals.get(first.candidate.id) if first is not None else None
    if first is None or again is None or again.objective is None:
        return None
    before, after = (record.result.tokens_per_second or 0.0 for record in (first, again))
    within = sum(record.result.tokens_per_second_ci95 or 0.0 for record in (first, again))
    return after / before if abs(after - before) > within else None

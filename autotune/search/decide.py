"""Who won: by all measurements of a candidate, ties called ties, and what is not settled called so."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from autotune.config.search import SearchSettings
from autotune.runs.objective import interval, maximised, score
from autotune.runs.records import TrialRecord
from autotune.runs.verdict import Speed, Verdict
from autotune.search.posterior import DISAGREEMENT, NOISY, disagreement, estimate_speeds

FINALISTS = 3
"""Candidates that are run again, besides the baseline, before the verdict."""

MOST_CONFIRMATIONS = 4
"""A finalist is confirmed at most this often while its figure stays unsettled."""

DRIFT = 0.05
"""Beyond this change of the machine's own speed, trials are ranked by what they would have reached at its first one."""


def searched(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Feasible trials that are no confirmations."""
    return [record for record in records if record.role != "final" and record.objective is not None]


def _finals(records: Sequence[TrialRecord]) -> dict[str, TrialRecord]:
    """The last confirmation of each candidate, by its id."""
    return {record.candidate.id: record for record in records if record.role == "final"}


def _baseline(records: Sequence[TrialRecord]) -> TrialRecord | None:
    return next((record for record in searched(records) if record.role == "baseline"), None)


def _failed(finals: Iterable[TrialRecord]) -> set[str]:
    """Ids of the candidates that failed their confirmation; running out of budget is not their fault."""
    return {record.candidate.id for record in finals if record.result.status not in ("ok", "interrupted")}


def at_first_speed(records: Sequence[TrialRecord], settings: SearchSettings) -> list[TrialRecord]:
    """The records; where the machine has drifted by more than DRIFT, with the drift taken out of their tokens/s. It
    is measured by the baseline's confirmation, and assumed to have come evenly from trial to trial since the first."""
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


def unconfirmed(records: Sequence[TrialRecord], settings: SearchSettings) -> list[TrialRecord]:
    """The finalists that have yet to be run again: the best, then the baseline, whose drift may change the order of
    the others. Where one has failed its confirmation, the next best takes its place. Last come those that were
    confirmed but whose figure is not settled."""
    finals = [record for record in records if record.role == "final"]
    failed = _failed(finals)
    corrected = at_first_speed(records, settings)
    speeds = estimate_speeds(corrected, settings)
    ranked = _ranked(searched(corrected), speeds, settings)
    ranked = [record for record in ranked if record.candidate.id not in failed]
    baseline = [record for record in ranked if record.role == "baseline"]
    wanted = {record.candidate.id: record for record in (*ranked[:1], *baseline, *ranked[1:FINALISTS])}
    times = {name: sum(r.candidate.id == name and r.objective is not None for r in finals) for name in wanted}
    settled = _settled(corrected, speeds)
    unsettled = [name for name in wanted if 0 < times[name] < MOST_CONFIRMATIONS and name not in settled]
    return [wanted[name] for name in (*(name for name in wanted if not times[name]), *unsettled)]


def decide(records: Sequence[TrialRecord], settings: SearchSettings) -> Verdict | None:
    """The verdict over all records so far; None while nothing feasible is known."""
    corrected, finals = at_first_speed(records, settings), _finals(records)
    speeds, failed = estimate_speeds(corrected, settings), _failed(finals.values())
    search, settled = _ranked(searched(records), speeds, settings), _settled(corrected, speeds)
    cautious = {name: speed if name in settled else _lowest(speed, finals.get(name)) for name, speed in speeds.items()}
    confirmed = _ranked([record for record in finals.values() if record.objective is not None], cautious, settings)
    pool = confirmed or [record for record in search if record.candidate.id not in failed]
    if not pool:
        return None
    rivals = [record for record in pool[1:] if record.candidate.id in settled]
    tied = _tied(pool[0], rivals, speeds, settings) if confirmed else []
    winner = min((pool[0], *tied), key=_memory)
    drift = _drift(searched(records), finals)
    pace = drift if drift is not None and corrected != list(records) else 1.0
    first = _baseline(records)
    better = search[: 1 + max((i for i, r in enumerate(search) if r.candidate.id == pool[0].candidate.id), default=-1)]
    return Verdict(
        winner=winner,
        speed=_at_pace(speeds[winner.candidate.id], pace),
        baseline=_at_pace(speeds[first.candidate.id], pace) if first is not None else None,
        confirmed=bool(confirmed),
        unsettled=_unsettled(winner, records, speeds, settled) if confirmed else "",
        tied_with=tuple(record.trial for record in (pool[0], *tied) if record is not winner),
        fell_through=tuple(record.trial for record in better if record.candidate.id in failed),
        drift=drift,
        notes=tuple(_contradictions(records).values()),
    )


def _at_pace(speed: Speed, pace: float) -> Speed:
    return replace(speed, tokens_per_second=speed.tokens_per_second * pace, ci95=speed.ci95 * pace)


def _ranked(
    records: Sequence[TrialRecord], speeds: Mapping[str, Speed], settings: SearchSettings
) -> list[TrialRecord]:
    """Feasible records, the best estimate first; equal ones in the order of their trials."""
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
    """All that can be counted on before a figure is settled: the lower end of its interval, or the confirmation."""
    low = speed.tokens_per_second * math.exp(-speed.relative_ci95)
    confirmed = final.result.tokens_per_second if final is not None else None
    return replace(speed, tokens_per_second=min(low, confirmed or low))


def _settled(records: Sequence[TrialRecord], speeds: Mapping[str, Speed]) -> set[str]:
    """Ids of the candidates whose figure can be relied on: all measurements together leave a narrow interval, and so
    does a confirmation by itself, which agrees with them."""

    def agrees(final: TrialRecord) -> bool:
        speed, together = final.result.tokens_per_second, speeds[final.candidate.id]
        if not speed or (final.result.tokens_per_second_ci95 or 0.0) > NOISY * speed:
            return False
        return together.relative_ci95 <= NOISY and abs(math.log(speed / together.tokens_per_second)) <= DISAGREEMENT

    finals = [record for record in records if record.role == "final" and record.objective is not None]
    return {final.candidate.id for final in finals if agrees(final)}


def _contradictions(records: Sequence[TrialRecord]) -> dict[str, str]:
    """Confirmations that contradict the trial they repeat, by candidate id: one line each."""
    groups: dict[str, list[TrialRecord]] = {}
    for record in records:
        if record.objective is not None:
            groups.setdefault(record.candidate.id, []).append(record)
    found = {}
    for name, group in groups.items():
        ratio = disagreement(group)
        if ratio is not None:
            trials = " and ".join(f"trial {r.trial} ({r.result.tokens_per_second or 0.0:,.0f})" for r in group)
            found[name] = f"tokens/s of one candidate differ by {ratio:.2f}x: {trials}; something disturbed a trial"
    return found


def _unsettled(
    winner: TrialRecord, records: Sequence[TrialRecord], speeds: Mapping[str, Speed], settled: set[str]
) -> str:
    """Why the winner, which was confirmed, may not be the best or as fast as is said; empty if nothing speaks
    against it."""
    own, contradictions = speeds[winner.candidate.id], _contradictions(records)
    if winner.candidate.id not in settled:
        half, speed = winner.result.tokens_per_second_ci95 or 0.0, winner.result.tokens_per_second or 1.0
        width = max(own.relative_ci95, half / speed)
        why = contradictions.get(winner.candidate.id, f"its tokens/s are known to ±{width:.0%} only")
        times = f"{own.measurements} measurement{'s' if own.measurements > 1 else ''}"
        return f"{why}, after {times}; search again on a quiet machine"
    for record in searched(records):
        name, speed = record.candidate.id, record.result.tokens_per_second or 0.0
        if name in contradictions and name not in settled and speed > own.tokens_per_second:
            return f"trial {record.trial} may be faster: {contradictions[name]}"
    return ""


def _memory(record: TrialRecord) -> tuple[float, int]:
    """The card's count, else the allocator's; records of one run know the same views."""
    peaks = (record.result.peak(view) for view in ("device_bytes", "reserved_bytes", "allocated_bytes"))
    return next((float(peak) for peak in peaks if peak is not None), float("inf")), record.trial


def _drift(search: Sequence[TrialRecord], finals: Mapping[str, TrialRecord]) -> float | None:
    first = _baseline(search)
    again = finals.get(first.candidate.id) if first is not None else None
    if first is None or again is None or again.objective is None:
        return None
    before, after = (record.result.tokens_per_second or 0.0 for record in (first, again))
    within = sum(record.result.tokens_per_second_ci95 or 0.0 for record in (first, again))
    return after / before if abs(after - before) > within else None

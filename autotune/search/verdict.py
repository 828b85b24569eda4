"""Who won: by confirmed values, ties called ties."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from autotune.config.search import SearchSettings
from autotune.measure.records import TrialRecord
from autotune.search.objective import interval, maximised, score

FINALISTS = 3
"""Candidates that are run again, besides the baseline, before the verdict."""

DRIFT = 0.05
"""Beyond this change of the machine's own speed, trials are ranked by what they would have reached at its first one."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of a search; of its state so far while it runs."""

    winner: TrialRecord
    """The measurement that counts: the confirmation where there is one, else the search trial."""
    confirmed: bool
    """The winner was run again in a fresh process, whole steps, evaluation and checkpoint included."""
    tied_with: tuple[int, ...] = ()
    """Trials whose interval overlaps the winner's; the winner needs the least memory of them."""
    fell_through: tuple[int, ...] = ()
    """Better trials that did not survive their confirmation."""
    drift: float | None = None
    """Speed of the machine at the end over that at the start, by the baseline's confirmation and its trial; None where
    that was not measured twice, or the two agree within their intervals."""
    notes: tuple[str, ...] = ()
    """What could not be done, one line each."""

    @property
    def status(self) -> str:
        """As best.toml and the study have it."""
        return "confirmed" if self.confirmed else "not confirmed"


def best_first(records: Sequence[TrialRecord], maximise: bool) -> list[TrialRecord]:
    """Feasible records by their objective; equal ones in the order of their trials."""
    feasible = [record for record in records if record.objective is not None]
    return sorted(feasible, key=lambda record: (_signed(record, maximise), record.trial))


def _signed(record: TrialRecord, maximise: bool) -> float:
    assert record.objective is not None
    return -record.objective if maximise else record.objective


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
    """The records, and where the machine has drifted by more than DRIFT, with the drift taken out of their tokens/s:
    it is what the baseline's confirmation says, and taken to have come evenly from trial to trial since the first."""
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
    the others. Where one has failed its confirmation, the next best takes its place."""
    finals = [record for record in records if record.role == "final"]
    done = {record.candidate.id for record in finals if record.objective is not None}
    failed = _failed(finals)
    ranked = best_first(searched(at_first_speed(records, settings)), maximised(settings))
    ranked = [record for record in ranked if record.candidate.id not in failed]
    baseline = [record for record in ranked if record.role == "baseline"]
    wanted = [*ranked[:1], *baseline, *ranked[1:FINALISTS]]
    waiting = {record.candidate.id: record for record in wanted if record.candidate.id not in done}
    return list(waiting.values())


def decide(records: Sequence[TrialRecord], settings: SearchSettings) -> Verdict | None:
    """The verdict over all records so far; None while nothing feasible is known."""
    maximise = maximised(settings)
    finals = _finals(records)
    failed = _failed(finals.values())
    search = best_first(searched(records), maximise)
    confirmed = best_first(list(finals.values()), maximise)
    pool = confirmed or [record for record in search if record.candidate.id not in failed]
    if not pool:
        return None
    tied = _tied(pool, settings) if confirmed else pool[:1]
    winner = min(tied, key=_memory)
    better = [record for record in search if _signed(record, maximise) <= _signed(pool[0], maximise)]
    return Verdict(
        winner=winner,
        confirmed=bool(confirmed),
        tied_with=tuple(record.trial for record in tied if record is not winner),
        fell_through=tuple(record.trial for record in better if record.candidate.id in failed),
        drift=_drift(searched(records), finals),
    )


def _tied(ranked: Sequence[TrialRecord], settings: SearchSettings) -> list[TrialRecord]:
    """The leading record, and those whose interval overlaps its own."""
    intervals = [interval(settings, record.candidate, record.result) for record in ranked]
    low, high = intervals[0]
    return [record for record, other in zip(ranked, intervals, strict=True) if other[0] <= high and low <= other[1]]


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

"""The verdict of a search: who won, what was gained, what each choice costs, where the time went, what to do next."""

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from autotune.config.search_settings import SearchSettings
from autotune.environment import Environment
from autotune.measure.types import PEAK_VIEWS, TrialResult
from autotune.runs.objective import law_of, maximised, pareto_front
from autotune.runs.races import RaceVerdict
from autotune.runs.records import TrialRecord
from autotune.runs.verdict import IDLE, RACING, Failure, Gain, Neighbour, Verdict
from autotune.search.advice import nothing_found
from autotune.search.decide import decide, searched
from autotune.search.space import Space, ordered, values_of

if TYPE_CHECKING:
    import optuna

FEWEST_FOR_IMPORTANCE = 10


def conclude(
    records: Sequence[TrialRecord],
    settings: SearchSettings,
    environment: Environment,
    space: Space,
    *,
    spent_seconds: float = 0.0,
    notes: Sequence[str] = (),
    study: "optuna.Study | None" = None,
    race: RaceVerdict | None = None,
) -> Verdict:
    """Verdict over all records so far. `study` is given once the search has ended: importance takes some 0.1 s.
    `race`: its outcome, which decides."""
    verdict = replace(decide(records, settings, race.candidates if race else ()), race=race)
    ran = [r.result for r in records if r.result.trial_seconds is not None and r.role != "race"]
    seconds = Counter[str]()
    for result in ran:
        seconds.update(result.phase_seconds)
    busy = sum(result.trial_seconds or 0.0 for result in ran)
    at_once = max(settings.workers, math.ceil(busy / spent_seconds)) if spent_seconds else 1  # machines that joined
    seconds = Counter({phase: lasted / at_once for phase, lasted in seconds.items()})
    idle = spent_seconds - busy / at_once
    if race:  # its trials are rungs
        racing = sum(reading.stepping_seconds for reading in race.readings)
        seconds.update({RACING: racing, "start": race.seconds - racing})
        idle -= race.seconds
    by_objective = verdict.winner if not verdict.raced else None
    verdict = replace(
        verdict,
        ended=study is not None,
        gain=_gain(verdict),
        trade_offs=_trade_offs(records, settings),
        failures=_failures(records),
        neighbours=_neighbours(by_objective, records, settings, space) if by_objective else (),
        importance=_importance(study, len(searched(records))) if study else {},
        law=_law(settings),
        trials=len(ran),
        spent_seconds=spent_seconds,
        seconds={**seconds, IDLE: max(0.0, idle)},
        notes=(*notes, *verdict.notes),
    )
    if verdict.winner is not None and environment.stand_in:
        verdict = replace(verdict, status="stand-in")
    if study is None or verdict.winner is not None:
        return verdict
    advice = nothing_found(settings, environment, records)
    return replace(verdict, budget_wanted=advice.budget, remedy=advice.remedy)


def _peak_ratio(result: TrialResult, base: TrialResult) -> float | None:
    """Ratio of peaks in the widest view that both know."""
    peaks = ((result.peak(view), base.peak(view)) for view in PEAK_VIEWS)
    return next((ours / theirs for ours, theirs in peaks if ours is not None and theirs), None)


def _gain(verdict: Verdict) -> Gain | None:
    winner, baseline, speed, base = verdict.winner, verdict.baseline, verdict.speed, verdict.baseline_speed
    if winner is None or baseline is None or speed is None or base is None:
        return None
    ratio, losses = speed.tokens_per_second / base.tokens_per_second, (winner.predicted_loss, baseline.predicted_loss)
    return Gain(
        speed=ratio,
        speed_ci95=ratio * (speed.relative_ci95**2 + base.relative_ci95**2) ** 0.5,
        memory=_peak_ratio(winner.result, baseline.result),
        loss=None if verdict.raced or losses[0] is None or losses[1] is None else losses[0] - losses[1],
    )


def _trade_offs(records: Sequence[TrialRecord], settings: SearchSettings) -> tuple[int, ...]:
    """Pareto front over the last measurement of each feasible candidate."""
    feasible = [record for record in records if record.objective is not None]
    last = {r.candidate.id: r for r in sorted(feasible, key=lambda r: (r.role == "final", r.trial))}.values()
    view = next((v for v in PEAK_VIEWS if all(r.result.peak(v) is not None for r in last)), PEAK_VIEWS[-1])
    points = []
    for record in last:
        peak, loss, speed = record.result.peak(view), record.predicted_loss, record.result.tokens_per_second
        value = speed if maximised(settings) else loss and -loss
        if peak is not None and value is not None:
            points.append((peak, value, record.trial))
    return tuple(pareto_front(points))


def _failures(records: Sequence[TrialRecord]) -> tuple[Failure, ...]:
    """Failed trials grouped by status and message, digits aside."""
    groups: dict[tuple[str, str], list[TrialRecord]] = {}
    for record in records:
        if record.result.status != "ok":
            alike = re.sub(r"\d[\d.,]*", "#", record.result.message)
            groups.setdefault((record.result.status, alike), []).append(record)
    failures = [
        Failure(status=status, reason=same[0].result.message, trials=tuple(record.trial for record in same))
        for (status, _), same in groups.items()
    ]
    return tuple(sorted(failures, key=lambda failure: (-len(failure.trials), failure.trials)))


def _law(settings: SearchSettings) -> str:
    if maximised(settings):
        return ""
    law = law_of(settings)
    good = f"within ±{law.band:.2f} nats where it was fitted, good for ranking only"
    return f"{law.name!r}, {good} ({law.source}); short trainings by recorded ones"


def _neighbours(
    winner: TrialRecord, records: Sequence[TrialRecord], settings: SearchSettings, space: Space
) -> tuple[Neighbour, ...]:
    """Trials that differ from the winner's in one choice; of a numeric choice the nearest on each side."""
    winner = next((r for r in searched(records) if r.candidate.id == winner.candidate.id), winner)
    at = values_of(space, winner.candidate)
    nearest: dict[tuple[str, object], tuple[int, Neighbour]] = {}
    for record in searched(records):
        there = values_of(space, record.candidate)
        changed = [name for name in space.choices if there[name] != at[name]]
        if len(changed) != 1:
            continue
        name, choices = changed[0], space.choices[changed[0]]
        distance = choices.index(there[name]) - choices.index(at[name])
        key = (name, distance > 0 if ordered(choices) else there[name])
        if key not in nearest or abs(distance) < nearest[key][0]:
            assert winner.objective is not None
            assert record.objective is not None
            ratio, difference = record.objective / winner.objective - 1.0, record.objective - winner.objective
            neighbour = Neighbour(
                knob=name,
                value=str(there[name]),
                winner=str(at[name]),
                trial=record.trial,
                objective=ratio if maximised(settings) else difference,
                peak=_peak_ratio(record.result, winner.result),
            )
            nearest[key] = abs(distance), neighbour
    return tuple(neighbour for _, neighbour in nearest.values())


def _importance(study: "optuna.Study", feasible: int) -> Mapping[str, float]:
    if feasible < FEWEST_FOR_IMPORTANCE:
        return {}
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the evaluator is experimental
        shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=0.25))
    return {name: float(share) for name, share in shares.items()}

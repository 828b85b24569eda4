"""What a search concludes from its trials beyond the winner: where its time went, what each choice costs."""

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from autotune.config.search import SearchSettings
from autotune.runs.objective import law_of, maximised
from autotune.runs.records import TrialRecord
from autotune.runs.verdict import Review, Step, Verdict
from autotune.search.decide import at_first_speed, searched
from autotune.search.space import Space, ordered, values_of

if TYPE_CHECKING:
    import optuna

FEWEST_FOR_IMPORTANCE = 10


def review(
    settings: SearchSettings,
    space: Space,
    study: "optuna.Study",
    found: Sequence[TrialRecord],
    verdict: Verdict | None,
    notes: Sequence[str],
    spent_seconds: float,
) -> Review:
    """The whole search, as verdict.json keeps it."""
    ran = [record for record in found if record.result.trial_seconds is not None]
    seconds: Counter[str] = Counter()
    for record in ran:
        seconds.update(record.result.phase_seconds)
    idle = spent_seconds - sum(record.result.trial_seconds or 0.0 for record in ran)
    return Review(
        confirmed=verdict is not None and verdict.confirmed,
        unsettled=verdict.unsettled if verdict else "",
        speed=verdict.speed if verdict else None,
        baseline=verdict.baseline if verdict else None,
        tied_with=verdict.tied_with if verdict else (),
        fell_through=verdict.fell_through if verdict else (),
        drift=verdict.drift if verdict else None,
        at_first_speed=_at_first_speed(settings, found),
        law=_law(settings),
        notes=(*notes, *(verdict.notes if verdict else ())),
        spent_seconds=spent_seconds,
        trials=len(ran),
        seconds={**seconds, "idle": max(0.0, idle)},
        steps=tuple(_steps(settings, space, found, verdict)) if verdict else (),
        importance=_importance(study, len(searched(found))),
    )


def _at_first_speed(settings: SearchSettings, found: Sequence[TrialRecord]) -> dict[str, float]:
    corrected = at_first_speed(found, settings)
    changed = any(new.objective != old.objective for new, old in zip(corrected, found, strict=True))
    return {str(r.trial): r.objective for r in corrected if r.objective is not None} if changed else {}


def _law(settings: SearchSettings) -> str:
    if maximised(settings):
        return ""
    law = law_of(settings)
    moved = f" moved by {settings.law_offset:+.2f} nats to this data" if settings.law_band is not None else ""
    return f"{law.name!r}{moved}, within ±{law.band:.2f} nats where it was fitted, good for ranking only ({law.source})"


def _steps(settings: SearchSettings, space: Space, found: Sequence[TrialRecord], verdict: Verdict) -> list[Step]:
    """Trials that differ from the winner's in one choice; of a choice in numbers, the nearest on each side."""
    own = next((r for r in searched(found) if r.candidate.id == verdict.winner.candidate.id), verdict.winner)
    at = values_of(space, own.candidate)
    nearest: dict[tuple[str, object], tuple[int, Step]] = {}
    for record in searched(found):
        there = values_of(space, record.candidate)
        changed = [name for name in space.choices if there[name] != at[name]]
        if len(changed) != 1:
            continue
        name, choices = changed[0], space.choices[changed[0]]
        distance = choices.index(there[name]) - choices.index(at[name])
        key = (name, distance > 0 if ordered(choices) else there[name])
        if key not in nearest or abs(distance) < nearest[key][0]:
            objective, peak = _against(own, record, maximised(settings))
            step = Step(
                knob=name, value=str(there[name]), winner=str(at[name]), trial=record.trial, objective=objective,
                peak=peak,
            )  # fmt: skip
            nearest[key] = abs(distance), step
    return [step for _, step in nearest.values()]


def _against(own: TrialRecord, other: TrialRecord, maximise: bool) -> tuple[float, float | None]:
    """Objective and peak against the winner's `own`, as a Step has them."""
    assert own.objective is not None
    assert other.objective is not None
    objective = other.objective / own.objective - 1.0 if maximise else other.objective - own.objective
    peaks = [record.result.peak("device_bytes") or record.result.peak("allocated_bytes") for record in (own, other)]
    return objective, peaks[1] / peaks[0] if peaks[0] and peaks[1] else None


def _importance(study: "optuna.Study", feasible: int) -> dict[str, float]:
    if feasible < FEWEST_FOR_IMPORTANCE:
        return {}
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the evaluator is experimental
        shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=0.25))
    return {name: float(share) for name, share in shares.items()}

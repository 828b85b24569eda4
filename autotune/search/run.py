"""One search, from settings to verdict, with every file of its directory.

The study is written before any file, and every file is replaced as a whole: a search can be killed at
any moment, its files can be read, and `resume` goes on.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from autotune.config.candidate import Candidate
from autotune.config.search import SearchSettings, read_settings
from autotune.config.tables import read_table
from autotune.environment import Environment
from autotune.errors import ConfigError, InterruptedByUser, NoFeasibleError
from autotune.measure.records import Role, TrialRecord, write_csv
from autotune.measure.review import write_review
from autotune.measure.runner import run_trial
from autotune.measure.types import TrialRequest, TrialResult
from autotune.search import files
from autotune.search import study as studies
from autotune.search.budget import Allowance, Budget, begin, final_seconds, measure_seconds, next_allowance
from autotune.search.calibrate import calibrate_law
from autotune.search.memory_model import MemoryModel, Prediction, calibrate, predict, save
from autotune.search.objective import maximised, score, speed_needed
from autotune.search.review import review
from autotune.search.sampler import doubted
from autotune.search.space import Space, baseline, build_space, guide_candidate, in_words
from autotune.search.verdict import Verdict, decide, searched, unconfirmed
from autotune.units import format_bytes, format_duration

if TYPE_CHECKING:
    import optuna

Measure = Callable[[TrialRequest, Path], TrialResult]

PASSED_OVER = 4
"""Predictions in a row that may stand in for a trial."""

HOPELESS = 0.7
"""A trial slower than this part of what it needs to be the best so far is not timed to the end."""

_SETTINGS, _ENVIRONMENT, _SPENT, _NOTES = "settings", "environment", "spent_seconds", "notes"


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that a person watching a search wants to know."""

    kind: Literal["begin", "end", "verdict"]
    """A trial begins, a trial has ended, the search has ended."""
    elapsed_seconds: float
    budget_seconds: float
    trial: int | None = None
    role: Role = "search"
    candidate: Candidate | None = None
    record: TrialRecord | None = None
    """Of the trial that has ended."""
    verdict: Verdict | None = None
    """The state so far; None while nothing is feasible."""


Notify = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Nobody watches."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What every step of a search needs."""

    settings: SearchSettings
    directory: Path
    environment: Environment
    space: Space
    study: "optuna.Study"
    budget: Budget
    spent_before: float = 0.0
    """Seconds that earlier parts of a resumed search took."""
    measure: Measure
    notify: Notify
    sampler: studies.Sampler
    found: list[TrialRecord]
    """What the study holds, so that it need not be read again for each trial."""
    told: tuple[str, ...] = ()
    """What to say before the search's own notes."""


def search(
    settings: SearchSettings,
    run_dir: Path,
    environment: Environment,
    *,
    measure: Measure = run_trial,
    notify: Notify = ignore,
    clock: Callable[[], float] = time.monotonic,
    started: float | None = None,
    sampler: studies.Sampler = "additive",
    calibrate_loss: bool = False,
) -> Verdict:
    """Search within the settings' budget and leave a run in `run_dir`, which must be new.

    `measure` runs one trial: a worker process, or a table of recorded answers. `clock` counts seconds; the budget
    runs since `started` by it, if that is given. `calibrate_loss` trains two pilots first, see `calibrate_law`.
    Raises ConfigError, NoFeasibleError when nothing fits, InterruptedByUser after Ctrl-C.
    """
    budget = begin(settings.budget_seconds, started, clock)
    told: list[str] = []
    with files.new_directory(run_dir):
        if calibrate_loss:
            settings, line = calibrate_law(settings, run_dir, budget, measure)
            told.append(line)
        url = studies.storage_url(run_dir, settings.storage)
        study = studies.create_study(url, settings.name, maximised(settings), settings.seed, sampler)
        study.set_user_attr(_SETTINGS, asdict(settings))
        study.set_user_attr(_ENVIRONMENT, asdict(environment))
        files.write_inputs(run_dir, settings, environment)
        write_csv(run_dir / "trials.csv", [])
    with files.locked(run_dir):
        return _go(_Run(
            settings=settings, directory=run_dir, environment=environment, space=build_space(settings, environment),
            study=study, budget=budget, measure=measure, notify=notify, sampler=sampler, found=[], told=tuple(told),
        ))  # fmt: skip


def resume(
    run_dir: Path,
    environment: Environment,
    *,
    budget_seconds: float | None = None,
    same_machine: bool = True,
    measure: Measure = run_trial,
    notify: Notify = ignore,
    clock: Callable[[], float] = time.monotonic,
    started: float | None = None,
    sampler: studies.Sampler = "additive",
) -> Verdict:
    """Go on with the search of `run_dir`. A budget that is given counts from now; otherwise what is left of the
    run's own is used up. What was in flight when the search died is recorded as interrupted.

    Raises what `search` raises, and ConfigError for another machine or torch than the run's, whose numbers
    cannot be compared, unless `same_machine` is False.
    """
    started = clock() if started is None else started
    settings = read_settings(run_dir / "search.toml")
    if same_machine:
        files.refuse_another_machine(run_dir, environment)
    with files.locked(run_dir):
        url = studies.storage_url(run_dir, settings.storage)
        study = studies.load_study(url, settings.name, settings.seed, sampler)
        studies.close_stale(study)
        spent = float(study.user_attrs.get(_SPENT, 0.0))
        seconds = budget_seconds if budget_seconds is not None else settings.budget_seconds - spent
        space = studies.as_begun(study, build_space(settings, environment))
        if seconds <= 0:
            total = format_duration(settings.budget_seconds)
            raise ConfigError(f"the budget of {run_dir} ({total}) is used up; give more time with --budget")
        return _go(_Run(
            settings=settings, directory=run_dir, environment=environment, space=space,
            study=study, budget=begin(seconds, started, clock), spent_before=spent,
            measure=measure, notify=notify, sampler=sampler, found=studies.records(study),
        ))  # fmt: skip


def rebuild(run_dir: Path) -> Verdict | None:
    """Write every file of a run anew from its study, and return the state of its search.
    Raises ConfigError where there is no study."""
    known = run_dir / "search.toml"
    given = read_settings(known) if known.exists() else None
    if (given is None or not given.storage) and not (run_dir / "study.db").exists():
        raise ConfigError(f"{run_dir} has no study.db; give the directory of a run")
    url = studies.storage_url(run_dir, given.storage if given else "")
    study = studies.load_study(url, given.name if given else "", seed=0)
    settings = read_table(SearchSettings, study.user_attrs[_SETTINGS], "search")
    environment = read_table(Environment, study.user_attrs[_ENVIRONMENT], "environment")
    files.write_inputs(run_dir, settings, environment)
    found = studies.records(study)
    state = files.publish(run_dir, settings, environment, found)
    return _conclude(run_dir, settings, build_space(settings, environment), study, found, state)


def _conclude(
    directory: Path,
    settings: SearchSettings,
    space: Space,
    study: "optuna.Study",
    found: list[TrialRecord],
    state: Verdict | None,
) -> Verdict | None:
    """The verdict with its notes; writes verdict.json."""
    known = study.user_attrs
    notes, spent = tuple(known.get(_NOTES, ())), float(known.get(_SPENT, 0.0))
    write_review(directory / "verdict.json", review(settings, space, study, found, state, notes, spent))
    return state and replace(state, notes=notes)


def _go(run: _Run) -> Verdict:
    notes: list[str] = []
    try:
        while True:  # time that confirming did not need is searched in
            before = len(run.found)
            notes = _explore(run) + _confirm(run)
            if len(run.found) == before:
                break
    except KeyboardInterrupt:
        studies.close_stale(run.study)
        run.found[:] = studies.records(run.study)
        _end(run, ["the search was interrupted"])
        raise InterruptedByUser(
            f"interrupted; {len(run.found)} trials are kept, go on with `autotune search --resume {run.directory}`"
        ) from None
    verdict = _end(run, notes)
    save(_memory_model(run), run.directory / "memory_model.json")
    if verdict is None:
        raise NoFeasibleError(_nothing_fits(run))
    run.notify(_event(run, "verdict", verdict=verdict))
    return verdict


def _end(run: _Run, notes: list[str]) -> Verdict | None:
    state = _publish(run)
    run.study.set_user_attr(_NOTES, [*run.told, *notes])
    return _conclude(run.directory, run.settings, run.space, run.study, run.found, state)


def _explore(run: _Run) -> list[str]:
    """Baseline, guide, then whatever the sampler proposes, until the budget's reserve. Returns notes."""
    first: dict[Role, Candidate | None] = {
        "baseline": baseline(run.settings),
        "guide": guide_candidate(run.settings, run.environment),
    }
    maximise = maximised(run.settings)
    while True:
        known = studies.answered(run.found)
        allowance = next_allowance(run.budget, run.found, maximise)
        role: Role = next((role for role, c in first.items() if c is not None and c.id not in known), "search")
        candidate = first.pop(role, None)  # once is enough, even if it is interrupted
        if allowance is None:
            return [f"the budget ended before the {role} was measured"] if candidate else []
        if candidate is not None:
            trial = studies.ask_for(run.study, run.space, candidate)
        else:
            asked = studies.ask_new(run.study, run.space, known, run.settings, run.sampler)
            if asked is None:
                return [f"all {len(known)} candidates of the space were measured before the budget's end"]
            trial, candidate = asked
        _measure(run, trial, role, candidate, allowance)


def _confirm(run: _Run) -> list[str]:
    """Run the best candidates and the baseline again, in fresh processes, as time permits. Returns notes."""
    skipped: dict[str, str] = {}
    while True:
        waiting = unconfirmed(run.found, maximised(run.settings))
        best_first = not any(record.role == "final" for record in run.found)  # should there be time for one only
        waiting = waiting[:best_first] + _doubted(run) + waiting[best_first:]
        record = next((record for record in waiting if record.candidate.id not in skipped), None)
        if record is None:
            return list(skipped.values())
        name, needed, left = record.candidate.id, final_seconds(record, run.budget), run.budget.remaining()
        if left < needed:
            skipped[name] = (
                f"trial {record.trial} was not confirmed: that takes about {format_duration(needed)}, "
                f"{format_duration(max(left, 0.0))} were left; give a larger --budget"
            )
            continue
        patience = max(60.0, 4 * needed)
        trial = studies.ask_for(run.study, run.space, record.candidate)
        allowance = Allowance(seconds=min(left, patience), ends_budget=left < patience)
        final = _measure(run, trial, "final", record.candidate, allowance)
        if final.result.status == "interrupted":
            skipped[name] = f"trial {record.trial} was not confirmed: the budget ended first; give a larger --budget"


def _doubted(run: _Run) -> list[TrialRecord]:
    """The trial that was most likely disturbed, if there is one and it was not run again."""
    again = {record.candidate.id for record in run.found if record.role == "final"}
    names = [dimension.name for dimension in run.space.dimensions]
    return [r for r in doubted(names, searched(run.found), run.settings)[:1] if r.candidate.id not in again]


def _measure(run: _Run, trial: "optuna.Trial", role: Role, candidate: Candidate, allowance: Allowance) -> TrialRecord:
    """One trial: written down, measured, judged, told, published."""
    number = 1 + max((record.trial for record in run.found), default=-1)
    log = run.directory / "logs" / f"trial-{number:04d}.log"
    best = decide(run.found, run.settings)
    request = TrialRequest(
        candidate=candidate,
        device=run.settings.device,
        result_path=str(log.with_suffix(".json")),
        memory_limit_bytes=run.settings.memory_limit_bytes,
        measure_seconds=measure_seconds(run.budget) * (2 if role == "final" else 1),
        timeout_seconds=allowance.seconds,
        stop_below_tokens_per_second=_least_speed(run.settings, candidate, best) if role == "search" else None,
        final=role == "final",
    )
    studies.begin(trial, number, role, request)
    run.notify(_event(run, "begin", trial=number, role=role, candidate=candidate, verdict=best))
    model = _memory_model(run)
    save(model, run.directory / "memory_model.json")
    prediction = predict(model, candidate)
    hopeless = role == "search" and prediction.low_device_bytes > run.settings.memory_limit_bytes
    result = _not_run(prediction) if hopeless and not _only_predicted(run) else run.measure(request, log)
    if result.status == "timeout" and allowance.ends_budget:
        result = replace(result, status="interrupted", message="the budget ended during this trial")
    judged = None
    if result.status == "ok" and result.tokens_per_second is not None:
        judged = score(run.settings, candidate, result.tokens_per_second)
    record = TrialRecord(
        trial=number,
        role=role,
        candidate=candidate,
        result=result,
        objective=judged.objective if judged else None,
        predicted_peak_bytes=prediction.peak_device_bytes,
        predicted_loss=judged.predicted_loss if judged else None,
    )
    studies.finish(run.study, trial, record, run.settings.memory_limit_bytes)
    run.found.append(record)
    state = _publish(run)
    run.notify(_event(run, "end", trial=number, role=role, candidate=candidate, record=record, verdict=state))
    return record


def _least_speed(settings: SearchSettings, candidate: Candidate, best: Verdict | None) -> float | None:
    """Below which the candidate will not become the best; None while there is none to beat."""
    if best is None or best.winner.objective is None:
        return None
    return HOPELESS * speed_needed(settings, candidate, best.winner.objective)


def _memory_model(run: _Run) -> MemoryModel:
    """The memory model, moved to what this run has measured so far."""
    kind = run.settings.device.partition(":")[0]
    return calibrate(kind, [(record.candidate, record.result) for record in run.found], run.environment)


def _only_predicted(run: _Run) -> bool:
    """The last few candidates were all passed over: time to measure one, should the model be wrong."""
    last = run.found[-PASSED_OVER:]
    return len(last) == PASSED_OVER and all(record.result.status == "predicted_over_limit" for record in last)


def _not_run(prediction: Prediction) -> TrialResult:
    """What is told of a candidate whose predicted peak lies beyond the limit by more than the model's own error."""
    low, high = format_bytes(prediction.low_device_bytes), format_bytes(prediction.high_device_bytes)
    return TrialResult(
        status="predicted_over_limit",
        phase="start",
        message=f"predicted to need {low} to {high}, from {prediction.trials} measured trials; not run",
        wanted_bytes=prediction.peak_device_bytes,
    )


def _event(
    run: _Run,
    kind: Literal["begin", "end", "verdict"],
    trial: int | None = None,
    role: Role = "search",
    candidate: Candidate | None = None,
    record: TrialRecord | None = None,
    verdict: Verdict | None = None,
) -> Event:
    return Event(
        kind=kind, elapsed_seconds=run.budget.elapsed(), budget_seconds=run.budget.seconds, trial=trial, role=role,
        candidate=candidate, record=record, verdict=verdict,
    )  # fmt: skip


def _publish(run: _Run) -> Verdict | None:
    run.study.set_user_attr(_SPENT, run.spent_before + run.budget.elapsed())
    studies.sync(run.directory)
    return files.publish(run.directory, run.settings, run.environment, run.found)


def _nothing_fits(run: _Run) -> str:
    """Why there is no winner: the smallest violation, and what to change."""
    limit, tried = run.settings.memory_limit_bytes, list(studies.answered(run.found).values())
    if not tried:
        seconds = format_duration(run.budget.seconds)
        return f"--budget {seconds} is too short for one trial on {run.settings.device}; give for example 5m"
    nearest = min(tried, key=lambda record: studies.violation(record.result, limit))
    what = f"no feasible candidate among {len(tried)}; the nearest was trial {nearest.trial} "
    what += f"({in_words(nearest.candidate)}): {nearest.result.status}"
    if nearest.result.status in ("oom", "over_limit", "predicted_over_limit"):
        over = int(studies.violation(nearest.result, limit) * limit)
        return (
            f"{what}, {format_bytes(over)} beyond the limit of {format_bytes(limit)}; raise --memory-limit or --budget"
        )
    if nearest.result.status == "timeout":
        return f"{what} in the phase {nearest.result.phase}; give more time with --budget"
    reason = nearest.result.message or f"in the phase {nearest.result.phase}"
    return f"{what}, {reason}; see logs/trial-{nearest.trial:04d}.log"

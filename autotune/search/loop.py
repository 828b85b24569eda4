"""One search, from settings to verdict, with every file of its directory.

The study is written before any file, and every file is replaced as a whole: a search can be killed at
any moment, its files can be read, and `resume` goes on.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from autotune.config.candidate import Candidate
from autotune.config.search_settings import SearchSettings, read_settings
from autotune.environment import Environment
from autotune.errors import ConfigError, InterruptedByUser, MachineError, NoFeasibleError
from autotune.measure.runner import run_trial
from autotune.measure.types import Steps, TrialRequest, TrialResult
from autotune.memory.model import MemoryModel, Prediction, calibrate, predict, save
from autotune.runs import directory as files
from autotune.runs.objective import loss_at, score, speed_needed
from autotune.runs.records import Role, TrialRecord, write_csv
from autotune.runs.verdict import Verdict
from autotune.search import storage
from autotune.search import study as studies
from autotune.search.advice import enough_for, nothing_found, trial_seconds
from autotune.search.budget import (
    CLOSING_SECONDS,
    Allowance,
    Budget,
    allow,
    begin,
    final_seconds,
    final_steps,
    measure_seconds,
    next_allowance,
)
from autotune.search.calibrate import calibrate_law
from autotune.search.conclude import conclude
from autotune.search.decide import decide, searched, unconfirmed
from autotune.search.posterior import NOISY
from autotune.search.sampler import doubted, propose
from autotune.search.space import Space, baseline, build_space, guide_candidate
from autotune.search.timekeeping import Part
from autotune.units import format_bytes, format_duration

if TYPE_CHECKING:
    import optuna

Measure = Callable[[TrialRequest, Path], TrialResult]

PASSED_OVER = 4
"""Predictions in a row that may stand in for a trial."""

HOPELESS = 0.7
"""A trial slower than this part of what it needs to be the best so far is not timed to the end."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """A trial begins, or it has ended: what a person watching a search wants to know."""

    elapsed_seconds: float
    budget_seconds: float
    trial: int
    role: Role
    candidate: Candidate
    record: TrialRecord | None = None
    """Of the trial that has ended; None where it begins."""
    verdict: Verdict
    """The state so far."""


Notify = Callable[[Event], None]


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
    found: list[TrialRecord]
    """What the study holds, so that it need not be read again for each trial."""
    told: tuple[str, ...] = ()
    """What to say before the search's own notes."""
    proposals: list[float] = field(default_factory=list)
    """Seconds that each one took."""


@storage.storage_errors()
def search(
    settings: SearchSettings,
    run_dir: Path,
    environment: Environment,
    *,
    measure: Measure = run_trial,
    notify: Notify = lambda event: None,
    clock: Callable[[], float] = time.monotonic,
    started: float | None = None,
    calibrate_loss: bool = False,
    storage_url: str = "",
    remarks: tuple[str, ...] = (),
) -> Verdict:
    """Search within the settings' budget and leave a run in `run_dir`, which must be new.

    `measure` runs one trial: a worker process, or a table of recorded answers. `clock` counts seconds; the budget
    runs since `started` by it, if that is given. `calibrate_loss` trains two pilots first, see `calibrate_law`.
    `storage_url`: with the password, which settings do not hold.
    `remarks`: what is known before the search, for its notes.
    Raises ConfigError, NoFeasibleError when nothing fits, InterruptedByUser after Ctrl-C.
    """
    budget = begin(settings.budget_seconds, started, clock)
    told = remarks
    with files.new_directory(run_dir):
        if calibrate_loss:
            settings, line = calibrate_law(settings, run_dir, budget, measure)
            told = (*remarks, line)
        if not settings.storage and (note := storage.lock_note(run_dir / files.STUDY_DB)):
            told += (note,)
        study = studies.create_study(run_dir, settings, storage=storage_url, patience=storage.within(budget))
        study.set_user_attr(studies.SETTINGS, asdict(settings))
        study.set_user_attr(studies.ENVIRONMENT, asdict(environment))
        study.set_user_attr(studies.REMARKS, told)
        files.write_inputs(run_dir, settings, environment)
        files.publish(run_dir, settings, environment, [], Verdict())
    with files.locked(run_dir), Part(run_dir, budget.started, clock) as part:
        part.follows(run_dir, 0.0)
        return _go(_Run(
            settings=settings, directory=run_dir, environment=environment, space=build_space(settings, environment),
            study=study, budget=budget, measure=measure, notify=notify, found=[], told=told,
        ))  # fmt: skip


@storage.storage_errors()
def resume(
    run_dir: Path,
    environment: Environment | Callable[[], Environment],
    *,
    budget_seconds: float | None = None,
    same_machine: bool = True,
    measure: Measure = run_trial,
    notify: Notify = lambda event: None,
    clock: Callable[[], float] = time.monotonic,
    started: float | None = None,
    remarks: tuple[str, ...] = (),
) -> Verdict:
    """Go on with the search of `run_dir`. A budget that is given counts from now; otherwise what is left of the
    run's own is used up. What was in flight when the search died is recorded as interrupted. `environment`: the
    machine, or what finds out about it, which takes seconds that count.

    Raises what `search` raises, and ConfigError for another machine or torch than the run's, whose numbers
    cannot be compared, unless `same_machine` is False.
    """
    started = clock() if started is None else started
    settings = read_settings(run_dir / files.SEARCH_TOML)
    with files.locked(run_dir), Part(run_dir, started, clock) as part:
        files.remove_leftovers(run_dir)
        here = environment() if callable(environment) else environment
        if same_machine:
            files.refuse_another_machine(run_dir, here)
        asked = settings.budget_seconds if budget_seconds is None else budget_seconds
        study = studies.load_study(run_dir, settings, storage.within(begin(asked, started, clock)))
        studies.close_stale(study, run_dir / studies.UNTOLD, settings.memory_limit_bytes)
        found = studies.records(study)
        write_csv(run_dir / files.TRIALS_CSV, found)  # what was in flight is in it from now on
        spent = part.follows(run_dir, studies.spent_seconds(study))
        study.set_user_attr(studies.SPENT, spent + clock() - started)
        remarks = tuple(dict.fromkeys([*studies.remarks_of(study), *remarks]))  # each once
        study.set_user_attr(studies.REMARKS, remarks)
        seconds = budget_seconds if budget_seconds is not None else settings.budget_seconds - spent
        space = studies.as_begun(study, build_space(settings, here))
        run = _Run(
            settings=settings, directory=run_dir, environment=here, space=space,
            study=study, budget=begin(seconds, started, clock), spent_before=spent,
            measure=measure, notify=notify, found=found, told=remarks,
        )  # fmt: skip
        if seconds - (clock() - started) <= (0.0 if budget_seconds else CLOSING_SECONDS):
            _end(run, list(studies.notes_of(study) or ["the budget was used up when the search was resumed"]))
            raise ConfigError(
                f"the budget of {run_dir} ({format_duration(settings.budget_seconds)}) is used up; "
                f"give more time with --budget, for example {enough_for(_trial_seconds(run))}"
            )
        return _go(run)


@storage.storage_errors()
def rebuild(run_dir: Path) -> Verdict:
    """Write every file of a run again from its study, and return its verdict. Raises ConfigError without a study."""
    study = studies.load_study(run_dir, _known_settings(run_dir))
    settings, environment = studies.settings_of(study), studies.environment_of(study)
    files.write_inputs(run_dir, settings, environment)
    found, space = studies.records(study), build_space(settings, environment)
    save(_calibrated(settings, environment, found), run_dir / files.MEMORY_MODEL_JSON)
    ended = studies.NOTES in study.user_attrs
    return _conclude(run_dir, settings, environment, space, study, found, ended=ended)


def _known_settings(run_dir: Path) -> SearchSettings | None:
    """Of search.toml; None where it is lost or spoiled and the run's own study.db can say the same."""
    try:
        return read_settings(run_dir / files.SEARCH_TOML)
    except ConfigError:
        if (run_dir / files.STUDY_DB).exists():
            return None
        if (run_dir / files.SEARCH_TOML).exists():
            raise
        return None


def _conclude(
    directory: Path,
    settings: SearchSettings,
    environment: Environment,
    space: Space,
    study: "optuna.Study",
    found: list[TrialRecord],
    *,
    ended: bool,
) -> Verdict:
    """The verdict over the records so far, written to the run directory and the study."""
    verdict = conclude(
        found, settings, environment, space,
        spent_seconds=studies.spent_seconds(study), notes=studies.notes_of(study), study=study if ended else None,
    )  # fmt: skip
    files.publish(directory, settings, environment, found, verdict)
    studies.mark_verdict(study, verdict)
    return verdict


def _go(run: _Run) -> Verdict:
    notes: list[str] = []
    try:
        while True:  # time that confirming did not need is searched in
            before = len(run.found)
            notes = _explore(run) + _confirm(run)
            if len(run.found) == before:
                break
    except KeyboardInterrupt:
        studies.close_stale(run.study, run.directory / studies.UNTOLD, run.settings.memory_limit_bytes)
        run.found[:] = studies.records(run.study)
        _end(run, ["the search was interrupted"])
        raise InterruptedByUser(
            f"interrupted; {len(run.found)} trials are kept, go on with `autotune search --resume {run.directory}`"
        ) from None
    except MachineError as error:
        _end(run, [str(error)])
        raise
    verdict = _end(run, notes)
    if verdict.winner is None:
        raise NoFeasibleError(_nothing_fits(run))
    return verdict


def _end(run: _Run, notes: list[str]) -> Verdict:
    notes = [note for note in notes if note not in run.told]
    run.study.set_user_attr(studies.NOTES, [*run.told, *notes])
    verdict = _publish(run, ended=True)
    save(_memory_model(run), run.directory / files.MEMORY_MODEL_JSON)
    run.study.set_user_attr(studies.SPENT, run.spent_before + run.budget.elapsed())
    return verdict


def _explore(run: _Run) -> list[str]:
    """Baseline, guide, then whatever the sampler proposes, until the budget's reserve. Returns notes."""
    first: dict[Role, Candidate | None] = {
        "baseline": baseline(run.settings),
        "guide": guide_candidate(run.settings, run.environment),
    }
    while True:
        known, model = studies.answered(run.found), _memory_model(run)
        role: Role = next((role for role, c in first.items() if c is not None and c.id not in known), "search")
        candidate = first.pop(role, None)  # once is enough, even if it is interrupted
        if candidate is None:
            ahead = max(run.proposals, default=0.0)
            if next_allowance(run.budget, run.found, run.settings, ahead) is None:
                return []
            before = run.budget.elapsed()
            candidate = propose(run.space, known, run.settings, model)
            run.proposals.append(run.budget.elapsed() - before)
        if candidate is None:
            return [f"all {len(known)} candidates of the space were measured before the budget's end"]
        allowance = next_allowance(run.budget, run.found, run.settings)  # proposing has taken its time from it
        if allowance is None:
            return [] if role == "search" else [f"the budget ended before the {role} was measured"]
        _measure(run, role, candidate, allowance, model)


def _confirm(run: _Run) -> list[str]:
    """Run the best candidates and the baseline again, in fresh processes, as time permits. Returns notes."""
    skipped: dict[str, str] = {}
    while True:
        waiting = unconfirmed(run.found, run.settings)
        best_first = not any(record.role == "final" for record in run.found)  # should there be time for one only
        waiting = waiting[:best_first] + _doubted(run) + waiting[best_first:]
        record = next((record for record in waiting if record.candidate.id not in skipped), None)
        if record is None:
            return list(skipped.values())
        steps = final_steps(record, run.budget)
        name, needed, left = record.candidate.id, final_seconds(record, run.budget, steps), run.budget.remaining()
        go_on = f"go on with --resume and --budget {enough_for(needed)}"
        again = any(final.candidate.id == name for final in run.found if final.role == "final")
        lacking = f"trial {record.trial} was not {'measured once more, to settle its figure' if again else 'confirmed'}"
        if left < needed:
            skipped[name] = (
                f"{lacking}: that takes about {format_duration(needed)}, "
                f"{format_duration(max(left, 0.0))} were left; {go_on}"
            )
            continue
        allowance = allow(left, patience=max(60.0, 4 * needed))
        final = _measure(run, "final", record.candidate, allowance, _memory_model(run), steps)
        if final.result.status == "interrupted":
            skipped[name] = f"{lacking}: the budget ended first; {go_on}"


def _doubted(run: _Run) -> list[TrialRecord]:
    """The trial that was most likely disturbed, if there is one and it was not run again."""
    again = {record.candidate.id for record in run.found if record.role == "final"}
    likeliest = doubted(run.space.choices, searched(run.found), run.settings)[:1]
    return [record for record in likeliest if record.candidate.id not in again]


def _measure(
    run: _Run,
    role: Role,
    candidate: Candidate,
    allowance: Allowance,
    model: MemoryModel,
    steps: Steps = "composed",
) -> TrialRecord:
    """One trial: written down, measured, judged, told, published. Raises MachineError for a failure that all trials
    would share."""
    settings, budget, number = run.settings, run.budget, 1 + max((record.trial for record in run.found), default=-1)
    log = run.directory / files.LOGS / f"trial-{number:04d}.log"
    best = decide(run.found, settings)
    request = TrialRequest(
        candidate=settings.completed(candidate),
        device=settings.device,
        result_path=str(log.with_suffix(".json")),
        memory_limit_bytes=settings.memory_limit_bytes,
        measure_seconds=measure_seconds(budget) * (2 if role == "final" else 1),
        timeout_seconds=allowance.seconds,
        stop_below_tokens_per_second=_least_speed(settings, candidate, best) if role == "search" else None,
        final=role == "final",
        steps=steps,
    )
    run.study.set_user_attr(studies.SPENT, run.spent_before + budget.elapsed())  # a kill must not make it free
    trial = studies.begin(run.study, run.space, number, role, request)
    event = Event(
        elapsed_seconds=budget.elapsed(), budget_seconds=budget.seconds, trial=number, role=role, candidate=candidate,
        verdict=best,
    )  # fmt: skip
    run.notify(event)
    prediction = predict(model, candidate)
    result = _passed_over(run, prediction, model.trials) if role == "search" else None
    if result is None:
        result = _run_within(run, request, log, allowance)
    if role == "final":
        result = _noise_said(result)
    speed = result.tokens_per_second if result.status == "ok" else None
    record = TrialRecord(
        trial=number,
        role=role,
        candidate=candidate,
        result=result,
        objective=None if speed is None else score(settings, candidate, speed),
        predicted_peak_bytes=prediction.peak_device_bytes,
        predicted_loss=None if speed is None else loss_at(settings, candidate, speed),
    )
    studies.finish(run.study, trial, record, settings.memory_limit_bytes, run.directory / studies.UNTOLD)
    run.found.append(record)
    state = _publish(run)
    run.notify(replace(event, elapsed_seconds=budget.elapsed(), record=record, verdict=state))
    if result.remedy:
        raise MachineError(result.remedy)
    return record


def _noise_said(result: TrialResult) -> TrialResult:
    """The result; where its interval is too wide to confirm anything, its message says so."""
    speed, half = result.tokens_per_second, result.tokens_per_second_ci95
    if not speed or half is None or half <= NOISY * speed:
        return result
    noisy = f"noisy: tokens/s ±{half / speed:.0%}, wider than ±{NOISY:.0%}"
    return replace(result, message="; ".join(filter(None, (result.message, noisy))))


def _run_within(run: _Run, request: TrialRequest, log: Path, allowance: Allowance) -> TrialResult:
    """The trial's result. What was written since the allowance was given, to a slow disk for example, has taken its
    time from it."""
    left = max(0.0, run.budget.remaining())
    request = replace(request, timeout_seconds=min(allowance.seconds, left))
    result = run.measure(request, log)
    if result.status == "timeout" and (allowance.ends_budget or left < allowance.seconds):
        return replace(result, status="interrupted", message="the budget ended during this trial")
    if result.status == "ok" and request.final and not request.whole_steps:
        accumulated = request.candidate.gradient_accumulation_steps
        composed = f"composed steps: whole ones of {accumulated} micro steps did not fit in the time left"
        return replace(result, message="; ".join(filter(None, [result.message, composed])))
    return result


def _least_speed(settings: SearchSettings, candidate: Candidate, best: Verdict) -> float | None:
    """Below which the candidate will not become the best; None while there is none to beat."""
    if best.winner is None or best.winner.objective is None:
        return None
    return HOPELESS * speed_needed(settings, candidate, best.winner.objective)


def _memory_model(run: _Run) -> MemoryModel:
    """The memory model, moved to what this run has measured so far."""
    return _calibrated(run.settings, run.environment, run.found)


def _calibrated(settings: SearchSettings, environment: Environment, found: list[TrialRecord]) -> MemoryModel:
    kind = settings.device_kind
    return calibrate(kind, [(record.candidate, record.result) for record in found], environment)


def _passed_over(run: _Run, prediction: Prediction, trials: int) -> TrialResult | None:
    """What is told of a candidate whose predicted peak lies beyond the limit by more than the model's own error; None
    for all others, and where the last few were all passed over: then one is measured, should the model be wrong."""
    last = [record.result.status for record in run.found[-PASSED_OVER:]]
    if prediction.low_device_bytes <= run.settings.memory_limit_bytes or last == ["predicted_over_limit"] * PASSED_OVER:
        return None
    low, high = format_bytes(prediction.low_device_bytes), format_bytes(prediction.high_device_bytes)
    return TrialResult(
        status="predicted_over_limit",
        phase="start",
        message=f"predicted to need {low} to {high}, from {trials} measured trials; not run",
        wanted_bytes=prediction.peak_device_bytes,
    )


def _publish(run: _Run, *, ended: bool = False) -> Verdict:
    run.study.set_user_attr(studies.SPENT, run.spent_before + run.budget.elapsed())
    verdict = _conclude(run.directory, run.settings, run.environment, run.space, run.study, run.found, ended=ended)
    storage.sync(run.directory)
    return verdict


def _nothing_fits(run: _Run) -> str:
    """Why there is no winner, and what to change."""
    advice = nothing_found(run.settings, run.environment, run.found)
    longer = f"go on with `autotune search --resume {run.directory} --budget {advice.budget}`"
    return f"{advice.why}; {advice.remedy or longer}"


def _trial_seconds(run: _Run) -> float:
    """Of two more trials of the kind that this run knows, one to search and one to confirm."""
    lasted = [record.result.trial_seconds for record in run.found if record.result.trial_seconds]
    return 2 * max(lasted) if lasted else 2 * trial_seconds(baseline(run.settings), run.environment, None)

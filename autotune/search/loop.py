"""One search, from settings to verdict, with every file of its run directory.

The study is written before any file, and every file is replaced atomically: a search can be killed at any moment, its
files stay readable, and `resume` continues.
"""

import shutil
import time
from collections.abc import Callable, Container
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from autotune.config.candidate import Candidate
from autotune.config.search_settings import SearchSettings, read_settings
from autotune.environment import Environment
from autotune.errors import ConfigError, InterruptedByUser, MachineError, NoFeasibleError
from autotune.measure.runner import Measure, TrainRung, run_rung, run_trial
from autotune.measure.types import Steps, TrialRequest, TrialResult
from autotune.memory.model import Prediction, calibrate, predict, save
from autotune.runs import directory as files
from autotune.runs.objective import best_first, loss_at, maximised, score, speed_needed
from autotune.runs.races import RaceVerdict, Reading, write_races
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
from autotune.search.conclude import conclude
from autotune.search.decide import searched, unconfirmed
from autotune.search.halving import Step, cost, next_rung
from autotune.search.outliers import suspected_outliers
from autotune.search.pool import by_candidate
from autotune.search.posterior import NOISY
from autotune.search.propose import Proposer
from autotune.search.race import (
    as_trial,
    as_trial_request,
    candidates_for_race,
    conclude_race,
    first_overhead,
    make_lineup,
    overhead,
    patience,
    race_notes,
    reading_of,
    rung_request,
)
from autotune.search.space import Space, baseline, build_space, guide_candidate
from autotune.search.timekeeping import Part
from autotune.units import format_bytes, format_duration

if TYPE_CHECKING:
    import optuna

PASSED_OVER = 4
"""Candidates in a row that may be skipped because of their predicted peak."""

HOPELESS = 0.7
"""Fraction of the speed needed to become the best; a trial below it is not timed to the end."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """A trial or a rung of the race begins or has ended, for whoever watches the search."""

    elapsed_seconds: float
    budget_seconds: float
    trial: int
    """Number of the trial, or of the rung where the role is `race`."""
    role: Role
    candidate: Candidate
    record: TrialRecord | None = None
    """Record of the trial that has ended; None where it begins."""
    reading: Reading | None = None
    """Reading of the rung that has ended."""
    verdict: Verdict
    """Verdict so far."""


Notify = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What proposals may use beyond the measured speeds; `scripts/replay` leaves parts out."""

    priors: bool = True
    """Prior means of speed and trial seconds (`autotune.search.priors`)."""
    memory_model: bool = True
    """Predicted peaks: their probability to fit, and skipping what is predicted not to."""


@storage.storage_errors()
def search(
    settings: SearchSettings,
    run_dir: Path,
    environment: Environment,
    *,
    measure: Measure = run_trial,
    train_rung: TrainRung = run_rung,
    notify: Notify = lambda event: None,
    clock: Callable[[], float] = time.monotonic,
    started: float | None = None,
    storage_url: str = "",
    study_storage: "optuna.storages.BaseStorage | None" = None,
    remarks: tuple[str, ...] = (),
    knowledge: Knowledge = Knowledge(),
) -> Verdict:
    """Search within the settings' budget and leave a run in `run_dir`, which must be new.

    `measure` runs one trial and `train_rung` one rung of the race: worker processes, or recorded answers. `clock`
    counts seconds; the budget counts from `started` on that clock, or from now.
    `storage_url`: with the password, which settings do not hold; `study_storage`: an open one, in its place.
    `remarks`: notes from before the search.
    Raises ConfigError, NoFeasibleError when nothing fits, InterruptedByUser after Ctrl-C.
    """
    budget = begin(settings.budget_seconds, started, clock)
    with files.new_directory(run_dir):
        if not settings.storage and (note := storage.lock_note(run_dir / files.STUDY_DB)):
            remarks = (*remarks, note)
        space = build_space(settings, environment)
        study = studies.create_study(
            run_dir, settings, url=storage_url, patience=storage.within(budget), storage=study_storage
        )
        study.set_user_attr(studies.SETTINGS, asdict(settings))
        study.set_user_attr(studies.ENVIRONMENT, asdict(environment))
        study.set_user_attr(studies.REMARKS, remarks)
        studies.keep_choices(study, space)
        run = Search(run_dir, settings, environment, space, study, budget, knowledge=knowledge)
        run.sampler_from_settings()
        files.write_inputs(run_dir, settings, environment)
        files.publish(run_dir, settings, environment, [], Verdict())
    with files.locked(run_dir), Part(run_dir, budget.started, clock) as part:
        part.follows(run_dir, 0.0)
        return run.run(measure, train_rung, notify, remarks)


@storage.storage_errors()
def resume(
    run_dir: Path,
    environment: Environment | Callable[[], Environment],
    *,
    budget_seconds: float | None = None,
    same_machine: bool = True,
    measure: Measure = run_trial,
    train_rung: TrainRung = run_rung,
    notify: Notify = lambda event: None,
    clock: Callable[[], float] = time.monotonic,
    started: float | None = None,
    remarks: tuple[str, ...] = (),
) -> Verdict:
    """Continue the search of `run_dir`. A given budget counts from now; otherwise the rest of the run's budget is used.
    A trial that was in flight when the search died is recorded as interrupted. `environment`: the machine, or a
    function that probes it, whose seconds count.

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
        whole = settings.budget_seconds if budget_seconds is None else budget_seconds
        study = studies.load_study(run_dir, settings, storage.within(begin(whole, started, clock)))
        studies.refuse_older(study, run_dir)
        studies.close_stale(study, run_dir / studies.PENDING, settings.memory_limit_bytes)
        spent = part.follows(run_dir, studies.spent_seconds(study))
        study.set_user_attr(studies.SPENT, spent + clock() - started)
        remarks = tuple(dict.fromkeys([*studies.notes_of(study, studies.REMARKS), *remarks]))  # each once
        study.set_user_attr(studies.REMARKS, remarks)
        seconds = budget_seconds if budget_seconds is not None else settings.budget_seconds - spent
        space = studies.as_begun(study, build_space(settings, here))
        budget = begin(seconds, started, clock)
        run = Search(run_dir, settings, here, space, study, budget, spent_before=spent)
        run.sampler_from_settings()
        write_csv(run_dir / files.TRIALS_CSV, run.records)  # the trial that was in flight is in it from now on
        if seconds - (clock() - started) <= (0.0 if budget_seconds else CLOSING_SECONDS):
            run.end([*studies.notes_of(study)] or ["the budget was used up when the search was resumed"])
            raise ConfigError(
                f"the budget of {run_dir} ({format_duration(settings.budget_seconds)}) is used up; "
                f"give more time with --budget, for example {enough_for(run.trial_seconds())}"
            )
        return run.run(measure, train_rung, notify, remarks)


@storage.storage_errors()
def rebuild(run_dir: Path) -> Verdict:
    """Write every file of a run again from its study, and return its verdict. Raises ConfigError without a study."""
    study = studies.load_study(run_dir, _known_settings(run_dir))
    settings, environment = studies.settings_of(study), studies.environment_of(study)
    files.write_inputs(run_dir, settings, environment)
    space, no_time = build_space(settings, environment), begin(settings.budget_seconds, 0.0, lambda: 0.0)
    run = Search(run_dir, settings, environment, space, study, no_time, spent_before=studies.spent_seconds(study))
    run.publish(ended=studies.NOTES in study.user_attrs)
    return run.verdict


def _known_settings(run_dir: Path) -> SearchSettings | None:
    """The settings in search.toml; None where it is lost or damaged and the run's own study.db holds them too."""
    try:
        return read_settings(run_dir / files.SEARCH_TOML)
    except ConfigError:
        if (run_dir / files.STUDY_DB).exists():
            return None
        if (run_dir / files.SEARCH_TOML).exists():
            raise
        return None


class Search:
    """One search: its records and what follows from them, which is computed once a trial."""

    def __init__(
        self,
        directory: Path,
        settings: SearchSettings,
        environment: Environment,
        space: Space,
        study: "optuna.Study",
        budget: Budget,
        *,
        spent_before: float = 0.0,
        knowledge: Knowledge = Knowledge(),
    ) -> None:
        """`spent_before`: seconds that earlier parts of a resumed search took."""
        self.directory, self.settings, self.environment, self.space = directory, settings, environment, space
        self.study, self.budget, self.knowledge = study, budget, knowledge
        self.records = studies.records(study)
        self.lineup, self.readings = studies.lineup_of(study), studies.readings_of(study)
        self._not_raced = ""  # why there is no race although there should be one
        self._numbers = studies.numbers(study)
        self._spent_before = spent_before
        self._notes = studies.notes_of(study)
        self._calibrate()
        self.verdict, self._marked = self._conclude(), Verdict()
        self._remarks: tuple[str, ...] = ()
        self._proposals: list[float] = []  # seconds that each one took

    def _calibrate(self) -> None:
        measured = [(record.candidate, record.result) for record in self.records]
        self.model = calibrate(self.settings.device_kind, measured, self.environment)

    def _conclude(self, *, ended: bool = False) -> Verdict:
        return conclude(
            self.records, self.settings, self.environment, self.space, spent_seconds=self._spent(), notes=self._notes,
            study=self.study if ended else None, race=self._race_verdict(),
        )  # fmt: skip

    def _race_verdict(self) -> RaceVerdict | None:
        return conclude_race(self.lineup, self.readings, self.settings) if self.lineup else None

    def sampler_from_settings(self) -> None:
        """Give the study the sampler that the settings name. Raises ConfigError."""
        self._proposer = Proposer(self.study, self.space, self.settings, self.environment, self.knowledge.priors)

    def run(self, measure: Measure, train_rung: TrainRung, notify: Notify, remarks: tuple[str, ...]) -> Verdict:
        """Search until the budget's end. `remarks` come before the search's own notes."""
        self._run_trial, self._train_rung, self._notify, self._remarks = measure, train_rung, notify, remarks
        notes: list[str] = []
        try:
            while True:  # time that confirming did not need is searched in
                before = len(self.records), len(self.readings)
                notes = self._explore() + self._race() + self._confirm()
                if (len(self.records), len(self.readings)) == before:
                    break
        except KeyboardInterrupt:
            studies.close_stale(self.study, self.directory / studies.PENDING, self.settings.memory_limit_bytes)
            self.records = studies.records(self.study)
            self._calibrate()
            self.end(["the search was interrupted"])
            raise InterruptedByUser(
                f"interrupted; {len(self.records)} trials are kept, go on with "
                f"`autotune search --resume {self.directory}`"
            ) from None
        except MachineError as error:
            self.end([str(error)])
            raise
        self.end(notes)
        if self.verdict.winner is None:
            advice = nothing_found(self.settings, self.environment, self.records)
            longer = f"go on with `autotune search --resume {self.directory} --budget {advice.budget}`"
            raise NoFeasibleError(f"{advice.why}; {advice.remedy or longer}")
        return self.verdict

    def end(self, notes: list[str]) -> None:
        """Write all files, the notes among them."""
        notes = [note for note in [*self._proposer.notes, *notes] if note not in self._remarks]
        self._notes = (*self._remarks, *notes)
        self.study.set_user_attr(studies.NOTES, self._notes)
        self._write_spent()
        self.publish(ended=True)

    def publish(self, *, ended: bool = False) -> None:
        """Conclude, replace the files that change with a trial, and mark the leader in the study."""
        self.verdict = self._conclude(ended=ended)
        if self.lineup and self.readings:
            write_races(self.directory / files.RACES_CSV, self.lineup.rivals, self.readings)
        files.publish(self.directory, self.settings, self.environment, self.records, self.verdict)
        if _leader(self.verdict) != _leader(self._marked):
            studies.mark_verdict(self.study, self.verdict, self._numbers)
            self._marked = self.verdict
        if ended:
            save(self.model, self.directory / files.MEMORY_MODEL_JSON)
        storage.sync(self.directory)

    def trial_seconds(self) -> float:
        """Estimated seconds of two more trials, one to search and one to confirm."""
        lasted = [record.result.trial_seconds for record in self.records if record.result.trial_seconds]
        return 2 * (max(lasted) if lasted else trial_seconds(baseline(self.settings), self.environment, None))

    def _explore(self) -> list[str]:
        """Baseline, guide, then what the sampler proposes, until the budget's reserve or the race. Returns notes."""
        if self.lineup is not None:
            return []
        first: dict[Role, Candidate | None] = {
            "baseline": baseline(self.settings),
            "guide": guide_candidate(self.settings, self.environment),
        }
        while True:
            known = by_candidate(self.records)
            role: Role = next((role for role, c in first.items() if c is not None and c.id not in known), "search")
            candidate, trial = first.pop(role, None), None  # once is enough, even if it is interrupted
            if candidate is None:
                ahead = max(self._proposals, default=0.0) + self._race_seconds()
                if next_allowance(self.budget, self.records, self.settings, ahead) is None:
                    return []
                before = self.budget.elapsed()
                proposal = self._proposer.propose(self.records, self.model if self.knowledge.memory_model else None)
                self._proposals.append(self.budget.elapsed() - before)
                if proposal is None:
                    return [f"all {len(known)} candidates of the space were measured before the budget's end"]
                trial, candidate = proposal
            # proposing has taken its time from it
            ahead = self._race_seconds() if role == "search" else 0.0
            allowance = next_allowance(self.budget, self.records, self.settings, ahead)
            if allowance is None:
                self._proposer.withdraw(trial)
                return [] if role == "search" else [f"the budget ended before the {role} was measured"]
            self._measure(role, candidate, allowance, trial)

    def _race_seconds(self) -> float:
        """Part of the budget that is kept for the race, once there is something to race."""
        raced = self.settings.race == "on" and not self._not_raced and searched(self.records)
        return self.settings.race_share * self.budget.seconds if raced else 0.0

    def _race(self) -> list[str]:
        """Train rivals as the rule says, as time permits. Returns notes."""
        if self.settings.race == "off" or not searched(self.records):
            return []
        if self.lineup is None and not self._not_raced:
            self._line_up()
        if self.lineup is None:
            return [self._not_raced]
        while (step := self._next_rung()) is not None:
            self._rung(step)
        race = self._race_verdict()
        kept = {} if race is None else {self._checkpoints(number) for number in race.order[:1]}
        for folder in (self.directory / files.RACE).glob("*"):
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)
        return [] if race is None else race_notes(self.lineup, race)

    def _line_up(self) -> None:
        """Choose the rivals, unless two of them take more time than there is."""
        best = best_first(searched(self.records), maximised(self.settings))[0]
        beside = first_overhead(self.records)
        rivals = candidates_for_race(self.records, self.settings)
        left = self._left_for_race()
        if next_rung(rivals, [], left, beside) is None:
            wanted = 2 * (beside + min(beside, min(rival.seconds for rival in rivals)))
            self._not_raced = (
                f"the budget is too short for a race: two rungs take about {format_duration(wanted)}, "
                f"{format_duration(max(0.0, left))} were left; the winner is by the law, not raced; give --budget "
                f"{enough_for(self.budget.seconds + wanted / self.settings.race_share)}"
            )
            return
        speed = best.result.tokens_per_second or 0.0
        self.lineup = make_lineup(rivals, Path(self.settings.recipe.data), speed, beside)
        studies.keep_lineup(self.study, self.lineup)

    def _left_for_race(self) -> float:
        """Seconds until the winner must be confirmed."""
        waiting = unconfirmed(self.records, self.settings, self._elected()) or searched(self.records)
        return self.budget.remaining() - final_seconds(waiting[0], self.budget)

    def _elected(self) -> tuple[str, ...]:
        race = self._race_verdict()
        return race.candidates if race else ()

    def _next_rung(self) -> Step | None:
        assert self.lineup is not None
        beside = overhead(self.readings, first_overhead(self.records))
        return next_rung(self.lineup.rivals, self.readings, self._left_for_race(), beside)

    def _rung(self, step: Step) -> None:
        """Run one rung and record it; the first of a candidate is its trial too, as it measures speed and memory."""
        assert self.lineup is not None
        rival = next(rival for rival in self.lineup.rivals if rival.rival == step.rival)
        number, beside = len(self.readings), overhead(self.readings, first_overhead(self.records))
        self._write_spent()  # a kill must not return the time
        event = Event(
            elapsed_seconds=self.budget.elapsed(), budget_seconds=self.budget.seconds, trial=number, role="race",
            candidate=rival.candidate, verdict=self.verdict,
        )  # fmt: skip
        self._notify(event)
        expected = cost(rival, step.fraction, self.readings, beside)
        allowance = allow(max(0.0, self._left_for_race()), patience(expected))
        request = rung_request(
            rival, step, self.lineup, device=self.settings.device, checkpoints=self._checkpoints(step.rival),
            memory_limit_bytes=self.settings.memory_limit_bytes, timeout_seconds=allowance.seconds,
            result_path=self.directory / files.LOGS / f"rung-{number:04d}.json",
            train_seconds=self.settings.train_seconds,
        )  # fmt: skip
        result = self._train_rung(request, Path(request.result_path).with_suffix(".log"))
        if result.status == "timeout" and allowance.ends_budget:
            result = replace(result, status="interrupted", message="the budget ended during this rung")
        reading = reading_of(number, step, result, rival)
        studies.keep_reading(self.study, reading)
        self.readings.append(reading)
        if any(record.role == "race" and record.candidate.id == rival.candidate.id for record in self.records):
            self.publish()
        else:
            trial = 1 + max(record.trial for record in self.records)
            attributes = studies.requested(trial, "race", as_trial_request(request))
            found = predict(self.model, rival.candidate)
            record = self._record(trial, "race", rival.candidate, as_trial(result), found)
            self._keep(self._proposer.enqueue(rival.candidate, attributes), record)
        self._notify(
            replace(event, elapsed_seconds=self.budget.elapsed(), reading=reading, verdict=self.verdict)
        )
        if result.remedy:
            raise MachineError(result.remedy)

    def _checkpoints(self, rival: int) -> Path:
        return self.directory / files.RACE / f"rival-{rival:02d}"

    def _confirm(self) -> list[str]:
        """Run the best candidates and the baseline again in fresh processes, as time permits. Returns notes."""
        skipped: dict[str, str] = {}
        while (record := self._next_to_confirm(skipped)) is not None:
            steps = final_steps(record, self.budget)
            name, left = record.candidate.id, self.budget.remaining()
            needed = final_seconds(record, self.budget, steps)
            again = any(final.candidate.id == name for final in self.records if final.role == "final")
            missing = "measured once more, to settle its figure" if again else "confirmed"
            go_on = f"go on with --resume and --budget {enough_for(needed)}"
            if left < needed:
                skipped[name] = (
                    f"trial {record.trial} was not {missing}: that takes about {format_duration(needed)}, "
                    f"{format_duration(max(left, 0.0))} were left; {go_on}"
                )
                continue
            allowance = allow(left, patience=max(60.0, 4 * needed))
            final = self._measure("final", record.candidate, allowance, steps=steps)
            if final.result.status == "interrupted":
                skipped[name] = f"trial {record.trial} was not {missing}: the budget ended first; {go_on}"
        return list(skipped.values())

    def _next_to_confirm(self, skipped: Container[str]) -> TrialRecord | None:
        """The best finalist first, should there be time for one only; then the trial that was most likely disturbed,
        unless it was run again; then the other finalists."""
        again = {record.candidate.id for record in self.records if record.role == "final"}
        suspects = suspected_outliers(self.space.choices, searched(self.records), self.settings)[:1]
        suspects = [] if self.lineup else suspects
        finalists = unconfirmed(self.records, self.settings, self._elected())
        leading = finalists[: 0 if again else 1]
        waiting = [*leading, *(r for r in suspects if r.candidate.id not in again), *finalists[len(leading) :]]
        return next((record for record in waiting if record.candidate.id not in skipped), None)

    def _measure(
        self,
        role: Role,
        candidate: Candidate,
        allowance: Allowance,
        trial: "optuna.Trial | None" = None,
        steps: Steps = "composed",
    ) -> TrialRecord:
        """Run one trial and record it. `trial`: Optuna's; None: it is enqueued. Raises MachineError for a failure that
        all trials would share."""
        number = 1 + max((record.trial for record in self.records), default=-1)
        request = self._request(number, role, candidate, allowance, steps)
        self._write_spent()  # a kill must not return the time
        attributes = studies.requested(number, role, request)
        if trial is None:
            trial = self._proposer.enqueue(candidate, attributes)
        else:
            for name, value in attributes.items():
                trial.set_user_attr(name, value)
        event = Event(
            elapsed_seconds=self.budget.elapsed(), budget_seconds=self.budget.seconds, trial=number, role=role,
            candidate=candidate, verdict=self.verdict,
        )  # fmt: skip
        self._notify(event)
        prediction = predict(self.model, candidate)
        result = (self._skipped(prediction) if role == "search" else None) or self._result(request, allowance)
        record = self._record(number, role, candidate, result, prediction)
        self._keep(trial, record)
        self._notify(replace(event, elapsed_seconds=self.budget.elapsed(), record=record, verdict=self.verdict))
        if result.remedy:
            raise MachineError(result.remedy)
        return record

    def _keep(self, trial: "optuna.Trial", record: TrialRecord) -> None:
        """Give the study and all files the record of a trial that has ended."""
        pending = self.directory / studies.PENDING
        studies.finish(self.study, trial, record, self.settings.memory_limit_bytes, pending)
        self._numbers[record.trial] = trial.number
        self.records.append(record)
        self._calibrate()
        self.publish()

    def _request(
        self, number: int, role: Role, candidate: Candidate, allowance: Allowance, steps: Steps
    ) -> TrialRequest:
        return TrialRequest(
            candidate=self.settings.completed(candidate),
            device=self.settings.device,
            result_path=str(self.directory / files.LOGS / f"trial-{number:04d}.json"),
            memory_limit_bytes=self.settings.memory_limit_bytes,
            measure_seconds=measure_seconds(self.budget) * (2 if role == "final" else 1),
            timeout_seconds=allowance.seconds,
            stop_below_tokens_per_second=self._least_speed(candidate) if role == "search" else None,
            final=role == "final",
            steps=steps,
        )

    def _least_speed(self, candidate: Candidate) -> float | None:
        """Speed below which the candidate cannot become the best; None while nothing is feasible."""
        best = self.verdict.winner.objective if self.verdict.winner else None
        return None if best is None else HOPELESS * speed_needed(self.settings, candidate, best)

    def _skipped(self, prediction: Prediction) -> TrialResult | None:
        """Result for a candidate that is skipped because even the lower bound of its predicted peak exceeds the limit;
        None for all others, and where the last few were all skipped: then one is run, should the model be wrong."""
        last = [record.result.status for record in self.records[-PASSED_OVER:]]
        fits = prediction.low_device_bytes <= self.settings.memory_limit_bytes
        if fits or not self.knowledge.memory_model or last == ["predicted_over_limit"] * PASSED_OVER:
            return None
        low, high = format_bytes(prediction.low_device_bytes), format_bytes(prediction.high_device_bytes)
        return TrialResult(
            status="predicted_over_limit",
            phase="start",
            message=f"predicted to need {low} to {high}, from {self.model.trials} measured trials; not run",
            wanted_bytes=prediction.peak_device_bytes,
        )

    def _result(self, request: TrialRequest, allowance: Allowance) -> TrialResult:
        """The measured result. Seconds since the allowance was given, on a slow disk for example, count."""
        left = max(0.0, self.budget.remaining())
        request = replace(request, timeout_seconds=min(allowance.seconds, left))
        result = self._run_trial(request, Path(request.result_path).with_suffix(".log"))
        if result.status == "timeout" and (allowance.ends_budget or left < allowance.seconds):
            return replace(result, status="interrupted", message="the budget ended during this trial")
        notes = [result.message]
        if result.status == "ok" and request.final and not request.whole_steps:
            accumulated = request.candidate.gradient_accumulation_steps
            notes.append(f"composed steps: whole ones of {accumulated} micro steps did not fit in the time left")
        speed, half = result.tokens_per_second, result.tokens_per_second_ci95
        if request.final and speed and half is not None and half > NOISY * speed:
            notes.append(f"noisy: tokens/s ±{half / speed:.0%}, wider than ±{NOISY:.0%}")
        return replace(result, message="; ".join(filter(None, notes)))

    def _record(
        self, number: int, role: Role, candidate: Candidate, result: TrialResult, prediction: Prediction
    ) -> TrialRecord:
        speed = result.tokens_per_second if result.status == "ok" else None
        return TrialRecord(
            trial=number,
            role=role,
            candidate=candidate,
            result=result,
            objective=None if speed is None else score(self.settings, candidate, speed),
            predicted_peak_bytes=prediction.peak_device_bytes,
            predicted_loss=None if speed is None else loss_at(self.settings, candidate, speed),
        )

    def _spent(self) -> float:
        """Wall clock of all parts of the search."""
        return self._spent_before + self.budget.elapsed()

    def _write_spent(self) -> None:
        self.study.set_user_attr(studies.SPENT, self._spent())


def _leader(verdict: Verdict) -> tuple[object, ...]:
    return verdict.status, verdict.winner and (verdict.winner.trial, verdict.winner.objective)

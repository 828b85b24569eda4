"""One search, from settings to verdict, with every file of its run directory.

The study is written before any file, and every file is replaced atomically: a search can be killed at any moment, its
files stay readable, and `resume` continues.
"""

import bisect
import shutil
import time
from collections.abc import Callable, Container
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from autotune.config.candidate import Candidate
from autotune.config.search_settings import SearchSettings, read_settings
from autotune.config.storage import is_server
from autotune.data.manifest import content_id
from autotune.environment import Environment, Slot
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
from autotune.search.crew import Crew, Job
from autotune.search.decide import searched, unconfirmed
from autotune.search.halving import RULE, Step, cost, next_rung
from autotune.search.outliers import suspected_outliers
from autotune.search.pool import by_candidate
from autotune.search.posterior import NOISY
from autotune.search.propose import Proposer
from autotune.search.race import (
    as_trial,
    as_trial_request,
    candidates_for_race,
    conclude_race,
    equal_tokens,
    first_overhead,
    make_lineup,
    overhead,
    patience,
    race_notes,
    reading_of,
    rung_request,
)
from autotune.search.shared import Peers, refuse_to_join
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
    device: str = ""
    """Where it runs; empty: on another machine."""
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
    start: bool = True
    """The first candidates from predicted speeds (`autotune.search.start`)."""
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
    pause: Callable[[], None] | None = None,
    started: float | None = None,
    slots: tuple[Slot, ...] = (),
    same_machine: bool = True,
    storage_url: str = "",
    study_storage: "optuna.storages.BaseStorage | None" = None,
    remarks: tuple[str, ...] = (),
    knowledge: Knowledge = Knowledge(),
) -> Verdict:
    """Search within the settings' budget and leave a run in `run_dir`, which must be new. Where a database server has a
    study of this name already, of the same search on a machine like this one, this search joins it.

    `measure` runs one trial and `train_rung` one rung of the race: worker processes, or recorded answers. `clock`
    counts seconds, and `pause` passes them until a trial may have ended; the budget counts from `started` on that
    clock, or from now. `slots`: where trials run at the same time; none: one on the settings' device.
    `storage_url`: with the password, which settings do not hold; `study_storage`: an open one, in its place.
    `remarks`: notes from before the search.
    Raises ConfigError, NoFeasibleError when nothing fits, InterruptedByUser after Ctrl-C.
    """
    budget = begin(settings.budget_seconds, started, clock)
    patience, tokens = storage.within(budget), _tokens(settings)
    with files.new_directory(run_dir):
        if not settings.storage and (note := storage.lock_note(run_dir / files.STUDY_DB)):
            remarks = (*remarks, note)
        space = build_space(settings, environment)
        new = studies.create_study(run_dir, settings, url=storage_url, patience=patience, storage=study_storage)
        study = new or studies.load_study(run_dir, settings, patience, storage_url)
        if new is None:
            refuse_to_join(studies.when_begun(study), settings, environment, tokens, same_machine=same_machine)
            settings, space = replace(settings, joined=True), studies.as_begun(study, space)
        else:
            study.set_user_attr(studies.ENVIRONMENT, asdict(environment))
            study.set_user_attr(studies.REMARKS, remarks)
            study.set_user_attr(studies.DATA, tokens)
            studies.keep_choices(study, space)
            study.set_user_attr(studies.SETTINGS, asdict(settings))  # last: others may join from now on
        run = Search(run_dir, settings, environment, space, study, budget, patience=patience, knowledge=knowledge)
        run.sampler_from_settings()
        files.write_inputs(run_dir, settings, environment)
        files.publish(run_dir, settings, environment, [], Verdict())
    shared = is_server(settings.storage)
    with files.locked(run_dir), Part(run_dir, budget.started, clock, keep=shared) as part:
        part.follows(run_dir, 0.0)
        return run.run(Crew(slots or (Slot(device=settings.device),), measure, pause), train_rung, notify, remarks)


def _tokens(settings: SearchSettings) -> str:
    return content_id(Path(settings.recipe.data)) if settings.recipe.data and settings.storage else ""


@storage.storage_errors()
def resume(
    run_dir: Path,
    environment: Environment | Callable[[SearchSettings], tuple[Environment, tuple[Slot, ...]]],
    *,
    budget_seconds: float | None = None,
    same_machine: bool = True,
    measure: Measure = run_trial,
    train_rung: TrainRung = run_rung,
    notify: Notify = lambda event: None,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[], None] | None = None,
    started: float | None = None,
    remarks: tuple[str, ...] = (),
) -> Verdict:
    """Continue the search of `run_dir`. A given budget counts from now; otherwise the rest of the run's budget is used.
    A trial that was in flight when the search died is recorded as interrupted. `environment`: the machine, or a
    function that probes it and its slots, whose seconds count.

    Raises what `search` raises, and ConfigError for another machine or torch than the run's, whose numbers
    cannot be compared, unless `same_machine` is False.
    """
    started = clock() if started is None else started
    settings = read_settings(run_dir / files.SEARCH_TOML)
    shared = is_server(settings.storage)
    with files.locked(run_dir), Part(run_dir, started, clock, keep=shared) as part:
        files.remove_leftovers(run_dir)
        alone = (Slot(device=settings.device),)
        here, slots = environment(settings) if callable(environment) else (environment, alone)
        if same_machine:
            files.refuse_another_machine(run_dir, here)
        whole = settings.budget_seconds if budget_seconds is None else budget_seconds
        patience = storage.within(begin(whole, started, clock))
        study = studies.load_study(run_dir, settings, patience)
        studies.refuse_older(study, run_dir)
        studies.close_stale(study, run_dir, settings.memory_limit_bytes)
        spent = part.follows(run_dir, 0.0 if shared else studies.spent_seconds(study))
        if not shared:
            study.set_user_attr(studies.SPENT, spent + clock() - started)
        remarks = tuple(dict.fromkeys([*studies.notes_of(study, studies.REMARKS), *remarks]))  # each once
        study.set_user_attr(studies.REMARKS, remarks)
        seconds = budget_seconds if budget_seconds is not None else settings.budget_seconds - spent
        space = studies.as_begun(study, build_space(settings, here))
        budget = begin(seconds, started, clock)
        run = Search(run_dir, settings, here, space, study, budget, patience=patience, spent_before=spent)
        run.sampler_from_settings()
        write_csv(run_dir / files.TRIALS_CSV, run.records)  # the trial that was in flight is in it from now on
        if seconds - (clock() - started) <= (0.0 if budget_seconds else CLOSING_SECONDS):
            run.end([*studies.notes_of(study)] or ["the budget was used up when the search was resumed"])
            raise ConfigError(
                f"the budget of {run_dir} ({format_duration(settings.budget_seconds)}) is used up; "
                f"give more time with --budget, for example {enough_for(run.trial_seconds())}"
            )
        return run.run(Crew(slots, measure, pause), train_rung, notify, remarks)


@storage.storage_errors()
def rebuild(run_dir: Path) -> Verdict:
    """Write every file of a run again from its study, and return its verdict. Raises ConfigError without a study."""
    known = _known_settings(run_dir)
    study = studies.load_study(run_dir, known)
    own = known is not None and is_server(known.storage)  # there, the study's settings are those of its first machine
    settings = known if known is not None and own else studies.settings_of(study)
    environment = studies.environment_of(study)
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
        patience: storage.Patience = storage.in_a_minute,
        spent_before: float = 0.0,
        knowledge: Knowledge = Knowledge(),
    ) -> None:
        """`spent_before`: seconds that earlier parts of a resumed search took."""
        self.directory, self.settings, self.environment, self.space = directory, settings, environment, space
        self.study, self.budget, self.knowledge = study, budget, knowledge
        self._patience, self._journal = patience, studies.Journal(directory)
        self._elsewhere: list[tuple[Candidate, Role]] = []  # what other machines measure
        self._measured = 0  # trials of this process
        self.records = studies.records(study)
        shared = studies.heartbeats_are_kept(study._storage)
        self._peers = Peers(study, {record.trial for record in self.records}) if shared else None
        self.lineup, self.readings = studies.lineup_of(study), studies.readings_of(study)
        self._not_raced = ""  # why there is no race although there should be one
        self._spent_before = spent_before
        self._notes = studies.notes_of(study)
        self._calibrate()
        self.verdict, self._marked = self._conclude(), Verdict()
        self._notify: Notify = lambda event: None
        self._remarks: tuple[str, ...] = ()
        self._left: list[str] = []  # notes on devices that have left
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
        self._proposer = Proposer(
            self.study, self.space, self.settings, self.environment, self.knowledge.priors, self.knowledge.start
        )

    def run(self, crew: Crew, train_rung: TrainRung, notify: Notify, remarks: tuple[str, ...]) -> Verdict:
        """Search until the budget's end. `remarks` come before the search's own notes."""
        self._crew, self._train_rung, self._notify, self._remarks = crew, train_rung, notify, remarks
        self._patience.meanwhile = self._keep_on_disk
        notes: list[str] = []
        try:
            while True:  # time that confirming did not need is searched in
                before = self._measured, len(self.readings)
                notes = self._explore() + self._race() + self._confirm()
                if (self._measured, len(self.readings)) == before:
                    break
        except KeyboardInterrupt:
            self._keep_on_disk()  # what has ended is not lost
            for job in crew.stop():
                studies.interrupt(self.study, job.trial)
            studies.close_stale(self.study, self.directory, self.settings.memory_limit_bytes)
            if self._peers is None:
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
        finally:
            self._keep_on_disk()
            crew.stop()
        self.end(notes)
        if self.verdict.winner is None:
            advice = nothing_found(self.settings, self.environment, self.records)
            longer = f"go on with `autotune search --resume {self.directory} --budget {advice.budget}`"
            raise NoFeasibleError(f"{advice.why}; {advice.remedy or longer}")
        return self.verdict

    def end(self, notes: list[str]) -> None:
        """Write all files, the notes among them."""
        notes = [note for note in [*self._proposer.notes, *self._left, *notes] if note not in self._remarks]
        if self._peers is not None:
            self._read_peers()
            self.lineup, self.readings = studies.lineup_of(self.study), studies.readings_of(self.study)
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
            studies.mark_verdict(self.study, self.verdict)
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
        self._first: dict[Role, Candidate | None] = {
            "baseline": baseline(self.settings),
            "guide": guide_candidate(self.settings, self.environment),
        }
        self._why: list[str] = []
        self._crew.work(self._next_trial, self._record_job, self._watch)
        return self._why

    def _next_trial(self, slot: Slot) -> Job | None:
        """What a slot measures next in exploring; None, with the reason in `_why`, where nothing is left to do."""
        while True:
            self._read_peers()
            pending = self._pending(final=False)
            known = by_candidate(self.records).keys() | {candidate.id for candidate in pending}
            role: Role = next(
                (role for role, c in self._first.items() if c is not None and c.id not in known), "search"
            )
            candidate, trial = self._first.pop(role, None), None  # once is enough, even if it is interrupted
            if candidate is None:
                ahead = max(self._proposals, default=0.0) + self._race_seconds()
                if self._allowance(ahead) is None:
                    return None
                before = self.budget.elapsed()
                model = self.model if self.knowledge.memory_model else None
                taken = None if self._peers is None else self._taken
                proposal = self._proposer.propose(self.records, model, pending, taken)
                self._proposals.append(self.budget.elapsed() - before)
                if proposal is None:
                    if not pending:
                        self._why = [f"all {len(known)} candidates of the space were measured before the budget's end"]
                    return None
                trial, candidate = proposal
            # proposing has taken its time from it
            allowance = self._allowance(self._race_seconds() if role == "search" else 0.0)
            if allowance is None:
                if trial is not None:
                    studies.withdraw(self.study, trial)
                self._why = [] if role == "search" else [f"the budget ended before the {role} was measured"]
                return None
            if (job := self._begin(slot, role, candidate, allowance, trial)) is not None:
                return job

    def _taken(self) -> set[str]:
        """Candidates that are measured by now, or about to be."""
        self._read_peers()
        return {*by_candidate(self.records), *(candidate.id for candidate in self._pending(final=False))}

    def _allowance(self, ahead: float) -> Allowance | None:
        return next_allowance(self.budget, self.records, self.settings, ahead, at_once=self._finals_at_once)

    @property
    def _finals_at_once(self) -> int:
        """Finals run alone on the CPU: beside others they would share its memory bandwidth and caches, and the figure
        would depend on what happens to run there. Cards have memory of their own."""
        return 1 if self.settings.device_kind == "cpu" else max(1, len(self._crew.slots))

    def _pending(self, *, final: bool) -> list[Candidate]:
        """Candidates that are being searched, or confirmed, here or on other machines."""
        here = [job.candidate for job in self._crew.jobs if (job.role == "final") == final]
        return [*here, *(c for c, role in self._elsewhere if (role == "final") == final)]

    def _read_peers(self) -> None:
        """Take over what other machines have measured since the last look, and what they measure now."""
        if self._peers is None:
            return
        new, claims = self._peers.read()
        self._elsewhere = [(claim.candidate, claim.role) for claim in claims]
        for record in new:
            bisect.insort(self.records, record, key=lambda record: record.trial)
        if new:
            self._calibrate()
        for record in new:
            self._notify(self._event(record.trial, record.role, record.candidate, record=record))

    def _watch(self) -> None:
        """Say that this machine lives."""
        if self._peers is not None:
            self._peers.beat(job.trial for job in self._crew.jobs)

    def _keep_on_disk(self) -> None:
        """Keep in the run's directory what has ended while the study's server is away."""
        for job, result in self._crew.look():
            self._journal.add(self._record_of(job, self._judged(job, result)))

    def _race_seconds(self) -> float:
        """Part of the budget that is kept for the race, once there is something to race."""
        raced = self._races and not self._not_raced and searched(self.records)
        return self.settings.race_share * self.budget.seconds if raced else 0.0

    @property
    def _races(self) -> bool:
        return self.settings.race == "on" and not self.settings.joined

    def _race(self) -> list[str]:
        """Train rivals as the rule says, as time permits. Returns notes."""
        if not self._races or not searched(self.records):
            return []
        if self.lineup is None and not self._not_raced:
            self._line_up()
        if self.lineup is None:
            return [self._not_raced]
        while (step := self._next_rung()) is not None:
            self._rung(step)
        race = self._race_verdict()
        kept = {self._checkpoints(number) for number in race.order[: RULE.eta]} if race else set()
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
        waiting = (unconfirmed(self.records, self.settings, self._elected()) or searched(self.records))[0]
        # a rung does not verify and warm up as a final does, but the trial of the same shape did
        alike = [record for record in searched(self.records) if record.candidate.shape == waiting.candidate.shape]
        needed = max(final_seconds(record, self.budget) for record in (waiting, *alike))
        return self.budget.remaining() - needed

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
            tokens=equal_tokens(
                rival, step.fraction, self.lineup, self.readings, self.records, self.settings.train_seconds
            ),
        )  # fmt: skip
        result = self._train_rung(request, Path(request.result_path).with_suffix(".log"))
        if result.status == "timeout" and allowance.ends_budget:
            result = replace(result, status="interrupted", message="the budget ended during this rung")
        if not any(record.role == "race" and record.candidate.id == rival.candidate.id for record in self.records):
            attributes = studies.requested("race", as_trial_request(request), self._fingerprint, self._spent())
            trial, found = self._proposer.claim(rival.candidate, attributes), predict(self.model, rival.candidate)
            self._keep(trial, self._record(trial.number, "race", rival.candidate, as_trial(result), found))
        reading = reading_of(number, step, result, rival)
        studies.keep_reading(self.study, reading)
        self.readings.append(reading)
        self.publish()
        self._notify(replace(event, elapsed_seconds=self.budget.elapsed(), reading=reading, verdict=self.verdict))
        if result.remedy:
            raise MachineError(result.remedy)

    def _checkpoints(self, rival: int) -> Path:
        return self.directory / files.RACE / f"rival-{rival:02d}"

    def _confirm(self) -> list[str]:
        """Run the best candidates and the baseline again in fresh processes, as time permits. Returns notes."""
        self._skipped: dict[str, str] = {}
        self._crew.work(self._next_final, self._record_job, self._watch, at_once=self._finals_at_once)
        return list(self._skipped.values())

    def _next_final(self, slot: Slot) -> Job | None:
        """What a slot confirms next; None where nothing is left to do."""
        self._read_peers()
        while (record := self._next_to_confirm(self._skipped)) is not None:
            steps = final_steps(record, self.budget)
            name, left = record.candidate.id, self.budget.remaining()
            needed = final_seconds(record, self.budget, steps)
            if left < needed:
                took = f"that takes about {format_duration(needed)}, {format_duration(max(left, 0.0))} were left"
                self._skip_final(record.candidate, f"{took}; {self._go_on(needed)}")
                continue
            allowance = allow(left, patience=max(60.0, 4 * needed))
            if (job := self._begin(slot, "final", record.candidate, allowance, steps=steps)) is not None:
                return job
            self._read_peers()
            if name not in {candidate.id for candidate in self._pending(final=True)}:
                return None  # it has just been confirmed elsewhere
        return None

    def _skip_final(self, candidate: Candidate, why: str) -> None:
        """Note that a candidate was not confirmed."""
        record = by_candidate(self.records).get(candidate.id)
        again = any(final.candidate.id == candidate.id for final in self.records if final.role == "final")
        missing = "measured once more, to settle its figure" if again else "confirmed"
        number = (
            next(r.trial for r in self.records if r.candidate.id == candidate.id) if record is None else record.trial
        )
        self._skipped[candidate.id] = f"trial {number} was not {missing}: {why}"

    def _go_on(self, seconds: float) -> str:
        return f"go on with --resume and --budget {enough_for(seconds)}"

    def _next_to_confirm(self, skipped: Container[str]) -> TrialRecord | None:
        """The best finalist first, should there be time for one only; then the trial that was most likely disturbed,
        unless it was run again; then the other finalists."""
        again = {record.candidate.id for record in self.records if record.role == "final"}
        suspects = suspected_outliers(self.space.choices, searched(self.records), self.settings)[:1]
        suspects = [] if self.lineup else suspects
        finalists = unconfirmed(self.records, self.settings, self._elected())
        leading = finalists[: 0 if again else 1]
        waiting = [*leading, *(r for r in suspects if r.candidate.id not in again), *finalists[len(leading) :]]
        running = {candidate.id for candidate in self._pending(final=True)}
        left = (r for r in waiting if r.candidate.id not in skipped and r.candidate.id not in running)
        return next(left, None)

    def _begin(
        self,
        slot: Slot,
        role: Role,
        candidate: Candidate,
        allowance: Allowance,
        trial: "optuna.Trial | None" = None,
        steps: Steps = "composed",
    ) -> Job | None:
        """A trial that has begun in the study; None where another machine has just begun with the same. `trial`:
        Optuna's; None: a new one."""
        request = self._request(slot, role, candidate, allowance, steps)
        attributes = studies.requested(role, request, self._fingerprint, self._spent())
        trial = self._proposer.claim(candidate, attributes, trial)
        number = trial.number
        if self._peers is not None and self._peers.has_lost(number, candidate, role):
            studies.withdraw(self.study, trial)
            return None
        self._notify(self._event(number, role, candidate, device=slot.device))
        prediction = predict(self.model, candidate)
        left = max(0.0, self.budget.remaining())  # seconds since the allowance was given, on a slow disk, count
        log = self.directory / files.LOGS / f"trial-{number:04d}.json"
        return Job(
            slot=slot, trial=trial, role=role, candidate=candidate, prediction=prediction,
            request=replace(request, result_path=str(log), timeout_seconds=min(allowance.seconds, left)),
            allowance=allowance, answer=self._passed_over(prediction) if role == "search" else None,
        )  # fmt: skip

    def _event(
        self, number: int, role: Role, candidate: Candidate, *, device: str = "", record: TrialRecord | None = None
    ) -> Event:
        return Event(
            elapsed_seconds=self.budget.elapsed(), budget_seconds=self.budget.seconds, trial=number, role=role,
            candidate=candidate, device=device, record=record, verdict=self.verdict,
        )  # fmt: skip

    def _record_job(self, job: Job, result: TrialResult) -> None:
        """Record what a slot has measured. A device that fails leaves; MachineError where none is left."""
        self._measured += 1
        judged = self._judged(job, result)
        others = [slot for slot in self._crew.slots if slot != job.slot]
        if result.remedy and others:  # the candidate is not at fault: another device may run it
            self._crew.slots = others
            self._left.append(f"{job.slot.device} left the search: {result.remedy}")
            judged = replace(judged, status="interrupted", message=result.remedy)
        record = self._keep(job.trial, self._record_of(job, judged))
        self._notify(self._event(job.trial.number, job.role, job.candidate, device=job.slot.device, record=record))
        if job.role == "final" and judged.status == "interrupted":
            self._skip_final(job.candidate, f"the budget ended first; {self._go_on(result.trial_seconds or 0.0)}")
        if result.remedy and not others:
            raise MachineError(result.remedy)

    def _record_of(self, job: Job, result: TrialResult) -> TrialRecord:
        return self._record(job.trial.number, job.role, job.candidate, result, job.prediction)

    def _keep(self, trial: "optuna.Trial", record: TrialRecord) -> TrialRecord | None:
        """Give the study and all files the record of a trial that has ended. Returns it as the study holds it; None
        where it was given to another machine meanwhile."""
        kept = studies.finish(self.study, trial, record, self.settings.memory_limit_bytes, self._journal)
        if self._peers is not None:
            self._peers.done(trial.number if kept is None else kept.trial)
        if kept is not None:
            bisect.insort(self.records, kept, key=lambda record: record.trial)
        self._calibrate()
        self.publish()
        return kept

    @property
    def _fingerprint(self) -> str:
        return self.environment.alike.fingerprint

    def _request(
        self, slot: Slot, role: Role, candidate: Candidate, allowance: Allowance, steps: Steps
    ) -> TrialRequest:
        return TrialRequest(
            candidate=self.settings.completed(candidate),
            device=slot.device,
            result_path="",
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

    def _passed_over(self, prediction: Prediction) -> TrialResult | None:
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

    def _judged(self, job: Job, result: TrialResult) -> TrialResult:
        """The result, with what it means in this search."""
        request, allowance = job.request, job.allowance
        if result.status == "timeout" and (allowance.ends_budget or request.timeout_seconds < allowance.seconds):
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
        if self._peers is not None:  # other machines have times of their own, which their run directories hold
            return
        self.study.set_user_attr(studies.SPENT, self._spent())


def _leader(verdict: Verdict) -> tuple[object, ...]:
    return verdict.status, verdict.winner and (verdict.winner.trial, verdict.winner.objective)

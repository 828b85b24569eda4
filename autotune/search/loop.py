"""One search, from settings to verdict, with every file of its run directory.

The study is written before any file, and every file is replaced atomically: a search can be killed at any moment, its
files stay readable, and `resume` continues. Its phases: `explore`, `race_phase`, `confirm`; what they share: `state`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from autotune.config.search_settings import SearchSettings, read_settings
from autotune.config.storage import is_server
from autotune.data.manifest import content_id
from autotune.environment import Environment, Slot
from autotune.errors import ConfigError, InterruptedByUser, MachineError, NoFeasibleError
from autotune.measure.runner import Measure, TrainRung, run_rung, run_trial
from autotune.runs import directory as files
from autotune.runs.records import write_csv
from autotune.runs.verdict import Verdict
from autotune.search import storage, study_trials
from autotune.search import study as studies
from autotune.search.advice import enough_for_more, nothing_found
from autotune.search.budget import CLOSING_SECONDS, begin
from autotune.search.confirm import Confirmation
from autotune.search.crew import Crew, TrialJob
from autotune.search.explore import Exploration
from autotune.search.propose import EVERYTHING, Knowledge, Proposer
from autotune.search.race_phase import Race
from autotune.search.shared import refuse_to_join
from autotune.search.space import build_space
from autotune.search.state import Notify, State
from autotune.search.timekeeping import Part
from autotune.search.trials import Trials
from autotune.units import format_duration

if TYPE_CHECKING:
    pass


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
    remarks: tuple[str, ...] = (),
    knowledge: Knowledge = EVERYTHING,
) -> Verdict:
    """Search within the settings' budget and leave a run in `run_dir`, which must be new. Where a database server has a
    study of this name already, of the same search on a machine like this one, this search joins it.

    `measure` runs one trial and `train_rung` one rung of the race: worker processes, or recorded answers. `clock`
    counts seconds, and `pause` passes them until a trial may have ended; the budget counts from `started` on that
    clock, or from now. `slots`: where trials run at the same time; none: one on the settings' device.
    `storage_url`: with the password, which settings do not hold.
    `remarks`: notes from before the search.
    Raises ConfigError, NoFeasibleError when nothing fits, InterruptedByUser after Ctrl-C.
    """
    budget = begin(settings.budget_seconds, started, clock)
    patience, tokens = storage.within(budget.remaining), _tokens(settings)
    with files.new_directory(run_dir):
        if not settings.storage and (note := storage.lock_note(run_dir / files.STUDY_DB)):
            remarks = (*remarks, note)
        space = build_space(settings, environment)
        new = studies.create_study(run_dir, settings, url=storage_url, patience=patience)
        study = new or studies.load_study(run_dir, settings, patience, storage_url)
        if new is None:
            refuse_to_join(studies.when_begun(study), settings, environment, tokens, same_machine=same_machine)
            settings, space = replace(settings, joined=True), studies.as_begun(study, space)
        else:
            studies.describe(study, settings, environment, space, remarks, tokens)
        state = State(run_dir, settings, environment, space, study, budget, notify=notify)
        proposer = Proposer(study, space, settings, environment, knowledge)
        files.write_inputs(run_dir, settings, environment)
        files.publish(run_dir, settings, environment, [], Verdict())
    shared = is_server(settings.storage)
    with files.locked(run_dir), Part(run_dir, budget.started, clock, keep=shared) as part:
        part.follows(run_dir, 0.0)
        crew = Crew(slots or (Slot(device=settings.device),), measure, train_rung, pause)
        return _run(state, proposer, crew, patience, remarks)


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
        patience = storage.within(begin(whole, started, clock).remaining)
        # its server was reached once: it may be starting again
        study = studies.load_study(run_dir, settings, patience, at_first=storage.in_a_minute)
        studies.refuse_older(study, run_dir)
        study_trials.close_stale(study, run_dir, settings.memory_limit_bytes)
        spent = part.follows(run_dir, 0.0 if shared else studies.spent_seconds(study))
        if not shared:
            study.set_user_attr(studies.SPENT, spent + clock() - started)
        remarks = tuple(dict.fromkeys([*studies.notes_of(study, studies.REMARKS), *remarks]))  # each once
        study.set_user_attr(studies.REMARKS, remarks)
        seconds = budget_seconds if budget_seconds is not None else settings.budget_seconds - spent
        space = studies.as_begun(study, build_space(settings, here))
        budget = begin(seconds, started, clock)
        state = State(run_dir, settings, here, space, study, budget, spent_before=spent, notify=notify)
        proposer = Proposer(study, space, settings, here)
        write_csv(run_dir / files.TRIALS_CSV, state.records)  # the trial that was in flight is in it from now on
        if seconds - (clock() - started) <= (0.0 if budget_seconds else CLOSING_SECONDS):
            state.end(studies.notes_of(study) or ["the budget was used up when the search was resumed"])
            raise ConfigError(
                f"the budget of {run_dir} ({format_duration(settings.budget_seconds)}) is used up; "
                f"give more time with --budget, for example {enough_for_more(settings, here, state.records)}"
            )
        return _run(state, proposer, Crew(slots, measure, train_rung, pause), patience, remarks)


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
    state = State(run_dir, settings, environment, space, study, no_time, spent_before=studies.spent_seconds(study))
    state.publish(ended=studies.NOTES in study.user_attrs)
    return state.verdict


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


def _run(
    state: State, proposer: Proposer, crew: Crew, patience: storage.Patience, remarks: Sequence[str]
) -> Verdict:
    """Search until the budget's end. `remarks` come before the search's own notes."""
    trials = Trials(state, proposer, crew)
    race = Race(state, trials, proposer)
    phases = Exploration(state, trials, proposer, race.kept_seconds), race, Confirmation(state, trials)

    def end(notes: Sequence[str]) -> None:
        own = (note for note in (*proposer.notes, *trials.gone, *notes) if note not in remarks)
        state.end([*remarks, *own])

    patience.meanwhile = trials.keep_on_disk
    try:
        while True:  # time that confirming did not need is searched in
            before = trials.ended, len(state.readings)
            notes = [note for phase in phases for note in phase.run()]
            if (trials.ended, len(state.readings)) == before:
                break
    except KeyboardInterrupt:
        trials.keep_on_disk()  # what has ended is not lost
        for job in crew.stop():
            if isinstance(job, TrialJob):
                study_trials.interrupt(state.study, job.trial)
        study_trials.close_stale(state.study, state.directory, state.settings.memory_limit_bytes)
        state.read_again()
        end(["the search was interrupted"])
        raise InterruptedByUser(
            f"interrupted; {len(state.records)} trials are kept, go on with "
            f"`autotune search --resume {state.directory}`"
        ) from None
    except MachineError as error:
        end([str(error)])
        raise
    finally:
        trials.keep_on_disk()
        crew.stop()
    end(notes)
    if state.verdict.winner is None:
        advice = nothing_found(state.settings, state.environment, state.records)
        longer = f"go on with `autotune search --resume {state.directory} --budget {advice.budget}`"
        raise NoFeasibleError(f"{advice.why}; {advice.remedy or longer}")
    return state.verdict

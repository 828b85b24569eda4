"""What one search knows so far, and how it is kept: a record goes to the study first, then to the files."""

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autotune.config.candidate import Candidate
from autotune.config.search_settings import SearchSettings
from autotune.environment import Environment
from autotune.measure.types import TrialRequest, TrialResult
from autotune.memory.model import MemoryModel, Prediction, calibrate, save
from autotune.runs import directory as files
from autotune.runs.objective import loss_at, score
from autotune.runs.races import Lineup, RaceVerdict, Reading, write_races
from autotune.runs.records import Role, TrialRecord
from autotune.runs.verdict import Verdict
from autotune.search import storage, study_trials
from autotune.search import study as studies
from autotune.search.budget import Budget
from autotune.search.conclude import conclude
from autotune.search.race import conclude_race
from autotune.search.shared import Claim, Peers
from autotune.search.space import Space

if TYPE_CHECKING:
    import optuna


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

_PUBLISHED_SECONDS = 2.0
"""Shortest time between two rewrites of a run's files where machines share the study: many trials end there, and each
conclusion considers all of them. The study holds everything, and the end of the search writes the files once more."""


class State:
    """One search so far: its records and what follows from them, which is computed once a trial."""

    def __init__(
        self, directory: Path, settings: SearchSettings, environment: Environment, space: Space, study: "optuna.Study",
        budget: Budget, *, spent_before: float = 0.0, notify: Notify = lambda event: None,
    ) -> None:  # fmt: skip
        """`spent_before`: seconds that earlier parts of a resumed search took."""
        self.directory, self.settings, self.environment, self.space = directory, settings, environment, space
        self.study, self.budget = study, budget
        self.records = study_trials.records(study)
        self.lineup, self.readings = studies.lineup_of(study), studies.readings_of(study)
        self.peers = Peers(study, {record.trial for record in self.records}) if studies.is_shared(study) else None
        self.elsewhere: list[Claim] = []
        """What other machines measure."""
        self._spent_before, self._notify, self._journal = spent_before, notify, study_trials.Journal(directory)
        self._notes = studies.notes_of(study)
        self._model: MemoryModel | None = None
        self.verdict, self._marked = self._conclude(), Verdict()
        self._published = -math.inf

    @property
    def model(self) -> MemoryModel:
        """The memory model, fitted to the records when it is asked for: others' records come several at a time."""
        if self._model is None:
            measured = [(record.candidate, record.result) for record in self.records]
            self._model = calibrate(self.settings.device_kind, measured, self.environment)
        return self._model

    def _conclude(self, *, ended: bool = False) -> Verdict:
        return conclude(
            self.records, self.settings, self.environment, self.space, spent_seconds=self.spent(), notes=self._notes,
            study=self.study if ended else None, race=self.race(),
        )  # fmt: skip

    def race(self) -> RaceVerdict | None:
        """What the race shows so far; None while nothing was read."""
        return conclude_race(self.lineup, self.readings, self.settings) if self.lineup else None

    def elected(self) -> tuple[str, ...]:
        """Ids of the candidates that the race prefers, best first."""
        race = self.race()
        return race.candidates if race else ()

    def spent(self) -> float:
        """Wall clock of all parts of the search."""
        return self._spent_before + self.budget.elapsed()

    def keep_spent(self) -> None:
        """Write the time into the study, so that a kill does not return it. Of several machines, each has times of its
        own, which its run directory holds."""
        if self.peers is None:
            self.study.set_user_attr(studies.SPENT, self.spent())

    def attributes(self, role: Role, request: TrialRequest) -> dict[str, object]:
        """Attributes of a trial that is about to be measured."""
        return study_trials.requested(role, request, self.environment.alike.fingerprint, self.spent())

    def record_of(
        self, number: int, role: Role, candidate: Candidate, result: TrialResult, prediction: Prediction
    ) -> TrialRecord:
        """Record of a trial that has ended, which is not kept yet."""
        speed = result.tokens_per_second if result.status == "ok" else None
        return TrialRecord(
            trial=number, role=role, candidate=candidate, result=result,
            objective=None if speed is None else score(self.settings, candidate, speed),
            predicted_peak_bytes=prediction.peak_device_bytes,
            predicted_loss=None if speed is None else loss_at(self.settings, candidate, speed),
        )  # fmt: skip

    def keep(self, trial: study_trials.OpenTrial, record: TrialRecord) -> TrialRecord | None:
        """Give the study and all files the record of a trial that has ended. Returns it as the study holds it; None
        where it was given to another machine meanwhile."""
        kept = study_trials.finish(self.study, trial, record, self.settings.memory_limit_bytes, self._journal)
        if self.peers is not None:
            self.peers.done(trial.number if kept is None else kept.trial)
        self._add([] if kept is None else [kept])
        if self.peers is None or self.budget.elapsed() - self._published >= _PUBLISHED_SECONDS:
            self.publish()
        return kept

    def keep_on_disk(self, records: Iterable[TrialRecord]) -> None:
        """Keep records in the run's directory while the study's server is away."""
        for record in records:
            self._journal.add(record)

    def keep_lineup(self, lineup: Lineup) -> None:
        self.lineup = lineup
        studies.keep_lineup(self.study, lineup)

    def keep_reading(self, reading: Reading) -> None:
        studies.keep_reading(self.study, reading)
        self.readings.append(reading)
        self.publish()

    def _add(self, records: Sequence[TrialRecord]) -> None:
        for record in records:
            bisect.insort(self.records, record, key=lambda record: record.trial)
            self._model = None

    def read_peers(self, older_than: float = 0.0) -> None:
        """Take over what other machines have measured since the last look, and what they measure now, unless the last
        look is not `older_than` so many seconds."""
        if self.peers is None or self.peers.seconds_since_read() < older_than:
            return
        new, self.elsewhere = self.peers.read()
        self._add(new)
        for record in new:
            self.tell(record.trial, record.role, record.candidate, record=record)

    def read_again(self) -> None:
        """Take over what ended without a record of this process."""
        if self.peers is None:
            self.records, self._model = study_trials.records(self.study), None

    def tell(
        self, number: int, role: Role, candidate: Candidate, *, device: str = "", record: TrialRecord | None = None,
        reading: Reading | None = None,
    ) -> None:  # fmt: skip
        """Tell whoever watches of a trial or a rung."""
        event = Event(
            elapsed_seconds=self.budget.elapsed(), budget_seconds=self.budget.seconds, trial=number, role=role,
            candidate=candidate, device=device, record=record, reading=reading, verdict=self.verdict,
        )  # fmt: skip
        self._notify(event)

    def publish(self, *, ended: bool = False) -> None:
        """Conclude, replace the files that change with a trial, and mark the leader in the study."""
        self._published = self.budget.elapsed()
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

    def end(self, notes: Sequence[str]) -> None:
        """Write all files, the notes among them."""
        if self.peers is not None:
            self.read_peers()
            self.lineup, self.readings = studies.lineup_of(self.study), studies.readings_of(self.study)
        self._notes = tuple(notes)
        self.study.set_user_attr(studies.NOTES, self._notes)
        self.keep_spent()
        self.publish(ended=True)


def _leader(verdict: Verdict) -> tuple[object, ...]:
    return verdict.status, verdict.winner and (verdict.winner.trial, verdict.winner.objective)

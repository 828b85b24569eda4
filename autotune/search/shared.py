"""One study for several machines: who may join, which trial belongs to whom, and what becomes of a dead machine's.

The database is the only coordinator. It numbers trials one after the other, so of two that begin with one candidate at
the same moment, the lower number stays. Ages are measured by one clock each: the database's for heartbeats, this
process's own for the rest.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, get_args

from autotune.config.candidate import Candidate
from autotune.config.search_settings import SearchSettings, refuse_other_search
from autotune.environment import Environment, differences
from autotune.errors import ConfigError
from autotune.runs.records import Role, TrialRecord
from autotune.search import study as studies
from autotune.search import study_trials, tables
from autotune.search.storage import BEAT_SECONDS, GRACE_SECONDS

if TYPE_CHECKING:
    import optuna


def refuse_to_join(
    study: "optuna.Study", settings: SearchSettings, here: Environment, data: str, *, same_machine: bool
) -> None:
    """Raise ConfigError unless a process with these settings, machine and tokens may take part in the study."""
    name = f"the study {settings.name!r}"
    studies.refuse_older(study, name)
    refuse_other_search(studies.settings_of(study), settings, name)
    tokens = study.user_attrs.get(studies.DATA, "")
    if tokens != data:
        raise ConfigError(
            f"--data {settings.recipe.data or 'none'} holds other tokens ({data or 'none'}) than those of {name} "
            f"({tokens or 'none'}); give a copy of the same directory"
        )
    there = studies.environment_of(study)
    if same_machine and (changes := differences(asdict(there.alike), here.alike)):
        raise ConfigError(
            f"{name} was begun on another machine ({', '.join(changes)}), figures do not compare; give another --name, "
            "or mix them with --other-machine"
        )


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A trial that runs."""

    number: int
    candidate: Candidate
    role: Role


class Peers:
    """The trials of a shared study, read as far as they are new."""

    def __init__(
        self, study: "optuna.Study", known: Iterable[int] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`known`: numbers of trials whose records are known."""
        self._study, self._clock = study, clock
        self._latest = -1  # number of the latest trial that was there at the last look
        self._done = set(known)  # numbers of those that have ended
        self._claims: dict[int, Claim] = {}
        self._unclaimed: set[int] = set()  # numbers of those that run, and do not say yet what they measure
        self._first_seen: dict[int, float] = {}  # when each running trial was seen first
        self._since, self._looked = clock(), clock()
        self._read = -math.inf

    def seconds_since_read(self) -> float:
        """Age of what is known; infinite before the first look."""
        return self._clock() - self._read

    def read(self) -> tuple[list[TrialRecord], list[Claim]]:
        """Records of trials that have ended since the last call, and what runs, own trials included."""
        new, self._read = [], self._clock()
        trials = tables.read(self._study, self._latest, study_trials.KEPT, self._unclaimed, ended=self._claims)
        for trial in trials:
            number = trial.number
            if number in self._done:
                continue
            self._unclaimed.discard(number)
            if trial.state.is_finished():
                self.done(number)
                if (record := study_trials.record_of(trial)) is not None:
                    new.append(record)
            elif (candidate := study_trials.requested_candidate(trial)) is not None:
                self._claims[number] = Claim(number=number, candidate=candidate, role=trial.user_attrs["role"])
            else:
                self._unclaimed.add(number)
        self._latest = max([self._latest, *(trial.number for trial in trials)])
        return new, list(self._claims.values())

    def done(self, number: int) -> None:
        """The trial has ended, and its record is known."""
        self._done.add(number)
        self._claims.pop(number, None)
        self._unclaimed.discard(number)

    def begun_since(self) -> set[str]:
        """Ids of the candidates that any process has begun to search since the last look."""
        return {name for _, name, final in self._begun() if not final}

    def has_lost(self, number: int, candidate: Candidate, role: Role) -> bool:
        """Whether another process began with this candidate just before trial `number` did."""
        mine = candidate.id, role == "final"
        return any((name, final) == mine for before, name, final in self._begun() if before < number)

    def _begun(self) -> list[tuple[int, str, bool]]:
        """Number and candidate's id of the trials that have begun since the last look, and whether they are finals."""
        found = tables.read(self._study, self._latest, ("candidate_id", "role"))
        begun = [(t.number, t.user_attrs) for t in found if t.state.name != "FAIL"]
        return [(n, a["candidate_id"], a["role"] == "final") for n, a in begun if a.get("role") in get_args(Role)]

    def beat(self, trials: Iterable[study_trials.OpenTrial]) -> None:
        """Say that these trials' machine lives, and end those of machines that do not, each every BEAT_SECONDS."""
        now = self._clock()
        if now - self._looked < BEAT_SECONDS:
            return
        if now - self._looked > GRACE_SECONDS / 2:  # the database was away: the others must have time to say it too
            self._since = now
        self._looked = now
        for trial in trials:
            study_trials.heartbeat(self._study, trial)
        if now - self._since > GRACE_SECONDS:
            study_trials.fail_dead(self._study, self._without_beat(now))

    def _without_beat(self, now: float) -> list[int]:
        """Numbers of trials that have run for a while, as far as seen from here."""
        self._first_seen = {number: self._first_seen.get(number, now) for number in self._claims}
        return [number for number, since in self._first_seen.items() if now - since > GRACE_SECONDS]

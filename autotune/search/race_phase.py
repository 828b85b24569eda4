"""The second phase of a search: its race, rung after rung, as `autotune.search.race` and `halving` say."""

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from autotune.environment import Slot
from autotune.errors import MachineError
from autotune.measure.types import RungRequest, RungResult, TrialResult
from autotune.memory.model import predict
from autotune.runs import directory as files
from autotune.runs.objective import best_first, maximised
from autotune.runs.races import Lineup, Rival
from autotune.search import race as racing
from autotune.search.advice import enough_for
from autotune.search.budget import allow, final_seconds
from autotune.search.crew import Job
from autotune.search.decide import searched, unconfirmed
from autotune.search.halving import FEWEST, RULE, Step, cost, next_rung, shortest
from autotune.search.propose import Proposer
from autotune.search.state import State
from autotune.search.trials import Trials
from autotune.units import format_duration

_PLANNED = 0.9
"""Part of the time left for which rungs are planned, but for those that a race needs: they may take longer than
expected, and one that the budget ends was in vain."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RungJob(Job):
    """A rung."""

    number: int
    step: Step
    rival: Rival


class Race:
    """Trains rivals as the rule says, as time permits; several at the same time where each has a card of its own."""

    def __init__(self, state: State, trials: Trials, proposer: Proposer) -> None:
        self._state, self._trials, self._proposer = state, trials, proposer
        self._wanted = state.settings.race == "on" and not state.settings.joined
        self._not_raced = ""  # why there is no race although there should be one

    def kept_seconds(self) -> float:
        """Part of the budget that is kept for the race, once there is something to race. A second shape is worth more
        than a longer race of one."""
        records, settings = self._state.records, self._state.settings
        if not self._wanted or self._not_raced or not searched(records):
            return 0.0
        share = settings.race_share * self._state.budget.seconds
        if settings.search_shape and len({record.candidate.shape for record in searched(records)}) < FEWEST:
            return min(share, racing.shortest_race(records, settings))
        return share

    def run(self) -> list[str]:
        """Race until the winner must be confirmed. Returns notes."""
        if not self._wanted or not searched(self._state.records):
            return []
        lineup = self._state.lineup or self._line_up()
        if lineup is None:
            return [self._not_raced]
        self._trials.work(partial(self._begin, lineup), self._record, self._trials.side_by_side)
        race = self._state.race()
        kept = {self._checkpoints(number) for number in race.order[: RULE.eta]} if race else set()
        for folder in (self._state.directory / files.RACE).glob("*"):
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)
        return [] if race is None else racing.race_notes(lineup, race, self._state.readings)

    def _line_up(self) -> Lineup | None:
        """Choose the rivals; None where two of them take more time than there is."""
        if self._not_raced:
            return None
        state = self._state
        rivals, beside = racing.candidates_for_race(state.records, state.settings), racing.first_overhead(state.records)
        left = self._left()
        if next_rung(rivals, [], left, beside) is None:
            wanted = shortest(rivals, beside)
            self._not_raced = (
                f"the budget is too short for a race: two rungs take about {format_duration(wanted)}, "
                f"{format_duration(max(0.0, left))} were left; the winner is by the law, not raced; give --budget "
                f"{enough_for(state.budget.seconds + wanted / state.settings.race_share)}"
            )
            return None
        best = best_first(searched(state.records), maximised(state.settings))[0]
        speed = best.result.tokens_per_second or 0.0
        lineup = racing.make_lineup(rivals, Path(state.settings.recipe.data), speed, beside)
        state.keep_lineup(lineup)
        return lineup

    def _left(self) -> float:
        """Seconds until the winner must be confirmed."""
        records, budget = self._state.records, self._state.budget
        waiting = (unconfirmed(records, self._state.settings, self._state.elected()) or searched(records))[0]
        # a rung does not verify and warm up as a final does, but the trial of the same shape did
        alike = [record for record in searched(records) if record.candidate.shape == waiting.candidate.shape]
        return budget.remaining() - max(final_seconds(record, budget) for record in (waiting, *alike))

    def _overhead(self, lineup: Lineup) -> float:
        return racing.overhead(lineup.rivals, self._state.readings, racing.first_overhead(self._state.records))

    def _begin(self, lineup: Lineup, slot: Slot) -> RungJob | None:
        """The next rung; None where none can begin now."""
        state, settings = self._state, self._state.settings
        running = tuple(job.step for job in self._trials.running(RungJob))
        beside, left, slots = self._overhead(lineup), self._left(), self._trials.side_by_side
        following = partial(
            next_rung, lineup.rivals, state.readings, overhead_seconds=beside, running=running, slots=slots
        )
        step = following(_PLANNED * left) or (following(left) if len(state.readings) < FEWEST else None)
        if step is None:
            return None
        rival = next(rival for rival in lineup.rivals if rival.rival == step.rival)
        numbers = [*(job.number for job in self._trials.running(RungJob)), *(r.reading for r in state.readings)]
        number = max(numbers, default=-1) + 1
        state.keep_spent()
        state.tell(number, "race", rival.candidate, device=slot.device)
        expected = cost(rival, step.fraction, state.readings, beside)
        allowance, seconds = allow(max(0.0, self._left()), racing.patience(expected)), settings.train_seconds
        request = racing.rung_request(
            rival, step, lineup, device=slot.device, checkpoints=self._checkpoints(step.rival),
            memory_limit_bytes=settings.memory_limit_bytes, timeout_seconds=allowance.seconds,
            result_path=state.directory / files.LOGS / f"rung-{number:04d}.json", train_seconds=seconds,
            tokens=racing.equal_tokens(rival, step.fraction, lineup, state.readings, state.records, seconds),
        )  # fmt: skip
        return RungJob(
            slot=slot, role="race", candidate=rival.candidate, request=request, allowance=allowance,
            number=number, step=step, rival=rival,
        )  # fmt: skip

    def _record(self, job: RungJob, result: TrialResult) -> None:
        """Record a rung; the first of a candidate is its trial too, as it measures speed and memory."""
        assert isinstance(result, RungResult)
        assert isinstance(job.request, RungRequest)
        state, candidate = self._state, job.candidate
        if result.status == "timeout" and job.allowance.ends_budget:
            result = replace(result, status="interrupted", message="the budget ended during this rung")
        result = self._trials.leave(job, result)
        if not any(record.role == "race" and record.candidate.id == candidate.id for record in state.records):
            trial = self._proposer.claim(candidate, state.attributes("race", racing.as_trial_request(job.request)))
            found = predict(state.model, candidate)
            state.keep(trial, state.record_of(trial.number, "race", candidate, racing.as_trial(result), found))
        reading = racing.reading_of(job.number, job.step, result, job.rival)
        state.keep_reading(reading)
        state.tell(job.number, "race", candidate, device=job.slot.device, reading=reading)
        if result.remedy:
            raise MachineError(result.remedy)

    def _checkpoints(self, rival: int) -> Path:
        return files.rival_checkpoints(self._state.directory, rival)

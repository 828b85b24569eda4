"""The second phase of a search: its race, rung after rung, as `autotune.search.race` and `halving` say."""

import shutil
from dataclasses import replace
from pathlib import Path

from autotune.errors import MachineError
from autotune.measure.runner import TrainRung
from autotune.memory.model import predict
from autotune.runs import directory as files
from autotune.runs.objective import best_first, maximised
from autotune.runs.races import Lineup
from autotune.search import race as racing
from autotune.search.advice import enough_for
from autotune.search.budget import allow, final_seconds
from autotune.search.decide import searched, unconfirmed
from autotune.search.halving import RULE, Step, cost, next_rung
from autotune.search.propose import Proposer
from autotune.search.state import State
from autotune.units import format_duration


class Race:
    """Trains rivals as the rule says, as time permits."""

    def __init__(self, state: State, proposer: Proposer, train_rung: TrainRung) -> None:
        self._state, self._proposer, self._train_rung = state, proposer, train_rung
        self._wanted = state.settings.race == "on" and not state.settings.joined
        self._not_raced = ""  # why there is no race although there should be one

    def kept_seconds(self) -> float:
        """Part of the budget that is kept for the race, once there is something to race."""
        raced = self._wanted and not self._not_raced and searched(self._state.records)
        return self._state.settings.race_share * self._state.budget.seconds if raced else 0.0

    def run(self) -> list[str]:
        """Race until the winner must be confirmed. Returns notes."""
        if not self._wanted or not searched(self._state.records):
            return []
        lineup = self._state.lineup or self._line_up()
        if lineup is None:
            return [self._not_raced]
        while (step := self._next(lineup)) is not None:
            self._rung(lineup, step)
        race = self._state.race()
        kept = {self._checkpoints(number) for number in race.order[: RULE.eta]} if race else set()
        for folder in (self._state.directory / files.RACE).glob("*"):
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)
        return [] if race is None else racing.race_notes(lineup, race)

    def _line_up(self) -> Lineup | None:
        """Choose the rivals; None where two of them take more time than there is."""
        if self._not_raced:
            return None
        state = self._state
        rivals, beside = racing.candidates_for_race(state.records, state.settings), racing.first_overhead(state.records)
        left = self._left()
        if next_rung(rivals, [], left, beside) is None:
            wanted = 2 * (beside + min(beside, min(rival.seconds for rival in rivals)))
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

    def _overhead(self) -> float:
        return racing.overhead(self._state.readings, racing.first_overhead(self._state.records))

    def _next(self, lineup: Lineup) -> Step | None:
        return next_rung(lineup.rivals, self._state.readings, self._left(), self._overhead())

    def _rung(self, lineup: Lineup, step: Step) -> None:
        """Run one rung and record it; the first of a candidate is its trial too, as it measures speed and memory."""
        state, settings = self._state, self._state.settings
        rival = next(rival for rival in lineup.rivals if rival.rival == step.rival)
        number, candidate = len(state.readings), rival.candidate
        state.keep_spent()
        state.tell(number, "race", candidate)
        expected = cost(rival, step.fraction, state.readings, self._overhead())
        allowance = allow(max(0.0, self._left()), racing.patience(expected))
        seconds = settings.train_seconds
        tokens = racing.equal_tokens(rival, step.fraction, lineup, state.readings, state.records, seconds)
        request = racing.rung_request(
            rival, step, lineup, device=settings.device, checkpoints=self._checkpoints(step.rival),
            memory_limit_bytes=settings.memory_limit_bytes, timeout_seconds=allowance.seconds,
            result_path=state.directory / files.LOGS / f"rung-{number:04d}.json",
            train_seconds=seconds, tokens=tokens,
        )  # fmt: skip
        result = self._train_rung(request, Path(request.result_path).with_suffix(".log"))
        if result.status == "timeout" and allowance.ends_budget:
            result = replace(result, status="interrupted", message="the budget ended during this rung")
        if not any(record.role == "race" and record.candidate.id == candidate.id for record in state.records):
            trial = self._proposer.claim(candidate, state.attributes("race", racing.as_trial_request(request)))
            found = predict(state.model, candidate)
            state.keep(trial, state.record_of(trial.number, "race", candidate, racing.as_trial(result), found))
        reading = racing.reading_of(number, step, result, rival)
        state.keep_reading(reading)
        state.tell(number, "race", candidate, reading=reading)
        if result.remedy:
            raise MachineError(result.remedy)

    def _checkpoints(self, rival: int) -> Path:
        return self._state.directory / files.RACE / f"rival-{rival:02d}"

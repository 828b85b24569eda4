"""The trials of a search: begun in the study, run in the crew's slots, recorded as they end."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from autotune.config.candidate import Candidate
from autotune.environment import Slot
from autotune.errors import MachineError
from autotune.measure.types import Steps, TrialRequest, TrialResult
from autotune.memory.model import Prediction, predict
from autotune.runs import directory as files
from autotune.runs.objective import speed_needed
from autotune.runs.records import Role, TrialRecord
from autotune.search import study_trials
from autotune.search.budget import Allowance, measure_seconds
from autotune.search.crew import Crew, J, Job, TrialJob
from autotune.search.posterior import NOISY
from autotune.search.propose import Proposer
from autotune.search.shared import Claim
from autotune.search.state import State
from autotune.units import format_bytes

R = TypeVar("R", bound=TrialResult)
PASSED_OVER = 4
"""Candidates in a row that may be skipped because of their predicted peak."""

HOPELESS = 0.7
"""Fraction of the speed needed to become the best; a trial below it is not timed to the end."""


class Trials:
    """What runs in the slots, and what has."""

    def __init__(self, state: State, proposer: Proposer, crew: Crew) -> None:
        self._state, self._proposer, self._crew = state, proposer, crew
        self.ended = 0
        """Trials of this process."""
        self.gone: list[str] = []
        """Notes on devices that have left."""

    def work(
        self, choose: Callable[[Slot], J | None], record: Callable[[J, TrialResult], object],
        at_once: int | None = None,
    ) -> None:  # fmt: skip
        """Run what `choose` gives, in so many slots `at_once`, until it gives nothing and nothing runs."""
        self._crew.work(choose, record, self._watch, at_once=at_once)

    def _watch(self) -> None:
        """Say that this machine lives."""
        if self._state.peers is not None:
            self._state.peers.beat(job.trial for job in self.running(TrialJob))

    def running(self, kind: type[J]) -> list[J]:
        """What runs of this kind."""
        return [job for job in self._crew.jobs if isinstance(job, kind)]

    @property
    def side_by_side(self) -> int:
        """How many finals, or rungs, run at once. Alone on the CPU: beside others they would share its memory bandwidth
        and caches, and the figure would depend on what happens to run there. Cards have memory of their own."""
        return 1 if self._state.settings.device_kind == "cpu" else max(1, len(self._crew.slots))

    def pending(self, *, final: bool) -> list[Candidate]:
        """Candidates that are being searched, or confirmed, here or on other machines."""
        running: list[Job | Claim] = [*self._crew.jobs, *self._state.elsewhere]
        return [one.candidate for one in running if (one.role == "final") == final]

    def begin(
        self, slot: Slot, role: Role, candidate: Candidate, allowance: Allowance,
        trial: study_trials.OpenTrial | None = None, steps: Steps = "composed",
    ) -> TrialJob | None:  # fmt: skip
        """A trial that has begun in the study; None where another machine has just begun with the same. `trial`:
        the one that an Optuna sampler proposed; None: a new one."""
        state, final = self._state, role == "final"
        request = TrialRequest(
            candidate=state.settings.completed(candidate), device=slot.device, result_path="",
            memory_limit_bytes=state.settings.memory_limit_bytes,
            measure_seconds=measure_seconds(state.budget) * (2 if final else 1), timeout_seconds=allowance.seconds,
            stop_below_tokens_per_second=_least_speed(state, candidate) if role == "search" else None,
            final=final, steps=steps,
        )  # fmt: skip
        trial = self._proposer.claim(candidate, state.attributes(role, request), trial)
        if state.peers is not None and state.peers.has_lost(trial.number, candidate, role):
            study_trials.withdraw(state.study, trial)
            return None
        state.tell(trial.number, role, candidate, device=slot.device)
        prediction = predict(state.model, candidate)
        log = state.directory / files.LOGS / f"trial-{trial.number:04d}.json"
        left = max(0.0, state.budget.remaining())  # seconds since the allowance was given, on a slow disk, count
        return TrialJob(
            slot=slot, trial=trial, role=role, candidate=candidate, prediction=prediction, allowance=allowance,
            request=replace(request, result_path=str(log), timeout_seconds=min(allowance.seconds, left)),
            answer=self._passed_over(prediction) if role == "search" else None,
        )  # fmt: skip

    def _passed_over(self, prediction: Prediction) -> TrialResult | None:
        """Result for a candidate that is skipped because even the lower bound of its predicted peak exceeds the limit;
        None for all others, and where the last few were all skipped: then one is run, should the model be wrong."""
        last = [record.result.status for record in self._state.records[-PASSED_OVER:]]
        fits = prediction.low_device_bytes <= self._state.settings.memory_limit_bytes
        if fits or not self._proposer.knowledge.memory_model or last == ["predicted_over_limit"] * PASSED_OVER:
            return None
        low, high = format_bytes(prediction.low_device_bytes), format_bytes(prediction.high_device_bytes)
        trials = self._state.model.trials
        return TrialResult(
            status="predicted_over_limit", phase="start", wanted_bytes=prediction.peak_device_bytes,
            message=f"predicted to need {low} to {high}, from {trials} measured trials; not run",
        )  # fmt: skip

    def record(self, job: TrialJob, result: TrialResult) -> TrialResult:
        """Record what a slot has measured, and return it with what it means. A device that fails leaves; MachineError
        where none is left."""
        self.ended += 1
        result = _judged(job, result)
        result = self.leave(job, result)
        record = self._state.keep(job.trial, self._record_of(job, result))
        self._state.tell(job.trial.number, job.role, job.candidate, device=job.slot.device, record=record)
        if result.remedy:
            raise MachineError(result.remedy)
        return result

    def leave(self, job: Job, result: R) -> R:
        """The result. Where its device fails and there are others, the device leaves, and the result is interrupted:
        the candidate is not at fault."""
        if not (result.remedy and self._crew.leave(job.slot)):
            return result
        self.gone.append(f"{job.slot.device} left the search: {result.remedy}")
        return replace(result, status="interrupted", message=result.remedy, remedy="")

    def keep_on_disk(self) -> None:
        """Keep in the run's directory what has ended while the study's server is away."""
        ended = ((job, result) for job, result in self._crew.look() if isinstance(job, TrialJob))
        self._state.keep_on_disk(self._record_of(job, _judged(job, result)) for job, result in ended)

    def _record_of(self, job: TrialJob, result: TrialResult) -> TrialRecord:
        return self._state.record_of(job.trial.number, job.role, job.candidate, result, job.prediction)


def _least_speed(state: State, candidate: Candidate) -> float | None:
    """Speed below which the candidate cannot become the best; None while nothing is feasible."""
    best = state.verdict.winner.objective if state.verdict.winner else None
    return None if best is None else HOPELESS * speed_needed(state.settings, candidate, best)


def _judged(job: Job, result: TrialResult) -> TrialResult:
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

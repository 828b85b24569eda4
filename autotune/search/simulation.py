"""Searches of a table of recorded trials: the real search, with a table in the runner's place and a simulated clock.

Each trial takes the seconds that were recorded for it. Regret: relative distance of the best tokens/s so far from the
best of the table.
"""

import json
import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from autotune.config.candidate import Candidate, Plan
from autotune.config.search_settings import SearchSettings
from autotune.config.tables import read_table
from autotune.environment import Environment, Slot
from autotune.errors import ConfigError, NoFeasibleError
from autotune.measure.runner import Running
from autotune.measure.types import MemoryView, TrialRequest, TrialResult
from autotune.search.loop import search
from autotune.search.propose import Knowledge
from autotune.search.resolve import resolve
from autotune.search.space import Space, build_space, canonical, every_candidate

VARIANTS = {
    "additive-no-start": ("additive", Knowledge(start=False)),
    "additive-no-priors": ("additive", Knowledge(priors=False)),
    "additive-no-start-no-priors": ("additive", Knowledge(start=False, priors=False)),
    "additive-no-memory-model": ("additive", Knowledge(memory_model=False)),
}
"""Ablations of our own sampler: what it does without a part of what it knows."""

CHOICES = (
    "micro_batch_size=1,2,4,8,16",
    "attention=sdpa",
    "loss=full,chunked",
    "loss_chunk_tokens=128,512",
    "activation_checkpointing=none,block",
    "compile=off,full,block",
    "dtype=float32,bfloat16",
)
"""The space whose every candidate `scripts/record_trials` measures."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Every candidate of one shape, with its result."""

    settings: SearchSettings
    environment: Environment
    space: Space
    results: Mapping[str, TrialResult]
    """Results by candidate id."""

    @property
    def seconds(self) -> float:
        """Seconds that measuring every candidate takes."""
        return sum(result.trial_seconds or 0.0 for result in self.results.values())

    @property
    def best(self) -> float:
        """Tokens/s of the fastest feasible candidate."""
        return max(speed(result) for result in self.results.values())


def speed(result: TrialResult) -> float:
    """Tokens/s; 0 where the candidate is not feasible."""
    return result.tokens_per_second or 0.0 if result.status == "ok" else 0.0


def read_tables(path: Path) -> list[Table]:
    """One table for each shape in the file. Raises ConfigError where a candidate is missing."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [(read_table(Candidate, r["candidate"], "row"), read_table(TrialResult, r["result"], "row")) for r in lines]
    environment = read_table(Environment, json.loads(path.with_suffix(".environment.json").read_text()), "environment")
    found = []
    for shape in sorted({candidate.shape for candidate, _ in rows}, key=lambda shape: shape.parameters):
        own = {candidate.id: result for candidate, result in rows if candidate.shape == shape}
        settings = resolve(environment, model=shape.size, choices=CHOICES)
        recipe = next(candidate.recipe for candidate, _ in rows if candidate.shape == shape)
        baseline = replace(settings.baseline, micro_batch_size=min(12, recipe.global_batch_size))
        settings = replace(settings, recipe=recipe, baseline=baseline)
        new = build_space(settings, environment).choices.keys() - settings.choices.keys()  # knobs of later versions
        known = {name: (str(getattr(Plan(), name)),) for name in new}
        settings = replace(settings, choices={**settings.choices, **known})
        space = build_space(settings, environment)
        missing = len(every_candidate(space).keys() - own.keys())
        if missing:
            message = f"{path} lacks {missing} of {len(every_candidate(space))} candidates of {shape.n_layer} layers"
            raise ConfigError(f"{message}; record them with scripts/record_trials")
        found.append(Table(settings=settings, environment=environment, space=space, results=own))
    return found


def peak_of_best(table: Table) -> int:
    """Bytes that the fastest feasible candidate allocates."""
    return max(table.results.values(), key=speed).peak("allocated_bytes") or 0


def limited(table: Table, limit_bytes: int) -> Table:
    """The table of a smaller device, on which a candidate may allocate so much: running it shows whether it does. All
    processes are equally large beyond that; on the CPU the rest is mostly Python and the compiler."""
    peaks = [(r.peak("device_bytes"), r.peak("allocated_bytes")) for r in table.results.values()]
    process = round(median(device - allocated for device, allocated in peaks if device and allocated))

    def answer(result: TrialResult) -> TrialResult:
        memory = {
            stage: MemoryView(allocated_bytes=peak, device_bytes=process + peak)
            for stage, view in result.memory.items()
            if (peak := view.allocated_bytes) is not None
        }
        too_much = result.status == "ok" and (result.peak("allocated_bytes") or 0) > limit_bytes
        return replace(result, memory=memory, status="over_limit" if too_much else result.status)

    settings = replace(table.settings, memory_limit_bytes=process + limit_bytes)
    return replace(table, settings=settings, results={name: answer(r) for name, r in table.results.items()})


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One search: after `seconds[i]` its regret was `regret[i]`."""

    seconds: tuple[float, ...]
    regret: tuple[float, ...]
    verdict: float
    """Regret of the winner; 1 where nothing feasible was found."""

    def at(self, seconds: float) -> float:
        """Regret at a time; 1 while nothing feasible is known."""
        return next((r for s, r in zip(self.seconds[::-1], self.regret[::-1], strict=True) if s <= seconds), 1.0)

    def within_first(self, trials: int) -> float:
        """Regret after so many trials."""
        return self.regret[min(trials, len(self.regret) - 1)]

    def trials_to(self, regret: float) -> float:
        """Trials until the regret was no larger; infinite where it never was."""
        return next((i for i, r in enumerate(self.regret) if r <= regret), math.inf)

    def reached(self, regret: float) -> float:
        """Seconds until the regret was no larger; infinite where it never was."""
        return next((s for s, r in zip(self.seconds, self.regret, strict=True) if r <= regret), math.inf)


class RecordedMachine:
    """`measure`, `clock` and `pause` of a search that reads a table. Only trials take time, and `pause` passes it to
    the next end of one; once the best plan is known, the clock skips to the end of the budget, with time left to
    confirm it."""

    def __init__(self, table: Table, budget_seconds: float) -> None:
        self.now, self._table = 0.0, table
        self._ends: list[float] = []  # of the trials that run
        self.seconds, self.regret = [0.0], [1.0]
        longest = max(result.trial_seconds or 0.0 for result in table.results.values())
        self._skip_to = budget_seconds - 10 * longest

    def clock(self) -> float:
        return self.now

    def pause(self) -> None:
        self.now = max(self.now, min(self._ends))

    def measure(self, request: TrialRequest, log: Path) -> Running[TrialResult]:
        result = self._table.results[canonical(request.candidate).id]
        lasted = result.trial_seconds or 0.0
        end = self.now + min(lasted, request.timeout_seconds)
        self._ends.append(end)
        while self.now < end:
            yield
        self._ends.remove(end)
        if lasted > request.timeout_seconds:
            return TrialResult(status="timeout", phase="measure", trial_seconds=request.timeout_seconds)
        if not request.final:
            self.seconds.append(end)
            self.regret.append(min(self.regret[-1], 1.0 - speed(result) / self._table.best))
            if self.regret[-1] == 0.0:
                self.now = max(self.now, self._skip_to)
        return result


def replay(
    table: Table, variant: str, seed: int, budget_seconds: float | None = None, workers: int = 1
) -> Trace:
    """One search by a sampler, or by one of VARIANTS, with so many trials at the same time. It begins with a random
    candidate, as a user's own configuration may be any. Without a budget, it is as long as measuring the whole table
    takes."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seconds = budget_seconds or table.seconds
    sampler, knowledge = VARIANTS.get(variant, (variant, Knowledge()))
    first = random.Random(seed).choice(list(every_candidate(table.space).values()))
    settings = replace(
        table.settings, name="replay", seed=seed, sampler=sampler, baseline=first.plan, budget_seconds=seconds
    )
    machine, memory = RecordedMachine(table, seconds), Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        try:
            verdict = search(
                settings, Path(folder, "run"), table.environment, measure=machine.measure, clock=machine.clock,
                pause=machine.pause, slots=tuple(Slot(device=f"cpu:{i}") for i in range(workers)),
                knowledge=knowledge,
            )  # fmt: skip
            assert verdict.winner is not None
            regret = 1.0 - speed(table.results[canonical(verdict.winner.candidate).id]) / table.best
        except NoFeasibleError:
            regret = 1.0
    return Trace(seconds=tuple(machine.seconds), regret=tuple(machine.regret), verdict=regret)


def quartiles(traces: Sequence[Trace], seconds: Sequence[float]) -> NDArray[np.float64]:
    """(3, len(seconds)): lower quartile, median and upper quartile of the regret."""
    return np.quantile([[trace.at(second) for second in seconds] for trace in traces], (0.25, 0.5, 0.75), axis=0)

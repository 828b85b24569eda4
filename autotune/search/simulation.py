"""Searches against a table of recorded trials: no device, a simulated clock, the real way to ask and to tell.

Each trial takes the seconds that were recorded for it. Regret: by how much the best tokens/s found so far stay
below the table's best, as a fraction of it.
"""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from autotune.config.candidate import Candidate
from autotune.config.search_settings import SearchSettings
from autotune.config.tables import read_table
from autotune.environment import Environment
from autotune.errors import ConfigError
from autotune.measure.types import MemoryView, TrialResult
from autotune.runs.records import TrialRecord
from autotune.search.resolve import resolve
from autotune.search.sampler import implied, propose, unknown
from autotune.search.space import Space, build_space, candidate_at, every_candidate
from autotune.search.study import ask_for, suggest, tell

if TYPE_CHECKING:
    import optuna

Sampler = Literal["additive", "tpe", "gp", "random"]
"""Ours (`autotune.search.sampler`), and Optuna's, to compare with: `gp` loads torch."""

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

_REPEATS = 10
"""Known candidates in a row before one that is not known is drawn at random."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Every candidate of one shape, with its answer."""

    settings: SearchSettings
    space: Space
    results: Mapping[str, TrialResult]
    """By candidate id."""

    @property
    def seconds(self) -> float:
        """What measuring all of it takes."""
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
        settings = resolve(environment, model=f"{shape.n_layer}x{shape.n_head}x{shape.n_embd}", choices=CHOICES)
        recipe = next(candidate.recipe for candidate, _ in rows if candidate.shape == shape)
        baseline = replace(settings.baseline, micro_batch_size=min(12, recipe.global_batch_size))
        settings = replace(settings, recipe=recipe, baseline=baseline)
        space = build_space(settings, environment)
        missing = len(every_candidate(space).keys() - own.keys())
        if missing:
            message = f"{path} lacks {missing} of {len(every_candidate(space))} candidates of {shape.n_layer} layers"
            raise ConfigError(f"{message}; record them with scripts/record_trials")
        found.append(Table(settings=settings, space=space, results=own))
    return found


def peak_of_best(table: Table) -> int:
    """Bytes that the fastest feasible candidate allocates."""
    return max(table.results.values(), key=speed).peak("allocated_bytes") or 0


def limited(table: Table, limit_bytes: int) -> Table:
    """The table of a smaller device: what allocates more than the limit is found out by running it. The process's
    own size is left out, because on the CPU it is mostly Python and the compiler."""

    def answer(result: TrialResult) -> TrialResult:
        peaks = {stage: view.allocated_bytes for stage, view in result.memory.items()}
        memory = {stage: MemoryView(allocated_bytes=peak, device_bytes=peak) for stage, peak in peaks.items()}
        too_much = result.status == "ok" and (result.peak("allocated_bytes") or 0) > limit_bytes
        return replace(result, memory=memory, status="over_limit" if too_much else result.status)

    settings = replace(table.settings, memory_limit_bytes=limit_bytes)
    return replace(table, settings=settings, results={name: answer(r) for name, r in table.results.items()})


@dataclass(frozen=True, kw_only=True)
class Trace:
    """How one search went: after `seconds[i]` its regret was `regret[i]`."""

    seconds: tuple[float, ...]
    regret: tuple[float, ...]

    def at(self, seconds: float) -> float:
        """Regret after so long; 1 while nothing feasible is known."""
        return next((r for s, r in zip(self.seconds[::-1], self.regret[::-1], strict=True) if s <= seconds), 1.0)

    def reached(self, regret: float) -> float:
        """Seconds until the regret was no larger; infinite where it never was."""
        return next((s for s, r in zip(self.seconds, self.regret, strict=True) if r <= regret), math.inf)


def replay(table: Table, sampler: Sampler, seed: int) -> Trace:
    """One search, until it has found the best or knows every answer. It begins with any candidate, as a user's own
    configuration may be any."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna_sampler(sampler, seed))
    settings, target = replace(table.settings, seed=seed), table.best
    first = random.Random(seed).choice(list(every_candidate(table.space).values()))
    known: dict[str, TrialRecord] = {}
    seconds, regret = [0.0], [1.0]
    asked: tuple[optuna.Trial, Candidate] | None = ask_for(study, table.space, first), first
    while asked is not None:
        trial, candidate = asked
        result = table.results[candidate.id]
        record = TrialRecord(
            trial=len(known), role="search", candidate=candidate, result=result, objective=speed(result) or None
        )
        tell(study, trial, record, settings.memory_limit_bytes)
        known[candidate.id] = record
        seconds.append(seconds[-1] + (result.trial_seconds or 0.0))
        regret.append(min(regret[-1], 1.0 - speed(result) / target))
        asked = ask(study, table.space, known, settings, sampler) if regret[-1] > 0.0 else None
    return Trace(seconds=tuple(seconds), regret=tuple(regret))


def optuna_sampler(kind: Sampler, seed: int) -> "optuna.samplers.BaseSampler":
    """Optuna's part in a search: everything for its own samplers, nothing for ours."""
    import optuna

    if kind == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=8)
    if kind == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=8, deterministic_objective=False)
    return optuna.samplers.RandomSampler(seed=seed)


def ask(
    study: "optuna.Study", space: Space, known: Mapping[str, TrialRecord], settings: SearchSettings, sampler: Sampler
) -> tuple["optuna.Trial", Candidate] | None:
    """A candidate whose answer does not follow from the `known` ones (by candidate id); None when there is none
    left. What one of Optuna's samplers proposes and is known is answered from the record."""
    if sampler == "additive":
        fresh = propose(space, known, settings)
        return (ask_for(study, space, fresh), fresh) if fresh is not None else None
    for _ in range(_REPEATS):
        trial = study.ask()
        candidate = candidate_at(space, suggest(trial, space))
        answer = implied(candidate, known)
        if answer is None:
            return trial, candidate
        tell(study, trial, answer, settings.memory_limit_bytes)
    pool = unknown(space, known, settings)
    if not pool:
        return None
    candidate = random.Random(settings.seed + len(known)).choice(pool)
    return ask_for(study, space, candidate), candidate


def quartiles(traces: Sequence[Trace], seconds: Sequence[float]) -> NDArray[np.float64]:
    """(3, len(seconds)): lower quartile, median and upper quartile of the regret."""
    return np.quantile([[trace.at(second) for second in seconds] for trace in traces], (0.25, 0.5, 0.75), axis=0)

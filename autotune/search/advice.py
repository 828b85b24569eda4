"""Advice after a search without a winner, or out of time: a budget or a remedy that has not just failed."""

from collections.abc import Sequence
from dataclasses import dataclass

from autotune.config.candidate import Candidate
from autotune.config.search_settings import SearchSettings
from autotune.environment import Environment
from autotune.measure.types import TrialResult
from autotune.runs.records import TrialRecord
from autotune.search.budget import CLOSING_SECONDS
from autotune.search.pool import by_candidate
from autotune.search.space import baseline, in_words
from autotune.search.study_trials import violation
from autotune.units import MIB, format_bytes, format_duration

_CPU_FLOPS_A_CORE, _CUDA_FLOPS = 2e10, 1e13
"""FLOP/s of a slow machine, used until something was timed."""
_MFU = 0.2
"""Fraction of the data sheet's peak that a slow plan reaches."""

_CYCLE, _WARM_CYCLES, _TIMED_CYCLES, _FIRST_STEPS = 4, 1, 3, 3
"""Shortest trial (`autotune.measure.worker`): micro steps per cycle, warm-up cycles, timed cycles, and first steps of
two micro steps each, in which code is compiled and the peak is measured."""
_START_SECONDS, _COMPILE_SECONDS = 15.0, 60.0
"""Time to load torch and build the model; time to compile."""

_NEAT_SECONDS = [60.0 * m for m in (1, 2, 3, 5, 10, 15, 20, 30, 45)] + [3600.0 * h for h in (1, 1.5, 2, 3, 4, 6, 8, 12)]


def trial_seconds(candidate: Candidate, environment: Environment, partial: TrialResult | None) -> float:
    """Estimated duration of a trial: from the FLOPs of its steps, and from the `partial` result of one that was ended
    early."""
    count = candidate.gradient_accumulation_steps
    first, cycle = _FIRST_STEPS * min(2, count), min(_CYCLE, count)
    later = (_WARM_CYCLES + _TIMED_CYCLES) * cycle
    tokens = candidate.plan.micro_batch_size * candidate.shape.block_size
    micro_step = tokens * candidate.shape.flops_per_token / _flops(environment)
    compiling = 0.0 if candidate.plan.compile == "off" else _COMPILE_SECONDS
    guess = _START_SECONDS + compiling + (first + later) * micro_step
    if partial is None or partial.trial_seconds is None:
        return guess
    spent = partial.trial_seconds
    if partial.phase in ("warmup", "measure", "done") and partial.compile_seconds is not None:
        # these seconds include compiling, so a micro step takes no longer than its share of them
        return spent + later * min(partial.compile_seconds / (2 * min(2, count)), max(micro_step, spent / first))
    return max(guess, 1.5 * spent)


def _flops(environment: Environment) -> float:
    """Expected FLOP/s."""
    if environment.device.startswith("cpu"):
        return _CPU_FLOPS_A_CORE * environment.cpu_count
    return _MFU * environment.peak_flops if environment.peak_flops else _CUDA_FLOPS


def enough_for(seconds: float) -> str:
    """Value for --budget in which `seconds` of trials fit, plus the start and the end of a search."""
    return neat(1.1 * seconds + 10.0 + CLOSING_SECONDS)


def enough_for_more(settings: SearchSettings, environment: Environment, records: Sequence[TrialRecord]) -> str:
    """Value for --budget in which two more trials fit, one to search and one to confirm."""
    longest = max((record.result.trial_seconds or 0.0 for record in records), default=0.0)
    return enough_for(2 * (longest or trial_seconds(baseline(settings), environment, None)))


def neat(seconds: float) -> str:
    """Next longer round duration, as --budget takes it."""
    rounded = next((duration for duration in _NEAT_SECONDS if duration >= seconds), None)
    if rounded is None:
        return f"{-(-seconds // 86400):.0f}d" if seconds > 86400 else "1d"
    return f"{rounded / 60:.0f}m" if rounded < 3600 or rounded % 3600 else f"{rounded / 3600:.0f}h"


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Advice after a search in which nothing is feasible."""

    why: str
    """Reason why there is no winner."""
    budget: str = ""
    """Larger --budget to resume with, if more time helps."""
    remedy: str = ""
    """Other change, if more time alone does not help."""


def nothing_found(settings: SearchSettings, environment: Environment, records: Sequence[TrialRecord]) -> Advice:
    """Advice for a search with these records, none of them feasible."""
    tried, limit, given = list(by_candidate(records).values()), settings.memory_limit_bytes, settings.budget_seconds
    if lacking := next((record.result.remedy for record in records if record.result.remedy), ""):
        return Advice(why="this machine cannot run what is searched", remedy=lacking)
    if not tried:
        candidate, partial = (records[-1].candidate, records[-1].result) if records else (baseline(settings), None)
        needed = 2 * trial_seconds(candidate, environment, partial)  # once to search, once to confirm
        ended = f"; the budget ended in its phase {partial.phase}" if partial else ""
        return Advice(
            why=f"--budget {format_duration(given)} is too short for one trial on {settings.device}{ended}",
            budget=enough_for(max(needed, 1.5 * given)),
        )
    nearest = min(tried, key=lambda record: violation(record.result, limit))
    result, over = nearest.result, int(violation(nearest.result, limit) * limit)
    why = f"no feasible candidate among {len(tried)}; the nearest was trial {nearest.trial} "
    why += f"({in_words(nearest.candidate)}): {result.status}"
    if result.status in ("oom", "over_limit", "predicted_over_limit"):
        why += f", {format_bytes(over)} beyond the limit of {format_bytes(limit)}"
        return Advice(why=why, remedy=_more_memory(environment, int(1.05 * (limit + over))))
    if result.status == "timeout":
        needed = 2 * trial_seconds(nearest.candidate, environment, result)
        return Advice(why=f"{why} in the phase {result.phase}", budget=enough_for(max(needed, 2 * given)))
    why += f", {result.message or f'in the phase {result.phase}'}"
    return Advice(why=why, remedy=f"see logs/trial-{nearest.trial:04d}.log")


def _more_memory(environment: Environment, wanted: int) -> str:
    """Remedy where `wanted` bytes are needed."""
    if wanted <= environment.device_memory_bytes:
        return f"start a new search with --memory-limit {-(-wanted // MIB)}MiB or more"
    return f"start a new search with a smaller model, {environment.device_name} has too little memory for this one"

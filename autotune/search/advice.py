"""What to do after a search that found nothing, or could not do all: computed, never what has just failed."""

from collections.abc import Sequence
from dataclasses import dataclass

from autotune.config.candidate import Candidate
from autotune.config.search import SearchSettings
from autotune.environment import Environment
from autotune.measure.types import TrialResult
from autotune.runs.records import TrialRecord
from autotune.search.budget import CLOSING_SECONDS
from autotune.search.space import baseline, in_words
from autotune.search.study import answered, violation
from autotune.units import MIB, format_bytes, format_duration

_CPU_FLOPS_A_CORE, _CUDA_FLOPS = 2e10, 1e13
"""A slow machine's, where nothing was timed."""
_MFU = 0.2
"""Part of a data sheet's peak that a slow plan reaches."""

_CYCLE, _WARM_CYCLES, _TIMED_CYCLES, _FIRST_STEPS = 4, 1, 3, 3
"""Of a trial, at least: micro steps of a cycle, cycles that warm up and that are timed; steps of two micro steps each
in which all is compiled and the peak is taken (`autotune.measure.worker`)."""
_START_SECONDS, _COMPILE_SECONDS = 15.0, 60.0
"""Loading torch and building the model; compiling."""

_NEAT_SECONDS = [60.0 * m for m in (1, 2, 3, 5, 10, 15, 20, 30, 45)] + [3600.0 * h for h in (1, 1.5, 2, 3, 4, 6, 8, 12)]


def trial_seconds(candidate: Candidate, environment: Environment, seen: TrialResult | None) -> float:
    """About how long a trial of the candidate takes: from the FLOPs of its steps, and from what was `seen` of it before
    it was ended."""
    count = candidate.gradient_accumulation_steps
    first, cycle = _FIRST_STEPS * min(2, count), min(_CYCLE, count)
    later = (_WARM_CYCLES + _TIMED_CYCLES) * cycle
    tokens = candidate.plan.micro_batch_size * candidate.shape.block_size
    micro_step = tokens * candidate.shape.flops_per_token / _flops(environment)
    compiling = 0.0 if candidate.plan.compile == "off" else _COMPILE_SECONDS
    guess = _START_SECONDS + compiling + (first + later) * micro_step
    if seen is None or seen.trial_seconds is None:
        return guess
    spent = seen.trial_seconds
    if seen.phase in ("warmup", "measure", "done") and seen.compile_seconds is not None:
        # compiling is in these seconds, so a micro step takes no longer than its share of them
        return spent + later * min(seen.compile_seconds / (2 * min(2, count)), max(micro_step, spent / first))
    return max(guess, 1.5 * spent)


def _flops(environment: Environment) -> float:
    """FLOP/s to expect of the machine."""
    if environment.device.startswith("cpu"):
        return _CPU_FLOPS_A_CORE * environment.cpu_count
    return _MFU * environment.peak_flops if environment.peak_flops else _CUDA_FLOPS


def enough_for(seconds: float) -> str:
    """A budget, as --budget takes it, in which so many seconds of trials fit beside the start and the end."""
    return neat(1.1 * seconds + 10.0 + CLOSING_SECONDS)


def neat(seconds: float) -> str:
    """The next round duration that is no shorter."""
    found = next((one for one in _NEAT_SECONDS if one >= seconds), None)
    if found is None:
        return f"{-(-seconds // 86400):.0f}d" if seconds > 86400 else "1d"
    return f"{found / 60:.0f}m" if found < 3600 or found % 3600 else f"{found / 3600:.0f}h"


@dataclass(frozen=True, kw_only=True)
class Advice:
    """After a search in which nothing is feasible."""

    why: str
    """There is no winner."""
    budget: str = ""
    """To go on with, where more time helps; a larger one than was not enough."""
    remedy: str = ""
    """What else to do, where more time alone does not help."""


def nothing_found(settings: SearchSettings, environment: Environment, found: Sequence[TrialRecord]) -> Advice:
    """What to say of a search whose records are `found`, none of them feasible."""
    tried, limit, given = list(answered(found).values()), settings.memory_limit_bytes, settings.budget_seconds
    if lacking := next((record.result.remedy for record in found if record.result.remedy), ""):
        return Advice(why="this machine cannot run what is searched", remedy=lacking)
    if not tried:
        candidate, seen = (found[-1].candidate, found[-1].result) if found else (baseline(settings), None)
        needed = 2 * trial_seconds(candidate, environment, seen)  # once to search, once to confirm
        ended = f"; the budget ended in its phase {seen.phase}" if seen else ""
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
    if wanted <= environment.device_memory_bytes:
        return f"start a new search with --memory-limit {-(-wanted // MIB)}MiB or more"
    return f"start a new search with a smaller model, {environment.device_name} has too little memory for this one"

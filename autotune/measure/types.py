"""Request and result of a trial, and a memory profile: plain data with JSON in both directions."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Literal, TypeVar

from autotune.config.candidate import Candidate
from autotune.config.tables import parse_json, read_table

Status = Literal[
    "ok",
    "over_limit",  # ran, but needs more than the limit
    "oom",  # out of memory
    "predicted_over_limit",  # not run
    "unsupported",  # cannot run on this machine or version of torch
    "incorrect",  # the loss is NaN or infinite, or wrong at the start
    "timeout",
    "crashed",
    "interrupted",
]
Phase = Literal["start", "build", "verify", "compile", "warmup", "measure", "done"]
Stage = Literal["first_step", "steady", "evaluation", "checkpoint"]
Steps = Literal["whole", "composed"]
T = TypeVar("T")

Z95 = NormalDist().inv_cdf(0.975)
"""Half width of a 95 % interval in standard deviations."""
PEAK_VIEWS = ("device_bytes", "reserved_bytes", "allocated_bytes")
"""Fields of MemoryView, the widest first."""


@dataclass(frozen=True, kw_only=True)
class MemoryView:
    """Peaks of one stage of a trial or a training. None: not known on this device."""

    allocated_bytes: int | None = None
    """Live tensors, by the allocator's count."""
    reserved_bytes: int | None = None
    """Device memory held by the allocator (CUDA)."""
    device_bytes: int | None = None
    """Memory of the process: by the driver's count on CUDA, resident size on the CPU."""
    num_alloc_retries: int | None = None
    """Times the allocator had to release cached memory before it could allocate (CUDA)."""


def largest_peak(stages: Mapping[str, MemoryView], view: str) -> int | None:
    """Largest value of a field of MemoryView over all stages; None if no stage knows it."""
    return max((value for stage in stages.values() if (value := getattr(stage, view)) is not None), default=None)


@dataclass(frozen=True, kw_only=True)
class TrialRequest:
    """One measurement, sent to the worker on stdin."""

    candidate: Candidate
    device: str
    """`cpu` or `cuda:0`."""
    result_path: str
    """Path of result.json, which the worker replaces at each phase."""
    memory_limit_bytes: int | None = None
    """None: the device's memory."""
    measure_seconds: float = 5.0
    """Upper bound of the timed part; it ends earlier once the interval is within ±1 %."""
    timeout_seconds: float = 600.0
    """Time after which the parent kills the worker's process group."""
    stop_below_tokens_per_second: float | None = None
    """Timing ends as soon as the candidate is certainly slower than this and cannot win."""
    final: bool = False
    """A finalist: its peaks include an evaluation and a checkpoint."""
    steps: Steps | None = None
    """Time whole optimizer steps, or compose them from micro steps and the optimizer's update. None: whole for a
    finalist, composed otherwise."""

    @property
    def whole_steps(self) -> bool:
        return self.final if self.steps is None else self.steps == "whole"


FROM_CACHE = 0.2
"""Time of a process's first steps if their code is in the compile cache, as a fraction of the time to compile it
(docs/race.md#the-time-of-a-rung)."""
EVALUATION_CODE = 0.4
"""Time to compile an evaluation's forward, as a fraction of that for a step (docs/race.md#the-time-of-a-rung)."""


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """Outcome of a trial. Unknown values are None, never 0."""

    status: Status
    phase: Phase
    """Last phase that was entered."""
    message: str = ""
    """Reason of a status other than `ok`, otherwise notes. One line."""
    tokens_per_second: float | None = None
    tokens_per_second_ci95: float | None = None
    """Half width of the 95 % interval, in tokens/s."""
    mfu: float | None = None
    """Fraction of the device's dense peak; None if the peak is unknown."""
    step_seconds_p50: float | None = None
    """Median optimizer step: accumulation x micro step + update."""
    steps: Steps | None = None
    """Optimizer steps were timed whole, or composed from their parts; None: nothing was timed."""
    micro_step_seconds_p50: float | None = None
    optimizer_seconds_p50: float | None = None
    memory: Mapping[str, MemoryView] = field(default_factory=dict)
    """Peaks by stage."""
    wanted_bytes: int | None = None
    """Size of the failed allocation, for `oom`."""
    other_processes_bytes: int | None = None
    """Device memory of other processes before the trial."""
    first_loss: float | None = None
    last_loss: float | None = None
    build_seconds: float | None = None
    compile_seconds: float | None = None
    """The first steps, compilation included."""
    compile_cache_hits: int | None = None
    """Graphs found in the compile cache; None if nothing is compiled."""
    compile_cache_misses: int | None = None
    """Graphs that had to be compiled."""
    measured_steps: int | None = None
    trial_seconds: float | None = None
    """Wall clock of the worker, start-up included."""
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    """`trial_seconds` by phase; `start` is start and end of the process."""
    started_at: str = ""
    """ISO 8601, UTC."""
    process_peak_bytes: tuple[int, ...] = ()
    """Peak of each process in the widest view, where there are several; `memory` is the fullest's."""
    remedy: str = ""
    """What to do about a failure of the machine, which every other trial would share; empty otherwise."""

    @property
    def saved_by_cache(self) -> float:
        """Seconds that the next process to run this code is spared, as the compile cache holds it by then."""
        return (1.0 - FROM_CACHE) * self.compiling_seconds if self.compile_cache_misses else 0.0

    @property
    def compiling_seconds(self) -> float:
        """Seconds to compile such a step where the compile cache holds none of it; 0 if nothing is compiled."""
        if self.compile_cache_misses is None:
            return 0.0
        return self.phase_seconds.get("compile", 0.0) / (1.0 if self.compile_cache_misses else FROM_CACHE)

    def peak(self, view: str) -> int | None:
        """Largest `allocated_bytes`, `reserved_bytes` or `device_bytes` over all stages."""
        return largest_peak(self.memory, view)

    @property
    def peak_bytes(self) -> int | None:
        """Peak in the widest known view: device, else reserved, else allocated bytes."""
        return max((peak for view in PEAK_VIEWS if (peak := self.peak(view)) is not None), default=None)

    @property
    def num_alloc_retries(self) -> int | None:
        known = [v.num_alloc_retries for v in self.memory.values() if v.num_alloc_retries is not None]
        return sum(known) if known else None


@dataclass(frozen=True, kw_only=True)
class RungRequest(TrialRequest):
    """One rung of a race: train a candidate to a length, let its rate decay, evaluate."""

    checkpoints: str = ""
    """Directory of the level phase's checkpoint (schedule `wsd`), from which the next rung continues; empty: none."""
    target_tokens: int
    """Tokens of the training at its end, those of earlier rungs and the decay included."""
    target_seconds: float | None = None
    """The same in seconds of steps: as many tokens as this process's own speed gives. None: `target_tokens`."""
    chunk_tokens: int
    """Validation tokens by which losses are recorded: a multiple of every rival's block size."""
    chunks: int
    """Number of chunks to evaluate."""
    evaluations: int = 1
    """Evaluations along the way, evenly spaced; the last is at the end."""


@dataclass(frozen=True, kw_only=True)
class RungResult(TrialResult):
    """Outcome of a rung."""

    iterations: int | None = None
    """Optimizer steps at the end of the decay, those of earlier rungs included."""
    level_iterations: int | None = None
    """Optimizer steps in the level phase's checkpoint."""
    stepping_seconds: float = 0.0
    """Time of this process's steps; the rest of `trial_seconds` is overhead."""
    chunk_losses: tuple[float, ...] = ()
    """Mean validation loss of each chunk, in nats; the same tokens for all rivals."""
    curve_tokens: tuple[int, ...] = ()
    curve_losses: tuple[float, ...] = ()
    """Validation losses along the way, and the tokens trained until then."""


def cache_text(hits: int | None, misses: int | None) -> str:
    """`4 of 6 graphs`: graphs found in the compile cache; empty if nothing was compiled."""
    return "" if hits is None or misses is None else f"{hits} of {hits + misses} graphs"


CATEGORIES = (
    "parameters",
    "optimizer state",
    "gradients",
    "activations",
    "logits and loss",
    "weight casts",
    "temporaries",
    "batch",
    "library workspaces",
    "allocator rounding",
    "unexplained",
)
"""Categories of memory; they add up to the allocator's peak. Definitions: docs/memory-model.md."""


@dataclass(frozen=True, kw_only=True)
class LiveTensor:
    """One allocation that was alive at the peak."""

    bytes: int
    """Requested bytes, before CUDA's allocator rounds them up."""
    category: str
    name: str = ""
    """Name of a known tensor: `exp_avg of wte.weight`, `tokens 1`."""
    made_by: str = ""
    """Operator of torch or generated kernel; empty for tensors older than the step."""
    lines: tuple[str, ...] = ()
    """Lines of this package: one, or all that were fused into the kernel. Empty if unknown."""
    phase: str = ""
    """Phase of the allocation; empty: before the step, or between its phases."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """One phase of the recorded step, in seconds since its start."""

    name: str
    begin_seconds: float
    end_seconds: float


@dataclass(frozen=True, kw_only=True)
class MemoryProfile:
    """Where the memory of one warm optimizer step goes."""

    measured_peak_bytes: int
    """Peak by the allocator's count; on the CPU, of an equal step without recording."""
    peak_bytes: Mapping[str, int]
    """Bytes at the peak by category; they add up to `measured_peak_bytes`."""
    peak_phase: str
    peak_seconds: float
    """Time of the peak since the start of the step (recording slows the step down)."""
    device_bytes: int | None = None
    """Memory of the process: by the driver's count on CUDA, resident size on the CPU."""
    live: tuple[LiveTensor, ...] = ()
    """Tensors alive at the peak, the largest first."""
    spans: tuple[Span, ...] = ()
    seconds: tuple[float, ...] = ()
    """Time of every allocation and release; the first entry is the start of the step."""
    timeline: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Bytes by category, one entry for each of `seconds`."""
    snapshot: str = ""
    """File for pytorch.org/memory_viz (CUDA)."""

    @property
    def unexplained(self) -> float:
        """Unexplained fraction of the peak."""
        return abs(self.peak_bytes["unexplained"]) / self.measured_peak_bytes


def to_json(value: TrialRequest | TrialResult | MemoryProfile) -> str:
    """One JSON object."""
    return json.dumps(asdict(value), allow_nan=False)


def from_json(cls: type[T], text: str) -> T:
    """Inverse of `to_json`. Raises ConfigError."""
    return read_table(cls, parse_json(text, cls.__name__), cls.__name__)

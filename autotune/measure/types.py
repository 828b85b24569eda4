"""What a trial is asked (TrialRequest) and what it answers (TrialResult): plain data, JSON both ways."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Literal, TypeVar

from autotune.config.candidate import Candidate
from autotune.config.tables import parse_json, read_table

Status = Literal[
    "ok",
    "over_limit",  # it ran, but needs more than the limit
    "oom",  # the device had no more memory
    "predicted_over_limit",  # never run
    "unsupported",  # this machine or version cannot run it
    "incorrect",  # losses not finite, or wrong at the start
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
    """What the allocator holds of the device (CUDA)."""
    device_bytes: int | None = None
    """What the process holds: by the driver's count on CUDA, resident size on the CPU."""
    num_alloc_retries: int | None = None
    """How often the allocator had to give cached memory back first (CUDA)."""


@dataclass(frozen=True, kw_only=True)
class TrialRequest:
    """One measurement, sent to the worker on stdin."""

    candidate: Candidate
    device: str
    """`cpu` or `cuda:0`."""
    result_path: str
    """Where the worker leaves result.json, replaced at each phase."""
    memory_limit_bytes: int | None = None
    """None: all there is."""
    measure_seconds: float = 5.0
    """Upper bound for the timed part; it ends earlier once the interval is within 1 percent."""
    timeout_seconds: float = 600.0
    """The parent kills the worker's whole process group after this long."""
    stop_below_tokens_per_second: float | None = None
    """Timing ends as soon as it is clear that the candidate is slower than this: it cannot win any more."""
    final: bool = False
    """A finalist: evaluation and a checkpoint are included in the peaks."""
    steps: Steps | None = None
    """Optimizer steps are timed whole, or composed from micro steps and the optimizer's part. None: whole for a
    finalist, composed for all others."""

    @property
    def whole_steps(self) -> bool:
        return self.final if self.steps is None else self.steps == "whole"


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """What became of a candidate. Unknown values are None, never 0."""

    status: Status
    phase: Phase
    """The last phase that was entered."""
    message: str = ""
    """Why, where the status is not `ok`; else what is worth knowing. One line."""
    tokens_per_second: float | None = None
    tokens_per_second_ci95: float | None = None
    """Half width of the 95 % interval, in tokens/s."""
    mfu: float | None = None
    """Fraction of the device's dense peak; None where that is unknown."""
    step_seconds_p50: float | None = None
    """One optimizer step: accumulation x micro step + optimizer step."""
    steps: Steps | None = None
    """Whether that was timed as a whole, or composed from its parts; None: nothing was timed."""
    micro_step_seconds_p50: float | None = None
    optimizer_seconds_p50: float | None = None
    memory: Mapping[str, MemoryView] = field(default_factory=dict)
    """By stage."""
    wanted_bytes: int | None = None
    """Of the allocation that failed, for `oom`."""
    other_processes_bytes: int | None = None
    """What others held of the device before the trial."""
    first_loss: float | None = None
    last_loss: float | None = None
    build_seconds: float | None = None
    compile_seconds: float | None = None
    """The first micro step and optimizer step, compilation and all."""
    compile_cache_hits: int | None = None
    """Graphs of the first steps whose code was found in the compile cache; None where nothing is compiled."""
    compile_cache_misses: int | None = None
    """Graphs whose code had to be generated."""
    measured_steps: int | None = None
    trial_seconds: float | None = None
    """Wall clock of the whole worker, its start included."""
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    """Where `trial_seconds` went, by phase; `start` is the process's start and end."""
    started_at: str = ""
    """ISO 8601, UTC."""
    remedy: str = ""
    """What to do about a failure that belongs to the machine, not to the candidate: every trial would fail so."""

    def peak(self, view: str) -> int | None:
        """Largest `allocated_bytes`, `reserved_bytes` or `device_bytes` over all stages."""
        known = [value for stage in self.memory.values() if (value := getattr(stage, view)) is not None]
        return max(known, default=None)

    @property
    def peak_bytes(self) -> int | None:
        """Peak in the widest known view: device, else reserved, else allocated bytes."""
        return max((peak for view in PEAK_VIEWS if (peak := self.peak(view)) is not None), default=None)

    @property
    def num_alloc_retries(self) -> int | None:
        known = [v.num_alloc_retries for v in self.memory.values() if v.num_alloc_retries is not None]
        return sum(known) if known else None


def cache_text(hits: int | None, misses: int | None) -> str:
    """`4 of 6 graphs`: what the compile cache held of what was compiled; empty where nothing was."""
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
"""What memory at the peak is for. They add up to the allocator's peak; what each one holds is said in
`autotune.profile.recorder`."""


@dataclass(frozen=True, kw_only=True)
class LiveTensor:
    """One allocation that was alive at the peak."""

    bytes: int
    """As asked for, before CUDA's allocator rounds it up."""
    category: str
    name: str = ""
    """Of what is known: `exp_avg of transformer.wte.weight`, `tokens 1`."""
    made_by: str = ""
    """An operator of torch or a generated kernel; empty for what was there before the step."""
    lines: tuple[str, ...] = ()
    """Of our code: one, or all those that were fused into the kernel. Empty where they are not known."""
    phase: str = ""
    """In which it was made; empty: before the step, or between its phases."""


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
    """The allocator's own. On the CPU, of the same step when nothing but its peak was measured."""
    peak_bytes: Mapping[str, int]
    """By category; they add up to `measured_peak_bytes`."""
    peak_phase: str
    peak_seconds: float
    """Since the step's start, on the timeline (recording slows the step down)."""
    device_bytes: int | None = None
    """What the process holds: by the driver's count on CUDA, resident size on the CPU."""
    live: tuple[LiveTensor, ...] = ()
    """At the peak, the largest first."""
    spans: tuple[Span, ...] = ()
    seconds: tuple[float, ...] = ()
    """Of every allocation and release; the first entry is the start."""
    timeline: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Bytes by category, one for each of `seconds`."""
    snapshot: str = ""
    """File that pytorch.org/memory_viz opens (CUDA)."""

    @property
    def unexplained(self) -> float:
        """Fraction of the peak."""
        return abs(self.peak_bytes["unexplained"]) / self.measured_peak_bytes


def to_json(value: TrialRequest | TrialResult | MemoryProfile) -> str:
    """One JSON object."""
    return json.dumps(asdict(value), allow_nan=False)


def from_json(cls: type[T], text: str) -> T:
    """What `to_json` wrote. Raises ConfigError."""
    return read_table(cls, parse_json(text, cls.__name__), cls.__name__)

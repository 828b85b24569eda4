"""Peak memory by stage, in four views: allocated, reserved, the device's own count, and retries.

CUDA: the caching allocator's statistics and NVML's count for this process. CPU: the exact peak of torch's
allocator, summed up from the profiler's memory events, and the resident size from /proc.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pynvml
import torch
from torch.profiler import ProfilerActivity, profile

from autotune.measure.types import MemoryView, Stage


class MemoryMeter:
    """Collects the peaks of stages: `with meter.stage("steady"): ...`, then `views()`."""

    def __init__(self, device: torch.device, live_bytes: Callable[[], int]) -> None:
        """live_bytes: of tensors that exist when a stage begins. On the CPU the allocator's peak is counted
        from there; CUDA's allocator knows by itself."""
        self.device, self._live_bytes = device, live_bytes
        self._views: dict[str, MemoryView] = {}
        self.ran: Counter[str] = Counter()
        """How often each operator ran in the first `steady` stage."""
        self._card = _Card.open(device) if device.type == "cuda" else None

    @property
    def other_processes_bytes(self) -> int | None:
        """What others held of the card when the meter was made; None on the CPU."""
        return self._card.others_bytes if self._card else None

    def others_grown_bytes(self) -> int | None:
        """What other processes have taken of the card since; None where that cannot be seen."""
        return self._card.others_grown_bytes() if self._card else None

    def process_bytes(self) -> int | None:
        """What this process holds of the card now, its context included; None without NVML, and on the CPU."""
        return self._card.process_bytes() if self._card else None

    def stage(self, name: Stage) -> AbstractContextManager[None]:
        """Measure the peaks of the block. A stage that is entered again keeps its largest values.

        On the CPU the block must free what it allocates, or leave it counted by `live_bytes`."""
        stage = self._cuda_stage(name) if self.device.type == "cuda" else self._cpu_stage(name)
        return self._heard(stage) if name == "steady" and self.device.type == "cuda" and not self.ran else stage

    def views(self) -> Mapping[str, MemoryView]:
        return dict(self._views)

    @contextmanager
    def _cuda_stage(self, name: Stage) -> Iterator[None]:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        retries = torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0)
        try:
            yield
        finally:
            torch.cuda.synchronize(self.device)
            stats = torch.cuda.memory_stats(self.device)
            reserved = stats["reserved_bytes.all.peak"]
            # the driver is asked now, but the allocator may have held more for a moment
            since_given_back = reserved - stats["reserved_bytes.all.current"]
            held = self.process_bytes()
            self._keep(name, MemoryView(
                allocated_bytes=stats["allocated_bytes.all.peak"],
                reserved_bytes=reserved,
                device_bytes=None if held is None else held + since_given_back,
                num_alloc_retries=stats.get("num_alloc_retries", 0) - retries,
            ))  # fmt: skip

    @contextmanager
    def _heard(self, stage: AbstractContextManager[None]) -> Iterator[None]:
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded, stage:
            yield
        self.ran = Counter(event.name() for event in _events(recorded))

    @contextmanager
    def _cpu_stage(self, name: Stage) -> Iterator[None]:
        before = self._live_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
            yield
        grown = max(accumulate(_allocations(recorded)), default=0)
        if name == "steady" and not self.ran:
            self.ran = Counter(event.name() for event in _events(recorded))
        self._keep(name, MemoryView(allocated_bytes=before + max(0, grown), device_bytes=_resident_peak_bytes()))

    def _keep(self, name: Stage, new: MemoryView) -> None:
        both = (self._views.get(name, MemoryView()), new)
        self._views[name] = MemoryView(
            allocated_bytes=_known(max, [view.allocated_bytes for view in both]),
            reserved_bytes=_known(max, [view.reserved_bytes for view in both]),
            device_bytes=_known(max, [view.device_bytes for view in both]),
            num_alloc_retries=_known(sum, [view.num_alloc_retries for view in both]),
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether the error, or one in its chain of causes, is a failed allocation. Decided by type, except for torch's CPU
    allocator, which raises RuntimeError and is recognised by its file name in the message
    (pytorch: c10/core/impl/alloc_cpu.cpp)."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and out_of_memory(cause)


def _known(combine: Callable[[list[int]], int], values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return combine(known) if known else None


def _events(recorded: profile) -> list[Any]:
    assert recorded.profiler is not None
    results: Any = recorded.profiler.kineto_results
    return list(results.events())


def _allocations(recorded: profile) -> list[int]:
    """Bytes of every allocation (+) and release (-) on the CPU, in order of time."""
    cpu = torch._C._autograd.DeviceType.CPU
    events = [event for event in _events(recorded) if event.name() == "[memory]" and event.device_type() == cpu]
    return [event.nbytes() for event in sorted(events, key=lambda event: int(event.start_ns()))]


def _resident_peak_bytes() -> int:
    """Largest resident size of this process since the last reset."""
    found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, "Linux has it since 2.6.33"
    return int(found[1]) * 1024


@dataclass(frozen=True, kw_only=True)
class _Card:
    """NVML's view of one CUDA device."""

    handle: object
    others_bytes: int
    """What others held at first; where the driver refuses process accounting, all that was in use."""

    @classmethod
    def open(cls, device: torch.device) -> "_Card | None":
        """None where there is no NVML: the driver's view stays unknown."""
        try:
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            return cls(handle=handle, others_bytes=_used_bytes(handle) - (_accounted_bytes(handle) or 0))
        except pynvml.NVMLError:
            return None

    def process_bytes(self) -> int:
        """What this process holds: by process accounting, else the device's use minus the use before."""
        accounted = _accounted_bytes(self.handle)
        return _used_bytes(self.handle) - self.others_bytes if accounted is None else accounted

    def others_grown_bytes(self) -> int | None:
        """What others have taken since; None where the driver refuses process accounting."""
        own = _accounted_bytes(self.handle)
        return None if own is None else _used_bytes(self.handle) - own - self.others_bytes


def _used_bytes(handle: object) -> int:
    """What processes hold; the first version of this call would count what the driver reserves for itself, too."""
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    return int(memory.total - memory.free - memory.reserved)


def _accounted_bytes(handle: object) -> int | None:
    """What NVML says that this process holds; None where the driver refuses to."""
    try:
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    return next((p.usedGpuMemory for p in processes if p.pid == os.getpid() and p.usedGpuMemory), None)

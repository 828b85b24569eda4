"""Peak memory by stage, in four views: allocated, reserved, the driver's count, and allocation retries.

CUDA: statistics of the caching allocator and NVML's count for this process. CPU: the exact peak of torch's
allocator, summed from the profiler's memory events, and the resident size from /proc.
"""

import errno
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

from autotune.measure.limit import is_limited
from autotune.measure.types import MemoryView, Stage


class MemoryMeter:
    """Records the peaks of stages: `with meter.stage("steady"): ...`, then `views()`."""

    def __init__(self, device: torch.device, live_bytes: Callable[[], int]) -> None:
        """live_bytes: returns the bytes of all tensors alive at the beginning of a stage. On the CPU, growth is added
        to it; CUDA's allocator counts them itself."""
        self.device, self._live_bytes = device, live_bytes
        self._views: dict[str, MemoryView] = {}
        self.ran: Counter[str] = Counter()
        """Calls by operator in the first `steady` stage."""
        self._card = _Card.open(device) if device.type == "cuda" else None

    @property
    def other_processes_bytes(self) -> int | None:
        """Device memory of other processes when the meter was created; None on the CPU."""
        return self._card.others_bytes if self._card else None

    def others_grown_bytes(self) -> int | None:
        """Growth of other processes' device memory since then; None where it is not known."""
        return self._card.others_grown_bytes() if self._card else None

    def process_bytes(self) -> int | None:
        """Device memory of this process, its CUDA context included; None without NVML and on the CPU."""
        return self._card.process_bytes() if self._card else None

    def stage(self, name: Stage) -> AbstractContextManager[None]:
        """Measure the peaks of the block. A stage that is entered again keeps its largest values.

        On the CPU the block must free what it allocates, except for tensors that `live_bytes` counts."""
        stage = self._cuda_stage(name) if self.device.type == "cuda" else self._cpu_stage(name)
        return self._counted(stage) if name == "steady" and self.device.type == "cuda" and not self.ran else stage

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
            # the driver's count is of now; the allocator may have held more at its peak
            released = reserved - stats["reserved_bytes.all.current"]
            held = self.process_bytes()
            self._keep(name, MemoryView(
                allocated_bytes=stats["allocated_bytes.all.peak"],
                reserved_bytes=reserved,
                device_bytes=None if held is None else held + released,
                num_alloc_retries=stats.get("num_alloc_retries", 0) - retries,
            ))  # fmt: skip

    @contextmanager
    def _counted(self, stage: AbstractContextManager[None]) -> Iterator[None]:
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
    """Whether the error, or one in its chain of causes, is a failed allocation. Decided by type, except for
    RuntimeError, whose message tells: by the name of torch's CPU allocator (pytorch: c10/core/impl/alloc_cpu.cpp), or
    of a thread that could not start where memory is limited, as there is none for its stack."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _messages()):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and out_of_memory(cause)


def _messages() -> tuple[str, ...]:
    threads = (os.strerror(errno.EAGAIN), "can't start new thread") if is_limited() else ()
    return "DefaultCPUAllocator", *threads


def _known(combine: Callable[[list[int]], int], values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return combine(known) if known else None


def _events(recorded: profile) -> list[Any]:
    assert recorded.profiler is not None
    results: Any = recorded.profiler.kineto_results
    return list(results.events())


def _allocations(recorded: profile) -> list[int]:
    """Bytes of every allocation (+) and release (-) on the CPU, in chronological order."""
    cpu = torch._C._autograd.DeviceType.CPU
    events = [event for event in _events(recorded) if event.name() == "[memory]" and event.device_type() == cpu]
    return [event.nbytes() for event in sorted(events, key=lambda event: int(event.start_ns()))]


def _resident_peak_bytes() -> int:
    """Largest resident size of this process since the last reset."""
    match = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None, "Linux has it since 2.6.33"
    return int(match[1]) * 1024


@dataclass(frozen=True, kw_only=True)
class _Card:
    """NVML's view of one CUDA device."""

    handle: object
    others_bytes: int
    """Memory of other processes at the beginning; all memory in use where process accounting is refused."""

    @classmethod
    def open(cls, device: torch.device) -> "_Card | None":
        """None without NVML: the driver's view is then unknown."""
        try:
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            return cls(handle=handle, others_bytes=_used_bytes(handle) - (_accounted_bytes(handle) or 0))
        except pynvml.NVMLError:
            return None

    def process_bytes(self) -> int:
        """Memory of this process by process accounting, else the growth of the device's use."""
        accounted = _accounted_bytes(self.handle)
        return _used_bytes(self.handle) - self.others_bytes if accounted is None else accounted

    def others_grown_bytes(self) -> int | None:
        """Growth of other processes' memory; None where the driver refuses process accounting."""
        accounted = _accounted_bytes(self.handle)
        return None if accounted is None else _used_bytes(self.handle) - accounted - self.others_bytes


def _used_bytes(handle: object) -> int:
    """Memory of all processes. Version 1 of this call would include memory reserved by the driver."""
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    return int(memory.total - memory.free - memory.reserved)


def _accounted_bytes(handle: object) -> int | None:
    """Memory of this process by NVML's process accounting; None where the driver refuses it."""
    try:
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    return next((p.usedGpuMemory for p in processes if p.pid == os.getpid() and p.usedGpuMemory), None)

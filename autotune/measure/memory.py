"""Peak memory by stage, in four views: allocated, reserved, the device's own count, and retries.

CUDA: the caching allocator's statistics and NVML's count for this process. CPU: the exact peak of torch's
allocator, summed up from the profiler's memory events, and the resident size from /proc.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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
        self._card = _Card.open(device) if device.type == "cuda" else None

    @property
    def other_processes_bytes(self) -> int | None:
        """What others held of the card when the meter was made; None on the CPU."""
        return self._card.others_bytes if self._card else None

    def others_grown_bytes(self) -> int | None:
        """What other processes have taken of the card since; None where that cannot be seen."""
        return self._card.others_grown_bytes() if self._card else None

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Measure the peaks of the block. A stage that is entered again keeps its largest values.

        On the CPU the block must free what it allocates, or leave it counted by `live_bytes`."""
        body = self._cuda_stage(self._card, name) if self._card else self._cpu_stage(name)
        with body:
            yield

    def views(self) -> Mapping[str, MemoryView]:
        return dict(self._views)

    @contextmanager
    def _cuda_stage(self, card: "_Card", name: Stage) -> Iterator[None]:
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
            held = card.process_bytes()
            self._keep(name, MemoryView(
                allocated_bytes=stats["allocated_bytes.all.peak"],
                reserved_bytes=reserved,
                device_bytes=None if held is None else held + since_given_back,
                num_alloc_retries=stats.get("num_alloc_retries", 0) - retries,
            ))  # fmt: skip

    @contextmanager
    def _cpu_stage(self, name: Stage) -> Iterator[None]:
        before = self._live_bytes()
        _reset_resident_peak()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
            yield
        allocated = before + max(0, peak_of(allocations(recorded)))
        self._keep(name, MemoryView(allocated_bytes=allocated, device_bytes=resident_peak_bytes()))

    def _keep(self, name: Stage, new: MemoryView) -> None:
        old = self._views.get(name, MemoryView())
        self._views[name] = MemoryView(
            allocated_bytes=_larger(old.allocated_bytes, new.allocated_bytes),
            reserved_bytes=_larger(old.reserved_bytes, new.reserved_bytes),
            device_bytes=_larger(old.device_bytes, new.device_bytes),
            num_alloc_retries=_sum(old.num_alloc_retries, new.num_alloc_retries),
        )


def _larger(a: int | None, b: int | None) -> int | None:
    return max((value for value in (a, b) if value is not None), default=None)


def _sum(a: int | None, b: int | None) -> int | None:
    return None if a is None and b is None else (a or 0) + (b or 0)


def allocations(recorded: profile) -> list[tuple[int, int]]:
    """(nanoseconds, bytes) of every allocation (+) and release (-) on the CPU, in order of time."""
    assert recorded.profiler is not None
    results: Any = recorded.profiler.kineto_results
    cpu = torch._C._autograd.DeviceType.CPU
    events = [
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]" and event.device_type() == cpu
    ]
    return sorted(events, key=lambda event: event[0])


def peak_of(events: list[tuple[int, int]]) -> int:
    """Largest running sum of the bytes."""
    held = peak = 0
    for _, count in events:
        held += count
        peak = max(peak, held)
    return peak


def _reset_resident_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM


def resident_peak_bytes() -> int:
    """Largest resident size of this process since the last reset (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no line VmHWM; Linux 2.6.33 or newer is needed")


@dataclass(frozen=True, kw_only=True)
class _Card:
    """NVML's view of one CUDA device."""

    handle: object | None
    used_before_bytes: int | None
    others_bytes: int | None = field(default=None)

    @classmethod
    def open(cls, device: torch.device) -> "_Card":
        try:
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            used = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        except pynvml.NVMLError:  # no NVML here: the driver's view stays unknown
            return cls(handle=None, used_before_bytes=None)
        card = cls(handle=handle, used_before_bytes=used)
        own = card._accounted_bytes() or 0
        return cls(handle=handle, used_before_bytes=used - own, others_bytes=used - own)

    def process_bytes(self) -> int | None:
        """What this process holds: by process accounting, else the device's use minus the use before."""
        if self.handle is None or self.used_before_bytes is None:
            return None
        accounted = self._accounted_bytes()
        if accounted is not None:
            return accounted
        return int(pynvml.nvmlDeviceGetMemoryInfo(self.handle).used) - self.used_before_bytes

    def others_grown_bytes(self) -> int | None:
        own = self._accounted_bytes() if self.handle is not None else None
        if own is None or self.others_bytes is None:
            return None
        return int(pynvml.nvmlDeviceGetMemoryInfo(self.handle).used) - own - self.others_bytes

    def _accounted_bytes(self) -> int | None:
        try:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(self.handle)
        except pynvml.NVMLError:  # some drivers refuse process accounting
            return None
        return next((p.usedGpuMemory for p in processes if p.pid == os.getpid() and p.usedGpuMemory), None)

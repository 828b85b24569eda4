"""Timing of micro steps and optimizer steps: warm up until steady, then the median with its interval."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from autotune.measure.types import Z95

TARGET = 0.01
"""Relative half width of the 95 % interval at which timing ends."""
MIN_SAMPLES = 7
"""Fewest samples for which order statistics bound the median with 95 % confidence and one outlier is tolerated."""
MAX_WARMUP = 20

# 97.5 % quantile of Student's t by sample count: below six, no order statistics bound the median with 95 % confidence.
_STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one part of a step."""

    median: float
    ci95: float
    """Distance from the median to the farther end of its 95 % interval, which may be asymmetric."""
    samples: int


def summarise(seconds: Sequence[float]) -> Timing:
    """Median and its distribution-free interval from order statistics (Conover, Practical Nonparametric
    Statistics, 3.2), with the normal approximation to binomial ranks. Below six samples: Student's interval. One
    sample: an interval as wide as the sample. Needs at least one sample."""
    ordered = sorted(seconds)
    count, median = len(ordered), statistics.median(ordered)
    if count == 1:
        return Timing(median=median, ci95=median, samples=1)
    if count in _STUDENT:
        return Timing(median=median, ci95=_STUDENT[count] * statistics.stdev(ordered) / math.sqrt(count), samples=count)
    spread = Z95 * math.sqrt(count) / 2
    low = max(0, math.floor(count / 2 - spread))
    high = min(count - 1, math.ceil(count / 2 + spread) - 1)
    return Timing(median=median, ci95=max(median - ordered[low], ordered[high] - median), samples=count)


class Stopwatch:
    """Times a function: by device events on CUDA, by the monotonic clock on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def time(self, work: Callable[[], object]) -> Callable[[], float]:
        """Run `work`; the returned function reads its seconds (on CUDA after `synchronise`)."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            work()
            end.record()
            return lambda: begin.elapsed_time(end) / 1e3
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        return lambda: seconds

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def warm_up(cycle: Callable[[], float], deadline: float, agreed: Callable[[bool], bool] = bool) -> int:
    """Run `cycle`, which returns its seconds, until one is within 5 % of its predecessor: at least three times and at
    most MAX_WARMUP, and until `deadline` (time.monotonic) at the latest. `agreed`: whether any of several processes
    would end. Returns the number of cycles."""
    previous = math.inf
    for done in range(1, MAX_WARMUP + 1):
        seconds = cycle()
        if agreed(time.monotonic() > deadline or (done >= 3 and abs(seconds - previous) <= 0.05 * previous)):
            return done
        previous = seconds
    return MAX_WARMUP

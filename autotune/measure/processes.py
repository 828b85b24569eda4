"""The parent's side of a trial of several processes: how torchrun starts them, and one result from theirs."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from autotune.environment import child_command
from autotune.measure.types import PEAK_VIEWS, MemoryView, TrialResult

R = TypeVar("R", bound=TrialResult)


def torchrun(module: str, processes: int, request: Path) -> list[str]:
    """Command that runs a worker's module in several processes of this machine, which end with this one. `request`: a
    file in the trial's folder, where torchrun's own folder, which it leaves behind, goes too."""
    ranks = ["--standalone", "--nproc-per-node", str(processes), "--log-dir", str(request.parent)]
    worker = ["-m", "autotune.measure.child", "0", module, str(request)]
    return child_command("torch.distributed.run", *ranks, *worker)


def result_file(main: Path, rank: int) -> Path:
    """Where a process leaves its result: `result.json`, `result.1.json`, ..."""
    return main if rank == 0 else main.with_suffix(f".{rank}{main.suffix}")


def together(results: Sequence[R], cause: int | None) -> R:
    """One result of all processes: that of the first one that failed, else of the main one, with the peaks of the
    fullest. `cause`: the process that ended first, as torchrun saw it."""
    failed = [(rank, result) for rank, result in enumerate(results) if result.status != "ok"]
    # the others crash because they lose it, or are ended by torchrun
    failed.sort(key=lambda ranked: (ranked[1].status == "crashed", ranked[0] != cause, not ranked[1].message))
    rank, chosen = failed[0] if failed else (0, results[0])
    views = [item for result in results for item in result.memory.items()]
    memory = {stage: _fullest([view for name, view in views if name == stage]) for stage, _ in views}
    message = f"rank {rank}: {chosen.message}" if failed and chosen.message else chosen.message
    peaks = tuple(result.peak_bytes or 0 for result in results) if all(r.peak_bytes for r in results) else ()
    return replace(chosen, memory=memory, message=message, process_peak_bytes=peaks)


def _fullest(views: Sequence[MemoryView]) -> MemoryView:
    def most(field: str) -> int | None:
        return max((value for view in views if (value := getattr(view, field)) is not None), default=None)

    return MemoryView(**{field: most(field) for field in (*PEAK_VIEWS, "num_alloc_retries")})


def first_to_end(log: str) -> tuple[int, int] | None:
    """Rank and return code of the process that ended first, from torchrun's report; None without one."""
    found = re.search(r"Root Cause.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)", log, re.DOTALL)
    return (int(found[1]), int(found[2])) if found else None

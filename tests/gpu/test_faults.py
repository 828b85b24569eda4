"""A fault costs its own trial and nothing else: the next trial measures what one before all faults did."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from gpu.bench import CHUNKED, EAGER, Bench

from autotune.config.candidate import Candidate
from autotune.measure.types import TrialResult
from autotune.units import GIB

pytestmark = [pytest.mark.gpu, pytest.mark.seconds(80)]

REFERENCE: list[TrialResult] = []
"""The trial before all faults; measured again where a call begins in the middle of this file."""


def reference(bench: Bench) -> Candidate:
    return bench.candidate(bench.shape(4, 4, 256), replace(CHUNKED, compile="block", micro_batch_size=8), 32)


def steady_bytes(result: TrialResult) -> int:
    """Steady steps only: what is compiled for the first time is tuned on the device, in memory of its own."""
    return result.memory["steady"].allocated_bytes or 0


def out_of_memory(bench: Bench) -> TrialResult:
    large = bench.candidate(bench.shape(12, 12, 768), replace(EAGER, micro_batch_size=64))
    return bench.trial(large, limit=400 << 20 if bench.dry else 4 * GIB)


def signalled(bench: Bench, number: signal.Signals) -> TrialResult:
    """A trial whose worker gets a signal two seconds after its start."""

    def send() -> None:
        for _ in range(100):
            time.sleep(0.1)
            for pid in children():
                if b"autotune.measure.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    time.sleep(2.0)  # into its build, where torch loads fast
                    os.kill(pid, number)
                    return

    thread = threading.Thread(target=send)
    thread.start()
    result = bench.trial(reference(bench), measure_seconds=60.0, timeout_seconds=12.0 if bench.dry else 25.0)
    thread.join()
    return result


def children() -> list[int]:
    """Child processes, found by their parent: not every kernel lists them in /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return found


def corrupted_context(bench: Bench) -> TrialResult:
    """The worker first reads beyond a tensor on the device: on CUDA everything after that fails."""
    kind = bench.device_kind
    code = (
        "import torch, runpy, sys; "
        f"torch.zeros(4, device='{kind}')[torch.tensor([10**6], device='{kind}')]; "
        "sys.argv = ['worker']; runpy.run_module('autotune.measure.worker', run_name='__main__')"
    )
    fake = bench.scratch / "corrupting-python"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n')
    fake.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(fake))
        return bench.trial(reference(bench))


FAULTS: dict[str, tuple[Callable[[Bench], TrialResult], tuple[str, ...]]] = {
    "out of memory": (out_of_memory, ("oom", "over_limit")),
    "hang": (partial(signalled, number=signal.SIGSTOP), ("timeout",)),
    "killed worker": (partial(signalled, number=signal.SIGKILL), ("crashed",)),
    "corrupted context": (corrupted_context, ("crashed",)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault: str, bench: Bench) -> None:
    if not REFERENCE:
        REFERENCE.append(bench.trial(reference(bench)))
        assert REFERENCE[0].status == "ok", REFERENCE[0].message
    run, statuses = FAULTS[fault]
    result = run(bench)
    after = bench.trial(reference(bench))
    ratio = steady_bytes(after) / steady_bytes(REFERENCE[0]) if after.status == "ok" else None
    bench.row.update(
        {"fault_status": result.status, "fault_message": result.message, "wanted_bytes": result.wanted_bytes}
    )
    bench.row.update({"next_peak_ratio": ratio})
    if after.tokens_per_second and REFERENCE[0].tokens_per_second:
        bench.row.update({"next_speed_ratio": after.tokens_per_second / REFERENCE[0].tokens_per_second})
    assert result.status in statuses, result.message
    assert after.status == "ok", after.message
    # not to the byte: how the allocator cuts its blocks depends on what was compiled in the process
    assert ratio == pytest.approx(1.0, abs=0.01)

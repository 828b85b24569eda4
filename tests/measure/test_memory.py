"""Peaks against tensors of known size."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
import torch

from autotune.config.candidate import Candidate
from autotune.measure import memory
from autotune.measure.memory import MemoryMeter
from autotune.measure.types import TrialRequest, to_json

CPU = torch.device("cpu")
MIB = 1 << 20


def megabytes(count: int) -> torch.Tensor:
    return torch.ones(count * MIB, dtype=torch.uint8)


def test_the_allocated_peak_is_exact_to_the_byte() -> None:
    kept = megabytes(8)
    meter = MemoryMeter(CPU, lambda: kept.nbytes)
    with meter.stage("steady"):
        first = megabytes(5)
        second = megabytes(3)
        del first
        third = megabytes(4)
        del second, third
    assert meter.views()["steady"].allocated_bytes == (8 + 5 + 3) * MIB


def test_a_stage_entered_again_keeps_its_largest_peak_and_stages_are_apart() -> None:
    meter = MemoryMeter(CPU, lambda: 0)
    for size in (2, 6, 1):
        with meter.stage("steady"):
            megabytes(size)
    with meter.stage("evaluation"):
        megabytes(3)
    peaks = {name: view.allocated_bytes for name, view in meter.views().items()}
    assert peaks == {"steady": 6 * MIB, "evaluation": 3 * MIB}


def test_resident_size_follows_what_is_touched() -> None:
    meter = MemoryMeter(CPU, lambda: 0)
    with meter.stage("first_step"):
        pass
    with meter.stage("steady"):
        megabytes(300)
    views = meter.views()
    grown = views["steady"].device_bytes - views["first_step"].device_bytes  # type: ignore[operator]
    assert 290 * MIB < grown < 400 * MIB


def test_what_the_cpu_cannot_know_is_none_and_not_zero() -> None:
    meter = MemoryMeter(CPU, lambda: 0)
    with meter.stage("steady"):
        pass
    view = meter.views()["steady"]
    assert view.reserved_bytes is None
    assert view.num_alloc_retries is None
    assert meter.other_processes_bytes is None


class Driver:
    """NVML as it answers on three kinds of machine."""

    NVMLError = pynvml.NVMLError
    nvmlMemory_v2 = pynvml.nvmlMemory_v2  # noqa: N815

    def __init__(self, kind: str) -> None:
        self.kind, self.used = kind, 3000 * MIB

    def nvmlInit(self) -> None:  # noqa: N802
        if self.kind == "no NVML":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, handle: object, version: int) -> SimpleNamespace:  # noqa: N802
        assert version == self.nvmlMemory_v2
        total, reserved = 8192 * MIB, 600 * MIB  # the driver's own: nobody's memory
        return SimpleNamespace(total=total, reserved=reserved, free=total - reserved - self.used, used=self.used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: object) -> list[SimpleNamespace]:  # noqa: N802
        if self.kind == "refuses":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        own = self.used - 2500 * MIB
        return [SimpleNamespace(pid=1, usedGpuMemory=2500 * MIB), SimpleNamespace(pid=4711, usedGpuMemory=own)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("accounts", (2500 * MIB, 1500 * MIB, 0)),  # its own 500 MiB before are not someone else's
        ("refuses", (3000 * MIB, 1000 * MIB, None)),  # all that was used before counts as others'
        ("no NVML", None),  # unknown, not zero
    ],
)
def test_the_drivers_view_and_what_stands_in_for_it(
    kind: str, expected: tuple[int, int, int | None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(kind)
    monkeypatch.setattr(memory, "pynvml", driver)
    monkeypatch.setattr(memory.os, "getpid", lambda: 4711)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    card = memory._Card.open(torch.device("cuda:0"))
    driver.used = 4000 * MIB
    assert (card and (card.others_bytes, card.process_bytes(), card.others_grown_bytes())) == expected


def test_a_thread_without_memory_for_its_stack_is_out_of_memory() -> None:
    script = (
        "import threading, torch\n"
        "from autotune.measure.limit import limit_data\n"
        "from autotune.measure.memory import out_of_memory\n"
        "assert not out_of_memory(RuntimeError('Resource temporarily unavailable'))\n"
        "limit_data(1 << 20)\n"
        "try:\n"
        "    threading.Thread(target=print).start()\n"
        "except RuntimeError as error:\n"
        "    print(out_of_memory(error), out_of_memory(RuntimeError('Resource temporarily unavailable')))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"


def test_a_worker_that_ran_out_of_memory_can_say_so(tmp_path: Path) -> None:
    """Not even a traceback could be printed within the limit."""
    request = TrialRequest(
        candidate=Candidate(), device="cpu", memory_limit_bytes=1 << 30, measure_seconds=1.0, timeout_seconds=60.0,
        result_path=str(tmp_path / "result.json"),
    )  # fmt: skip
    script = (
        "import sys\n"
        "from autotune.measure import limit, worker\n"
        "from autotune.measure.types import TrialRequest\n"
        "kept = []\n"
        "def measure(request, outcome):\n"
        "    limit.limit_data(1 << 20)\n"
        "    for size in [1 << 14, *range(512, 0, -8)]:  # all size classes of the allocator\n"
        "        try:\n"
        "            while True:\n"
        "                kept.append(bytes(size))\n"
        "        except MemoryError:\n"
        "            pass\n"
        "    raise MemoryError\n"
        "sys.exit(worker.main(measure, TrialRequest))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], input=to_json(request), capture_output=True, text=True)
    assert done.returncode == 1
    assert "MemoryError" in done.stderr
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "oom"

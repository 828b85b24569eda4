"""The stand-in through its C interface: what it says of a card, and where its memory ends."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from cuda_stand_in.build import CARDS, build, variables

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")

PRELUDE = """
import ctypes, os, sys, time
cuda, nvml = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL("libnvidia-ml.so.1")
MIB = 1 << 20

def attribute(number):
    value = ctypes.c_int()
    assert cuda.cuDeviceGetAttribute(ctypes.byref(value), number, 0) == 0
    return value.value

def information():
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
    return free.value, total.value

def allocate(size):
    pointer = ctypes.c_uint64()
    return cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size)), pointer

def name():
    text = ctypes.create_string_buffer(96)
    assert nvml.nvmlInit_v2() == 0
    assert nvml.nvmlDeviceGetName(None, text, 96) == 0
    return text.value.decode()

def context():
    made = ctypes.c_void_p()
    assert cuda.cuInit(0) == 0
    return cuda.cuDevicePrimaryCtxRetain(ctypes.byref(made), 0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("stand-in")
    build(made)
    return made


def start(folder: Path, card: str, code: str, **more: str) -> "subprocess.Popen[str]":
    """A process with the stand-in: the dynamic loader reads LD_LIBRARY_PATH at its start only."""
    wanted = {name: value for name, value in variables(folder, card).items() if name != "LD_PRELOAD"}
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        env={**os.environ, **wanted, **more}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def said(folder: Path, card: str, code: str, **more: str) -> str:
    process = start(folder, card, code, **more)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return out.strip()


@pytest.mark.parametrize(
    ("card", "full", "capability", "multiprocessors", "gib"),
    [
        ("T4", "Tesla T4", (7, 5), 40, 14.56),
        ("RTX 3090", "NVIDIA GeForce RTX 3090", (8, 6), 82, 23.69),
        ("RTX 4090", "NVIDIA GeForce RTX 4090", (8, 9), 128, 23.65),
        ("A100", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 79.15),
        ("H100", "NVIDIA H100 80GB HBM3", (9, 0), 132, 79.10),
    ],
)
def test_a_card(
    card: str, full: str, capability: tuple[int, int], multiprocessors: int, gib: float, folder: Path
) -> None:
    found = said(folder, card, "context(); print(name(), *map(attribute, (75, 76, 16)), information()[1], sep='|')")
    name, major, minor, count, memory = found.split("|")
    assert name == f"{full} (stand-in)"
    assert (int(major), int(minor), int(count)) == (*capability, multiprocessors)
    assert int(memory) / 2**30 == pytest.approx(gib, abs=0.01)


def test_every_card_is_tested() -> None:
    assert len(CARDS) == 5


def test_an_unknown_card_is_refused_in_one_line(folder: Path) -> None:
    process = start(folder, "RTX 9090", "context()")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.strip().startswith("error: AUTOTUNE_STAND_IN_CARD=RTX 9090 names no card")
    assert errors.count("\n") == 1


def test_memory_ends_at_the_cards_edge_and_comes_back(folder: Path) -> None:
    out = said(
        folder, "RTX 4090",
        """
        context()
        free, total = information()
        refused, _ = allocate(free + MIB)
        taken, pointer = allocate(free)
        more, _ = allocate(1)
        freed = cuda.cuMemFree_v2(pointer)
        print(refused, taken, more, freed, free == information()[0], total - free == 450 * MIB)
        """,
    )  # fmt: skip
    assert out == "2 0 2 0 True True"


def test_mapped_memory_counts_until_it_is_neither_held_nor_mapped(folder: Path) -> None:
    """The calls that the allocator's expandable segments make."""
    out = said(
        folder, "T4",
        """
        context()
        before = information()[0]
        handle, address = ctypes.c_uint64(), ctypes.c_uint64()
        size, range, zero = ctypes.c_size_t(20 * MIB), ctypes.c_size_t(1 << 34), ctypes.c_uint64(0)
        codes = [cuda.cuMemAddressReserve(ctypes.byref(address), range, zero, zero, zero),
                 cuda.cuMemCreate(ctypes.byref(handle), size, None, zero),
                 cuda.cuMemMap(address, size, zero, handle, zero),
                 cuda.cuMemRelease(handle)]
        held = before - information()[0]
        codes.append(cuda.cuMemUnmap(address, size))
        print(sum(codes), held // MIB, before == information()[0])
        """,
    )  # fmt: skip
    assert out == "0 20 True"


def test_processes_share_the_card_and_a_killed_one_leaves_nothing(folder: Path) -> None:
    other = start(folder, "T4", "context(); print(allocate(10 << 30)[0], flush=True); time.sleep(60)")
    assert other.stdout is not None
    assert other.stdout.readline().strip() == "0"
    code = """
        context()
        class Process(ctypes.Structure):
            _fields_ = [("pid", ctypes.c_uint), ("bytes", ctypes.c_ulonglong), ("rest", ctypes.c_uint * 2)]
        count, found = ctypes.c_uint(8), (Process * 8)()
        nvml.nvmlInit_v2()
        assert nvml.nvmlDeviceGetComputeRunningProcesses_v3(None, ctypes.byref(count), found) == 0
        print(count.value, allocate(10 << 30)[0], sorted(one.bytes // MIB for one in found[: count.value]))
        """
    assert said(folder, "T4", code) == "2 2 [450, 10690]"
    other.kill()
    other.wait()
    assert said(folder, "T4", code) == "1 0 [450]"


def test_only_machine_code_for_the_card_is_loaded(folder: Path) -> None:
    def elf(abi: int, flags: int) -> bytes:
        header = b"\x7fELF" + bytes([2, 1, 1, 0x41, abi]) + bytes(7)
        header += (2).to_bytes(2, "little") + (190).to_bytes(2, "little") + bytes(20 + 8)
        return header + flags.to_bytes(4, "little") + bytes(12) + b"\0.text.kernel\0"

    code = """
        context()
        module = ctypes.c_void_p()
        image = bytes.fromhex(sys.stdin.read())
        print(cuda.cuModuleLoadData(ctypes.byref(module), image + bytes(64)))
        """
    for image, expected in [(elf(8, 89 << 8), 0), (elf(7, 86), 0), (elf(8, 90 << 8), 209), (elf(8, 80 << 8), 0)]:
        process = start(folder, "RTX 4090", code)
        out, errors = process.communicate(image.hex(), timeout=60)
        assert out.strip() == str(expected), errors
    process = start(folder, "RTX 4090", code)
    assert process.communicate(b".version 9.0".hex() + "00" * 64, timeout=60)[0].strip() == "200"


def test_less_memory_than_the_card_has(folder: Path) -> None:
    code = "context(); print(information()[1])"
    assert said(folder, "T4", code, AUTOTUNE_STAND_IN_MEMORY=str(1 << 30)) == str(1 << 30)


def test_events_tell_time(folder: Path) -> None:
    out = said(
        folder, "H100",
        """
        begin, end, spent = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_float()
        for event in (begin, end):
            cuda.cuEventCreate(ctypes.byref(event), 0)
        cuda.cuEventRecord(begin, None)
        time.sleep(0.05)
        cuda.cuEventRecord(end, None)
        cuda.cuEventElapsedTime_v2(ctypes.byref(spent), begin, end)
        print(spent.value)
        """,
    )  # fmt: skip
    assert 50 <= float(out) < 1000

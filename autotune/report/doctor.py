"""What is available on this machine and, for each absence, why. Nothing here imports torch."""

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich import box
from rich.markup import escape
from rich.table import Table

from autotune.data import tokenizer
from autotune.environment import Environment, compile_cache_dir, probe
from autotune.errors import AutotuneError, DataError
from autotune.kernels import registry
from autotune.units import GIB, format_bytes

TORCH_RANGE = ((2, 11), (2, 14))
"""From the first to before the second, as pyproject.toml has it."""
_WANTED = ">={}.{},<{}.{}".format(*TORCH_RANGE[0], *TORCH_RANGE[1])
_OPTIONAL = {
    "triton": "compiled kernels on CUDA; comes with torch's CUDA builds",
    "liger_kernel": "Liger's fused loss",
    "cut_cross_entropy": "Apple's fused loss",
    "bitsandbytes": "8-bit AdamW",
    "wandb": "logging to Weights & Biases",
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: Literal["ok", "absent", "missing"]
    """`missing` keeps one from searching here, `absent` does not."""
    found: str
    """What is there, or why it is not and what to do."""


def examine() -> tuple[Check, ...]:
    """Look at everything that a search needs or can use."""
    packages = [_package(name, purpose) for name, purpose in _OPTIONAL.items()]
    host = (*_compiler(), _memory(), _disk(Path.cwd()), _cache(compile_cache_dir()), _tokenizer(), *packages)
    try:
        machine = probe()
    except AutotuneError as error:
        return (_python(), Check(name="torch", state="missing", found=f"{error}; install torch{_WANTED}"), *host)
    return (_python(), _torch(machine.torch), _device(machine), _nvml(machine), *host)


def can_search(checks: Sequence[Check]) -> bool:
    """Whether nothing that a search needs is missing."""
    return all(check.state != "missing" for check in checks)


def check_table(checks: Sequence[Check]) -> Table:
    """The checks, a line each."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("what", "state", "found"):
        table.add_column(header)
    colours = {"ok": "green", "absent": "yellow", "missing": "bold red"}
    for check in checks:
        table.add_row(check.name, f"[{colours[check.state]}]{check.state}", escape(check.found))
    return table


def kernel_table(environment: Environment) -> Table:
    """The registry's rows with what each is, and why it cannot run here where it cannot."""
    machine = registry.machine(environment.device, environment.capability, environment.torch)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("operation", "name", "here", "what it is", "dtypes"):
        table.add_column(header)
    for kernel in registry.KERNELS:
        reason = registry.why_unavailable(kernel, machine)
        here = "[green]ok" if reason is None else f"[yellow]{escape(reason)}"
        table.add_row(kernel.operation, kernel.name, here, escape(kernel.summary), ", ".join(kernel.dtypes))
    return table


def _python() -> Check:
    good = sys.version_info >= (3, 11)
    found = platform.python_version() + ("" if good else "; needs 3.11 or newer")
    return Check(name="Python", state="ok" if good else "missing", found=found)


def _torch(version: str) -> Check:
    release = tuple(int(number) for number in version.split(".")[:2])
    good = TORCH_RANGE[0] <= release < TORCH_RANGE[1]
    found = version + ("" if good else f"; run `pip install 'torch{_WANTED}'`")
    return Check(name="torch", state="ok" if good else "missing", found=found)


def _device(machine: Environment) -> Check:
    if machine.device == "cpu":
        cores = f"searches run on the CPU: {machine.device_name}, {machine.cpu_count} cores"
        return Check(name="CUDA device", state="absent", found=f"{_why_no_cuda(machine.torch)}; {cores}")
    capability = ".".join(map(str, machine.capability))
    memory = format_bytes(machine.device_memory_bytes)
    text = f"{machine.device_name}, {memory}, capability {capability}, driver {machine.driver or '-'}"
    return Check(name="CUDA device", state="ok", found=f"{text}, CUDA {machine.cuda}")


def _why_no_cuda(torch: str) -> str:
    if torch.endswith("+cpu"):
        return f"torch {torch} is a build without CUDA"
    if not Path("/proc/driver/nvidia").exists():
        return "no NVIDIA driver is loaded"
    return "torch sees none: compare `nvidia-smi` with CUDA_VISIBLE_DEVICES"


def _nvml(machine: Environment) -> Check:
    """Whether the driver says what each process holds: the widest view of peak memory."""
    import pynvml

    name = "NVML process accounting"
    if machine.device == "cpu":
        return Check(name=name, state="absent", found="no CUDA device")
    try:
        pynvml.nvmlInit()
        cards = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        processes = [p for card in cards for p in pynvml.nvmlDeviceGetComputeRunningProcesses(card)]
        refusal = "the driver hides it" if any(p.usedGpuMemory is None for p in processes) else ""
    except pynvml.NVMLError as error:
        refusal = str(error)
    if refusal:
        found = f"{refusal}; peaks are the device's use minus its use before the trial: let nothing else run on it"
        return Check(name=name, state="absent", found=found)
    return Check(name=name, state="ok", found=f"{len(processes)} processes seen on {len(cards)} devices")


def _compiler() -> tuple[Check, Check]:
    """torch.compile writes C++ on the CPU; on CUDA, Triton compiles its launcher in C."""
    wanted = os.environ.get("CXX", "g++")
    path, header = shutil.which(wanted), Path(sysconfig.get_path("include"), "Python.h")
    compiler = path or f"{wanted} is not found; torch.compile needs it: install g++ (or point CXX at a compiler)"
    headers = str(header) if header.exists() else f"{header} is not there; install python3-dev for torch.compile"
    return (
        Check(name="C++ compiler", state="ok" if path else "missing", found=compiler),
        Check(name="Python headers", state="ok" if header.exists() else "missing", found=headers),
    )


def _memory() -> Check:
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)
    return Check(name="free memory", state="ok", found=format_bytes(None if kib is None else kib * 1024))


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    enough = free >= GIB
    found = f"{format_bytes(free)} at {folder}" + ("" if enough else "; a run with checkpoints needs more than 1 GiB")
    return Check(name="free disk", state="ok" if enough else "absent", found=found)


def _cache(folder: Path) -> Check:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    good = existing.is_dir() and os.access(existing, os.W_OK)
    found = str(folder) if good else f"{folder} cannot be written; set AUTOTUNE_CACHE_DIR"
    return Check(name="compile cache", state="ok" if good else "missing", found=found)


def _tokenizer() -> Check:
    try:
        tokenizer.encoder()
    except DataError as error:
        return Check(name="GPT-2 tokenizer", state="missing", found=str(error))
    return Check(name="GPT-2 tokenizer", state="ok", found="ranks verified, no network needed")


def _package(name: str, purpose: str) -> Check:
    if importlib.util.find_spec(name) is None:
        return Check(name=name, state="absent", found=f"optional, not installed: {purpose}")
    return Check(name=name, state="ok", found=purpose)

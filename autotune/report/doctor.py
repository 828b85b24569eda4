"""Checks of this machine: what a search needs or can use and, if absent, why. Nothing here imports torch."""

import ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from autotune.data import tokenizer
from autotune.environment import Environment, busy_machine, probe, why_no_cuda
from autotune.errors import AutotuneError, ConfigError, DataError
from autotune.kernels import registry
from autotune.model.compile_cache import compile_cache_dir, make_cache
from autotune.report.table import Listing, make_table
from autotune.units import GIB, format_bytes

TORCH_RANGE = ((2, 11), (2, 15))
"""From the first to before the second, as pyproject.toml has it."""
_WANTED = "torch>={}.{},<{}.{}".format(*TORCH_RANGE[0], *TORCH_RANGE[1])
_OPTIONAL = {
    "triton": "compiled kernels on CUDA; comes with torch's CUDA builds",
    "liger_kernel": "Liger's fused loss",
    "cut_cross_entropy": "Apple's fused loss",
    "bitsandbytes": "8-bit AdamW",
    "wandb": "logging to Weights & Biases",
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One requirement."""

    name: str
    state: Literal["ok", "absent", "missing"]
    """`missing` prevents a search here, `absent` does not."""
    details: str
    """Version or place; if not ok, reason and remedy."""


def _needed(name: str, details: str | None, otherwise: str) -> Check:
    return Check(name=name, state="ok" if details else "missing", details=details or otherwise)


def _useful(name: str, details: str | None, otherwise: str) -> Check:
    return Check(name=name, state="ok" if details else "absent", details=details or otherwise)


def examine() -> tuple[Check, ...]:
    """All checks of this machine."""
    quiet = _useful("quiet machine", None if (busy := busy_machine()) else "no other program keeps it busy", busy)
    return (_needed("Python", platform.python_version(), ""), quiet, *_torch(), *_host(), *_packages())


def can_search(checks: Sequence[Check]) -> bool:
    """Whether all that a search needs is there."""
    return all(check.state != "missing" for check in checks)


def check_table(checks: Sequence[Check]) -> Listing:
    """One line per check."""
    return make_table([{"what": check.name, "state": check.state, "found": check.details} for check in checks])


def kernel_table(environment: Environment) -> Listing:
    """Registered kernels: summary, and whether they run here or why not."""
    machine = registry.machine(environment.device, environment.capability, environment.torch)
    return make_table(
        [
            {
                "operation": kernel.operation,
                "name": kernel.name,
                "here": registry.why_unavailable(kernel, machine) or "ok",
                "what it is": kernel.summary,
                "dtypes": ", ".join(kernel.dtypes),
            }
            for kernel in registry.KERNELS
        ],
        key=2,
    )


def _torch() -> Iterator[Check]:
    """torch's version and its device."""
    try:
        machine = probe()
    except AutotuneError as error:
        yield _needed("torch", None, f"{error}; install {_WANTED}")
        return
    release = tuple(int(number) for number in machine.torch.split(".")[:2])
    supported = machine.torch if TORCH_RANGE[0] <= release < TORCH_RANGE[1] else None
    yield _needed("torch", supported, f"{machine.torch}; run `pip install '{_WANTED}'`")
    memory = format_bytes(machine.device_memory_bytes)
    if machine.device == "cpu":
        cores = f"searches run on the CPU: {machine.device_name}, {machine.cpu_count} cores, {memory}"
        yield _useful("CUDA device", None, f"{why_no_cuda(machine.torch)}; {cores}")
        return
    capability = ".".join(map(str, machine.capability))
    text = f"{machine.device_name}, {memory}, capability {capability}, driver {machine.driver or '-'}"
    yield _useful("CUDA device", f"{text}, CUDA {machine.cuda}", "")
    yield _nvml()


def _nvml() -> Check:
    """Whether the driver reports memory per process, the widest view of peak memory."""
    import pynvml

    try:
        pynvml.nvmlInit()
        cards = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        processes = [p for card in cards for p in pynvml.nvmlDeviceGetComputeRunningProcesses(card)]
        refusal = "the driver does not report it" if any(p.usedGpuMemory is None for p in processes) else ""
    except pynvml.NVMLError as error:
        refusal = str(error)
    details = None if refusal else f"{len(processes)} processes on {len(cards)} devices"
    fallback = "peaks are the device's use minus its use before the trial: let nothing else run on it"
    return _useful("NVML process accounting", details, f"{refusal}; {fallback}")


def _host() -> Iterator[Check]:
    """Compiler, headers, disk. torch.compile generates C++ on the CPU; on CUDA, Triton compiles its launcher in C."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    advice = f"{header} is not there; install python3-dev for torch.compile"
    yield _needed("Python headers", str(header) if header.exists() else None, advice)
    yield from _compiling()
    free = shutil.disk_usage(Path.cwd()).free
    details = f"{format_bytes(free)} at {Path.cwd()}"
    too_little = f"{details}; a run with checkpoints needs more than 1 GiB"
    yield _useful("free disk", details if free >= GIB else None, too_little)


_SOURCE = '#include <omp.h>\nextern "C" int answer() { return omp_get_max_threads() > 0 ? 42 : 0; }\n'


def _compiling() -> Iterator[Check]:
    """Inductor's compiler and cache, tested by building a library in the cache and loading it."""
    compiler = os.environ.get("CXX", "g++")  # a program name without options, as Inductor reads it
    try:
        cache = compile_cache_dir()
        make_cache(cache)
    except ConfigError as error:
        refusal = shutil.which(compiler) is None and f"{compiler} is not found; {_INSTALL}"
        yield _needed("C++ compiler", None if refusal else compiler, refusal or "")
        yield _needed("compile cache", None, str(error))
        return
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=cache) as folder:
        refusal = _compile(compiler, Path(folder))
        yield _needed("C++ compiler", None if refusal else shutil.which(compiler), f"{refusal}; {_INSTALL}")
        refusal = "" if refusal else _load(Path(folder, "answer.so"))
    advice = f"a library in {cache} cannot be loaded: {refusal}; set AUTOTUNE_CACHE_DIR to a folder not mounted noexec"
    yield _needed("compile cache", None if refusal else str(cache), advice)


_INSTALL = "torch.compile needs it: install g++, or point CXX at a compiler"


def _compile(compiler: str, folder: Path) -> str:
    """Build answer.so in the folder. Returns the reason of a failure, or an empty text."""
    source, library = folder / "answer.cpp", folder / "answer.so"
    try:
        source.write_text(_SOURCE)
        command = [compiler, "-shared", "-fPIC", "-fopenmp", str(source), "-o", str(library)]
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=120)
    except FileNotFoundError:
        return f"{compiler} is not found"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{compiler} does not run: {error}"
    if run.returncode == 0 and library.exists():
        return ""
    lines = [line.strip() for line in run.stderr.splitlines() if "error" in line or "No space" in line]
    return f"{compiler} compiles nothing in {folder.parent}: {lines[0] if lines else f'exit code {run.returncode}'}"


def _load(library: Path) -> str:
    """Load the library and call it. Returns the reason of a failure, or an empty text."""
    try:
        return "" if ctypes.CDLL(str(library)).answer() == 42 else "it returns a wrong value"
    except (OSError, AttributeError) as error:
        return str(error)


def _packages() -> Iterator[Check]:
    try:
        tokenizer.encoder()
        yield _needed("GPT-2 tokenizer", "ranks verified, no network needed", "")
    except DataError as error:
        yield _needed("GPT-2 tokenizer", None, str(error))
    for name, purpose in _OPTIONAL.items():
        installed = purpose if importlib.util.find_spec(name) else None
        yield _useful(name, installed, f"optional, not installed: {purpose}")

"""What machine this is: device, memory, versions, peak FLOP/s; and its fingerprint.

`describe` needs torch; `probe` asks a fresh process, so that the searching process never imports torch
and holds no memory of the device.
"""

import contextlib
import hashlib
import json
import os
import platform
import struct
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import autotune
from autotune import places
from autotune.config.candidate import plain_texts
from autotune.config.tables import read_table
from autotune.errors import AutotuneError, ConfigError, UnsupportedError
from autotune.terminal import visible

# Dense bfloat16 (float16) tensor-core peaks in TFLOP/s, from NVIDIA's data sheets, by part of the device's name.
# The first match counts, so the longer name stands first.
_PEAK_TFLOPS = (
    ("B200", 2250.0), ("H200", 989.0), ("H100 PCIe", 756.0), ("H100", 989.0), ("H800", 989.0),
    ("A100", 312.0), ("A800", 312.0), ("A6000 Ada", 364.0), ("6000 Ada", 364.0), ("A6000", 154.8), ("A40", 149.7),
    ("A10G", 70.0), ("A10", 125.0), ("L40S", 362.0), ("L40", 181.0), ("L4", 121.0), ("V100", 125.0), ("T4", 65.0),
    ("RTX 5090", 209.5), ("RTX 5080", 112.6), ("RTX 4090", 165.2), ("RTX 4080", 97.5), ("RTX 4070 Ti", 80.2),
    ("RTX 4070", 58.3), ("RTX 3090 Ti", 80.0), ("RTX 3090", 71.2), ("RTX 3080", 59.5), ("RTX 3060", 25.6),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A machine and its software, as far as measurements depend on them."""

    device: str
    """`cpu` or `cuda:0`."""
    device_name: str
    device_memory_bytes: int
    """All of the card's memory; on the CPU, what this process may use of the main memory."""
    capability: tuple[int, ...] = ()
    """CUDA compute capability."""
    driver: str = ""
    cuda: str = ""
    torch: str
    python: str
    autotune: str
    cpu_count: int
    """Cores this process may use."""
    platform: str
    peak_flops: float | None = None
    """Dense bfloat16 FLOP/s of the data sheet; None where unknown (and MFU with it)."""

    def __post_init__(self) -> None:
        plain_texts("environment.", vars(self))

    @property
    def fingerprint(self) -> str:
        """Equal for machines whose measurements may be compared: 10 hexadecimal digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]


def describe(device: str = "auto") -> Environment:
    """This machine, seen from inside a process with torch. `auto`: the first CUDA device, else the CPU.
    Raises ConfigError for a device that does not exist."""
    import torch

    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"--device {device!r} is not understood; write cpu or cuda:0") from None
    if where.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"--device {device!r} is not supported; write cpu or cuda:0")
    here = Environment(
        device="cpu",
        device_name=_cpu_name(),
        device_memory_bytes=_available_memory(),
        torch=torch.__version__,
        python=platform.python_version(),
        autotune=autotune.__version__,
        cpu_count=len(os.sched_getaffinity(0)),
        platform=platform.system() + " " + platform.machine(),
    )
    return here if where.type == "cpu" else _with_card(here, where.index or 0)


def _with_card(here: Environment, index: int) -> Environment:
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= found:
        raise ConfigError(f"--device cuda:{index} does not exist, {found} are visible; see `autotune doctor`")
    properties = torch.cuda.get_device_properties(index)
    return replace(
        here,
        device=f"cuda:{index}",
        device_name=visible(properties.name),
        device_memory_bytes=properties.total_memory,
        capability=(properties.major, properties.minor),
        driver=_driver_version(),
        cuda=torch.version.cuda or "",
        peak_flops=next((tflops * 1e12 for part, tflops in _PEAK_TFLOPS if part in properties.name), None),
    )


def probe(device: str = "auto") -> Environment:
    """`describe`, from a fresh process. Raises what `describe` raises."""
    command = [sys.executable, "-m", "autotune.environment", device]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=worker_environment())
    lines = run.stdout.strip().splitlines()
    if run.returncode == 0 and lines:
        return read_table(Environment, json.loads(lines[-1]), "environment")
    last = (run.stderr.strip().splitlines() or ["no output"])[-1]
    raise AutotuneError(last.removeprefix("error: ") if last.startswith("error: ") else f"torch does not start: {last}")


def worker_environment(cache_dir: Path | None = None, allocator: str = "default") -> dict[str, str]:
    """Environment variables of a worker process: this checkout importable, a compile cache that outlives
    the process, the allocator's settings in place before torch loads."""
    variables = dict(os.environ)
    places.settle(variables)
    checkout = str(Path(autotune.__file__).parent.parent)
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [checkout, variables.get("PYTHONPATH")]))
    variables["PYTHONUNBUFFERED"] = "1"
    if cache_dir is not None:
        variables["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir)
    if allocator == "expandable_segments":
        variables["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return variables


def compile_cache_dir() -> Path:
    """Where compiled kernels are kept between processes: AUTOTUNE_CACHE_DIR, else in the folder of caches."""
    chosen = os.environ.get("AUTOTUNE_CACHE_DIR")
    return Path(chosen).absolute() if chosen else places.cache_home(os.environ) / "autotune" / "inductor"


def drop_torn_libraries(cache_dir: Path, older_than_seconds: float = 3.0) -> list[Path]:
    """Remove shared libraries that a killed linker left unfinished, and return them: Inductor takes any file of the
    right name for a compiled kernel, so one torn file would crash every later process that needs it. Files that
    changed just now may belong to a linker at work and stay."""
    torn = []
    for path in cache_dir.rglob("*.so") if cache_dir.is_dir() else ():
        with contextlib.suppress(OSError):  # another process was faster
            status = path.stat()
            if time.time() - status.st_mtime > older_than_seconds and not _is_whole(path, status.st_size):
                path.unlink()
                torn.append(path)
    return torn


def _is_whole(path: Path, size: int) -> bool:
    """An ELF file's table of sections stands at its end (System V ABI, object files: e_shoff, e_shentsize, e_shnum)."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return False
    sections, entry_bytes, entries = struct.unpack_from("<Q10xHH", header, 0x28)
    return bool(sections) and size >= sections + entry_bytes * entries


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return visible(line.partition(":")[2].strip())
    return platform.processor() or platform.machine()


def _available_memory() -> int:
    """Main memory, or the control group's share of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:  # no control groups, or their first version
        return total
    return total if limit == "max" else min(total, int(limit))


def _driver_version() -> str:
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:  # a card without NVML (some virtual machines): the version stays unknown
        return ""


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(describe(sys.argv[1]))))
    except AutotuneError as error:
        sys.exit(f"error: {error}")

"""Description of this machine: device, memory, versions, peak FLOP/s, fingerprint; and the environment of workers.

`describe` needs torch; `probe` runs it in a fresh process, so that the searching process never imports torch and holds
no device memory.
"""

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import autotune
from autotune import places
from autotune.cgroup import ControlGroups
from autotune.config import cards
from autotune.config.candidate import plain_texts
from autotune.config.tables import read_table
from autotune.errors import AutotuneError, ConfigError, UnsupportedError
from autotune.kernels.registry import device_kind
from autotune.terminal import visible

if TYPE_CHECKING:
    import torch

_STEERING = (
    "TORCH", "PYTORCH_", "INDUCTOR_", "AOT_", "ATEN_", "C10_", "TRITON_",  # torch and its compilers
    "OMP_", "GOMP_", "KMP_", "MKL_", "DNNL_", "ONEDNN_", "OPENBLAS_", "BLIS_",  # threads, products on the CPU
    "CUDA_", "CUBLAS", "CUDNN_", "NVIDIA_TF32_", "CUTLASS_",  # CUDA
    "MALLOC_", "TCMALLOC_", "MIMALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD",  # allocators
    "CXX",  # the compiler of generated code
)  # fmt: skip
"""Prefixes of environment variables that can change what a step does or its speed."""
_NOT_STEERING = (
    "_DIR", "_HOME", "_PATH", "_PATHS", "_VERSION", "_URL", "_HOST", "_PORT", "_LOGS", "_LOG_LEVEL", "_VERBOSE",
    "_TRACE", "_JOB_ID", "_DISPLAY_ENV", "_VISIBLE_DEVICES", "_DEVICE_ORDER",
)  # fmt: skip
"""Suffixes of variables that only name locations or control output. Addresses may contain a password."""
_OF_TORCHRUN = ("TORCHELASTIC_", "TORCH_NCCL_")
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")

SPIN = "10000"
"""GOMP_SPINCOUNT of workers. In GNU's OpenMP, which torch's wheels include, a thread that waits for the others spins
for 300,000 iterations (about 3 ms) before it sleeps; another program on that core waits for it at every barrier.
Tokens/s of two winners of the quickstart on two cores, alone and beside two busy processes: by default 13,100 and 525,
10,300 and 495; with this value 12,850 and 4,700, 10,160 and 2,574 (tests/benchmarks/test_spin.py). With 1,000
iterations it is 4,718 beside them, but 7,400 alone; OMP_WAIT_POLICY=passive costs a seventh alone. The OpenMP of Intel
and LLVM, in some conda builds, ignores the variable."""
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
"""Variables that control how threads wait. If the user has set one, workers keep it."""
HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""GLIBC_TUNABLES of workers, read at process start: malloc requests transparent huge pages (glibc 2.35; other C
libraries ignore it). A step on the CPU touches hundreds of MiB, so small pages overflow the TLB: 1.03 times the
tokens/s, faster in each of five pairs (tests/benchmarks/test_pages.py)."""
EXPANDABLE = "expandable_segments:True"
STAND_IN = "(stand-in)"
"""Part of a device's name where no card computes: tests/cuda_stand_in. Speeds and losses there mean nothing, allocated
and reserved bytes are the allocator's own."""
STAND_IN_FINGERPRINT = "stand-in-"
NOT_MEASURED = "the device is a stand-in for a card and computes nothing: only memory means something"
_BUSY = 0.7
"""Smallest load average at which another program is assumed to run."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Properties of a machine and its software that measurements depend on."""

    device: str
    """`cpu` or `cuda:0`."""
    device_name: str
    device_memory_bytes: int
    """Memory of the card; on the CPU, main memory that this process may use."""
    capability: tuple[int, ...] = ()
    """CUDA compute capability."""
    driver: str = ""
    cuda: str = ""
    torch: str
    python: str
    autotune: str
    cpu_count: int
    """Number of cores that this process may use."""
    platform: str
    peak_flops: float | None = None
    """Dense bfloat16 FLOP/s of the data sheet; None if unknown (MFU is unknown then)."""
    threads: int | None = None
    """Threads of torch's operators; None in files older than this field."""
    cores: str = ""
    """Ids of the cores that this process may use: `0-3,8`."""
    cpu_quota: float | None = None
    """CPU time granted by the control group, in cores; None: unlimited."""
    power_limit_watts: float | None = None
    """Power limit of the card, from NVML."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of workers that can change a measurement."""
    workers: int = 1
    """Trials that share this machine's cores and memory at the same time; this environment is the part of one."""
    processes: int = 1
    """Processes of one trial, started by torchrun, with a card each or a part of the cores and memory; this environment
    is the part of one."""
    emulated: str = ""
    """Dtype whose matrix products the CPU has no instructions for, so that they take some thirty times as long as those
    of float32: `bfloat16`; empty: none."""

    def __post_init__(self) -> None:
        plain_texts("environment.", vars(self))

    @property
    def stand_in(self) -> bool:
        """Whether no card computes here."""
        return STAND_IN in self.device_name

    @property
    def fingerprint(self) -> str:
        """Ten hexadecimal digits, equal for machines whose measurements are comparable; of a stand-in, marked so."""
        told = asdict(self)
        for name in ("workers", "processes"):  # as before these fields
            if told[name] == 1:
                del told[name]
        del told["emulated"]  # follows from the processor
        digits = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:10]
        return STAND_IN_FINGERPRINT + digits if self.stand_in else digits

    @property
    def alike(self) -> "Environment":
        """Equal for cards of a machine, and for machines, whose measurements are comparable: without the number of the
        card and the ids of the cores."""
        return replace(self, device=device_kind(self.device), cores="")


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where trials run, one at a time."""

    device: str
    cores: frozenset[int] = frozenset()
    """The only cores of its processes; empty: all."""


def describe(device: str = "auto") -> Environment:
    """Describe this machine with torch. `auto`: the first CUDA device, else the CPU. Raises ConfigError for a device
    that does not exist."""
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
        threads=torch.get_num_threads(),
        cores=_ranges(sorted(os.sched_getaffinity(0))),
        cpu_quota=ControlGroups().cpu_quota(),
        variables=steering_variables(os.environ),
        emulated=_emulated() if where.type == "cpu" else "",
    )
    return here if where.type == "cpu" else _with_card(here, where.index or 0)


def _emulated() -> str:
    """See Environment. oneDNN, which torch's products in bfloat16 need, says whether the processor has the
    instructions; a build without oneDNN uses none."""
    import torch

    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return "" if supported is not None and supported() else "bfloat16"


def _with_card(here: Environment, index: int) -> Environment:
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= found:
        why = f"{found} are visible" if found else why_no_cuda(torch.__version__)
        raise ConfigError(f"--device cuda:{index} does not exist, {why}; see `autotune doctor`")
    properties = torch.cuda.get_device_properties(index)
    card = None if STAND_IN in properties.name else cards.of_device(properties.name)
    return replace(
        here,
        device=f"cuda:{index}",
        device_name=visible(properties.name),
        device_memory_bytes=properties.total_memory,
        capability=(properties.major, properties.minor),
        driver=_driver_version(),
        power_limit_watts=_power_limit(str(properties.uuid)),
        cuda=torch.version.cuda or "",
        peak_flops=card.peak_flops if card else None,
    )


def computes(device: "torch.device") -> bool:
    """Whether results on the device mean something."""
    import torch

    return device.type != "cuda" or STAND_IN not in torch.cuda.get_device_name(device)


def refuse_stand_in(recorded: Mapping[str, Any], here: Environment, what: str) -> None:
    """Raise ConfigError where `what` was made on a stand-in and this is a real device: nothing in it was measured."""
    name = str(recorded.get("device_name", ""))
    if STAND_IN in name and not here.stand_in:
        raise ConfigError(
            f"{what} was made on {visible(name)}, which computes nothing, so nothing in it was measured; search on "
            "this machine, or delete its tables [measured] and [environment] to train the plan as your own"
        )


def why_no_cuda(torch: str) -> str:
    """Why this version of torch finds no card."""
    if torch.endswith("+cpu"):
        return f"torch {torch} is a build without CUDA"
    if not Path("/proc/driver/nvidia").exists():
        return "no NVIDIA driver is loaded"
    return (
        "torch finds none: compare `nvidia-smi` with CUDA_VISIBLE_DEVICES; "
        "a CUDA 13 build needs a driver from 580 on, a CUDA 12 build one from 525 on"
    )


def steering_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables that can change a measurement, except those that a plan sets."""
    return {
        name: visible(value[:200])
        for name, value in sorted(variables.items())
        if name.startswith(_STEERING)
        and not name.startswith(_OF_TORCHRUN)
        and not name.endswith(_NOT_STEERING)
        and not any(word in name for word in _SECRET)
        and (name, value) != ("PYTORCH_ALLOC_CONF", EXPANDABLE)
    }


def differences(there: Mapping[str, Any], here: Environment) -> list[str]:
    """Differences between a recorded environment and this one, in words. Fields that an older version did not record
    are not compared."""
    there, now = (json.loads(json.dumps(one)) for one in (there, asdict(here)))  # tuples become lists, as in TOML
    after, complete = now.pop("variables"), "threads" in there  # TOML omits None
    del now["emulated"]  # follows from the processor
    lines = []
    for key, value in now.items():
        before = there.get(key, 1 if key in ("workers", "processes") else None if complete else value)
        if before != value:
            lines.append(f"{key} {_value(before)} there, {_value(value)} here")
    earlier = there.get("variables", {} if complete else after)
    if not isinstance(earlier, Mapping):
        earlier = {}
    for name in sorted({*earlier, *after}):
        if earlier.get(name) != after.get(name):
            lines.append(f"{name} {_value(earlier.get(name))} there, {_value(after.get(name))} here")
    return lines


def _value(value: object) -> str:
    return "not set" if value is None else repr(value)[:80]


def busy_cores(seconds: float = 0.3) -> float:
    """Number of busy cores while this process sleeps for `seconds` (man 5 proc, /proc/stat)."""

    def ticks() -> tuple[int, int]:
        all_cores = Path("/proc/stat").read_text().splitlines()[0]
        user, nice, system, idle, iowait, *rest = map(int, all_cores.split()[1:9])
        return user + nice + system + sum(rest), idle + iowait

    busy, idle = ticks()
    time.sleep(seconds)
    later_busy, later_idle = ticks()
    share = (later_busy - busy) / max(1, later_busy - busy + later_idle - idle)
    return (os.cpu_count() or 1) * share


def busy_machine() -> str:
    """A one-line warning if other programs keep this machine busy, else empty. Call it before starting workers, which
    would count."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    if load < max(_BUSY, cores / 8) or busy_cores() < 0.3:  # the load average includes programs that have ended
        return ""
    return f"the machine is busy: load average {load:.1f} on {cores} cores; speeds will be too low and noisy"


def child_command(module: str, *words: str) -> list[str]:
    """Command that runs a module of this package in a process that dies with this one and imports nothing from the
    working directory."""
    return [sys.executable, "-P", "-m", "autotune.measure.child", str(os.getpid()), module, *words]


def probe(device: str = "auto") -> Environment:
    """`describe` in a fresh process. Raises the same errors."""
    command = child_command("autotune.environment", device)
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=worker_environment())
    lines = run.stdout.strip().splitlines()
    if run.returncode == 0 and lines:
        return read_table(Environment, json.loads(lines[-1]), "environment")
    last = (run.stderr.strip().splitlines() or ["no output"])[-1]
    raise AutotuneError(last.removeprefix("error: ") if last.startswith("error: ") else f"torch does not start: {last}")


def make_slots(device: str, workers: int) -> tuple[Slot, ...]:
    """The slots of `--device` and `--workers`: a card each, or parts of the cores. Raises ConfigError."""
    if workers < 1:
        raise ConfigError(f"--workers {workers} is not allowed; give 1 or more")
    names = [f"{name}:0" if name == "cuda" else name for name in device.split(",")]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--device {device} names {min(twice)} twice, where trials would disturb each other; once")
    if len(names) > 1 and any(device_kind(name) != "cuda" for name in names):
        raise ConfigError(f"--device {device}: only cards can be several; write for example cuda:0,cuda:1")
    if workers == 1 or len(names) > 1:
        if workers not in (1, len(names)):
            raise ConfigError(f"--workers {workers} is not allowed beside --device {device}; leave it out")
        return tuple(Slot(device=name) for name in names)
    if device_kind(names[0]) != "cpu":
        raise ConfigError(
            f"--workers {workers} is not allowed: one card has one trial at a time, others would disturb it; "
            "give several cards, --device cuda:0,cuda:1"
        )
    cores = sorted(os.sched_getaffinity(0))
    usable = _usable_cores()
    if workers > usable:
        raise ConfigError(
            f"--workers {workers} is not allowed: each needs a core, there are {usable}; give at most that"
        )
    each = usable // workers
    asked = {name: os.environ.get(name, "") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    if many := [f"{name}={value}" for name, value in asked.items() if value.isdecimal() and int(value) > each]:
        raise ConfigError(f"{many[0]} is more than the {each} cores of one of {workers} workers; unset it")
    return tuple(Slot(device="cpu", cores=frozenset(cores[i * each : (i + 1) * each])) for i in range(workers))


def part_of_cores(index: int, parts: int) -> frozenset[int]:
    """The cores of one of `parts` processes, which divide those of this one evenly; at least one."""
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, _usable_cores() // parts)
    return frozenset(cores[(index * each + i) % len(cores)] for i in range(each))


def _usable_cores() -> int:
    cores = len(os.sched_getaffinity(0))
    return min(cores, max(1, int(ControlGroups().cpu_quota() or cores)))


def part_of_one(whole: Environment, processes: int) -> Environment:
    """What each of several processes under torchrun finds, where `whole` is what one alone finds."""
    if processes == 1:
        return whole
    cores = sorted(part_of_cores(0, processes))
    variables = {name: value for name, value in whole.variables.items() if name != "OMP_NUM_THREADS"}  # is not heeded
    part = replace(whole, threads=len(cores), variables=variables, processes=processes)
    if whole.device != "cpu":
        return part
    memory = whole.device_memory_bytes // processes
    return replace(part, device_memory_bytes=memory, cpu_count=len(cores), cores=_ranges(cores))


@contextlib.contextmanager
def on_cores(cores: frozenset[int]) -> Iterator[None]:
    """Within it, this thread and the processes that it starts have these cores only; all, where there are none. Torch
    takes a thread for each."""
    before = os.sched_getaffinity(0)
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, before)


def probe_slots(device: str = "auto", workers: int = 1, processes: int = 1) -> tuple[Environment, tuple[Slot, ...]]:
    """What a trial finds in each slot of `--device` and `--workers`, or each process of one with `--nproc`.
    Raises ConfigError, also for unlike cards."""
    if processes != 1:
        return _probe_processes(device, workers, processes)
    if workers > 1 and device == "auto":
        device = probe(device).device
    slots = make_slots(device, workers)
    if slots[0].cores:
        with on_cores(slots[0].cores):
            part = probe(device)
        return replace(part, device_memory_bytes=part.device_memory_bytes // workers, workers=workers), slots
    first, *others = [probe(slot.device) for slot in slots]
    for other in others:
        if changes := differences(asdict(first.alike), other.alike):
            raise ConfigError(
                f"{other.device} is unlike {first.device} ({', '.join(changes)}), their figures do not compare; "
                "search on each alone"
            )
    return first, (Slot(device=first.device), *slots[1:])


def _probe_processes(device: str, workers: int, processes: int) -> tuple[Environment, tuple[Slot, ...]]:
    if processes < 1:
        raise ConfigError(f"--nproc {processes} is not allowed; give 1 or more")
    if workers != 1 or "," in device:
        raise ConfigError(
            f"--nproc {processes} is one trial on {processes} cards or parts of the cores; leave out --workers and "
            "all but the kind of --device: cuda or cpu"
        )
    first = probe(device)
    if first.device == "cpu":
        if processes > _usable_cores():
            raise ConfigError(
                f"--nproc {processes} is not allowed: each needs a core, there are {_usable_cores()}; give at most that"
            )
        return part_of_one(first, processes), (Slot(device="cpu"),)
    if first.device != "cuda:0":
        raise ConfigError(
            f"--device {device} is not allowed with --nproc: its processes take cuda:0 to cuda:{processes - 1}; "
            "choose cards by CUDA_VISIBLE_DEVICES"
        )
    probe_slots(",".join(f"cuda:{index}" for index in range(processes)))  # all are there, and alike
    return part_of_one(first, processes), (Slot(device="cuda:0"),)


def worker_environment(cache_dir: Path | None = None, allocator: str = "default") -> dict[str, str]:
    """Environment variables of a worker process: an importable checkout, the compile cache, the allocator's settings,
    bounded spinning and huge pages. The worker and its child processes, compilers included, import nothing from the
    working directory."""
    variables = dict(os.environ)
    places.settle(variables)
    path = _import_path(variables.pop("PYTHONPATH", ""))
    if path:
        variables["PYTHONPATH"] = os.pathsep.join(path)
    variables["PYTHONSAFEPATH"] = "1"
    variables["PYTHONUNBUFFERED"] = "1"
    if not any(variables.get(name) for name in _WAITING):
        variables["GOMP_SPINCOUNT"] = SPIN
    variables.setdefault("GLIBC_TUNABLES", HUGE_PAGES)
    if cache_dir is not None:
        variables["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir)
    if allocator == "expandable_segments":
        variables["PYTORCH_ALLOC_CONF"] = EXPANDABLE
    return variables


def _import_path(users: str) -> list[str]:
    """PYTHONPATH of a worker: this checkout, unless it is installed, and the user's entries without the working
    directory (an empty entry means it too)."""
    checkout = Path(autotune.__file__).parent.parent
    # PYTHONPATH precedes the standard library, so it must not contain a folder of installed packages
    installed = checkout in (Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib")))
    working = Path.cwd()
    kept = [entry for entry in users.split(os.pathsep) if entry and Path(entry).resolve() not in (working, checkout)]
    return kept if installed else [str(checkout), *kept]


def start_again_as_worker() -> None:
    """Re-execute this process with the variables that C libraries read at process start, so that it runs like a worker.
    Does nothing if they are set."""
    if "GLIBC_TUNABLES" not in os.environ and sys.platform == "linux":
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return visible(line.partition(":")[2].strip())
    return platform.processor() or platform.machine()


def _available_memory() -> int:
    """Main memory, or the limit of the control group."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = ControlGroups().memory_limit_bytes()
    return total if limit is None else min(total, limit)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 8] -> `0-2,8`."""
    words = []
    for number in numbers:
        if number - 1 not in numbers:
            first = number
        if number + 1 not in numbers:
            words.append(str(first) if first == number else f"{first}-{number}")
    return ",".join(words)


def _driver_version() -> str:
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:  # no NVML, for example in some virtual machines
        return ""


def _power_limit(uuid: str) -> float | None:
    import pynvml

    try:
        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        return float(pynvml.nvmlDeviceGetEnforcedPowerLimit(card)) / 1000  # milliwatts
    except pynvml.NVMLError:  # no NVML, or no power limit (a MIG slice, some virtual machines)
        return None


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(describe(sys.argv[1]))))
    except AutotuneError as error:
        sys.exit(f"error: {error}")

"""The machine described, its fingerprint, and the variables that a worker gets."""

import _ctypes
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from fake_machine import CPU, CUDA
from recorded_run import ENVIRONMENT

from autotune.environment import (
    HUGE_PAGES,
    SPIN,
    Environment,
    busy_cores,
    busy_machine,
    child_command,
    describe,
    differences,
    make_slots,
    part_of_cores,
    part_of_one,
    probe,
    probe_slots,
    refuse_stand_in,
    steering_variables,
    why_no_cuda,
    worker_environment,
)
from autotune.errors import AutotuneError, ConfigError, UnsupportedError
from autotune.model.compile_cache import compile_cache_dir, drop_torn_libraries


def test_a_fresh_process_sees_what_this_one_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", HUGE_PAGES)  # as fresh processes of ours have it
    found = probe("cpu")
    assert found.threads is not None  # other tests may have changed this process's
    assert found == replace(describe("cpu"), threads=found.threads)


def test_probing_loads_no_torch_here() -> None:
    code = "import sys; from autotune.environment import probe; probe('cpu'); print('torch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=worker_environment()
    )
    assert run.stdout.strip() == "False"


def test_the_cpu_is_described() -> None:
    here = describe("cpu")
    assert here.device_memory_bytes > 1 << 28
    assert here.cpu_count == len(os.sched_getaffinity(0))
    assert (here.peak_flops, here.capability) == (None, ())


@pytest.mark.parametrize(
    ("device", "kind"),
    [("cuda:99", ConfigError), ("tpu", ConfigError), ("", ConfigError), ("meta", UnsupportedError)],
)
def test_devices_that_are_not_here(device: str, kind: type[AutotuneError]) -> None:
    with pytest.raises(kind, match="--device") as caught:
        describe(device)
    assert "\n" not in str(caught.value)


def test_a_child_that_fails_says_so_in_one_line() -> None:
    with pytest.raises(AutotuneError, match="cuda:99 does not exist"):
        probe("cuda:99")


def test_a_torch_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(AutotuneError, match="torch does not start: ImportError: libcudart"):
        probe("cpu")


def test_a_stand_in_is_never_taken_for_a_card() -> None:
    card, stand_in = ENVIRONMENT, replace(ENVIRONMENT, device_name="Card (stand-in)")
    assert (card.stand_in, stand_in.stand_in) == (False, True)
    assert stand_in.fingerprint.startswith("stand-in-")
    assert not card.fingerprint.startswith("stand-in-")
    refuse_stand_in(asdict(card), card, "it")
    refuse_stand_in({}, card, "it")
    refuse_stand_in(asdict(stand_in), stand_in, "it")
    with pytest.raises(ConfigError, match=r"it was made on Card \(stand-in\), which computes nothing") as caught:
        refuse_stand_in(asdict(stand_in), card, "it")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("torch", "said"), [("2.13.0+cpu", "2.13.0+cpu is a build without CUDA"), ("2.14.1+cu130", "no NVIDIA driver")]
)
def test_why_torch_finds_no_card(torch: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: False)  # no driver here
    assert said in why_no_cuda(torch)


def test_every_field_counts_for_the_fingerprint() -> None:
    changes = {
        "torch": "2.11.0", "device_name": "Other", "driver": "1", "cpu_count": 3, "peak_flops": 1e12, "threads": 1,
        "cores": "2-3", "cpu_quota": 1.5, "power_limit_watts": 300.0, "variables": {"OMP_NUM_THREADS": "1"},
    }  # fmt: skip
    prints = {replace(ENVIRONMENT, **{name: value}).fingerprint for name, value in changes.items()}  # type: ignore[arg-type]
    assert len(prints | {ENVIRONMENT.fingerprint}) == len(changes) + 1
    assert replace(ENVIRONMENT).fingerprint == ENVIRONMENT.fingerprint
    assert "fingerprint" not in asdict(ENVIRONMENT)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("OMP_NUM_THREADS", "1", {"threads": 1}), ("ATEN_CPU_CAPABILITY", "default", {})],
)
def test_what_speed_depends_on_is_described(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: dict[str, object]
) -> None:
    before = probe("cpu")
    monkeypatch.setenv(name, value)
    here = probe("cpu")
    assert here.variables.get(name) == value
    assert {field: getattr(here, field) for field in expected} == expected
    assert here.fingerprint != before.fingerprint


def test_the_cores_that_are_allowed_are_described() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, [{allowed[-1]}]); from autotune.environment import probe; "
        "here = probe('cpu'); print(here.cores, here.cpu_count, here.threads)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(allowed[-1]), "1", "1"]


def test_variables_that_are_recorded() -> None:
    kept = {
        "TORCHINDUCTOR_MAX_AUTOTUNE": "1", "PYTORCH_CUDA_ALLOC_CONF": "x", "ATEN_CPU_CAPABILITY": "default",
        "OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "1", "KMP_AFFINITY": "none", "MKL_CBWR": "AVX2",
        "ONEDNN_DEFAULT_FPMATH_MODE": "BF16", "NVIDIA_TF32_OVERRIDE": "0", "CUDA_LAUNCH_BLOCKING": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":0:0", "TRITON_INTERPRET": "1", "MALLOC_ARENA_MAX": "1",
        "LD_PRELOAD": "libjemalloc.so", "CXX": "clang++",
    }  # fmt: skip
    others = {
        "HOME": "/root", "PATH": "/bin", "AWS_SECRET_ACCESS_KEY": "x", "WANDB_API_KEY": "x", "TORCH_TOKEN": "x",
        "TORCHINDUCTOR_CACHE_DIR": "/", "TORCHINDUCTOR_REDIS_URL": "redis://:password@host",
        "CUDA_VISIBLE_DEVICES": "1", "TORCHELASTIC_RUN_ID": "x", "TORCH_LOGS": "+dynamo",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }  # fmt: skip
    assert steering_variables({**kept, **others}) == kept
    assert steering_variables({"LD_PRELOAD": "x" * 1000}) == {"LD_PRELOAD": "x" * 200}


def recorded(environment: Environment) -> dict[str, Any]:
    """As a file has it."""
    read: dict[str, Any] = json.loads(json.dumps(asdict(environment)))
    return read


def test_differences_are_short() -> None:
    many = {f"TORCHINDUCTOR_{number}": "1" for number in range(50)}
    here = replace(ENVIRONMENT, threads=4, variables={**many, "OMP_NUM_THREADS": "4"})
    there = recorded(replace(here, threads=2, cpu_quota=1.5, variables={**many, "MKL_CBWR": "AVX2"}))
    expected = [
        "threads 2 there, 4 here",
        "cpu_quota 1.5 there, not set here",
        "MKL_CBWR 'AVX2' there, not set here",
        "OMP_NUM_THREADS not set there, '4' here",
    ]
    assert differences(there, here) == expected
    assert differences(recorded(here), here) == []


def test_an_older_record_is_compared_in_what_it_has() -> None:
    here = replace(ENVIRONMENT, threads=4, cores="0-3", variables={"OMP_NUM_THREADS": "4"})
    older = {name: value for name, value in recorded(ENVIRONMENT).items() if name in ("device_name", "torch")}
    assert differences(older, here) == []
    assert differences({**older, "torch": "2.11"}, here) == ["torch '2.11' there, '2.13.0' here"]


@pytest.mark.parametrize(
    ("load", "cores", "said"),
    [
        (0.3, 2, ""),
        (2.12, 2, "the machine is busy: load average 2.1 on 2 cores; speeds will be too low and noisy"),
        (0.8, 1, "the machine is busy: load average 0.8 on 1 cores; speeds will be too low and noisy"),
        (3.0, 64, ""),
        (9.0, 64, "the machine is busy: load average 9.0 on 64 cores; speeds will be too low and noisy"),
    ],
)
def test_a_busy_machine(monkeypatch: pytest.MonkeyPatch, load: float, cores: int, said: str) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr("autotune.environment.busy_cores", lambda: 1.0)
    assert busy_machine() == said
    monkeypatch.setattr("autotune.environment.busy_cores", lambda: 0.1)
    assert busy_machine() == ""  # it is over


def test_a_core_that_works_is_seen() -> None:
    before = busy_cores()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        beside = max(busy_cores() for _ in range(5))
        process.kill()
    assert beside > 0.5
    assert 0.0 <= before <= (os.cpu_count() or 1)


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"])
def test_the_users_way_of_waiting_holds(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
        monkeypatch.delenv(other, raising=False)
    assert worker_environment()["GOMP_SPINCOUNT"] == SPIN
    monkeypatch.setenv(name, "7")
    assert worker_environment()[name] == "7"
    assert worker_environment().get("GOMP_SPINCOUNT") == ("7" if name == "GOMP_SPINCOUNT" else None)


def test_openmp_takes_the_bounded_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    """GNU's OpenMP says what it uses when it loads, with torch."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")
    command = child_command("autotune.environment", "cpu")
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=worker_environment())
    assert f"GOMP_SPINCOUNT = '{SPIN}'" in run.stderr


def test_nothing_is_imported_from_the_working_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(["", ".", "elsewhere", str(tmp_path), str(tmp_path / "elsewhere")])
    )
    variables = worker_environment()
    assert variables["PYTHONPATH"].split(os.pathsep)[-2:] == ["elsewhere", str(tmp_path / "elsewhere")]
    code = "import sys; print('\\n'.join(map(str, sys.path)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=variables)
    assert not {"", ".", str(tmp_path)} & set(run.stdout.splitlines())
    assert str(tmp_path / "elsewhere") in run.stdout.splitlines()


def test_a_child_whose_parent_is_gone_does_nothing(tmp_path: Path) -> None:
    """A parent that dies before its child has asked for a death signal: the child sees another parent."""
    (tmp_path / "mark.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    variables = {**worker_environment(), "PYTHONPATH": f"{Path(__file__).parents[1]}{os.pathsep}{tmp_path}"}
    command = child_command("mark")
    assert subprocess.run(command, env=variables, check=False).returncode == 0
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    strange = [str(os.getppid()) if word == str(os.getpid()) else word for word in command]
    assert subprocess.run(strange, env=variables, check=False).returncode == 1
    assert not (tmp_path / "ran").exists()


def test_what_a_worker_gets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", "before")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    variables = worker_environment(tmp_path, "expandable_segments")
    assert variables["PYTHONPATH"].endswith(os.pathsep + "before")
    assert variables["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
    assert variables["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in worker_environment(tmp_path)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path))
    assert compile_cache_dir() == tmp_path
    monkeypatch.delenv("AUTOTUNE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache_dir() == tmp_path / "autotune" / "inductor"


def test_what_a_killed_linker_left_is_removed(tmp_path: Path) -> None:
    """Inductor would load the torn file for ever after: "file too short"."""
    whole = Path(_ctypes.__file__).read_bytes()
    contents = {"whole.so": whole, "torn.so": whole[:-1], "begun.so": whole[:100], "empty.so": b"", "new.so": b""}
    for name, content in contents.items():
        path = tmp_path / "ab" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        if name != "new.so":  # a linker may be at work on that one
            os.utime(path, (1e9, 1e9))
    removed = drop_torn_libraries(tmp_path)
    assert {path.name for path in removed} == {"torn.so", "begun.so", "empty.so"}
    assert {path.name for path in (tmp_path / "ab").iterdir()} == {"whole.so", "new.so"}
    assert drop_torn_libraries(tmp_path / "missing") == []


def test_a_training_starts_with_what_c_libraries_read_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same process, its arguments kept; the user's own setting holds."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from autotune.environment import start_again_as_worker\n"
        "start_again_as_worker()\n"
        "print(os.getpid(), sys.argv[1:], os.environ['GLIBC_TUNABLES'])\n"
    )
    for set_by_user in ("", "glibc.malloc.hugetlb=0"):
        if set_by_user:
            monkeypatch.setenv("GLIBC_TUNABLES", set_by_user)
        process = subprocess.Popen([sys.executable, script, "a b", "-c"], stdout=subprocess.PIPE, text=True)
        said, _ = process.communicate(timeout=60)
        assert said == f"{process.pid} ['a b', '-c'] {set_by_user or HUGE_PAGES}\n"


@pytest.mark.parametrize(
    ("device", "workers", "says"),
    [
        ("cuda:0", 2, "--workers 2 is not allowed: one card has one trial at a time"),
        ("cuda:0,cuda:1", 3, "--workers 3 is not allowed beside --device cuda:0,cuda:1"),
        ("cuda:0,cuda:0", 1, "names cuda:0 twice"),
        ("cuda,cuda:0", 1, "names cuda:0 twice"),
        ("cpu,cuda:0", 1, "only cards can be several"),
        ("cpu", 0, "--workers 0 is not allowed; give 1 or more"),
        ("cpu", 10_000, "--workers 10000 is not allowed: each needs a core, there are"),
    ],
)
def test_slots_that_would_disturb_each_other_are_refused(device: str, workers: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_slots(device, workers)


def test_more_threads_than_a_workers_cores_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 4, 5, 8})
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [sorted(slot.cores) for slot in make_slots("cpu", 2)] == [[3, 4], [5, 8]]
    with pytest.raises(ConfigError, match="OMP_NUM_THREADS=2 is more than the 1 cores of one of 4 workers; unset it"):
        make_slots("cpu", 4)


def test_processes_divide_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 4, 5, 8})
    whole = replace(CPU, cpu_count=4, threads=4, variables={"OMP_NUM_THREADS": "4"})
    part = part_of_one(whole, 2)
    assert (part.processes, part.threads, part.cores, part.cpu_count) == (2, 2, "3-4", 2)
    assert (part.device_memory_bytes, part.variables) == (whole.device_memory_bytes // 2, {})
    assert [sorted(part_of_cores(rank, 2)) for rank in (0, 1)] == [[3, 4], [5, 8]]
    assert part.fingerprint != replace(part, processes=1).fingerprint
    card = part_of_one(replace(CUDA, threads=4), 2)
    assert (card.threads, card.device_memory_bytes) == (2, CUDA.device_memory_bytes)


@pytest.mark.parametrize(
    ("device", "workers", "processes", "says"),
    [
        ("cpu", 1, 0, "--nproc 0 is not allowed; give 1 or more"),
        ("cpu", 2, 2, "--nproc 2 is one trial on 2 cards or parts of the cores; leave out --workers"),
        ("cuda:0,cuda:1", 1, 2, "leave out --workers and all but the kind of --device"),
        ("cpu", 1, 10_000, "--nproc 10000 is not allowed: each needs a core, there are"),
        ("cuda:1", 1, 2, "its processes take cuda:0 to cuda:1; choose cards by CUDA_VISIBLE_DEVICES"),
        ("cuda:0", 1, 2, "cuda:1 is unlike cuda:0"),
    ],
)
def test_processes_that_the_machine_lacks_are_refused(
    device: str, workers: int, processes: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = {"cpu": CPU, "cuda:0": CUDA, "cuda:1": replace(CUDA, device="cuda:1", device_name="Other Card")}
    monkeypatch.setattr("autotune.environment.probe", machines.__getitem__)
    with pytest.raises(ConfigError, match=says):
        probe_slots(device, workers, processes)


def test_unlike_cards_are_refused_with_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = {
        "cuda:0": replace(CUDA, cores="0-3"), "cuda:1": replace(CUDA, device="cuda:1"),
        "cuda:2": replace(CUDA, device="cuda:2", device_name="Other Card"),
    }  # fmt: skip
    monkeypatch.setattr("autotune.environment.probe", cards.__getitem__)
    found, slots = probe_slots("cuda:0,cuda:1")
    assert (found, [slot.device for slot in slots]) == (cards["cuda:0"], ["cuda:0", "cuda:1"])
    with pytest.raises(ConfigError, match=r"cuda:2 is unlike cuda:0 \(device_name 'Paper Card' there, 'Other"):
        probe_slots("cuda:0,cuda:2")


@pytest.mark.slow
def test_a_worker_on_the_cpu_finds_its_part_of_the_machine() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    whole, (part, slots) = probe("cpu"), probe_slots("cpu", 2)
    assert part.cpu_count == part.threads == len(slots[0].cores) == whole.cpu_count // 2
    assert part.device_memory_bytes == whole.device_memory_bytes // 2
    assert part.fingerprint != whole.fingerprint
    assert not slots[0].cores & slots[1].cores
    assert os.sched_getaffinity(0) == slots[0].cores | slots[1].cores

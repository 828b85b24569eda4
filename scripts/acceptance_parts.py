"""The parts of `scripts/gpu_acceptance`: what is measured, and when it counts as good.

Every measurement goes through a public door of the project: a worker process by `run_trial`, the command line in a
process of its own, or pytest. An item is one measurement; a part is a list of them.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.config.presets import GUIDE, GuideRow
from autotune.config.tables import read_table
from autotune.config.toml import CandidateFile, format_candidate, parse_candidate
from autotune.data.batches import synthetic_batch
from autotune.data.shards import write_shard
from autotune.environment import Environment, worker_environment
from autotune.measure.runner import run_trial
from autotune.measure.types import TrialRequest, TrialResult
from autotune.memory.model import MemoryModel, calibrate, predict
from autotune.model.compile_cache import compile_cache_dir
from autotune.search.resolve import resolve
from autotune.search.space import build_space, every_candidate
from autotune.units import GIB, format_bytes

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
Choice = TypeVar("Choice")

AIM_TOKENS_PER_SECOND = 550_000.0
"""Aimed at with 124M on one H200; the public mark of this class there is 489k (modded-nanogpt, track 3)."""

REHEARSED_MINUTES = 1.5
"""Of a search: time for two or three trials on two cores."""


@dataclass(frozen=True)
class Item:
    """One measurement of a part."""

    name: str
    seconds: float
    """On a card, it is not begun with less time than this left."""
    measure: Callable[[], Row]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The machine, and where its rows go."""

    environment: Environment
    directory: Path
    rehearse: bool
    deadline: float
    """time.monotonic()"""

    @property
    def device(self) -> str:
        return self.environment.device

    def some(self, choices: Sequence[Choice]) -> Sequence[Choice]:
        """All of them on a card, the first in a rehearsal."""
        return choices[:1] if self.rehearse else choices

    def shape(self, n_layer: int, n_head: int, n_embd: int) -> Shape:
        """The shape itself on a card, a tiny stand-in for it in a rehearsal."""
        if self.rehearse:
            return Shape(n_layer=1 + n_layer % 2, n_head=2, n_embd=64, block_size=64, vocab_size=512)
        return Shape(n_layer=n_layer, n_head=n_head, n_embd=n_embd)

    def candidate(self, shape: Shape, plan: Plan, sequences: int = 512) -> Candidate:
        sequences = 8 if self.rehearse else sequences
        micro = min(plan.micro_batch_size, sequences)
        recipe = Recipe(shape=shape, global_batch_size=sequences)
        chunk = min(plan.loss_chunk_tokens, micro * shape.block_size)
        return Candidate(recipe=recipe, plan=replace(plan, micro_batch_size=micro, loss_chunk_tokens=chunk))

    def trial(self, candidate: Candidate, limit: int | None = None, final: bool = False, **changes: Any) -> TrialResult:
        """In a fresh worker process, its log kept beside the rows' folder, outside the references."""
        request = TrialRequest(
            candidate=candidate, device=self.device, result_path="", memory_limit_bytes=limit,
            measure_seconds=0.3 if self.rehearse else 4.0, timeout_seconds=min(240.0, self.left()), final=final,
        )  # fmt: skip
        log = ROOT / "results" / "acceptance-logs" / f"{candidate.id}.log"
        return run_trial(replace(request, **changes), log)

    def recorded(self, part: str) -> dict[str, Row]:
        """What an earlier call left of a part, by item."""
        path = self.directory / f"{part}.json"
        return {row["item"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}

    def rows(self, part: str) -> dict[str, Row]:
        """The good ones of them."""
        return {item: row for item, row in self.recorded(part).items() if row["ok"]}

    def autotune(self, *words: object) -> str:
        """The command line in a process of its own, from the repository's root; its output."""
        command = [sys.executable, "-m", "autotune", *map(str, words)]
        variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        return self.output(command, variables)

    def output(self, command: Sequence[str], variables: Mapping[str, str] | None = None) -> str:
        """What a command prints, run from the repository's root and ended when the time is over."""
        run = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=self.left()
        )
        if run.returncode:
            raise RuntimeError((run.stderr.strip().splitlines() or ["no output"])[-1])
        return run.stdout

    def left(self) -> float:
        """Seconds until this call's end, at least twenty."""
        return max(20.0, self.deadline - time.monotonic())

    def others_note(self) -> str:
        """That the card is not ours alone; empty if it is, or on the CPU."""
        if self.device == "cpu":
            return ""
        import torch

        free, total = torch.cuda.mem_get_info()
        held = total - free
        busy = held > 2 * GIB
        return f"{format_bytes(held)} of the card are in use by other processes: speeds will be too low" * busy


@dataclass(frozen=True)
class Part:
    """A row of PARTS."""

    name: str
    shows: str
    items: Callable[[Bench], Iterable[Item]]
    headline: Callable[[list[Row]], str]
    """Of at least one row, for the summary."""
    default: bool = True
    """False: takes long, runs only when it is named (or rehearsed)."""
    parallel: int = 1
    """Items at the same time: more than one only where nothing is timed."""


def measured(result: TrialResult) -> Row:
    """What a row says of a trial."""
    return {
        "status": result.status,
        "message": result.message,
        "tokens_per_second": result.tokens_per_second,
        "tokens_per_second_ci95": result.tokens_per_second_ci95,
        "mfu": result.mfu,
        "peak_allocated_bytes": result.peak("allocated_bytes"),
        "peak_reserved_bytes": result.peak("reserved_bytes"),
        "peak_device_bytes": result.peak("device_bytes"),
        "num_alloc_retries": result.num_alloc_retries,
        "compile_seconds": result.compile_seconds,
    }


EAGER = Plan(micro_batch_size=16, compile="off", loss="full", attention="sdpa", dtype="bfloat16")
COMPILED = replace(EAGER, compile="full")
CHUNKED = replace(COMPILED, loss="chunked", loss_chunk_tokens=8192)
PLANS = {"plain nanoGPT, eager": EAGER, "plain nanoGPT, compiled": COMPILED, "chunked loss, compiled": CHUNKED}


# --- tests ---------------------------------------------------------------------------------------


OTHER_TESTS = ("tests/measure", "tests/model", "tests/train")


def _pytest(*paths: str) -> Callable[[Bench], Iterator[Item]]:
    """The tests marked `gpu` in these folders."""

    def items(bench: Bench) -> Iterator[Item]:
        yield Item(" ".join(paths), 120, partial(_run_tests, bench, paths))

    return items


def _run_tests(bench: Bench, paths: Iterable[str]) -> Row:
    _, report = _pytest_report(bench, "--junit-xml", *paths, "-m", "gpu")
    cases = list(ElementTree.fromstring(report).iter("testcase"))
    kinds = {name: [case for case in cases if case.find(name) is not None] for name in ("failure", "error", "skipped")}
    bad = [f"{case.get('classname')}.{case.get('name')}" for case in kinds["failure"] + kinds["error"]]
    passed = len(cases) - len(bad) - len(kinds["skipped"])
    return {"ok": not bad, "passed": passed, "failed": bad, "skipped": len(kinds["skipped"]), "message": "; ".join(bad)}


def _pytest_report(bench: Bench, kind: str, *words: str) -> tuple[bool, str]:
    """Whether all passed, and what pytest writes into the file that `kind` asks for."""
    with TemporaryDirectory() as directory:
        report = Path(directory) / "report"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{kind}={report}", *words]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=bench.left())
        if not report.exists():
            raise RuntimeError((run.stdout + run.stderr).strip().splitlines()[-1])
        return run.returncode == 0, report.read_text()


def _kernel_speed(bench: Bench) -> Iterator[Item]:
    """The kernel benchmark's ratios, at the guide's size on a card."""
    for test in bench.some(("test_attention", "test_losses")):
        yield Item(test, 150, partial(_run_benchmark, bench, test))


def _run_benchmark(bench: Bench, test: str) -> Row:
    words = ("tests/benchmarks/test_kernels.py", "-k", test, "--benchmark-enable", "--benchmark-only")
    passed, report = _pytest_report(bench, "--benchmark-json", *words)
    tables = [benchmark["extra_info"] for benchmark in json.loads(report)["benchmarks"]]
    pairs = {
        f"{name}: {what}": value
        for info in tables
        for name, pair in info.items()
        if isinstance(pair, dict)  # and not how busy the machine was
        for what, value in pair.items()
    }
    return {**pairs, "ok": passed}


# --- faults and limits -----------------------------------------------------------------------------


def _faults(bench: Bench) -> Iterator[Item]:
    """Each fault, and whether the next trial measures what one before all faults did."""
    reference = bench.candidate(bench.shape(4, 4, 256), replace(CHUNKED, compile="block", micro_batch_size=8), 32)
    first: list[TrialResult] = []

    def steady(result: TrialResult) -> int | None:
        """What is compiled for the first time is tuned on the device, in memory of its own: not this stage's."""
        view = result.memory.get("steady")
        return view.allocated_bytes if view else None

    def before() -> Row:
        first.append(bench.trial(reference))
        return {**measured(first[0]), "ok": first[0].status == "ok"}

    def unaffected(fault: Callable[[], TrialResult], *statuses: str) -> Row:
        result = fault()
        earlier = first[0] if first else bench.trial(reference)
        after = bench.trial(reference)
        row: Row = {"status": result.status, "message": result.message, "wanted_bytes": result.wanted_bytes}
        row |= {"next_status": after.status, "next_peak_ratio": (steady(after) or 0) / (steady(earlier) or 1)}
        if after.tokens_per_second and earlier.tokens_per_second:
            row["next_speed_ratio"] = after.tokens_per_second / earlier.tokens_per_second
        # not to the byte: how the allocator cuts its blocks depends on what was compiled in this process
        same = abs(row["next_peak_ratio"] - 1) < 0.01
        return {**row, "ok": result.status in statuses and after.status == "ok" and same}

    def out_of_memory() -> TrialResult:
        large = bench.candidate(bench.shape(12, 12, 768), replace(EAGER, micro_batch_size=64))
        return bench.trial(large, limit=400 << 20 if bench.rehearse else 4 * GIB)

    def fault(name: str, run: Callable[[], TrialResult], *statuses: str) -> Item:
        return Item(name, 60, partial(unaffected, run, *statuses))

    yield Item("before all faults", 40, before)
    yield fault("out of memory", out_of_memory, "oom", "over_limit")
    yield fault("a hang", partial(_signalled, bench, reference, signal.SIGSTOP), "timeout")
    yield fault("a killed worker", partial(_signalled, bench, reference, signal.SIGKILL), "crashed")
    yield fault("a corrupted context", lambda: _corrupted(bench, reference), "crashed")


def _signalled(bench: Bench, candidate: Candidate, number: signal.Signals) -> TrialResult:
    """A trial whose worker gets a signal two seconds after its start."""

    def send() -> None:
        for _ in range(100):
            time.sleep(0.1)
            for pid in _children():
                if b"autotune.measure.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    time.sleep(2.0)  # into its build, where torch loads fast
                    os.kill(pid, number)
                    return

    thread = threading.Thread(target=send)
    thread.start()
    result = bench.trial(candidate, measure_seconds=60.0, timeout_seconds=25.0)
    thread.join()
    return result


def _children() -> list[int]:
    """Of this process: by their parent, as not every kernel lists them."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return found


def _corrupted(bench: Bench, candidate: Candidate) -> TrialResult:
    """The worker's interpreter first reads beyond a tensor on the device: on CUDA all that follows fails."""
    kind = bench.device.partition(":")[0]
    code = (
        "import torch, runpy, sys; "
        f"torch.zeros(4, device='{kind}')[torch.tensor([10**6], device='{kind}')]; "
        "sys.argv = ['worker']; runpy.run_module('autotune.measure.worker', run_name='__main__')"
    )
    with TemporaryDirectory() as directory:
        fake = Path(directory) / "python"
        fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n')
        fake.chmod(0o755)
        real, sys.executable = sys.executable, str(fake)
        try:
            return bench.trial(candidate)
        finally:
            sys.executable = real


def _limits(bench: Bench) -> Iterator[Item]:
    """A smaller card emulated on this one: what fits runs below the limit, what does not is told so."""
    for gib in (2, 1) if bench.rehearse else (24, 16):
        for fits in (True, False):
            name = f"{gib} GiB, {'fits' if fits else 'does not fit'}"
            yield Item(name, 40, partial(_limit, bench, gib, fits))


def _limit(bench: Bench, gib: int, fits: bool) -> Row:
    plan = replace(CHUNKED, micro_batch_size=8) if fits else replace(EAGER, micro_batch_size=64)
    shape = bench.shape(12, 12, 768)
    if bench.rehearse and not fits:  # a gigabyte of logits and more
        shape = replace(shape, vocab_size=1_000_000)
    result = bench.trial(bench.candidate(shape, plan), limit=gib * GIB)
    peak, expected = result.peak("device_bytes"), ("ok",) if fits else ("oom", "over_limit")
    held = None if peak is None else peak <= gib * GIB  # what ran out of memory in its first step has no peak
    good = result.status in expected and held is not False
    return {**measured(result), "limit_bytes": gib * GIB, "held": held, "ok": good}


# --- throughput, the promise, the breakdown --------------------------------------------------------

MODELS = {"124M": (12, 12, 768), "354M": (24, 16, 1024)}


def _throughput(bench: Bench) -> Iterator[Item]:
    """Plain nanoGPT's plan eager and compiled, and the winner of a search, at half a million tokens a step."""
    for model, sizes in bench.some(list(MODELS.items())):
        for name in ("plain nanoGPT, eager", "plain nanoGPT, compiled"):
            for micro in bench.some((64, 16)):
                plan = replace(PLANS[name], micro_batch_size=micro)
                candidate = bench.candidate(bench.shape(*sizes), plan)
                label = f"{model}: {name}, micro batch {micro}"
                yield Item(label, 75, partial(_good, bench, candidate))
        yield Item(f"{model}: winner", 60 * WINNER_MINUTES + 20, partial(_winner, bench, model))
        for recompute in ("none", "selective", "budget_0.5"):
            label = f"{model}: winner at micro batch 64, recompute {recompute}"
            yield Item(label, 75, partial(_at_64, bench, model, recompute))


def _good(bench: Bench, candidate: Candidate) -> Row:
    """Good is also that the card is too small for nanoGPT's own way, not compiled."""
    result = bench.trial(candidate)
    good = ("ok", "oom") if candidate.plan.compile == "off" else ("ok",)
    return {**measured(result), "candidate": asdict(candidate), "ok": result.status in good}


WINNER_MINUTES = 6.0
LIKELY = (
    "micro_batch_size=32,64,128", "loss=full,chunked,chunked_triton", "loss_chunk_tokens=4096,8192,16384",
    "activation_checkpointing=none", "compile=full", "attention=sdpa,sdpa_flash", "allocator=default",
    "dtype=bfloat16,bfloat16_residual",
)  # fmt: skip
"""On a card a whole graph takes up to a minute to compile: a short search has no time for what is likely slow."""


def _winner(bench: Bench, model: str) -> Row:
    """A short `autotune search` over the plans of the shape."""
    minutes, choices = (REHEARSED_MINUTES, ()) if bench.rehearse else (WINNER_MINUTES, LIKELY)
    words = ("--data", synthetic_data(), *(word for choice in choices for word in ("--choices", choice)))
    run, trials = _search(bench, bench.shape(*MODELS[model]), minutes, *words)
    toml = (run / "best.toml").read_text()
    best = tomllib.loads(toml)
    return {"model": model, "trials": trials, **best["measured"], **best["plan"], "run": run.name, "toml": toml}


def _search(bench: Bench, shape: Shape, minutes: float, *words: object) -> tuple[Path, int]:
    """A search's directory, and how many trials it made."""
    run = ROOT / "results" / f"acceptance-{_in_words(shape)}-{time.time():.0f}"
    fixed = ("--device", bench.device, "--model", _in_words(shape), "--name", run.name)
    bench.autotune("search", *fixed, "--budget", f"{60 * minutes:.0f}s", *words)
    return run, len((run / "trials.csv").read_text().splitlines()) - 1


def synthetic_data() -> Path:
    """Shards of Zipf's law, enough for a hundred steps of half a million tokens: made once."""
    directory = ROOT / "results" / "acceptance-data"
    directory.mkdir(parents=True, exist_ok=True)
    for name, sequences in (("fineweb_val_000000.bin", 2_000), ("fineweb_train_000001.bin", 50_000)):
        if not (directory / name).exists():
            tokens, _ = synthetic_batch(
                seed=len(name), step=0, global_batch_size=sequences, block_size=1024, vocab_size=50257
            )
            write_shard(directory / name, tokens.ravel())
    return directory


def _winner_candidate(bench: Bench, model: str) -> CandidateFile:
    row = bench.rows("throughput").get(f"{model}: winner")
    if row is None:
        raise RuntimeError(f"no winner of {model} is recorded; run scripts/gpu_acceptance --only throughput")
    return parse_candidate(row["toml"], "the winner")


def _at_64(bench: Bench, model: str, recompute: str) -> Row:
    """The winner's plan at micro batch 64, whose peak is held against the compiled plain plan's."""
    candidate = _winner_candidate(bench, model).candidate
    micro = min(64, candidate.recipe.global_batch_size)
    plan = replace(candidate.plan, micro_batch_size=micro, activation_checkpointing=recompute)
    row = _good(bench, replace(candidate, plan=plan))
    plain = bench.rows("throughput").get(f"{model}: plain nanoGPT, compiled, micro batch 64")
    if plain and row["peak_allocated_bytes"]:
        row["peak_against_plain"] = row["peak_allocated_bytes"] / plain["peak_allocated_bytes"]
    return {"model": model, **row}


def _throughput_headline(rows: list[Row]) -> str:
    """The winner's tokens/s, against the best compiled plain plan, for each model."""
    words = []
    for model in MODELS:
        speeds = {row["item"]: row["tokens_per_second"] for row in rows if row["ok"]}
        plain = [speed for item, speed in speeds.items() if item.startswith(f"{model}: plain nanoGPT, compiled")]
        if plain and (best := speeds.get(f"{model}: winner")):
            words.append(f"{model} {best:,.0f} tokens/s, {best / max(plain):.2f}x plain compiled")
    return "; ".join([*words, f"aim on an H200: 124M {AIM_TOKENS_PER_SECOND:,.0f} tokens/s"])


def _each_model(seconds: float, measure: Callable[[Bench, str], Row]) -> Callable[[Bench], Iterator[Item]]:
    return lambda bench: (Item(name, seconds, partial(measure, bench, name)) for name in bench.some(list(MODELS)))


def _trained(bench: Bench, model: str) -> Row:
    """The search's winner trained for some steps: tokens/s within 2 % of the verdict, peaks within 1 %."""
    file = _winner_candidate(bench, model)
    tokens = (10 if bench.rehearse else {"124M": 60, "354M": 20}[model]) * file.candidate.recipe.tokens_per_step
    with TemporaryDirectory() as directory:
        toml, out = Path(directory) / "winner.toml", Path(directory) / "train"
        toml.write_text(format_candidate(file))
        bench.autotune("train", toml, "--device", bench.device, "--out", out, "--max-tokens", tokens)
        summary = json.loads((out / "summary.json").read_text())
    kept = bench.rehearse or not summary["warnings"]  # a CPU shared with other programs promises nothing
    keys = ("tokens_per_second", "peak_allocated_bytes", "peak_device_bytes", "seconds")
    return {"ok": kept, **{key: summary[key] for key in keys}, "message": "; ".join(summary["comparison"])}


def _profiled(bench: Bench, model: str) -> Row:
    """Where the winner's step spends the device's time."""
    with TemporaryDirectory() as directory:
        toml = Path(directory) / "winner.toml"
        file = _winner_candidate(bench, model)
        toml.write_text(format_candidate(file))
        command = [sys.executable, str(ROOT / "scripts" / "step_breakdown"), str(toml), bench.device]
        variables = worker_environment(compile_cache_dir(), file.candidate.plan.allocator)
        return dict(json.loads(bench.output(command, variables)))


# --- memory ----------------------------------------------------------------------------------------

DRAWN = 80


def _memory(bench: Bench) -> Iterator[Item]:
    """Compiled candidates drawn by chance; by turns they calibrate and are predicted, so that any number serves."""
    rng = random.Random(7)
    for number in range(6 if bench.rehearse else DRAWN):
        role = "held out" if number % 2 else "calibration"
        yield Item(f"{role} {number:02}", 75, partial(_peaks, bench, _draw(rng, bench)))


def _draw(rng: random.Random, bench: Bench) -> Candidate:
    head = rng.choice([64, 128])
    heads = rng.choice([4, 6, 8, 12]) * 64 // head
    shape = Shape(
        n_layer=rng.choice([2, 4, 6, 8, 12]), n_head=heads, n_embd=heads * head, block_size=rng.choice([512, 1024])
    )
    if bench.rehearse:
        shape = replace(bench.shape(shape.n_layer, 2, 64), n_layer=rng.choice([1, 2, 3]))
    plan = Plan(
        micro_batch_size=rng.choice([1, 2, 3, 4, 6, 8, 12, 16, 24]),
        loss=rng.choice(["full", "chunked"]),
        loss_chunk_tokens=rng.choice([1024, 2048, 4096, 8192]),
        compile=rng.choice(["full", "block"]),
        activation_checkpointing=rng.choice(["none", "none", "block"]),
        attention="sdpa",
        dtype="bfloat16",
    )
    return bench.candidate(shape, plan, plan.micro_batch_size * rng.choice([1, 2, 4]))


def _peaks(bench: Bench, candidate: Candidate) -> Row:
    result = bench.trial(candidate, measure_seconds=0.1)
    rows = {"candidate": asdict(candidate), "result": asdict(result)}
    return {**measured(result), **rows, "ok": result.status == "ok"}


def _memory_error(bench: Bench) -> Iterator[Item]:
    """The memory model's error over the held-out candidates of `memory_trials`."""
    rows = bench.rows("memory_trials")
    known = [_pair(row) for item, row in rows.items() if item.startswith("calibration")]
    model = calibrate(bench.device.partition(":")[0], known, bench.environment)
    beyond = [d - r for _, t in known if (d := t.peak("device_bytes")) and (r := t.peak("reserved_bytes"))]
    context = statistics.median(beyond) if beyond else 0.0
    for item, row in rows.items():
        if item.startswith("held out"):
            yield Item(item, 0.0, partial(_compared, bench, model, context, *_pair(row)))


def _compared(bench: Bench, model: MemoryModel, context: float, candidate: Candidate, result: TrialResult) -> Row:
    """The allocated peak is predicted; the device's is explained by what the allocator reserved and the context."""
    prediction, reserved = predict(model, candidate), result.peak("reserved_bytes")
    pairs = {
        "allocated": (prediction.peak_allocated_bytes, result.peak("allocated_bytes")),
        "device": (prediction.peak_device_bytes, result.peak("device_bytes")),
        "explained": (None if reserved is None else reserved + context, result.peak("device_bytes")),
    }
    errors = {f"{view}_error": p / m - 1 for view, (p, m) in pairs.items() if m and p}
    bars = {"allocated_error": 0.10, "explained_error": 0.02}
    ok = bench.rehearse or all(abs(errors[view]) <= bar for view, bar in bars.items() if view in errors)
    return {"predicted_peak_bytes": prediction.peak_allocated_bytes, **errors, "ok": ok}


def _pair(row: Row) -> tuple[Candidate, TrialResult]:
    return read_table(Candidate, row["candidate"], "candidate"), read_table(TrialResult, row["result"], "result")


def _error_headline(rows: list[Row]) -> str:
    words = []
    for view in ("allocated", "device", "explained"):
        errors = [abs(row[f"{view}_error"]) for row in rows if f"{view}_error" in row]
        if errors:
            words.append(f"{view}: median {statistics.median(errors):.2%}, worst {max(errors):.1%} of {len(errors)}")
    return "; ".join(words)


def _guide(bench: Bench) -> Iterator[Item]:
    """Each row of the guide as it stands, plain and with a chunked loss: does it fit the card it is meant for?"""
    for row in bench.some(GUIDE):
        for name, plan in PLANS.items():
            yield Item(f"{row.card}: {name}", 40, partial(_guide_row, bench, row, plan))


def _guide_row(bench: Bench, row: GuideRow, plan: Plan) -> Row:
    shape = bench.shape(row.shape.n_layer, row.shape.n_head, row.shape.n_embd)
    plan = replace(plan, micro_batch_size=row.micro_batch_size)
    result = bench.trial(bench.candidate(shape, plan, row.micro_batch_size * row.gradient_accumulation_steps))
    peak, memory = result.peak("device_bytes"), row.memory_bytes or 12 * GIB
    facts = {"claimed": row.claimed, "parameters": shape.parameters, "card_bytes": memory}
    fits = None if peak is None else result.status == "ok" and peak <= memory
    # a card too small for the row is an answer too
    return {**facts, **measured(result), "fits": fits, "ok": result.status in ("ok", "oom", "over_limit")}


def _guide_headline(rows: list[Row]) -> str:
    fitting = {name: sum(bool(r.get("fits")) for r in rows if r["item"].endswith(name)) for name in PLANS}
    return "rows that fit their card: " + ", ".join(f"{count} {name}" for name, count in fitting.items())


def _largest(bench: Bench) -> Iterator[Item]:
    """The largest micro batch of each of the guide's shapes that runs below an emulated limit."""
    for row in bench.some(GUIDE):
        for name in ("plain nanoGPT, compiled", "chunked loss, compiled"):
            for gib in (1,) if bench.rehearse else (24, 16):
                measure = partial(_largest_micro_batch, bench, row, PLANS[name], gib * GIB)
                yield Item(f"{row.card}: {name}, {gib} GiB", 120, measure)


def _largest_micro_batch(bench: Bench, row: GuideRow, plan: Plan, limit: int) -> Row:
    """Two small micro batches measured, the third predicted from them, then tried and moved until it is the last."""
    shape = bench.shape(row.shape.n_layer, row.shape.n_head, row.shape.n_embd)
    sequences = 8 if bench.rehearse else 512

    def at(micro: int) -> Candidate:
        return bench.candidate(shape, replace(plan, micro_batch_size=micro), sequences)

    known = [(at(micro), bench.trial(at(micro), measure_seconds=0.1)) for micro in (2, 4)]
    model = calibrate(bench.device.partition(":")[0], known, bench.environment)
    fitting = [micro for micro in range(1, sequences) if predict(model, at(micro)).peak_device_bytes * 1.01 <= limit]
    micro, best, failed = max(fitting, default=1), 0, sequences
    result = known[0][1]
    for _ in range(5):
        tried = bench.trial(at(micro), limit=limit, measure_seconds=0.5)
        if tried.status == "ok":
            best, result = micro, tried
        else:
            failed = micro
        if failed - best <= max(1, best // 50):
            break
        micro = best + max(1, best // 50) if tried.status == "ok" else micro - max(1, micro // 50)
        if not 0 < micro < sequences:
            break
    facts = {"limit_bytes": limit, "largest_micro_batch": best, "smallest_that_failed": failed}
    return {**measured(result), **facts, "ok": best > 0}


# --- the search on the card ------------------------------------------------------------------------


SEARCHED = (
    "micro_batch_size=8,16,24,32,48,64", "loss=full,chunked", "loss_chunk_tokens=2048,8192",
    "activation_checkpointing=none,block", "compile=off,full,block", "attention=sdpa,sdpa_flash", "allocator=default",
    "dtype=bfloat16",
)  # fmt: skip
"""Some 200 plans of 124M."""


def _exhaustive(bench: Bench) -> Iterator[Item]:
    """Every plan of the space `SEARCHED`, in an order of chance: what searches can be replayed against."""
    shape, choices = bench.shape(12, 12, 768), () if bench.rehearse else SEARCHED
    settings = resolve(bench.environment, model=_in_words(shape), choices=choices)
    found = every_candidate(build_space(settings, bench.environment))
    order = random.Random(0).sample(list(found.values()), len(found))
    for candidate in order[:3] if bench.rehearse else order:
        yield Item(candidate.id, 60, partial(_recorded, bench, candidate))


def _in_words(shape: Shape) -> str:
    """For --model."""
    return f"{shape.n_layer}x{shape.n_head}x{shape.n_embd}x{shape.block_size}"


def _recorded(bench: Bench, candidate: Candidate) -> Row:
    result = bench.trial(candidate, measure_seconds=2.0)
    whole = {"candidate": asdict(candidate), "result": asdict(result)}
    return {**measured(result), **whole, "ok": result.status in ("ok", "oom", "over_limit", "unsupported")}


def _search_quality(bench: Bench) -> Iterator[Item]:
    """A search of fifteen minutes over the space of `exhaustive`, against the best of it."""
    yield Item("fifteen minutes", 910, partial(_searched, bench))


def _searched(bench: Bench) -> Row:
    rows = bench.rows("exhaustive")
    if not rows:
        raise RuntimeError("no exhaustive table is recorded; run scripts/gpu_acceptance --only exhaustive")
    minutes, choices = (REHEARSED_MINUTES, ()) if bench.rehearse else (15.0, SEARCHED)
    run, trials = _search(
        bench, bench.shape(12, 12, 768), minutes, *(word for choice in choices for word in ("--choices", choice))
    )
    best = parse_candidate((run / "best.toml").read_text(), "the winner")
    row = {"trials": trials, "trials_an_hour": trials * 60 / minutes, **best.measured}
    if bench.rehearse:  # three trials are no table
        return row
    speeds = {item: row["tokens_per_second"] or 0.0 for item, row in rows.items()}
    regret = 1 - speeds[best.candidate.id] / max(speeds.values())
    return {**row, "regret": regret, "ok": regret <= 0.02}


def _quality_headline(rows: list[Row]) -> str:
    (row,) = rows
    return f"{row['trials_an_hour']:.0f} trials an hour, regret {row.get('regret', 0):.1%}" if row["ok"] else ""


def _count(what: str) -> Callable[[list[Row]], str]:
    return lambda rows: f"{sum(row['ok'] for row in rows)} of {len(rows)} {what}"


PARTS = (
    Part("kernels", "every kernel row against float64", _pytest("tests/kernels"), _count("test runs passed")),
    Part("tests", "the other tests that need a card", _pytest(*OTHER_TESTS), _count("test runs passed")),
    Part("faults", "a fault costs its own trial and nothing else", _faults, _count("left the next trial as it was")),
    Part("kernel_speed", "every kernel row against torch's own, in seconds and bytes", _kernel_speed, _count("ran")),
    Part("limits", "emulated smaller cards", _limits, _count("limits held")),
    Part("throughput", "plain nanoGPT eager, compiled, and the search's winner", _throughput, _throughput_headline),
    Part("promise", "what was measured is what is trained", _each_model(180, _trained), _count("promises kept")),
    Part("memory_trials", "peaks of candidates drawn by chance", _memory, _count("measured"), parallel=6),
    Part("memory_error", "the memory model's error on those held out", _memory_error, _error_headline),
    Part("breakdown", "where the winner's step spends its time", _each_model(90, _profiled), _count("profiled")),
    Part("guide", "the guide's rows on the cards they are meant for", _guide, _guide_headline),
    Part("largest", "largest micro batch below emulated limits", _largest, _count("limits filled"), default=False),
    Part("exhaustive", "every plan of a space of 124M", _exhaustive, _count("recorded"), default=False),
    Part("search_quality", "a search against that table", _search_quality, _quality_headline, default=False),
)

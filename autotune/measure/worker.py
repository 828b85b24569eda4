"""The child's side of a trial: one candidate, built, verified, compiled, warmed up and measured.

    python -m autotune.measure.worker < request.json

result.json is replaced at every phase, so a killed worker has left word of where it died.
"""

import math
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from autotune.config.candidate import Candidate
from autotune.config.toml import write_atomically
from autotune.data.batches import micro_batches, open_batches, synthetic_batch
from autotune.environment import describe
from autotune.errors import AutotuneError, UnsupportedError
from autotune.measure.memory import MemoryMeter
from autotune.measure.timing import MIN_SAMPLES, TARGET, Stopwatch, Timing, summarise, warm_up
from autotune.measure.types import TrialRequest, TrialResult, request_from_json, to_json
from autotune.model.checkpoint import TrainState, save_checkpoint
from autotune.model.step import TrainStep, build, compile_cache

CYCLE = 4
"""Micro steps before each optimizer step while timing; a longer accumulation is composed from them."""
COMPILING_STEPS = 2
"""Dynamo guards on autograd's state, which is another one inside a first call than in all later ones: an operator
that compiles a part of itself is compiled twice."""
LOSS_TOLERANCE = 0.3
"""Nats by which the first loss may differ from what the initialisation gives."""
REPEAT_FAVOUR = 1.3
"""Nats by which a new model prefers to repeat a token, at most: 0.8 to 1.22 from 64 to 1024 wide, 1 to 12 layers."""
LIMIT_MARGIN = 0.01
"""Part of its peak that a candidate must leave free below the limit: long trainings see slightly more."""
OTHERS_TOLERANCE_BYTES = 64 << 20
"""What others may take during a trial without a word."""
CUDA_MARGIN_BYTES = 64 << 20
"""Room left below an emulated limit for what libraries take after the fraction was set."""

MicroBatch = tuple[Tensor, Tensor, float]


class IncorrectError(Exception):
    """The candidate computes something else than it should; the message says what."""


@dataclass
class Report:
    """The result so far, written out at each phase."""

    path: Path
    result: TrialResult
    meter: MemoryMeter | None = None
    entered: float = field(default_factory=time.monotonic)

    def enter(self, **changes: object) -> None:
        now, spent = time.monotonic(), dict(self.result.phase_seconds)
        spent[self.result.phase] = spent.get(self.result.phase, 0.0) + now - self.entered
        self.entered = now
        self.result = replace(self.result, phase_seconds=spent, **changes)  # type: ignore[arg-type]
        write_atomically(self.path, to_json(self.result))


def run(request: TrialRequest, report: Report) -> None:
    """Measure the candidate of `request`; what it raises, `main` turns into a status."""
    candidate, device = request.candidate, torch.device(request.device)
    report.enter(phase="build")
    started = time.perf_counter()
    report.meter = meter = MemoryMeter(device, lambda: live_bytes(step, batches))  # before a context exists
    limit_memory(request, device, meter)
    step = build(candidate, device)
    batches = resident_batches(candidate, device, whole_step=request.final)
    report.enter(
        phase="verify",
        build_seconds=time.perf_counter() - started,
        other_processes_bytes=meter.other_processes_bytes,
    )
    first_loss = verify(step, batches[0])
    report.enter(phase="compile", first_loss=first_loss)
    started = time.perf_counter()
    with meter.stage("first_step"):
        for _ in range(COMPILING_STEPS):
            step.step(batches[:2], 0.0)
    hits, misses = compile_cache() or (None, None)
    report.enter(
        phase="warmup",
        compile_seconds=time.perf_counter() - started,
        compile_cache_hits=hits,
        compile_cache_misses=misses,
        memory=meter.views(),
    )
    torch.compiler.set_stance("fail_on_recompile")  # a recompilation while timing would be timed
    with meter.stage("steady"):
        compiled_loss, _ = step.step(batches[:2], candidate.recipe.learning_rate)
    compiled = compiled_loss.item() / sum(share for _, _, share in batches[:2])
    check_loss(compiled, candidate, "compiled", repeated(batches[:2]))
    report.enter(memory=meter.views())
    stop_if_over_limit(request, report.result)
    measured = time_steps(step, batches, request, report)
    if request.final:
        rehearse(step, batches, meter)
    report.enter(phase="done", status="ok", memory=meter.views(), **throughput(measured, request))
    stop_if_over_limit(request, report.result)


def limit_memory(request: TrialRequest, device: torch.device, meter: MemoryMeter) -> None:
    """Make this process live inside the limit for real, so that a small card can be tried on a larger one.
    `meter` was made before this process had a context, so what it saw in use belongs to others."""
    limit = request.memory_limit_bytes
    if limit is None:
        return
    if device.type == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        return
    torch.zeros(1, device=device)  # the context exists from here on
    free, total = torch.cuda.mem_get_info(device)
    context = max(0, total - free - (meter.other_processes_bytes or 0) - torch.cuda.memory_reserved(device))
    room = limit - context - CUDA_MARGIN_BYTES
    if room <= 0:
        raise UnsupportedError(
            f"memory limit {limit} bytes is smaller than the CUDA context of {context} bytes; raise --memory-limit"
        )
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), device)


def resident_batches(candidate: Candidate, device: torch.device, whole_step: bool) -> list[MicroBatch]:
    """Micro batches of real text, or of a Zipf law where there is none, resident on the device."""
    shape, recipe, micro = candidate.shape, candidate.recipe, candidate.plan.micro_batch_size
    count = candidate.gradient_accumulation_steps
    rows = recipe.global_batch_size if whole_step else min(count, CYCLE) * micro
    if recipe.data:
        source = open_batches(
            Path(recipe.data),
            seed=recipe.seed,
            global_batch_size=rows,
            block_size=shape.block_size,
            vocab_size=shape.vocab_size,
        )
        tokens, targets = source.train_batch(0)
    else:
        tokens, targets = synthetic_batch(
            seed=recipe.seed, step=0, global_batch_size=rows, block_size=shape.block_size, vocab_size=shape.vocab_size
        )
    return [
        (torch.from_numpy(x).to(device), torch.from_numpy(y).to(device), share)
        for x, y, share in micro_batches(tokens, targets, micro)
    ]


def live_bytes(step: TrainStep, batches: list[MicroBatch]) -> int:
    """Bytes of all tensors that outlive a step."""
    return step.state_bytes() + sum(x.nbytes + y.nbytes for x, y, _ in batches)


def verify(step: TrainStep, batch: MicroBatch) -> float:
    """The loss of one sequence, not compiled, before anything is timed. Raises IncorrectError."""
    tokens, targets, _ = batch
    torch.compiler.set_stance("force_eager")
    loss = step.evaluate(tokens[:1], targets[:1]).item()
    torch.compiler.set_stance("default")
    check_loss(loss, step.candidate, "first", repeated([(tokens[:1], targets[:1], 1.0)]))
    return loss


def repeated(batches: list[MicroBatch]) -> float:
    """Fraction of the targets that repeat their input token (runs of spaces in source code, for example)."""
    same = sum((tokens == targets).sum().item() for tokens, targets, _ in batches)
    return same / sum(tokens.numel() for tokens, _, _ in batches)


def check_loss(loss: float, candidate: Candidate, which: str, repeats: float) -> None:
    """A new model's logits are normal(0, 0.02^2 n_embd): cross entropy ln(vocabulary) + variance / 2.
    But the tied head favours the input token itself, so targets that repeat it cost less."""
    expected = math.log(candidate.shape.vocab_size) + 0.02**2 * candidate.shape.n_embd / 2
    lowest = expected - REPEAT_FAVOUR * repeats - LOSS_TOLERANCE
    if not lowest < loss < expected + LOSS_TOLERANCE:  # also catches NaN
        raise IncorrectError(f"{which} loss {loss:.4f} is not within {LOSS_TOLERANCE} of a new model's {expected:.4f}")


@dataclass(frozen=True, kw_only=True)
class Timings:
    """What was timed: the parts of a step, or whole steps (for a finalist)."""

    first: Timing
    """The first micro step after an optimizer step."""
    later: Timing | None
    """The others, which add to gradients that exist."""
    optimizer: Timing
    whole: Timing | None = None


def time_steps(step: TrainStep, batches: list[MicroBatch], request: TrialRequest, report: Report) -> Timings:
    """Warm up, then repeat until the interval is narrow enough or the time is over."""
    watch, lr = Stopwatch(step.device), request.candidate.recipe.learning_rate
    samples: dict[str, list[float]] = {"first": [], "later": [], "optimizer": [], "whole": []}
    losses: list[Tensor] = []

    def cycle() -> float:
        readings = []
        for index, (tokens, targets, share) in enumerate(batches):
            kind = "later" if index else "first"
            readings.append((kind, watch.time(lambda: losses.append(step.micro_step(tokens, targets, share)))))  # noqa: B023
        readings.append(("optimizer", watch.time(lambda: step.optimizer_step(lr))))
        watch.synchronise()
        seconds = [(kind, reading()) for kind, reading in readings]
        for kind, value in seconds:
            samples[kind].append(value)
        samples["whole"].append(sum(value for _, value in seconds))
        return samples["whole"][-1]

    deadline = time.monotonic() + request.measure_seconds
    warm_up(cycle, deadline)
    for values in samples.values():
        values.clear()
    report.enter(phase="measure")
    while True:
        cycle()
        timings = summarise_all(samples, request.final)
        whole = summarise(samples["whole"])
        steady = whole.samples >= MIN_SAMPLES and whole.ci95 <= TARGET * whole.median
        if whole.samples >= 3 and cannot_win(timings, request):
            least = request.stop_below_tokens_per_second
            report.enter(message=f"timing ended early: below {least:,.0f} tokens/s it cannot win any more")
            break
        if steady or (time.monotonic() > deadline and whole.samples >= 3):
            break
    last = losses[-1].item() / batches[-1][2]
    report.enter(last_loss=last if math.isfinite(last) else None)
    if not math.isfinite(last):
        raise IncorrectError(f"loss is {last} after {len(samples['whole'])} steps")
    return timings


def summarise_all(samples: Mapping[str, list[float]], final: bool) -> Timings:
    return Timings(
        first=summarise(samples["first"]),
        later=summarise(samples["later"]) if samples["later"] else None,
        optimizer=summarise(samples["optimizer"]),
        whole=summarise(samples["whole"]) if final else None,
    )


def step_seconds(timings: Timings, candidate: Candidate) -> tuple[float, float]:
    """Of a whole optimizer step, timed whole or composed from its parts, and the half width of its interval."""
    if timings.whole is not None:
        return timings.whole.median, timings.whole.ci95
    parts = [(1, timings.first), (1, timings.optimizer)]
    if timings.later is not None:
        parts.append((candidate.gradient_accumulation_steps - 1, timings.later))
    seconds = sum(count * part.median for count, part in parts)
    return seconds, math.sqrt(sum((count * part.ci95) ** 2 for count, part in parts))


def cannot_win(timings: Timings, request: TrialRequest) -> bool:
    """Even the fast end of the interval lies below what the request asks for."""
    if request.stop_below_tokens_per_second is None:
        return False
    seconds, ci95 = step_seconds(timings, request.candidate)
    return (seconds - ci95) * request.stop_below_tokens_per_second > request.candidate.recipe.tokens_per_step


def throughput(timings: Timings, request: TrialRequest) -> dict[str, object]:
    """Tokens/s of whole optimizer steps."""
    candidate = request.candidate
    seconds, ci95 = step_seconds(timings, candidate)
    tokens_per_second = candidate.recipe.tokens_per_step / seconds
    peak_flops = describe(request.device).peak_flops
    return {
        "tokens_per_second": tokens_per_second,
        "tokens_per_second_ci95": tokens_per_second * ci95 / seconds,
        "mfu": tokens_per_second * candidate.shape.flops_per_token / peak_flops if peak_flops else None,
        "step_seconds_p50": seconds,
        "micro_step_seconds_p50": (timings.later or timings.first).median,
        "optimizer_seconds_p50": timings.optimizer.median,
        "measured_steps": timings.optimizer.samples,
    }


def rehearse(step: TrainStep, batches: list[MicroBatch], meter: MemoryMeter) -> None:
    """What else a training does with the device's memory: an evaluation and a checkpoint."""
    torch.compiler.set_stance("default")  # the forward without gradients is compiled here
    tokens, targets, _ = batches[0]
    rows = step.candidate.recipe.eval_batch_size or step.candidate.plan.micro_batch_size
    repeats = -(-rows // tokens.shape[0])
    with meter.stage("evaluation"):
        step.evaluate(tokens.repeat(repeats, 1)[:rows], targets.repeat(repeats, 1)[:rows])
    with meter.stage("checkpoint"), tempfile.TemporaryDirectory() as directory:
        save_checkpoint(Path(directory), step, TrainState(iteration=0, tokens=0, candidate=step.candidate))


class OverLimitError(Exception):
    """It ran, but the device saw more than the limit."""


def stop_if_over_limit(request: TrialRequest, result: TrialResult) -> None:
    limit = request.memory_limit_bytes
    views = [result.peak(view) for view in ("allocated_bytes", "reserved_bytes", "device_bytes")]
    largest = max((value for value in views if value is not None), default=0)
    if limit is not None and largest * (1 + LIMIT_MARGIN) > limit:
        raise OverLimitError(f"needs {largest} bytes and a margin of {LIMIT_MARGIN:.0%}, the limit is {limit}")


def failure(error: BaseException) -> dict[str, object]:
    """The status, message and wanted bytes of a trial that raised `error`."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:500]
    if out_of_memory(error):
        return {"status": "oom", "message": text, "wanted_bytes": wanted_bytes(str(error))}
    statuses = {IncorrectError: "incorrect", OverLimitError: "over_limit", UnsupportedError: "unsupported"}
    status = next((name for kind, name in statuses.items() if isinstance(error, kind)), "crashed")
    message = text if isinstance(error, (AutotuneError, *statuses)) else f"{type(error).__name__}: {text}"
    return {"status": status, "message": message}


def out_of_memory(error: BaseException) -> bool:
    """By type, wherever in the chain of causes it stands. Only torch's CPU allocator has no type of its own
    (pytorch: c10/core/impl/alloc_cpu.cpp) and is told by the place it names."""
    chain: Iterator[BaseException | None] = iter_causes(error)
    return any(
        isinstance(cause, (torch.OutOfMemoryError, MemoryError))
        or (isinstance(cause, RuntimeError) and "DefaultCPUAllocator" in str(cause))
        for cause in islice(chain, 20)
    )


def iter_causes(error: BaseException | None) -> Iterator[BaseException | None]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def wanted_bytes(message: str) -> int | None:
    """Of the allocation that failed, from the allocators' messages."""
    if match := re.search(r"tried to allocate (\d+) bytes", message):
        return int(match[1])
    if match := re.search(r"Tried to allocate ([\d.]+) ([KMG]iB)", message):
        return round(float(match[1]) * {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[match[2]])
    return None


def main(measure: Callable[[TrialRequest, Report], None]) -> int:
    """Do what stdin asks for by `measure`, and leave its outcome in result.json. Returns the exit code."""
    request = request_from_json(sys.stdin.read())
    report = Report(Path(request.result_path), TrialResult(status="crashed", phase="start"))
    try:
        measure(request, report)
    except KeyboardInterrupt:
        report.enter(status="interrupted", message="interrupted")
        return 130
    except BaseException as error:
        import traceback

        traceback.print_exc()  # into the trial's log
        report.enter(**failure(error))
        report.enter(message=report.result.message + others_note(report))
        return 1
    report.enter(message=(report.result.message + others_note(report)).removeprefix("; "))
    return 0


def others_note(report: Report) -> str:
    """That another process took memory while this trial ran; empty where none did, or none can be seen."""
    grown = report.meter.others_grown_bytes() if report.meter else None
    if grown is None or grown <= OTHERS_TOLERANCE_BYTES:
        return ""
    return f"; other processes took {grown} more bytes of the device during the trial, measure it again without them"


if __name__ == "__main__":
    sys.exit(main(run))

"""The child's side of a trial: one candidate, built, verified, compiled, warmed up and measured.

    python -m autotune.measure.worker < request.json
    torchrun --nproc-per-node 2 -m autotune.measure.worker request.json

result.json is replaced at every phase, so the last phase of a killed worker is known.
"""

import math
import os
import re
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from autotune.config.candidate import Candidate
from autotune.data.batches import micro_batches, open_batches, synthetic_batch
from autotune.environment import NOT_MEASURED, computes, describe
from autotune.errors import AutotuneError, UnsupportedError
from autotune.files import write_atomically
from autotune.measure.blame import remedy
from autotune.measure.limit import lift_limit, limit_data
from autotune.measure.memory import MemoryMeter, out_of_memory
from autotune.measure.processes import result_file
from autotune.measure.ran import check_ran
from autotune.measure.timing import MIN_SAMPLES, TARGET, Stopwatch, Timing, summarise, warm_up
from autotune.measure.types import Status, TrialRequest, TrialResult, from_json, to_json
from autotune.model.checkpoint import TrainState, gather, save_checkpoint
from autotune.model.compile_cache import compile_cache
from autotune.model.distributed import DistributedContext, distributed_context, process_group
from autotune.model.step import COMPILING_STEPS, TrainStep, build

CYCLE = 4
"""Micro steps before each optimizer step while timing; a longer accumulation is composed from them."""
LOSS_TOLERANCE = 0.3
"""Tolerated difference of the first loss from its expectation, in nats."""
REPEAT_FAVOUR = 1.3
"""Largest preference of a new model for repeating a token, in nats: 0.8 to 1.22 measured for widths of 64 to 1024 and 1
to 12 layers."""
LIMIT_MARGIN = 0.01
"""Fraction of its peak that a candidate must leave free below the limit: long trainings need slightly more."""
OTHERS_TOLERANCE_BYTES = 64 << 20
"""Growth of other processes' memory during a trial that is tolerated without a note."""
CUDA_MARGIN_BYTES = 256 << 20
"""Room below an emulated limit for modules that libraries (cuBLAS, cuDNN, Triton) load on first use, after the limit
was set."""

MicroBatch = tuple[Tensor, Tensor, float]
R = TypeVar("R", bound=TrialRequest)


class TrialEnded(Exception):  # noqa: N818 - an outcome, not a fault
    """Ends the trial with a status; the message is the reason."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Outcome:
    """The result so far; `enter` writes it to result.json."""

    path: Path
    result: TrialResult
    meter: MemoryMeter | None = None
    entered: float = field(default_factory=time.monotonic)

    def enter(self, **changes: object) -> None:
        now, spent = time.monotonic(), dict(self.result.phase_seconds)
        spent[self.result.phase] = spent.get(self.result.phase, 0.0) + now - self.entered
        self.entered = now
        self.result = replace(self.result, phase_seconds=spent, **changes)  # type: ignore[arg-type]
        write_atomically(self.path, to_json(self.result), durable=False)


def run(request: TrialRequest, outcome: Outcome) -> None:
    """Measure the candidate of `request`. Exceptions become a status in `main`."""
    candidate, context = request.candidate, distributed_context()
    device = torch.device("cuda", context.local_rank) if context.world_size > 1 and request.device != "cpu" else None
    device = device or torch.device(request.device)
    outcome.enter(phase="build")
    started = time.perf_counter()
    outcome.meter = meter = MemoryMeter(device, lambda: live_bytes(step, batches))  # before the CUDA context
    limit_memory(request, device, meter)
    step = build(candidate, device)
    with process_group(context), step.over_processes(context.world_size):
        batches = resident_batches(candidate, device, whole_step=request.whole_steps)
        outcome.enter(
            phase="verify",
            build_seconds=time.perf_counter() - started,
            other_processes_bytes=meter.other_processes_bytes,
        )
        outcome.enter(first_loss=verify(step, batches[0]))
        compiled = compile_step(step, batches[:2], outcome, meter)
        if computes(device):
            check_loss(compiled, candidate, "compiled", batches[:2])
        stop_if_over_limit(request, outcome.result)
        measured = time_steps(step, batches, request, outcome, context)
        if request.final:
            measure_eval_and_checkpoint(step, batches, meter, outcome.path.parent, context)
        outcome.enter(phase="done", status="ok", memory=meter.views(), **throughput(measured, request))
        stop_if_over_limit(request, outcome.result)
        context.barrier()  # torchrun ends the others when one has failed, so none may be done before


def compile_step(step: TrainStep, batches: list[MicroBatch], outcome: Outcome, meter: MemoryMeter) -> float:
    """Run the compiling steps and a warm one, record their peaks, and return the warm step's mean loss. Recompiling
    after that is an error, because it would be timed."""
    outcome.enter(phase="compile")
    started = time.perf_counter()
    with meter.stage("first_step"):
        for _ in range(COMPILING_STEPS):
            step.step(batches, 0.0)
    hits, misses = compile_cache() or (None, None)
    outcome.enter(
        phase="warmup",
        compile_seconds=time.perf_counter() - started,
        compile_cache_hits=hits,
        compile_cache_misses=misses,
        memory=meter.views(),
    )
    torch.compiler.set_stance("fail_on_recompile")
    with meter.stage("steady"):
        loss, _ = step.step(batches, step.candidate.recipe.learning_rate)
    outcome.enter(memory=meter.views())
    check_ran(step.candidate.plan, meter.ran, step.device)
    return loss.item() / sum(share for _, _, share in batches)


def limit_memory(request: TrialRequest, device: torch.device, meter: MemoryMeter) -> None:
    """Enforce the request's memory limit, so that a small card can be emulated on a larger one. `meter` was created
    before this process had a CUDA context, so the memory it saw in use belongs to other processes."""
    limit = request.memory_limit_bytes
    if limit is None:
        return
    if device.type == "cpu":
        limit_data(limit)
        return
    torch.zeros(1, device=device)  # creates the context
    free, total = torch.cuda.mem_get_info(device)
    held = meter.process_bytes()
    context = max(0, (total - free if held is None else held) - torch.cuda.memory_reserved(device))
    room = limit - context - CUDA_MARGIN_BYTES
    if room <= 0:
        raise UnsupportedError(
            f"memory limit {limit} bytes is smaller than the CUDA context of {context} bytes; raise --memory-limit"
        )
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), device)


def resident_batches(candidate: Candidate, device: torch.device, whole_step: bool) -> list[MicroBatch]:
    """This process's micro batches (tokens, targets, share) on the device: from the recipe's data, else from a Zipf
    law."""
    context, shape, recipe = distributed_context(), candidate.shape, candidate.recipe
    micro = min(candidate.plan.micro_batch_size, candidate.sequences)
    count = candidate.gradient_accumulation_steps
    count = count if whole_step else min(count, CYCLE)
    total = recipe.global_batch_size if whole_step else count * micro * context.world_size
    rows, sizes = context.rows(total), {
        "global_batch_size": total,
        "block_size": shape.block_size,
        "vocab_size": shape.vocab_size,
    }
    if recipe.data:
        tokens, targets = open_batches(Path(recipe.data), seed=recipe.seed, **sizes).train_batch(0, rows)
    else:
        tokens, targets = (ids[rows] for ids in synthetic_batch(seed=recipe.seed, step=0, **sizes))
    return [
        (torch.from_numpy(x).to(device), torch.from_numpy(y).to(device), share)
        for x, y, share in micro_batches(tokens, targets, micro, total, count)
    ]


def live_bytes(step: TrainStep, batches: list[MicroBatch]) -> int:
    """Bytes of all tensors that outlive a step: parameters, gradients, optimizer state, batches."""
    return step.state_bytes() + sum(x.nbytes + y.nbytes for x, y, _ in batches)


def verify(step: TrainStep, batch: MicroBatch) -> float | None:
    """The loss of one sequence, not compiled, before anything is timed; None where the device computes nothing.
    Raises TrialEnded if it is wrong."""
    tokens, targets = batch[0][:1], batch[1][:1]
    loss = step.evaluate(tokens, targets, compiled=False).item()
    if computes(step.device):
        check_loss(loss, step.candidate, "first", [(tokens, targets, 1.0)])
    if step.device.type == "cuda":
        torch.cuda.empty_cache()  # a training runs no such forward: its reserved memory must not count
    return loss if computes(step.device) else None


def check_loss(loss: float, candidate: Candidate, which: str, batches: list[MicroBatch]) -> None:
    """Raise TrialEnded unless `loss` is plausible for a new model.

    Its logits are normal(0, 0.02^2 n_embd), so the cross entropy is ln(vocabulary) + variance / 2. The tied head
    favours the input token itself, so targets that repeat it (spaces in source code, for example) cost less."""
    same = sum((tokens == targets).sum().item() for tokens, targets, _ in batches)
    repeats = same / sum(tokens.numel() for tokens, _, _ in batches)
    expected = math.log(candidate.shape.vocab_size) + 0.02**2 * candidate.shape.n_embd / 2
    lowest = expected - REPEAT_FAVOUR * repeats - LOSS_TOLERANCE
    if not lowest < loss < expected + LOSS_TOLERANCE:  # also catches NaN
        message = f"{which} loss {loss:.4f} is not within {LOSS_TOLERANCE} of a new model's {expected:.4f}"
        raise TrialEnded("incorrect", message)


Timings = Mapping[str, Timing]
"""Timings of `whole` steps and of their parts: the `first` micro step after an update, the `later` ones, which add to
existing gradients (absent without accumulation), the `last` one of several processes, which exchange gradients in it,
and the `optimizer` update. Of several processes, the slowest's."""


def time_steps(
    step: TrainStep, batches: list[MicroBatch], request: TrialRequest, outcome: Outcome, context: DistributedContext
) -> Timings:
    """Warm up, then repeat steps until the interval is narrow enough or the time is over."""
    watch, lr = Stopwatch(step.device), request.candidate.recipe.learning_rate
    samples: dict[str, list[float]] = defaultdict(list)
    losses: list[Tensor] = []

    def cycle() -> float:
        readings = []
        for index, (tokens, targets, share) in enumerate(batches):
            last = index == len(batches) - 1
            kind = "first" if not index else "last" if last and context.world_size > 1 else "later"
            work = partial(step.micro_step, tokens, targets, share, last=last)
            readings.append((kind, watch.time(lambda: losses.append(work()))))  # noqa: B023 - called at once
        readings.append(("optimizer", watch.time(lambda: step.optimizer_step(lr))))
        watch.synchronise()
        seconds = [reading() for _, reading in readings]
        seconds = context.slowest([*seconds, sum(seconds)])
        for kind, value in zip([*(kind for kind, _ in readings), "whole"], seconds, strict=True):
            samples[kind].append(value)
        return seconds[-1]

    deadline = time.monotonic() + request.measure_seconds
    warm_up(cycle, deadline, context.any)
    samples.clear()
    outcome.enter(phase="measure")
    while True:
        cycle()
        timings = {kind: summarise(values) for kind, values in samples.items()}
        whole = timings["whole"]
        steady = whole.samples >= MIN_SAMPLES and whole.ci95 <= TARGET * whole.median
        if whole.samples < 3:
            continue
        if cannot_win(timings, request):
            least = request.stop_below_tokens_per_second
            outcome.enter(message=f"timing ended early: below {least:,.0f} tokens/s it cannot win")
            break
        if context.any(steady or time.monotonic() > deadline):
            break
    last = losses[-1].item() / batches[-1][2] if batches[-1][2] else losses[-1].item()
    outcome.enter(last_loss=last if math.isfinite(last) and computes(step.device) else None)
    if not math.isfinite(last):
        raise TrialEnded("incorrect", f"loss is {last} after {whole.samples} steps")
    return timings


def step_seconds(timings: Timings, request: TrialRequest) -> tuple[float, float]:
    """Seconds of one optimizer step, timed whole or composed from its parts, and the half width of its interval."""
    if request.whole_steps:
        return timings["whole"].median, timings["whole"].ci95
    once = [timings[kind] for kind in ("first", "last") if kind in timings]
    parts = [(1, part) for part in (*once, timings["optimizer"])]
    if "later" in timings:
        parts.append((request.candidate.gradient_accumulation_steps - len(once), timings["later"]))
    seconds = sum(count * part.median for count, part in parts)
    return seconds, math.sqrt(sum((count * part.ci95) ** 2 for count, part in parts))


def cannot_win(timings: Timings, request: TrialRequest) -> bool:
    """Whether even the fast end of the interval is below `stop_below_tokens_per_second`."""
    if request.stop_below_tokens_per_second is None:
        return False
    seconds, ci95 = step_seconds(timings, request)
    return (seconds - ci95) * request.stop_below_tokens_per_second > request.candidate.recipe.tokens_per_step


def throughput(timings: Timings, request: TrialRequest) -> dict[str, object]:
    """The fields of a TrialResult that follow from the timings."""
    candidate = request.candidate
    seconds, ci95 = step_seconds(timings, request)
    tokens_per_second = candidate.recipe.tokens_per_step / seconds
    peak_flops = (describe(request.device).peak_flops or 0.0) * candidate.plan.processes
    return {
        "tokens_per_second": tokens_per_second,
        "tokens_per_second_ci95": tokens_per_second * ci95 / seconds,
        "mfu": tokens_per_second * candidate.shape.flops_per_token / peak_flops if peak_flops else None,
        "step_seconds_p50": seconds,
        "steps": "whole" if request.whole_steps else "composed",
        "micro_step_seconds_p50": timings.get("later", timings["first"]).median,
        "optimizer_seconds_p50": timings["optimizer"].median,
        "measured_steps": timings["optimizer"].samples,
    }


def measure_eval_and_checkpoint(
    step: TrainStep, batches: list[MicroBatch], meter: MemoryMeter, folder: Path, context: DistributedContext
) -> None:
    """Record the peaks of an evaluation and a checkpoint. `folder` belongs to the trial and is removed even if this
    process is killed."""
    torch.compiler.set_stance("default")  # the forward without gradients is compiled here
    tokens, targets, _ = batches[0]
    rows = step.candidate.evaluation.eval_batch_size or len(tokens)
    with meter.stage("evaluation"):
        step.evaluate(tokens[:rows], targets[:rows])
    with meter.stage("checkpoint"), tempfile.TemporaryDirectory(dir=folder) as directory:
        held = gather(step)
        if context.is_main:
            save_checkpoint(Path(directory), step, TrainState(iteration=0, tokens=0, candidate=step.candidate), held)
        del held  # what was gathered does not outlive the stage


def stop_if_over_limit(request: TrialRequest, result: TrialResult) -> None:
    limit = request.memory_limit_bytes
    largest = result.peak_bytes or 0
    if limit is not None and largest * (1 + LIMIT_MARGIN) > limit:
        message = f"needs {largest} bytes and a margin of {LIMIT_MARGIN:.0%}, the limit is {limit}"
        raise TrialEnded("over_limit", message)


def failure(error: BaseException) -> dict[str, object]:
    """The status, message and wanted bytes of a trial that raised `error`."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:500]
    if out_of_memory(error):
        # the rest of the message is the state of CUDA's allocator, or where the CPU's failed; the trial's log keeps it
        short = text.partition(" GPU ")[0].rpartition("DefaultCPUAllocator: ")[2]
        return {"status": "oom", "message": short, "wanted_bytes": wanted_bytes(str(error))}
    if isinstance(error, TrialEnded):
        return {"status": error.status, "message": text}
    if advice := remedy(error, os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")):
        return {"status": "unsupported", "message": text, "remedy": advice}
    if isinstance(error, AutotuneError):
        return {"status": "unsupported" if isinstance(error, UnsupportedError) else "crashed", "message": text}
    return {"status": "crashed", "message": f"{type(error).__name__}: {text}"}


def wanted_bytes(message: str) -> int | None:
    """Bytes of the failed allocation, from the allocator's message."""
    if match := re.search(r"tried to allocate (\d+) bytes", message):
        return int(match[1])
    if match := re.search(r"Tried to allocate ([\d.]+) ([KMG]iB)", message):
        return round(float(match[1]) * {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[match[2]])
    return None


def main(measure: Callable[[R, Outcome], None], kind: type[R], result: type[TrialResult] = TrialResult) -> int:
    """Read a request of that kind from the file given, or stdin, run `measure`, and leave the outcome, a `result`, in
    result.json. Returns the exit code."""
    request = from_json(kind, Path(sys.argv[1]).read_text() if sys.argv[1:] else sys.stdin.read())
    file = result_file(Path(request.result_path), distributed_context().rank)
    outcome = Outcome(file, result(status="crashed", phase="start"))
    try:
        measure(request, outcome)
    except KeyboardInterrupt:
        outcome.enter(status="interrupted", message="interrupted")
        return 130
    except BaseException as error:
        lift_limit()  # else a candidate that ran out of memory could not say so
        traceback.print_exc()  # into the trial's log
        outcome.enter(**failure(error))
    notes = [outcome.result.message]
    if outcome.result.status == "ok" and not computes(torch.device(request.device)):
        notes.append(NOT_MEASURED)
    grown = outcome.meter.others_grown_bytes() if outcome.meter else None
    if grown is not None and grown > OTHERS_TOLERANCE_BYTES:
        notes.append(f"other processes took {grown} more bytes of the device during the trial, measure it again alone")
    outcome.enter(message="; ".join(filter(None, notes)))  # also records the seconds of the last phase
    return 0 if outcome.result.status == "ok" else 1


if __name__ == "__main__":
    sys.exit(main(run, TrialRequest))

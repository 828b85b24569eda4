"""A machine made of formulas: trials without a worker, deterministic and instant, for testing searches."""

import json
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from autotune.config.candidate import Candidate
from autotune.config.search_settings import SearchSettings
from autotune.environment import Environment
from autotune.measure.types import MemoryView, TrialRequest, TrialResult
from autotune.search.resolve import resolve
from autotune.search.space import reads_chunks
from autotune.units import GIB

CPU = Environment(
    device="cpu", device_name="Paper CPU", device_memory_bytes=16 * GIB, torch="2.13.0", python="3.11.9",
    autotune="0.1.0", cpu_count=2, platform="Linux x86_64",
)  # fmt: skip
CUDA = replace(
    CPU, device="cuda:0", device_name="Paper Card", device_memory_bytes=24 * GIB, capability=(9, 0), cuda="13.0"
)
OLD_CUDA = replace(CUDA, capability=(7, 5))


def settings(environment: Environment = CUDA, **words: object) -> SearchSettings:
    return resolve(environment, **{"model": "12x12x768", "budget": "60s", "name": "paper", **words})  # type: ignore[arg-type]


def peak_bytes(candidate: Candidate) -> int:
    """The closed form of the field's literature: weights, activations and logits."""
    shape, plan = candidate.shape, candidate.plan
    tokens = plan.micro_batch_size * shape.block_size
    layers = 36 if plan.compile == "off" else 24
    if plan.activation_checkpointing == "block":
        layers = 4
    logit_tokens = min(tokens, plan.loss_chunk_tokens) if reads_chunks(plan) else tokens
    activations = tokens * (shape.n_layer * layers + 6) * shape.n_embd
    return 16 * shape.parameters + activations + 6 * logit_tokens * shape.vocab_size + GIB


def tokens_per_second(candidate: Candidate) -> float:
    """Larger micro batches saturate, recomputation costs a third, compilation a quarter less."""
    plan = candidate.plan
    tokens = plan.micro_batch_size * candidate.shape.block_size
    speed = 4e14 / candidate.shape.flops_per_token * tokens / (tokens + 3000)
    speed *= {"off": 0.7, "block": 0.97, "full": 1.0}[plan.compile]
    speed *= 0.75 if plan.activation_checkpointing == "block" else 1.0
    speed *= {"sdpa": 1.0, "sdpa_cudnn": 1.02}.get(plan.attention, 0.8)
    if reads_chunks(plan):
        speed *= 0.98 if plan.loss_chunk_tokens >= 2048 else 0.96
        speed *= 1.0 if plan.loss == "chunked" else 0.9
    rows = plan.micro_batch_size * candidate.gradient_accumulation_steps
    return speed * candidate.recipe.global_batch_size / rows


class Machine:
    """`measure` for a search. Time passes only as far as trials take any: `clock` reads it."""

    def __init__(self, trial_seconds: float = 5.0) -> None:
        self.now, self.trial_seconds = 0.0, trial_seconds
        self.requests: list[TrialRequest] = []
        self.results: dict[str, TrialResult] = {}
        """Answers to give for candidate ids, searched; with `final:` before the id, confirmed."""
        self.hanging: set[str] = set()

    def clock(self) -> float:
        return self.now

    def measure(self, request: TrialRequest, log: Path) -> TrialResult:
        self.requests.append(request)
        name = ("final:" if request.final else "") + request.candidate.id
        result = self.results.get(name, answer(request))
        whole_steps = 6 * (result.step_seconds_p50 or 0.0) if request.whole_steps else 0.0
        seconds = self.trial_seconds + whole_steps
        if name in self.hanging or seconds > request.timeout_seconds:
            self.now += request.timeout_seconds
            late = TrialResult(status="timeout", phase="compile", message="not done")
            return replace(late, trial_seconds=request.timeout_seconds)
        self.now += seconds
        phases = {"start": 0.1 * seconds, "compile": 0.6 * seconds, "measure": 0.3 * seconds}
        timed = ("whole" if request.whole_steps else "composed") if result.status == "ok" else None
        return replace(result, trial_seconds=seconds, phase_seconds=phases, steps=timed)


def answer(request: TrialRequest) -> TrialResult:
    """What the formulas say."""
    candidate, peak = request.candidate, peak_bytes(request.candidate)
    assert request.memory_limit_bytes is not None
    if peak > request.memory_limit_bytes:
        memory = {"first_step": MemoryView(allocated_bytes=request.memory_limit_bytes)}
        wanted = peak - request.memory_limit_bytes
        return TrialResult(status="oom", phase="warmup", message="out of memory", memory=memory, wanted_bytes=wanted)
    speed = tokens_per_second(candidate)
    return TrialResult(
        status="ok",
        phase="done",
        tokens_per_second=speed,
        tokens_per_second_ci95=speed * 0.002,
        step_seconds_p50=candidate.recipe.tokens_per_step / speed,
        memory={"steady": MemoryView(allocated_bytes=peak, device_bytes=peak + GIB // 2)},
        first_loss=10.8,
        last_loss=10.7,
    )


def slow_measure(request: TrialRequest, log: Path) -> TrialResult:
    """The formulas at a pace that leaves time to kill the process."""
    time.sleep(0.05)
    return replace(answer(request), trial_seconds=0.05)


if __name__ == "__main__":  # a search in a process of its own: fake_machine.py RUN_DIR search|resume SECONDS
    from autotune.search.loop import resume, search

    directory, verb, seconds = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    if verb == "search":
        verdict = search(settings(budget=seconds), directory, CUDA, measure=slow_measure)
    else:
        verdict = resume(directory, CUDA, budget_seconds=float(seconds), measure=slow_measure)
    print(json.dumps({"winner": verdict.winner.trial, "torch": "torch" in sys.modules}))


class Beside(Machine):
    """Trials that run at the same time: `pause` passes the time to the next end of one."""

    def __init__(self, trial_seconds: float = 5.0) -> None:
        super().__init__(trial_seconds)
        self.running: dict[str, float] = {}
        self.most, self.stopped = 0, list[str]()
        self.together = set[tuple[bool, int]]()

    def start(self, request: TrialRequest, log: Path) -> Generator[None, None, TrialResult]:
        began = self.now
        result = self.measure(request, log)
        end, self.now = self.now + int(request.device[-1] == "2"), began  # the last card is a second slower
        with self.busy(request.device, end):
            self.together.add((request.final, len(self.running)))
            while self.now < end:
                yield
        return result

    @contextmanager
    def busy(self, device: str, end: float) -> Iterator[None]:
        """A worker runs there until then, unless it is stopped."""
        self.running[device] = end
        try:
            yield
        except GeneratorExit:
            self.stopped.append(device)
            raise
        finally:
            del self.running[device]

    def pause(self) -> None:
        self.now = max(self.now, min(self.running.values()))

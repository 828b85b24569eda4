"""The child's side of a profile: where the memory of one real, warm optimizer step goes.

    python -m autotune.profile.recorder < request.json

Writes result.json as a trial does, profile.json and, on CUDA, snapshot.pickle. docs/memory-model.md defines the
categories.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import PurePath

import torch
from torch import Tensor

from autotune.config.candidate import Candidate
from autotune.files import write_atomically
from autotune.kernels import registry
from autotune.measure.memory import MemoryMeter
from autotune.measure.types import CATEGORIES, LiveTensor, MemoryProfile, MemoryView, TrialRequest, to_json
from autotune.measure.worker import (
    MicroBatch,
    Outcome,
    TrialEnded,
    compile_step,
    limit_memory,
    live_bytes,
    main,
    resident_batches,
)
from autotune.model.step import TrainStep, build
from autotune.profile.allocations import Allocation, Recording, record
from autotune.profile.provenance import OURS, Buffer, Wrapper, listen

SNAPSHOT = "snapshot.pickle"
Known = Mapping[int, tuple[str, str, Tensor]]
"""Address -> category, name, tensor."""


def profile(request: TrialRequest, outcome: Outcome) -> None:
    """Record the candidate of `request`. Exceptions become the result's status."""
    candidate, device = request.candidate, torch.device(request.device)
    lr, directory = candidate.recipe.learning_rate, outcome.path.parent
    outcome.enter(phase="build")
    outcome.meter = meter = MemoryMeter(device, lambda: live_bytes(step, batches))
    limit_memory(request, device, meter)
    with listen() as wrappers:
        step = build(candidate, device)
        batches = resident_batches(candidate, device, whole_step=False)
        outcome.enter(other_processes_bytes=meter.other_processes_bytes)
        compile_step(step, batches[:2], outcome, meter)
    outcome.enter(phase="measure")
    known = known_tensors(step, batches)
    before = [Allocation(address=a, bytes=t.nbytes, requested_bytes=t.nbytes) for a, (_, _, t) in known.items()]
    gradients: dict[int, str] = {}
    handle = step.optimizer.register_step_pre_hook(lambda *_: gradients.update(_gradients(step)))
    recording = record(lambda: step.step(batches[:2], lr), device, before, directory / SNAPSHOT)
    handle.remove()
    if not gradients:
        raise TrialEnded("incorrect", "the optimizer was not stepped: gradients are not finite")
    explainer = Explainer(recording=recording, candidate=candidate, wrappers=wrappers, known=known, gradients=gradients)
    write_atomically(directory / "profile.json", to_json(explain(explainer, meter.views()["steady"])))
    outcome.enter(phase="done", status="ok")


def known_tensors(step: TrainStep, batches: list[MicroBatch]) -> Known:
    """All tensors on the step's device that outlive a step, by address."""
    known = {}
    for name, parameter in step.model.named_parameters():
        known[parameter.data_ptr()] = ("parameters", name, parameter.detach())
        for key, state in step.optimizer.state[parameter].items():
            if torch.is_tensor(state) and state.device.type == step.device.type:
                known[state.data_ptr()] = ("optimizer state", f"{key} of {name}", state)
    for index, (tokens, targets, _) in enumerate(batches, 1):
        known[tokens.data_ptr()] = ("batch", f"tokens {index}", tokens)
        known[targets.data_ptr()] = ("batch", f"targets {index}", targets)
    return known


def _gradients(step: TrainStep) -> dict[int, str]:
    named = step.model.named_parameters()
    return {p.grad.data_ptr(): f"gradient of {name}" for name, p in named if p.grad is not None}


@dataclass(frozen=True, kw_only=True)
class Explainer:
    """Assigns allocations to categories."""

    recording: Recording
    candidate: Candidate
    wrappers: Mapping[str, Wrapper]
    """Generated code by file name."""
    known: Known
    gradients: Mapping[int, str]
    """Address -> name, right before the optimizer's update."""

    def describe(self, allocation: Allocation) -> LiveTensor:
        """Category, name and origin of one allocation."""
        size, address = allocation.requested_bytes, allocation.address
        if allocation.born < 0:
            category, name, _ = self.known.get(address, ("unexplained", "", None))
            if address in self.recording.library_addresses:
                category = "library workspaces"
            return LiveTensor(bytes=size, category=category, name=name)
        buffer, lines = self._origin(allocation)
        phase = self.recording.span_of(allocation.born)
        backward = [span.name for span in self.recording.spans if span.name.startswith("backward")][-1]
        outlives = allocation.alive_at(self.recording.last_event(backward))
        name = self.gradients.get(address, "") if outlives else ""
        category = "gradients" if name else self._category(allocation, buffer, lines, phase)
        made_by = buffer.kernel if buffer else allocation.operator
        return LiveTensor(bytes=size, category=category, name=name, made_by=made_by, lines=lines, phase=phase)

    def _origin(self, allocation: Allocation) -> tuple[Buffer | None, tuple[str, ...]]:
        """The buffer, if generated code allocated it, and this package's lines in the innermost frame."""
        for frame in allocation.frames:
            wrapper = self.wrappers.get(PurePath(frame.file).name)
            if wrapper is not None and not frame.inside:
                buffer = wrapper.buffer(frame.line)
                return buffer, buffer.lines if buffer else ()
            if match := OURS.search(frame.file):
                inside = f".. {frame.inside}()" if frame.inside else ""
                return None, (f"{match[1]}:{frame.line}{inside}",)
        return None, ()

    def _category(self, allocation: Allocation, buffer: Buffer | None, lines: tuple[str, ...], phase: str) -> str:
        if self._is_cast(allocation, buffer):
            return "weight casts"
        if self._is_loss(allocation, buffer, lines):
            return "logits and loss"
        if phase.startswith("forward") and allocation.alive_at(self.recording.last_event(phase)):
            return "activations"
        return "unexplained" if allocation.freed is None else "temporaries"

    def _is_cast(self, allocation: Allocation, buffer: Buffer | None) -> bool:
        if buffer is None or buffer.sizes is None:
            source = self.known.get(allocation.copied_from or 0)
            return source is not None and source[0] == "parameters"
        shape, plan = self.candidate.shape, self.candidate.plan
        matrices = [t for kind, _, t in self.known.values() if kind == "parameters" and t.dim() == 2]
        weights = {tuple(sorted(weight.shape)) for weight in matrices}
        sizes = tuple(sorted(buffer.sizes))
        ambiguous = plan.micro_batch_size * shape.block_size in sizes  # (tokens, width) may be a weight's sizes
        read = {tuple(sorted(reads)) for reads in buffer.reads}
        return buffer.dtype in ("bfloat16", "float16") and sizes in weights & read and not ambiguous

    def _is_loss(self, allocation: Allocation, buffer: Buffer | None, lines: tuple[str, ...]) -> bool:
        path = registry.find("loss", self.candidate.plan.loss).path.partition(":")[0]
        loss_file = f"autotune/kernels/{path}.py"
        if any(frame.file.endswith(loss_file) for frame in allocation.frames):
            return True
        if lines and all(line.startswith(loss_file) for line in lines):
            return True
        shape, plan = self.candidate.shape, self.candidate.plan
        logits = plan.micro_batch_size * shape.block_size * shape.vocab_size
        return buffer is not None and buffer.sizes is not None and prod(buffer.sizes) == logits


def explain(explainer: Explainer, steady: MemoryView) -> MemoryProfile:
    """The profile: all allocations by category, over time and at the peak."""
    recording = explainer.recording
    measured = recording.peak_bytes or steady.allocated_bytes
    assert measured is not None
    described = [(allocation, explainer.describe(allocation)) for allocation in recording.allocations]
    timeline = _timeline(described, len(recording.seconds))
    totals = [sum(column) for column in zip(*timeline.values(), strict=True)]
    peak = max(range(len(totals)), key=totals.__getitem__)
    held = {category: counts[peak] for category, counts in timeline.items()}
    held["unexplained"] += measured - totals[peak]
    live = [tensor for allocation, tensor in described if allocation.alive_at(peak - 1)]
    return MemoryProfile(
        measured_peak_bytes=measured,
        peak_bytes=held,
        peak_phase=recording.span_of(peak - 1) or "between the phases",
        peak_seconds=recording.seconds[peak - 1],
        device_bytes=steady.device_bytes,
        live=tuple(sorted(live, key=lambda tensor: -tensor.bytes)),
        spans=recording.spans,
        seconds=(0.0, *recording.seconds),
        timeline=timeline,
        snapshot=SNAPSHOT if steady.reserved_bytes is not None else "",
    )


def _timeline(described: list[tuple[Allocation, LiveTensor]], events: int) -> dict[str, tuple[int, ...]]:
    """Bytes by category, (events + 1,): before the step and after each event."""
    changes = {category: [0] * (events + 1) for category in CATEGORIES}
    for allocation, tensor in described:
        rounding = allocation.bytes - allocation.requested_bytes
        for category, count in ((tensor.category, tensor.bytes), ("allocator rounding", rounding)):
            changes[category][allocation.born + 1] += count
            if allocation.freed is not None:
                changes[category][allocation.freed + 1] -= count
    return {category: tuple(accumulate(counts)) for category, counts in changes.items()}


if __name__ == "__main__":
    sys.exit(main(profile, TrialRequest))

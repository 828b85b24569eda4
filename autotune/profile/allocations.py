"""All allocations of a function call, with the operators and the Python lines that made them.

Both devices use torch's profiler, which records each block that the CPU allocator or CUDA's caching allocator allocates
or frees. On CUDA the allocator's own history (drawn by pytorch.org/memory_viz) adds requested sizes and exact stacks.
"""

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from autotune.measure.types import Span

_MARK = "autotune::step::"
"""Prefix of the parts of a step, as named by `autotune.model.step`."""
_COPIES = ("aten::_to_copy", "aten::to")
_ENGINE = "autograd::engine::evaluate_function"


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One Python frame of a stack."""

    file: str
    line: int
    inside: str = ""
    """Function that begins at `line`, if the line itself is unknown: the profiler records calls, and `a + b` is not
    one."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """One block from its allocation until its release."""

    address: int
    bytes: int
    """Size by the allocator's count."""
    requested_bytes: int
    """Requested size; less than `bytes` where CUDA's allocator rounds up."""
    born: int = -1
    """Event of the allocation; -1: allocated before the recording."""
    freed: int | None = None
    """Event of the release; None: not released."""
    operator: str = ""
    """Outermost torch operator around the allocation: the one that the code called."""
    frames: tuple[Frame, ...] = ()
    """Stack, innermost first. For a backward operator, the stack of its forward operator."""
    copied_from: int | None = None
    """Address of the tensor that was converted into this one."""

    def alive_at(self, event: int) -> bool:
        """Whether the block is allocated right after event `event`."""
        return self.born <= event and (self.freed is None or event < self.freed)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """All allocations of a function call, including those that existed before it."""

    allocations: tuple[Allocation, ...]
    seconds: tuple[float, ...]
    """Time of each event (an allocation or a release) since the start."""
    spans: tuple[Span, ...]
    peak_bytes: int | None = None
    """Peak by CUDA's allocator. Equal steps may differ, depending on whether a block had to be split."""
    library_addresses: frozenset[int] = frozenset()
    """Workspaces of CUDA's libraries."""

    def span_of(self, event: int) -> str:
        """Name of the span that contains event `event`; empty between spans."""
        now = self.seconds[event]
        return next((span.name for span in self.spans if span.begin_seconds <= now < span.end_seconds), "")

    def last_event(self, span: str) -> int:
        """Last event in the span of that name, or before it."""
        end = next(one.end_seconds for one in self.spans if one.name == span)
        return bisect_left(self.seconds, end) - 1


def record(work: Callable[[], object], device: torch.device, before: list[Allocation], snapshot: Path) -> Recording:
    """Run `work` and return its allocations on `device`.

    before: tensors that exist already; on CUDA the allocator's own list replaces it.
    snapshot: file for the history of CUDA's allocator, a pickle for pytorch.org/memory_viz.
    """
    cuda = device.type == "cuda"
    peak, libraries = None, frozenset[int]()
    if cuda:
        torch.cuda.synchronize(device)
        before = _active_blocks(device)
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.memory._record_memory_history(stacks="python")
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, with_stack=True, record_shapes=True
    ) as recorded:
        work()
    assert recorded.profiler is not None
    kineto: Any = recorded.profiler.kineto_results
    events = list(_in_order(kineto.experimental_event_tree()))
    memory = [e for e in events if e.tag == _EventType.Allocation and e.extra_fields.device.type == device.type]
    memory.sort(key=lambda event: int(event.start_time_ns))
    allocations = _paired(memory, _forward_operators(events))
    marks = [e for e in events if e.tag == _EventType.TorchOp and e.name.startswith(_MARK)]
    start = min(event.start_time_ns for event in (memory[0], marks[0]))
    if cuda:
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.memory._dump_snapshot(str(snapshot))  # type: ignore[no-untyped-call]
        history = torch.cuda.memory._snapshot()["device_traces"][device.index or 0]
        torch.cuda.memory._record_memory_history(enabled=None)
        allocations = _with_history(allocations, history)
        libraries = _library_addresses(device)
    return Recording(
        allocations=(*before, *allocations),
        seconds=tuple((event.start_time_ns - start) / 1e9 for event in memory),
        spans=_spans(marks, start),
        peak_bytes=peak,
        library_addresses=libraries,
    )


def _in_order(roots: list[Any]) -> Iterator[Any]:
    """All events below `roots` in depth-first order, each before the events that it contains."""
    waiting = list(reversed(roots))
    while waiting:
        event = waiting.pop()
        yield event
        waiting.extend(reversed(event.children))


def _paired(events: list[Any], forwards: dict[int, Any]) -> list[Allocation]:
    """Allocations with their releases, from memory events in chronological order."""
    allocations: list[Allocation] = []
    released: dict[int, int] = {}  # address -> index of the next release
    for index, event in reversed(list(enumerate(events))):
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0:
            allocations.append(_allocation(event, index, released.pop(address, None), forwards))
        else:
            released[address] = index
    return allocations[::-1]


def _allocation(event: Any, born: int, freed: int | None, forwards: dict[int, Any]) -> Allocation:
    operator, copied_from = "", None
    frames: list[Frame] = []
    for outer in _ancestors(event, forwards):
        if outer.tag == _EventType.TorchOp:
            if "::" in outer.name and not outer.name.startswith(("autograd::", _MARK)):
                operator = outer.name
            if outer.name in _COPIES and hasattr(outer.extra_fields.inputs[0], "storage_data_ptr"):
                copied_from = outer.extra_fields.inputs[0].storage_data_ptr
        elif outer.tag in (_EventType.PyCall, _EventType.PyCCall):
            if not frames and outer.tag == _EventType.PyCall:
                inside = outer.extra_fields.callsite
                frames.append(Frame(file=inside.file_name, line=inside.line_number, inside=inside.function_name))
            caller = outer.extra_fields.caller
            frames.append(Frame(file=caller.file_name, line=caller.line_number))
    return Allocation(
        address=event.extra_fields.ptr,
        bytes=event.extra_fields.alloc_size,
        requested_bytes=event.extra_fields.alloc_size,
        born=born,
        freed=freed,
        operator=operator,
        frames=tuple(frames),
        copied_from=copied_from,
    )


def _ancestors(event: Any, forwards: dict[int, Any]) -> Iterator[Any]:
    """Events that contain `event`, innermost first. From a node of the backward it continues with the forward operator
    that created the node, whose Python lines say more than the call of `backward`."""
    outer = event.parent
    while outer is not None:
        yield outer
        if outer.tag == _EventType.TorchOp and outer.name.startswith(_ENGINE):
            outer = forwards.get(outer.extra_fields.sequence_number, outer.parent)
        else:
            outer = outer.parent


def _forward_operators(events: list[Any]) -> dict[int, Any]:
    """Sequence number of a backward node -> the forward operator that created it.

    An operator's sequence number counts the nodes created before it, so the creator of node n is the last operator to
    start at count n. The evaluation of a node has its number too and is left out.
    """
    creators = {}
    for event in events:
        if event.tag != _EventType.TorchOp or event.extra_fields.sequence_number < 0:
            continue
        number, outer = event.extra_fields.sequence_number, event.parent
        evaluating = event.name.startswith(_ENGINE) or (
            outer is not None
            and outer.tag == _EventType.TorchOp
            and outer.name.startswith(_ENGINE)
            and outer.extra_fields.sequence_number == number
        )
        if not evaluating:
            creators[number] = event
    return creators


def _spans(marks: list[Any], start: int) -> tuple[Span, ...]:
    """The parts of the step, numbered by micro step: `forward 2`."""
    counts: dict[str, int] = defaultdict(int)
    spans = []
    for event in marks:
        kind = event.name.removeprefix(_MARK)
        counts[kind] += 1
        begin, end = ((time - start) / 1e9 for time in (event.start_time_ns, event.end_time_ns))
        name = kind if kind == "optimizer" else f"{kind} {counts[kind]}"
        spans.append(Span(name=name, begin_seconds=begin, end_seconds=end))
    return tuple(spans)


def _active_blocks(device: torch.device) -> list[Allocation]:
    """Blocks that CUDA's allocator has in use now."""
    return [
        Allocation(address=block["address"], bytes=block["size"], requested_bytes=block["requested_size"])
        for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        if segment["device"] == (device.index or 0)
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    ]


def _with_history(allocations: list[Allocation], history: list[dict[str, Any]]) -> list[Allocation]:
    """`allocations` with requested sizes and exact stacks. Both records are complete and in order, so the n-th
    allocation at an address is the same one in both."""
    entries: dict[int, deque[dict[str, Any]]] = defaultdict(deque)
    for entry in history:
        if entry["action"] == "alloc":
            entries[entry["addr"]].append(entry)
    joined = []
    for allocation in allocations:
        if queue := entries.get(allocation.address):
            entry = queue.popleft()
            frames = [Frame(file=f["filename"], line=f["line"]) for f in entry.get("frames", [])]
            allocation = replace(allocation, requested_bytes=entry["size"], frames=tuple(frames) or allocation.frames)
        joined.append(allocation)
    return joined


def _library_addresses(device: torch.device) -> frozenset[int]:
    """Workspaces of cuBLAS: the blocks that disappear when torch clears them."""
    held = {block.address for block in _active_blocks(device)}
    torch._C._cuda_clearCublasWorkspaces()
    return frozenset(held - {block.address for block in _active_blocks(device)})

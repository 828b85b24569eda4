"""Every allocation of a piece of work, with the operators and the Python lines that made it.

One recorder for both devices: torch's profiler, which hears of each block that the CPU allocator and CUDA's
caching allocator hand out or take back. On CUDA the allocator's own history (pytorch.org/memory_viz draws it)
adds what was asked for before rounding and the exact stack of every allocation.
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
"""Begins the names that `autotune.model.step` gives to the parts of a step."""
_COPIES = ("aten::_to_copy", "aten::to")
_ENGINE = "autograd::engine::evaluate_function"


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One Python frame of a stack."""

    file: str
    line: int
    inside: str = ""
    """Name of the function that begins at `line`, where no more is known: the profiler sees calls, and `a + b` is
    none."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """One block from the time it was handed out until it was given back."""

    address: int
    bytes: int
    """By the allocator's count."""
    requested_bytes: int
    """What was asked for; less than `bytes` where CUDA's allocator rounds up."""
    born: int = -1
    """Index of its event; -1: it was there before."""
    freed: int | None = None
    """Index of its event; None: it was there after."""
    operator: str = ""
    """The outermost one of torch around it: what the code called."""
    frames: tuple[Frame, ...] = ()
    """Innermost first. For a backward operator: those of the forward operator that it belongs to."""
    copied_from: int | None = None
    """Address of the tensor that was converted into this one."""

    def alive_at(self, event: int) -> bool:
        """Whether the block is held right after event `event`."""
        return self.born <= event and (self.freed is None or event < self.freed)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """All allocations of a piece of work, those that were there before included."""

    allocations: tuple[Allocation, ...]
    seconds: tuple[float, ...]
    """Of the events, since the start: each one an allocation or a release."""
    spans: tuple[Span, ...]
    peak_bytes: int | None = None
    """CUDA's allocator's own count of its peak. It may differ from another step's: a block need not be split."""
    library_addresses: frozenset[int] = frozenset()
    """Blocks that CUDA's libraries keep as their workspace."""

    def span_of(self, event: int) -> str:
        """Name of the span in which event `event` lies; empty between them."""
        now = self.seconds[event]
        return next((span.name for span in self.spans if span.begin_seconds <= now < span.end_seconds), "")

    def last_event(self, span: str) -> int:
        """The last one in the span of that name, or before it."""
        end = next(one.end_seconds for one in self.spans if one.name == span)
        return bisect_left(self.seconds, end) - 1


def record(work: Callable[[], object], device: torch.device, before: list[Allocation], snapshot: Path) -> Recording:
    """Run `work` and tell its allocations on `device`. `before`: the tensors that exist (CUDA knows by itself).

    On CUDA the allocator's history goes to the file `snapshot` (a pickle that pytorch.org/memory_viz opens).
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
    heard = [e for e in events if e.tag == _EventType.Allocation and e.extra_fields.device.type == device.type]
    heard.sort(key=lambda event: int(event.start_time_ns))
    made = _paired(heard, _forward_operators(events))
    marks = [e for e in events if e.tag == _EventType.TorchOp and e.name.startswith(_MARK)]
    start = min(event.start_time_ns for event in (heard[0], marks[0]))
    if cuda:
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.memory._dump_snapshot(str(snapshot))  # type: ignore[no-untyped-call]
        history = torch.cuda.memory._snapshot()["device_traces"][device.index or 0]
        torch.cuda.memory._record_memory_history(enabled=None)
        made = _with_history(made, history)
        libraries = _library_addresses(device)
    return Recording(
        allocations=(*before, *made),
        seconds=tuple((event.start_time_ns - start) / 1e9 for event in heard),
        spans=_spans(marks, start),
        peak_bytes=peak,
        library_addresses=libraries,
    )


def _in_order(roots: list[Any]) -> Iterator[Any]:
    """All events below `roots`, each before those that it contains."""
    waiting = list(reversed(roots))
    while waiting:
        event = waiting.pop()
        yield event
        waiting.extend(reversed(event.children))


def _paired(heard: list[Any], forwards: dict[int, Any]) -> list[Allocation]:
    """Allocations with their releases."""
    found: list[Allocation] = []
    released: dict[int, int] = {}  # address -> index of the next release
    for index, event in reversed(list(enumerate(heard))):
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0:
            found.append(_allocation(event, index, released.pop(address, None), forwards))
        else:
            released[address] = index
    return found[::-1]


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
    """What the event happened inside of, innermost first. From a node of the backward it goes on to the
    forward operator that made the node, whose Python lines say more than the call of `backward`."""
    outer = event.parent
    while outer is not None:
        yield outer
        if outer.tag == _EventType.TorchOp and outer.name.startswith(_ENGINE):
            outer = forwards.get(outer.extra_fields.sequence_number, outer.parent)
        else:
            outer = outer.parent


def _forward_operators(events: list[Any]) -> dict[int, Any]:
    """Sequence number of a backward node -> the operator that made it.

    An operator carries the count of nodes made before it; so the one that makes node n is the last to start
    at count n. A node's own evaluation carries its number too, and is left out.
    """
    found = {}
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
            found[number] = event
    return found


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
    """What CUDA's allocator has handed out at this moment."""
    return [
        Allocation(address=block["address"], bytes=block["size"], requested_bytes=block["requested_size"])
        for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        if segment["device"] == (device.index or 0)
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    ]


def _with_history(made: list[Allocation], history: list[dict[str, Any]]) -> list[Allocation]:
    """Requested sizes and exact stacks. Both records are complete and in order, so the n-th allocation at an
    address is the same one in both."""
    entries: dict[int, deque[dict[str, Any]]] = defaultdict(deque)
    for entry in history:
        if entry["action"] == "alloc":
            entries[entry["addr"]].append(entry)
    joined = []
    for allocation in made:
        if queue := entries.get(allocation.address):
            entry = queue.popleft()
            frames = [Frame(file=f["filename"], line=f["line"]) for f in entry.get("frames", [])]
            allocation = replace(allocation, requested_bytes=entry["size"], frames=tuple(frames) or allocation.frames)
        joined.append(allocation)
    return joined


def _library_addresses(device: torch.device) -> frozenset[int]:
    """Workspaces of cuBLAS: the blocks that are gone once torch drops them."""
    held = {block.address for block in _active_blocks(device)}
    torch._C._cuda_clearCublasWorkspaces()
    return frozenset(held - {block.address for block in _active_blocks(device)})

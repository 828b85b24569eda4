"""Maps lines of Inductor's generated code to the lines of this package that they compute.

Inductor generates a wrapper `call` that allocates buffers and runs kernels, with a provenance handle in a comment above
each run. An artifact of torch's structured trace lists the lines fused into each kernel:
https://docs.pytorch.org/docs/stable/torch.compiler_inductor_provenance.html (torch 2.9 and later).
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch._functorch.config
import torch._inductor.config

OURS = re.compile(r"(?:^|/)(autotune/(?:model|kernels)/\w+\.py)$")
"""Files whose lines are reported: the model, its step, and the kernels."""
_STACK_LINE = re.compile(r'File "([^"]+)", line (\d+), in ')
_BUFFER = re.compile(r"\s*(\w+) = empty_strided_\w+\(\(([\d, ]*)\), \([\d, ]*\), torch\.(\w+)")
_INPUTS = re.compile(r"\s*assert_size_stride(?:_grouped)?\(\(?([\w, ]+)\)?, (\(.*)")
_REUSE = re.compile(r"\s*(\w+) = (?:reinterpret_tensor\()?(\w+)\b.*# reuse")
_HANDLE = re.compile(r"\s*# \[Provenance debug handles\] (\S+:\d+)")
_CALL = re.compile(r"\s*(?:\w+ = )?([\w.]+)\(")
_IDLE = ("del ", "assert_", "#", "return")

Sizes = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """A buffer of generated code."""

    kernel: str
    """First kernel that writes it."""
    lines: tuple[str, ...]
    """Lines of this package that were fused into the kernel; empty if unknown."""
    sizes: Sizes | None = None
    """None if an operator allocated it."""
    dtype: str = ""
    reads: frozenset[Sizes] = frozenset()
    """Sizes of the graph's inputs that the kernel reads."""


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """One file of generated code."""

    text: tuple[str, ...]
    """Lines of the file."""
    inputs: Mapping[str, Sizes]
    """Sizes of the graph's inputs by name."""
    traces: Mapping[str, list[str]]
    """`kernel:handle` -> stack traces of the operators fused into the kernel."""

    def buffer(self, number: int) -> Buffer | None:
        """Buffer allocated in line `number`; None if no kernel uses it."""
        declared = _BUFFER.match(self.text[number - 1])
        run = number if declared is None else self._first_run(number, declared[1])
        if run is None:
            return None
        call, handle = self.text[run - 1], self._handle_above(run)
        called = _CALL.match(call)
        kernel = handle.rpartition(":")[0] or (called[1] if called else "")
        lines = filter(None, map(our_line, self.traces.get(handle, [])))
        return Buffer(
            kernel=kernel.removesuffix(".run"),
            lines=tuple(dict.fromkeys(lines)),
            sizes=_sizes(declared[2]) if declared else None,
            dtype=declared[3] if declared else "",
            reads=frozenset(self.inputs[word] for word in re.findall(r"\w+", call) if word in self.inputs),
        )

    def _first_run(self, number: int, name: str) -> int | None:
        """Number of the first line after `number` that computes with the buffer, following its renames."""
        for index in range(number, len(self.text)):
            line = self.text[index]
            if (reused := _REUSE.match(line)) and reused[2] == name:
                name = reused[1]
            elif re.search(rf"\b{name}\b", line) and not line.lstrip().startswith(_IDLE):
                return index + 1
        return None

    def _handle_above(self, number: int) -> str:
        for line in reversed(self.text[max(0, number - 4) : number - 1]):
            if match := _HANDLE.match(line):
                return match[1]
            if not line.lstrip().startswith("#") and "get_raw_stream" not in line:
                break
        return ""


@contextmanager
def listen() -> Iterator[dict[str, Wrapper]]:
    """Record the provenance of kernels compiled inside the block. At its end, the yielded mapping holds all wrappers by
    file name (a hash of the text).

    Graphs are lowered again, not read from the cache: a cached graph names the lines of an older source. The kernels
    still come from the cache.
    """
    wrappers: dict[str, Wrapper] = {}
    logger, listener = logging.getLogger("torch.__trace"), _Listener()
    logger.addHandler(listener)
    try:
        with (
            torch._inductor.config.patch({"trace.provenance_tracking_level": 1, "fx_graph_cache": False}),
            torch._functorch.config.patch(enable_autograd_cache=False),
        ):
            yield wrappers
    finally:
        logger.removeHandler(listener)
    for path, traces in listener.found.items():
        text = tuple(path.read_text().splitlines())
        wrappers[path.name] = Wrapper(text=text, inputs=_inputs(text), traces=traces)


class _Listener(logging.Handler):
    """Collects two artifacts of the structured trace: the path of a wrapper, then the stacks of its kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Path, dict[str, list[str]]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        metadata = getattr(record, "metadata", {})
        if "inductor_output_code" in metadata:
            self.found[Path(metadata["inductor_output_code"]["filename"])] = {}
        elif metadata.get("artifact", {}).get("name") == "inductor_provenance_tracking_kernel_stack_traces":
            self.found[next(reversed(self.found))] = json.loads(getattr(record, "payload", None) or "{}")


def our_line(trace: str) -> str | None:
    """The innermost line of this package in a formatted stack trace: `autotune/model/gpt.py:62`."""
    ours = [f"{match[1]}:{line}" for path, line in _STACK_LINE.findall(trace) if (match := OURS.search(path))]
    return ours[-1] if ours else None


def _inputs(text: Iterable[str]) -> dict[str, Sizes]:
    """Sizes of a graph's inputs by name, from the assertions: one for each input, or (torch 2.14 and later) one for
    several, `assert_size_stride_grouped((a, b), ((4, 8), (8, )), ((8, 1), (1, )), 'input')`."""
    return {
        name: _sizes(size)
        for asserted in filter(None, map(_INPUTS.match, text))
        for name, size in zip(asserted[1].split(", "), re.findall(r"\(([^()]*)\)", asserted[2]), strict=False)
    }


def _sizes(text: str) -> Sizes:
    return tuple(int(size) for size in re.findall(r"\d+", text))

"""All implementations of attention and loss, and their requirements. Imports no torch."""

import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Operation = Literal["attention", "loss"]
HALF = ("bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One implementation."""

    operation: Operation
    name: str
    """Name in a plan."""
    path: str
    """`module:function`, relative to this package."""
    summary: str
    dtypes: tuple[str, ...] = ("float32", *HALF)
    capability: tuple[int, int] | None = None
    """Smallest CUDA compute capability; None: runs on the CPU too."""
    torch: tuple[int, int] = (2, 11)
    """Smallest version."""
    package: str = ""
    """Optional module that must be installed."""
    package_version: tuple[int, int] = (0, 0)
    """Smallest version."""
    package_source: str = ""
    """What pip installs it from; empty: the package index has it under the module's name."""
    compiled_only: bool = False
    """Runs in compiled graphs only, not with plan.compile = off."""
    dropout: bool = True
    """Attention: supports dropout."""
    head_multiple: int = 1
    """Attention: head sizes must be a multiple of it."""
    largest_head: int = 1 << 16
    chunked: bool = False
    """Loss: reads the plan's `loss_chunk_tokens`."""
    runs: str = ""
    """Part of the name of an operator that runs whenever this kernel does, compiled or not; empty: none."""
    searched: tuple[str, ...] = ("cpu", "cuda")
    """Devices on which searches try it; left out where another row was better in speed and memory (`scripts/bench -k
    kernels`). A plan may name it on any device."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Properties that kernels are checked against; made by `machine`."""

    device: str
    """`cpu` or `cuda`."""
    torch: tuple[int, int]
    capability: tuple[int, int] = (0, 0)


def device_kind(device: str) -> str:
    """`cuda:0` -> `cuda`."""
    return device.partition(":")[0]


def machine(device: str, capability: Sequence[int], torch: str) -> Machine:
    """From a device (`cuda:0`), its compute capability (empty on the CPU) and torch's version string."""
    major, minor = (*capability, 0, 0)[:2]
    return Machine(device=device_kind(device), torch=_release(torch), capability=(major, minor))


def _release(version: str) -> tuple[int, int]:
    """`2.13.0+cpu` -> (2, 13)."""
    found = re.match(r"(\d+)\.(\d+)", version)
    assert found, version
    return int(found[1]), int(found[2])


KERNELS = (
    Kernel(
        operation="attention",
        name="sdpa",
        path="attention_sdpa:automatic",
        summary="torch's scaled_dot_product_attention, backend chosen by torch",
    ),
    Kernel(
        operation="attention",
        name="sdpa_flash",
        path="attention_sdpa:flash",
        summary="FlashAttention 2 through torch",
        runs="_scaled_dot_product_flash_attention",
        dtypes=HALF,
        capability=(8, 0),
        head_multiple=8,
        largest_head=256,
    ),
    Kernel(
        operation="attention",
        name="sdpa_cudnn",
        path="attention_sdpa:cudnn",
        summary="cuDNN's fused attention through torch",
        runs="_scaled_dot_product_cudnn_attention",
        dtypes=HALF,
        capability=(8, 0),
        head_multiple=8,
        largest_head=128,
    ),
    Kernel(
        operation="attention",
        name="sdpa_efficient",
        path="attention_sdpa:efficient",
        summary="memory-efficient attention through torch",
        runs="_scaled_dot_product_efficient_attention",
        capability=(5, 0),
        head_multiple=8,
    ),
    Kernel(
        operation="attention",
        name="sdpa_math",
        path="attention_sdpa:math",
        summary="plain matrix products; holds the (T, T) scores",
    ),
    Kernel(
        operation="attention",
        name="flex",
        path="attention_flex:causal",
        summary="torch's FlexAttention with a causal block mask; its backward exists on CUDA only",
        capability=(8, 0),
        compiled_only=True,  # otherwise unfused, with all scores in float32
        dropout=False,
        head_multiple=16,
        largest_head=256,
    ),
    Kernel(
        operation="loss",
        name="full",
        path="loss_full:cross_entropy",
        summary="all logits at once, as nanoGPT does",
    ),
    Kernel(
        operation="loss",
        name="chunked",
        path="loss_chunked:cross_entropy",
        summary="logits chunk by chunk, gradients computed in the forward",
        runs="autotune::chunked_cross_entropy",
        chunked=True,
    ),
    Kernel(
        operation="loss",
        name="chunked_triton",
        path="loss_chunked_triton:cross_entropy",
        summary="chunked, with softmax, loss and gradient in one Triton kernel",
        runs="autotune::chunked_cross_entropy",
        capability=(7, 0),
        package="triton",
        chunked=True,
    ),
    Kernel(
        operation="loss",
        name="torch_linear_cross_entropy",
        path="loss_torch_linear:cross_entropy",
        summary="torch's chunked linear_cross_entropy; its training loss is rounded to the plan's dtype",
        runs="_linear_cross_entropy",
        torch=(2, 13),
        chunked=True,
        searched=("cuda",),
    ),
    Kernel(
        operation="loss",
        name="auto_chunker",
        path="loss_auto_chunker:cross_entropy",
        summary="full logits, chunked by Inductor; evaluation is not",
        compiled_only=True,
        chunked=True,
        searched=("cuda",),
    ),
    Kernel(
        operation="loss",
        name="liger",
        path="loss_liger:cross_entropy",
        summary="Liger's fused linear cross entropy, its own chunk size",
        capability=(7, 0),
        package="liger_kernel",
    ),
    Kernel(
        operation="loss",
        name="cce",
        path="loss_cce:cross_entropy",
        summary="Apple's cut cross entropy (cce_kahan_full_c): no logits in memory",
        dtypes=HALF,
        capability=(8, 0),
        package="cut_cross_entropy",
        package_version=(25, 4),  # the first with cce_kahan_full_c; PyPI has 25.1
        package_source="git+https://github.com/apple/ml-cross-entropy",
    ),
)


_BY_NAME: dict[Operation, dict[str, Kernel]] = {
    operation: {kernel.name: kernel for kernel in KERNELS if kernel.operation == operation}
    for operation in get_args(Operation)
}


def kernels(operation: Operation) -> tuple[Kernel, ...]:
    """All rows of one operation, the default first."""
    return tuple(_BY_NAME[operation].values())


def names(operation: Operation) -> tuple[str, ...]:
    """Names that a plan may use for one operation."""
    return tuple(_BY_NAME[operation])


def find(operation: Operation, name: str) -> Kernel:
    """The row called `name`, which must be one of `names(operation)`."""
    return _BY_NAME[operation][name]


def why_unavailable(
    kernel: Kernel,
    machine: Machine,
    *,
    dtype: str | None = None,
    compile: str | None = None,
    head_size: int | None = None,
    dropout: float = 0.0,
) -> str | None:
    """The reason why `machine` cannot run `kernel` with these options, or None if it can."""
    if kernel.capability and machine.device == "cpu":
        return "needs cuda, this is cpu"
    if kernel.capability and machine.capability < kernel.capability:
        return f"needs compute capability {_dotted(kernel.capability)}, this card has {_dotted(machine.capability)}"
    if machine.torch < kernel.torch:
        return f"needs torch {_dotted(kernel.torch)}, this is {_dotted(machine.torch)}"
    if reason := _why_not_installed(kernel):
        return reason
    if dtype is not None and dtype not in kernel.dtypes:
        return f"needs {' or '.join(kernel.dtypes)}, the plan says {dtype}"
    if compile == "off" and kernel.compiled_only:
        return "needs compile = full or block, the plan says off"
    if head_size is not None and (head_size % kernel.head_multiple or head_size > kernel.largest_head):
        return f"needs a head size in steps of {kernel.head_multiple} up to {kernel.largest_head}, this is {head_size}"
    if dropout and not kernel.dropout:
        return f"needs dropout 0, the model has {dropout}"
    return None


def _why_not_installed(kernel: Kernel) -> str | None:
    if not kernel.package:
        return None
    name = kernel.package.replace("_", "-")  # as pip writes it
    remedy = f"pip install {kernel.package_source or name}"
    if importlib.util.find_spec(kernel.package) is None:
        return f"needs the package {name}, which is not installed: {remedy}"
    if kernel.package_version > (0, 0):
        found = _release(importlib.metadata.version(name))
        if found < kernel.package_version:
            return f"needs {name} {_dotted(kernel.package_version)}, installed is {_dotted(found)}: {remedy}"
    return None


def _dotted(pair: tuple[int, int]) -> str:
    return ".".join(map(str, pair))


def load(kernel: Kernel) -> Callable[..., Any]:
    """Import the implementation."""
    module, _, function = kernel.path.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(f"{__package__}.{module}"), function)
    return loaded

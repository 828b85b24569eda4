"""Did a step do what its plan names? Decided by the operators that ran, not by settings.

An environment variable can turn compilation off, select another allocator or round float32 products, without a message
from torch.
"""

import os
from collections.abc import Iterator, Mapping

import torch

from autotune.config.candidate import Plan
from autotune.environment import EXPANDABLE, computes, steering_variables
from autotune.errors import UnsupportedError
from autotune.kernels import registry

_GRAPH = "## Call CompiledFxGraph"
"""Profiler event of each call of an Inductor graph."""
_NORM = "aten::native_layer_norm"
"""Inductor generates its own LayerNorm, so this operator ran outside of its graphs."""
_MICRO_STEP = "autotune::step::forward"
_AGAINST_COMPILING = (
    "TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE", "TORCH_COMPILE_OVERRIDE_BACKENDS",
    "TORCH_COMPILE_OVERRIDE_DYNAMO_CONFIGS", "TORCH_COMPILE_OVERRIDE_INDUCTOR_CONFIGS",
)  # fmt: skip
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""torch reads the first of these that is set."""


def check_ran(plan: Plan, ran: Mapping[str, int], device: torch.device) -> None:
    """Raise UnsupportedError, naming the variable at fault, if a step of `plan` did something else.

    ran: calls by operator in a warm step."""
    for reason in (*_compiled(plan, ran), *_kernels(plan, ran), *_precision(plan, device), *_allocator(plan, device)):
        raise UnsupportedError(reason)


def _compiled(plan: Plan, ran: Mapping[str, int]) -> Iterator[str]:
    if plan.compile == "off":
        return
    graphs = sum(count for name, count in ran.items() if name.startswith(_GRAPH))
    # with compile = block, the last norm of each forward is outside of the blocks
    outside = ran.get(_NORM, 0) - (ran.get(_MICRO_STEP, 0) if plan.compile == "block" else 0)
    if not graphs or outside > 0:
        what = "Inductor compiled nothing" if not graphs else "a part of the model ran uncompiled"
        yield f"plan.compile = {plan.compile!r}, but {what}; {_remedy(_AGAINST_COMPILING)}"


def _kernels(plan: Plan, ran: Mapping[str, int]) -> Iterator[str]:
    chosen: dict[registry.Operation, str] = {"attention": plan.attention, "loss": plan.loss}
    for operation, name in chosen.items():
        rows, planned = registry.kernels(operation), registry.find(operation, name)
        if planned.runs and not _seen(planned.runs, ran):
            yield f"plan.{operation} = {name!r}, but {planned.runs} did not run; {_remedy()}"
        for other in rows:
            if name != "sdpa" and other.runs not in ("", planned.runs) and _seen(other.runs, ran):  # sdpa may be any
                yield f"plan.{operation} = {name!r}, but {other.runs} ran; {_remedy()}"


def _seen(part: str, ran: Mapping[str, int]) -> bool:
    return any(part in name for name in ran)


def _precision(plan: Plan, device: torch.device) -> Iterator[str]:
    """Whether products are exact: float32 represents 1 + 2^-12, faster formats round it to 1."""
    if plan.dtype == "float32" and computes(device):
        sums = torch.full((256, 256), 1 + 2**-12, device=device) @ torch.ones(256, 256, device=device)
        if not torch.all(sums == 256.0625):
            names = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE")
            yield f"plan.dtype = 'float32', but matrix products round their factors; {_remedy(names)}"
    if plan.dtype == "tfloat32" and os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        yield "plan.dtype = 'tfloat32', but NVIDIA_TF32_OVERRIDE = 0 forbids it; unset it"


def _allocator(plan: Plan, device: torch.device) -> Iterator[str]:
    if device.type != "cuda":
        return
    name = next((name for name in _ALLOCATOR if os.environ.get(name)), None)
    wanted = EXPANDABLE if plan.allocator == "expandable_segments" else None
    if name and os.environ[name] != wanted:
        yield f"plan.allocator = {plan.allocator!r}, but {name} = {os.environ[name][:100]!r} differs; unset it"
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        yield f"plan.allocator = {plan.allocator!r}, but PYTORCH_NO_CUDA_MEMORY_CACHING turns it off; unset it"


def _remedy(suspects: tuple[str, ...] = ()) -> str:
    """Variables to unset: the suspects that are set, else all of torch's that are set."""
    present = [name for name, value in steering_variables(os.environ).items() if value not in ("", "0")]
    blamed = [name for name in suspects if name in present] or [name for name in present if name.startswith("TORCH")]
    if blamed:
        return f"unset {' and '.join(blamed)}"
    return "no environment variable explains it, so this version of torch cannot do it here; choose another plan"

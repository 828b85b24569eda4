"""Build a candidate and run its optimizer step: the one step that trials measure and training runs."""

import ctypes
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from autotune.config.candidate import AUTOCAST, Candidate
from autotune.errors import UnsupportedError
from autotune.kernels import registry
from autotune.model.compile_cache import compile_cache_dir, drop_torn_libraries
from autotune.model.distributed import distributed_context
from autotune.model.gpt import GPT
from autotune.model.optim import make_optimizer
from autotune.model.recompute import budget, compile_blocks, run_block
from autotune.model.sharding import DividedOptimizer, divided, local, shard_fully, whole

COMPILING_STEPS = 2
"""Steps until all is compiled. Dynamo guards on autograd's state, which differs between a first call and later ones, so
an operator that compiles a part of itself is compiled twice."""
RECOMPILE_LIMIT = 32
"""Versions of one function (sizes, training or evaluation) that a process may compile; one more is an error."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class TrainStep:
    """A model, its optimizer and the plan for stepping them. Make one with `build`."""

    def __init__(self, candidate: Candidate, model: GPT, device: torch.device) -> None:
        self.candidate, self.model, self.device = candidate, model, device
        self.optimizer = make_optimizer(model, candidate.recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=candidate.plan.dtype == "float16")
        self._forward = _compiled(model, candidate)
        self._parallel: DistributedDataParallel | None = None
        self._divided: DividedOptimizer | None = None

    @contextmanager
    def over_processes(self, processes: int) -> Iterator[None]:
        """Within it, sum gradients over all processes of torch's default group, once per step, and divide what the plan
        says; nothing where there is one. The optimizer is a new one.

        Each process passes its own micro batches to `step`, as many as the others, with shares of one global batch.
        """
        try:
            if processes > 1:
                self._divide()
            yield
        finally:
            if self._parallel:
                # If it were the last to hold the process group, that would end while it holds the interpreter's lock,
                # and wait for a thread of gloo's that wants the lock to free a tensor
                self._parallel = None
                gc.collect()

    def _divide(self) -> None:
        recipe, sharding = self.candidate.recipe, self.candidate.plan.sharding
        if sharding == "full":
            shard_fully(self.model, self.device)
            self.optimizer = make_optimizer(self.model, recipe)
            return
        if not isinstance(self._forward, nn.Module):
            raise UnsupportedError("plan.loss = 'auto_chunker' trains in one process only; use chunked")
        devices = [self.device] if self.device.type == "cuda" else None
        self._parallel = DistributedDataParallel(self._forward, device_ids=devices, gradient_as_bucket_view=True)
        if sharding == "optimizer":
            self._divided = DividedOptimizer(self.model, recipe)
            self.optimizer = self._divided.optimizer

    def micro_step(self, tokens: Tensor, targets: Tensor, share: float, *, last: bool = True) -> Tensor:
        """Forward and backward of one micro batch; gradients accumulate until `optimizer_step`. In the last one before
        it, replicas sum their gradients.

        tokens, targets: (micro_batch_size, T) on the device, targets -1 in padded rows.
        share: counted targets of this micro batch over those of the global batch.
        Returns its share of the global mean loss, on the device and not synchronised.
        """
        if self._parallel:
            self._parallel.require_backward_grad_sync = last
        with _sums_in_order(self.device):
            with record_function("autotune::step::forward"), self._autocast(), budget(self.candidate.plan):
                loss: Tensor = (self._parallel or self._forward)(tokens, targets) * share
            with record_function("autotune::step::backward"):
                # DistributedDataParallel takes the mean over processes, shares need the sum
                summed = loss * torch.distributed.get_world_size() if self._parallel else loss
                self.scaler.scale(summed).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    @record_function("autotune::step::optimizer")
    def optimizer_step(self, lr: float) -> Tensor:
        """Clip, update, clear the gradients. Returns the gradient norm before clipping, on the device."""
        recipe = self.candidate.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        largest = recipe.grad_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), largest)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        return whole(norm)

    def gradients(self, micro_batches: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
        """Forward and backward of (tokens, targets, share) micro batches -> mean loss; with several processes, this
        one's share of it. The weights do not change: after a failure, clear the gradients and repeat it."""
        loss = torch.zeros((), device=self.device)
        for index, (tokens, targets, share) in enumerate(micro_batches):
            loss += self.micro_step(tokens, targets, share, last=index == len(micro_batches) - 1)
        return loss

    def step(self, micro_batches: Sequence[tuple[Tensor, Tensor, float]], lr: float) -> tuple[Tensor, Tensor]:
        """One optimizer step over (tokens, targets, share) micro batches -> mean loss, gradient norm."""
        return self.gradients(micro_batches), self.optimizer_step(lr)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, targets: Tensor, *, compiled: bool = True) -> Tensor:
        """Mean loss of a batch (B, T) without gradients, with the plan's kernels. A forward that is not compiled starts
        at once, but is slower and may take more memory."""
        self.model.eval()
        with self._autocast(), nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
            loss: Tensor = self._forward(tokens, targets)
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # a backward, which does it otherwise, does not follow
        self.model.train()
        return loss

    def state_bytes(self) -> int:
        """Bytes of the existing parameters, gradients and optimizer state of this process."""
        tensors = [t for p in self.model.parameters() for t in (p, p.grad) if t is not None]
        if self._parallel and self.optimizer.state:
            # It keeps the memory of gradients. The second step replaces it, and a profiler that sees that does not
            # see the older memory freed, so until then it is not counted
            tensors = [*self.model.parameters()] * 2
        tensors += [t for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        return sum(local(t).nbytes for t in tensors)

    def weights(self) -> dict[str, Tensor]:
        """The weights by nanoGPT's names, gathered from all processes, which must all call it. Where they are divided,
        only the main one has them then."""
        return self._kept((name, whole(p.detach())) for name, p in self.model.named_parameters())

    def moments(self) -> dict[str, Tensor | int]:
        """The optimizer state as `<weight>.<state>`, likewise."""
        if self._divided:
            return self._kept(self._divided.gathered())
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        return self._kept(
            (f"{names[parameter]}.{key}", whole(value) if torch.is_tensor(value) else value)
            for parameter, held in self.optimizer.state.items()
            for key, value in held.items()
        )

    def _kept(self, tensors: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        """Gathered tensors, out of the device's memory where they are copies."""
        if self.candidate.plan.sharding == "none":
            return dict(tensors)
        main = torch.distributed.get_rank() == 0
        return {name: tensor.cpu() for name, tensor in tensors if main}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy whole weights into the model. Raises RuntimeError if their names or shapes differ."""
        own = dict(self.model.named_parameters())
        self.model.load_state_dict({name: divided(t, own[name]) if name in own else t for name, t in weights.items()})

    def load_moments(self, moments: Mapping[str, Mapping[str, Tensor | int]]) -> None:
        """Load whole optimizer states, by weight and key. load_state_dict puts each optimizer's `step` on the right
        device."""
        own = self._divided.own if self._divided else dict(self.model.named_parameters())
        names: dict[Tensor, str] = {parameter: name for name, parameter in own.items()}
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        states = {
            index: {key: self._part(names[parameter], parameter, value) for key, value in held.items()}
            for index, parameter in enumerate(parameters)
            if (held := moments.get(names[parameter])) is not None
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})

    def _part(self, name: str, parameter: Tensor, value: Tensor | int) -> Tensor | int:
        if not isinstance(value, Tensor):
            return value
        return self._divided.part(name, value) if self._divided else divided(value, parameter)

    def _autocast(self) -> AbstractContextManager[object]:
        name = self.candidate.plan.matrix_dtype
        dtype = getattr(torch, name) if name in AUTOCAST else None
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)


@contextmanager
def _sums_in_order(device: torch.device) -> Iterator[None]:
    """On the CPU, sum gradients in a fixed order, so that a training is reproducible bit for bit.

    In compiled code, several threads would add to the embedding's gradient in arbitrary order. On CUDA determinism
    would cost speed and is not promised.
    """
    if device.type != "cpu":
        yield
        return
    deterministic: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = False  # takes time, and no uninitialised memory is read here
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = before[1]


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step.

    By default it returns the free end of the heap to the system. Depending on the layout of the heap, one process then
    faults thousands of pages in again at each step, and another one with the same plan none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # glibc's own upper bound; larger blocks have a mapping of their own
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def build(candidate: Candidate, device: torch.device) -> TrainStep:
    """Instantiate the candidate on `device`, seeded by the recipe. Raises UnsupportedError, with the reason, if this
    machine cannot run the plan."""
    shape, plan = candidate.shape, candidate.plan
    check_supported(candidate, machine_of(device))
    if device.type == "cpu":
        _keep_freed_memory()
    torch.set_float32_matmul_precision("high" if plan.dtype == "tfloat32" else "highest")
    torch.manual_seed(candidate.recipe.seed)
    with torch.device(device):
        model = GPT(
            shape,
            attention=registry.load(registry.find("attention", plan.attention)),
            loss=registry.load(registry.find("loss", plan.loss)),
            loss_chunk_tokens=plan.loss_chunk_tokens,
            run_block=run_block(plan),
            residual_dtype=torch.bfloat16 if plan.dtype == "bfloat16_residual" else torch.float32,
        )
    return TrainStep(candidate, model, device)


def machine_of(device: torch.device) -> registry.Machine:
    """The machine that kernels are checked against."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else ()
    return registry.machine(device.type, capability, torch.__version__)


def check_supported(candidate: Candidate, machine: registry.Machine) -> None:
    """Raise UnsupportedError, with the reason, if `machine` cannot run `candidate`."""
    for reason in _obstacles(candidate, machine):
        raise UnsupportedError(reason)


def _obstacles(candidate: Candidate, machine: registry.Machine) -> Iterator[str]:
    shape, plan = candidate.shape, candidate.plan
    if machine.device == "cpu" and plan.dtype in ("float16", "tfloat32"):
        yield f"plan.dtype = {plan.dtype!r} needs a CUDA device; use bfloat16 or float32 on the CPU"
    if machine.device == "cuda" and plan.dtype == "tfloat32" and machine.capability < (8, 0):
        found = ".".join(map(str, machine.capability))
        yield f"plan.dtype = 'tfloat32' needs compute capability 8.0, this card has {found}; use float16 or float32"
    if machine.device == "cpu" and plan.allocator != "default":
        yield f"plan.allocator = {plan.allocator!r} needs a CUDA device; use default on the CPU"
    if plan.memory_budget is not None and plan.compile == "off":
        checkpointing = f"plan.activation_checkpointing = {plan.activation_checkpointing!r}"
        yield f"{checkpointing} needs compiled graphs; use plan.compile = full or block, or another checkpointing"
    yield from _obstacles_of_processes(candidate)
    if candidate.recipe.optimizer == "adamw_8bit" and find_spec("bitsandbytes") is None:
        yield (
            "training.optimizer = 'adamw_8bit' needs the package bitsandbytes, which is not installed; "
            "pip install 'nanogpt-autotune[8bit]', or use adamw"
        )
    attention, loss = registry.find("attention", plan.attention), registry.find("loss", plan.loss)
    for kernel in (attention, loss):
        reason = registry.why_unavailable(
            kernel,
            machine,
            dtype=plan.matrix_dtype,
            compile=plan.compile,
            head_size=shape.head_size,
            dropout=shape.dropout,
        )
        if reason:
            yield f"plan.{kernel.operation} = {kernel.name!r} {reason}; see `autotune kernels`"
    tokens = plan.micro_batch_size * shape.block_size
    if loss.chunked and plan.loss_chunk_tokens > tokens:
        yield f"plan.loss_chunk_tokens = {plan.loss_chunk_tokens} is more than a micro batch has ({tokens}); lower it"


def _obstacles_of_processes(candidate: Candidate) -> Iterator[str]:
    plan, processes = candidate.plan, distributed_context().world_size
    if plan.processes != processes:
        yield (
            f"plan.processes = {plan.processes}, but here {processes} trains; set plan.processes = {processes} and "
            "plan.sharding = 'none'"
        )
    if plan.sharding == "none":
        return
    sharding = f"plan.sharding = {plan.sharding!r}"
    if processes == 1:
        yield f"{sharding} needs several processes; start it with torchrun --nproc-per-node 2, or use none"
    if plan.sharding == "full" and plan.compile == "full":
        yield f"{sharding} gathers block by block, outside of compiled graphs; use plan.compile = block or off"
    if plan.dtype == "float16":
        yield f"{sharding} has no loss scaling, which float16 needs; use bfloat16, or plan.sharding = none"
    if candidate.recipe.optimizer == "adamw_8bit":
        yield f"{sharding} cannot divide the state of adamw_8bit; use adamw, or plan.sharding = none"


def _compiled(model: GPT, candidate: Candidate) -> Callable[..., Tensor]:
    """The model's forward, compiled as planned. Its parameters are those of `model`."""
    plan = candidate.plan
    if plan.compile != "off":
        drop_torn_libraries(compile_cache_dir())
        # beyond torch's limit of 8, another version of a function would silently run uncompiled, in far more memory
        dynamo_config.recompile_limit = RECOMPILE_LIMIT
        dynamo_config.fail_on_recompile_limit_hit = True
        dynamo_config.suppress_errors = False  # TORCHDYNAMO_SUPPRESS_ERRORS would run failures uncompiled
    compiler: Callable[..., Any] = partial(torch.compile, dynamic=False)
    if plan.loss == "auto_chunker":
        from autotune.kernels.loss_auto_chunker import compile_in_chunks

        tokens = plan.micro_batch_size * candidate.shape.block_size
        error = UnsupportedError("plan.loss = 'auto_chunker' left the logits of this model whole; use chunked")
        compiler = partial(compile_in_chunks, chunks=-(-tokens // plan.loss_chunk_tokens), error=error)
    if plan.compile == "full":
        return cast("Callable[..., Tensor]", compiler(model))
    if plan.compile == "block":
        compile_blocks(model, plan)
        model.loss = compiler(model.loss)
    return model

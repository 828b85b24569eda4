"""Weights, gradients and optimizer state divided among the processes of a training, and gathered for a checkpoint.

    optimizer   Each process keeps the optimizer's state of a part of the weights and updates that part; then all
                exchange what they have updated (ZeRO stage 1, arXiv:1910.02054). Gradients are summed as for replicas.
    full        torch's FSDP2 divides weights, gradients and state by rows: each block, and the rest.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from autotune.config.candidate import Recipe
from autotune.model.gpt import GPT
from autotune.model.optim import by_muon, make_optimizer

_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""Its name since torch 2.13, and before."""


def shard_fully(model: GPT, device: torch.device) -> None:
    """Divide the weights by rows. Gradients are summed over the processes, as each passes its share of one batch."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*model.h, model):  # embeddings and the last norm belong to the model itself
        fully_shard(module, mesh=mesh)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor from what all processes hold of it; all must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, divided as `like` is."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        # cloned, as a view would keep all of it
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None).clone()
    return tensor


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What one process updates of one weight."""

    weight: nn.Parameter
    owner: int | None
    """The process that updates all of it; None: each one updates as many elements."""
    own: nn.Parameter | None
    """This process's, in the same memory; None: it has none."""

    def of(self, tensor: Tensor) -> Tensor:
        """This process's part of a tensor of the weight's shape, in the same memory; of others, the tensor."""
        if self.owner is not None or tensor.shape != self.weight.shape:
            return tensor
        return tensor.view(-1).chunk(dist.get_world_size())[dist.get_rank()]

    def exchange(self, tensor: Tensor, updated: Tensor | None) -> dist.Work | None:
        """Begin to fill `tensor`, of the weight's shape, with what the processes have `updated`."""
        if self.owner is None:
            assert updated is not None
            work: dist.Work | None = _all_gather(tensor.view(-1), updated, async_op=True)
            return work
        if updated is not None:
            tensor.copy_(updated)
        work = dist.broadcast(tensor, self.owner, async_op=True)
        return work


class DividedOptimizer:
    """The recipe's optimizer over this process's parts of the weights.

    AdamW treats every element alone, so each process has as many of each weight. A matrix of Muon, or what cannot be
    divided evenly, belongs to the process that has the fewest elements of such.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self._parts = dict(_parts(model, recipe))
        self.own = {name: part.own for name, part in self._parts.items() if part.own is not None}
        self.optimizer = make_optimizer(model, recipe, self.own)
        self.optimizer.register_step_pre_hook(lambda *_: self._take_gradients())
        self.optimizer.register_step_post_hook(lambda *_: self._exchange())

    def _take_gradients(self) -> None:
        for part in self._parts.values():
            if part.own is not None and part.weight.grad is not None:
                part.own.grad = part.of(part.weight.grad)

    @torch.no_grad()
    def _exchange(self) -> None:
        begun = []
        for part in self._parts.values():
            own = None if part.own is None or part.owner is not None else part.own
            begun.append(part.exchange(part.weight.detach(), None if own is None else own.detach()))
            if own is not None:
                own.grad = None
        for work in begun:
            if work is not None:
                work.wait()

    def part(self, name: str, value: Tensor) -> Tensor:
        """A copy of this process's part of a state of the weight `name`."""
        return self._parts[name].of(value).clone()

    def gathered(self) -> Iterator[tuple[str, Tensor]]:
        """The state of all weights as `<weight>.<key>`, one after the other; all processes must take them."""
        held = {
            (name, key): value
            for name, own in self.own.items()
            for key, value in self.optimizer.state[own].items()
        }
        told: list[dict[tuple[str, str], tuple[bool, torch.dtype]]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(told, {place: (value.dim() > 0, value.dtype) for place, value in held.items()})
        for (name, key), (of_elements, dtype) in {place: kind for one in told for place, kind in one.items()}.items():
            part, value = self._parts[name], held.get((name, key))
            shape = part.weight.shape if of_elements else ()
            if part.owner is None and not of_elements:  # a counter, the same in all
                assert value is not None
                yield f"{name}.{key}", value
                continue
            state = torch.empty(shape, dtype=dtype, device=part.weight.device)
            if (work := part.exchange(state, value)) is not None:
                work.wait()
            yield f"{name}.{key}", state


def _parts(model: nn.Module, recipe: Recipe) -> Iterator[tuple[str, _Part]]:
    processes, rank = dist.get_world_size(), dist.get_rank()
    owned = [0] * processes  # elements
    for name, weight in model.named_parameters():
        if weight.numel() % processes == 0 and not (recipe.optimizer == "muon" and by_muon(name, weight)):
            slices = weight.detach().view(-1).chunk(processes)
            yield name, _Part(weight=weight, owner=None, own=nn.Parameter(slices[rank]))
            continue
        owner = owned.index(min(owned))
        owned[owner] += weight.numel()
        yield name, _Part(weight=weight, owner=owner, own=weight if owner == rank else None)

"""Activation checkpointing: what the backward recomputes, by blocks, by operators, or by a memory budget.

By blocks, a compiled block is one unit and only its input is kept. By operators, the compiler has to see the choice,
so checkpoint and block are compiled together. By a budget, Inductor's partitioner chooses.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from autotune.config.candidate import Plan
from autotune.model.gpt import GPT, RunBlock

_aten: Any = torch.ops.aten
KEPT = [
    *(_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default),
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
]
"""Operators whose outputs are kept: matrix products and attention, the expensive ones. The rest is cheap to
recompute."""


def run_block(plan: Plan) -> RunBlock:
    """How the training forward runs one block; `every_k` recomputes blocks 0, k, 2k, ..."""
    every = plan.recomputed_every
    if every is not None:
        return lambda layer, block, x: _checkpoint(block, x) if layer % every == 0 else block(x)
    return _selectively if plan.activation_checkpointing == "selective" else lambda layer, block, x: block(x)


def compile_blocks(model: GPT, plan: Plan) -> None:
    """Compile the blocks separately: one compilation serves all layers."""
    for block in model.h:
        block.compile(dynamic=False)
    if plan.activation_checkpointing == "selective":
        model.run_block = torch.compile(model.run_block, dynamic=False)


def budget(plan: Plan) -> AbstractContextManager[Any]:
    """Context in which the first forward compiles graphs that keep the plan's share of their activations."""
    if plan.memory_budget is None:
        return nullcontext()
    patched: AbstractContextManager[Any] = functorch_config.patch(activation_memory_budget=plan.memory_budget)
    return patched


def _selectively(layer: int, block: nn.Module, x: Tensor) -> Tensor:
    return _checkpoint(block, x, context_fn=partial(create_selective_checkpoint_contexts, KEPT))


def _checkpoint(block: nn.Module, x: Tensor, **options: Any) -> Tensor:
    y: Tensor = checkpoint(block, x, use_reentrant=False, **options)
    return y

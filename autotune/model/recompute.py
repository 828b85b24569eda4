"""What a plan computes again in the backward instead of keeping it: by blocks, by operators, or by a budget.

By blocks, a compiled block is one unit: what is kept is its input. By operators, the compiler has to see the
choice, so checkpoint and block are compiled together. By a budget, Inductor's partitioner makes the choice.
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
"""Matrix products and attention: what costs most to compute. The rest is nearly free to compute again."""


def run_block(plan: Plan) -> RunBlock:
    """How a training forward runs one block; `every_k` counts from the first."""
    every = plan.recomputed_every
    if every is not None:
        return lambda layer, block, x: _checkpoint(block, x) if layer % every == 0 else block(x)
    return _selectively if plan.activation_checkpointing == "selective" else lambda layer, block, x: block(x)


def compile_blocks(model: GPT, plan: Plan) -> None:
    """Compile every block by itself: one compilation serves all of them, whatever the depth."""
    for block in model.h:
        block.compile(dynamic=False)
    if plan.activation_checkpointing == "selective":
        model.run_block = torch.compile(model.run_block, dynamic=False)


def budget(plan: Plan) -> AbstractContextManager[Any]:
    """Within it, a forward's first call compiles graphs that keep the plan's part of their activations."""
    if plan.memory_budget is None:
        return nullcontext()
    patched: AbstractContextManager[Any] = functorch_config.patch(activation_memory_budget=plan.memory_budget)
    return patched


def _selectively(layer: int, block: nn.Module, x: Tensor) -> Tensor:
    return _checkpoint(block, x, context_fn=partial(create_selective_checkpoint_contexts, KEPT))


def _checkpoint(block: nn.Module, x: Tensor, **options: Any) -> Tensor:
    y: Tensor = checkpoint(block, x, use_reentrant=False, **options)
    return y

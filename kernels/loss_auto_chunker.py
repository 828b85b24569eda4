"""Full logits written plainly, for Inductor's auto chunker to cut into chunks.

The chunker is a pass over the joint graph: it exists only where forward and backward are compiled together, and
where it finds no way to chunk it says nothing and leaves the graph whole. So whoever compiles must use
`compile_in_chunks`, which looks.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import metrics

from autotune.kernels.loss_full import cross_entropy

__all__ = ["compile_in_chunks", "cross_entropy"]


def compile_in_chunks(function: Callable[..., Tensor], *, chunks: int, error: Exception) -> Callable[..., Tensor]:
    """`function`, which ends in a loss over full logits, compiled with those in `chunks` pieces.
    Its first call with gradients raises `error` where that did not happen."""
    compiled = torch.compile(function, dynamic=False, options={
        "auto_chunker.enable": True,
        "auto_chunker.num_chunk": chunks,
        "auto_chunker.amplify_ratio_threshold": 1,  # the plan decides, not the ratio of logits to inputs
        "auto_chunker.output_size_threshold": 1,
    })  # fmt: skip
    looked = False

    def call(*inputs: Tensor) -> Tensor:
        nonlocal looked
        before = metrics.num_auto_chunking
        # the cache of whole autograd graphs does not know these options and would answer with the unchunked graph
        with functorch_config.patch(enable_autograd_cache=False):
            loss = compiled(*inputs)
        if torch.is_grad_enabled() and not looked:
            looked = True
            if metrics.num_auto_chunking == before:
                raise error
        return loss

    return call

"""Loss over full logits, which Inductor's auto chunker divides into chunks.

The chunker is a pass over the joint graph, so forward and backward must be compiled together. If it finds no way to
chunk, it silently leaves the graph as it is; `compile_in_chunks` checks that.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import metrics

from autotune.kernels.loss_full import cross_entropy

__all__ = ["compile_in_chunks", "cross_entropy"]


def compile_in_chunks(function: Callable[..., Tensor], *, chunks: int, error: Exception) -> Callable[..., Tensor]:
    """Compile `function`, which ends in a loss over full logits, with the logits in `chunks` pieces. The first call
    with gradients raises `error` if the compiler did not chunk them."""
    compiled = torch.compile(function, dynamic=False, options={
        "auto_chunker.enable": True,
        "auto_chunker.num_chunk": chunks,
        "auto_chunker.amplify_ratio_threshold": 1,  # the plan decides, not the ratio of logits to inputs
        "auto_chunker.output_size_threshold": 1,
    })  # fmt: skip
    checked = False

    def call(*inputs: Tensor) -> Tensor:
        nonlocal checked
        before = metrics.num_auto_chunking
        # the autograd cache does not know these options and would return the unchunked graph
        with functorch_config.patch(enable_autograd_cache=False):
            loss = compiled(*inputs)
        if torch.is_grad_enabled() and not checked:
            checked = True
            if metrics.num_auto_chunking == before:
                raise error
        return loss

    return call

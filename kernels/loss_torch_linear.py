"""Head and cross entropy by torch.nn.functional.linear_cross_entropy, in chunks of the plan's size (torch 2.13)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from autotune.kernels import loss_chunked


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
    """Mean over targets other than -1, a float32 scalar that was rounded to the matrix dtype.

    The rounding is too coarse for a validation loss (0.03 at 10, in bfloat16), so the chunked loss is used without
    gradients. The operator ignores autocast: hidden and weight are cast here.
    """
    if not torch.is_grad_enabled():
        return loss_chunked.cross_entropy(hidden, weight, targets, chunk_tokens)
    dtype = loss_chunked.matrix_dtype(hidden)
    compiling = torch.compiler.is_compiling()  # compiled graphs require that buffers are kept
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=chunk_tokens, chunking_method=None, allow_retain_graph=compiling
    )
    with torch.autocast(hidden.device.type, enabled=False):
        loss = F.linear_cross_entropy(hidden.to(dtype), weight.to(dtype), targets, ignore_index=-1, options=options)
    return loss.float()

"""Head and cross entropy by Liger's fused kernel (package liger-kernel, Hsu et al., arXiv:2410.10989)."""

import torch
from torch import Tensor

from autotune.kernels.loss_chunked import matrix_dtype


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
    """Mean over targets other than -1, float32 scalar. Liger chooses its chunks; ignores `chunk_tokens`."""
    loss: Tensor = _fused(hidden, weight, targets)
    return loss


# It copies a count to the host, which a graph cannot contain. The kernel itself cannot be marked: plan.compile = block
# compiles the loss alone, and torch.compile ignores the mark on what it is given.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    dtype = matrix_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        fused = LigerFusedLinearCrossEntropyLoss(ignore_index=-1, accum_dtype=torch.float32)
        loss: Tensor = fused(weight.to(dtype), hidden.to(dtype), targets)
    return loss.float()

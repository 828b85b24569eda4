"""Head and cross entropy by Apple's cut cross entropy (Wijmans et al., arXiv:2411.09009): no logits in memory."""

import torch
from torch import Tensor

from autotune.kernels.loss_chunked import matrix_dtype


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
    """Mean over targets other than -1, float32 scalar. Ignores `chunk_tokens`.

    Uses the variant for pretraining: the weight's gradient is unfiltered and summed with Kahan's correction.
    """
    loss: Tensor = _cut(hidden, weight, targets)
    return loss


@torch.compiler.disable  # type: ignore[untyped-decorator]  # kernels that tune themselves while they run; see loss_liger
def _cut(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    dtype = matrix_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = linear_cross_entropy(
            hidden.to(dtype), weight.to(dtype), targets, ignore_index=-1, impl="cce_kahan_full_c"
        )
    return loss.float()

"""Head and cross entropy over all logits at once, as nanoGPT computes them."""

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
    """Mean over targets other than -1, float32 scalar. `chunk_tokens` does not matter here.

    Holds N * vocab_size logits, in the matrix dtype and again in float32.
    """
    logits = F.linear(hidden, weight)  # (N, vocab_size)
    return F.cross_entropy(logits.float(), targets, ignore_index=-1)

"""Head and cross entropy over all logits at once, as in nanoGPT."""

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
    """Mean over targets other than -1, float32 scalar. Ignores `chunk_tokens`.

    Holds N * vocab_size logits, in the matrix dtype and again in float32.
    """
    logits = F.linear(hidden, weight)  # (N, vocab_size)
    return F.cross_entropy(logits.float(), targets, ignore_index=-1)

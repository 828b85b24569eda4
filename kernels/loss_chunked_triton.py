"""The chunked loss with softmax, loss and gradient of a chunk of logits in one Triton kernel.

Compared with `loss_chunked`, whose softmax Inductor compiles: logits are read twice and written once by one kernel, and
another chunk size needs no recompilation. One program per row: a first pass over the vocabulary computes maximum and
sum online (Milakov and Gimelshein, arXiv:1805.02867), a second pass replaces each logit by its gradient. Sums are
float32 for any dtype of the logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from autotune.kernels.loss_chunked import SOFTMAX, by_chunks

BLOCK_V = 4096
"""Logits of a row that a program processes at once."""


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
    """Mean over targets other than -1, float32 scalar; `chunk_tokens` rows of logits at one time."""
    return by_chunks(hidden, weight, targets, chunk_tokens, "triton")


def softmax_(logits: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """logits (n, V), targets (n,), scale (n,) -> summed scaled loss (); logits become its gradient."""
    rows, words = logits.shape
    losses = torch.empty_like(scale)  # (n,)
    block = min(BLOCK_V, triton.next_power_of_2(words))
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        _softmax_loss_kernel[(rows,)](
            logits, logits.stride(0), targets, scale, losses, WORDS=words, BLOCK_V=block, num_warps=8
        )
    return losses.sum()


SOFTMAX["triton"] = softmax_


@triton.jit  # type: ignore[untyped-decorator]
def _softmax_loss_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations itself
    logits,
    stride,
    targets,
    scales,
    losses,
    WORDS: tl.constexpr,  # noqa: N803
    BLOCK_V: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    scale = tl.load(scales + row)
    target_logit = tl.load(logits + target).to(tl.float32)  # before any thread writes a gradient there
    columns = tl.arange(0, BLOCK_V)
    largest = float("-inf")
    total = 0.0
    for start in range(0, WORDS, BLOCK_V):
        inside = start + columns < WORDS
        x = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
    normaliser = largest + tl.log(total)
    tl.store(losses + row, (normaliser - target_logit) * scale)
    for start in range(0, WORDS, BLOCK_V):
        inside = start + columns < WORDS
        x = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        p = tl.exp(x - normaliser)
        gradient = tl.where(start + columns == target, p - 1.0, p) * scale
        tl.store(logits + start + columns, gradient.to(logits.dtype.element_ty), mask=inside)

"""Head and cross entropy chunk by chunk, so that the full (N, vocab_size) logits never exist.

Gradients are computed in the forward, where a chunk's logits become their own gradient in place: softmax -
onehot(target). The backward only scales them, also by 1/count: scaled earlier, the gradients of words other than the
target would underflow in float16.

It is one opaque operator. Given the loop, Inductor keeps the weight gradient of every chunk until it can add them all
in one kernel: 631 MiB against 459 MiB for full logits at 2048 tokens of 384.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

VOCABULARY_SLICE = {"cpu": 2048, "cuda": 16384}
"""Rows of the weight gradient accumulated at once. Bounds the temporary; fewer would not occupy a large card."""

Softmax = Callable[[Tensor, Tensor, Tensor], Tensor]
"""logits (n, V), targets (n,), scale (n,) -> summed scaled loss (); logits become its gradient."""
SOFTMAX: dict[str, Softmax] = {}
"""Softmax by name, added by modules that have one of their own."""


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
    """Mean over targets other than -1, float32 scalar; `chunk_tokens` rows of logits exist at one time."""
    softmax = "compiled" if torch.compiler.is_compiling() else "eager"
    return by_chunks(hidden, weight, targets, chunk_tokens, softmax)


def by_chunks(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, softmax: str) -> Tensor:
    """`cross_entropy` with one of three implementations of softmax and gradient: eager, compiled, triton."""
    dtype = matrix_dtype(hidden)
    loss: Tensor = _chunked(hidden, weight, targets, chunk_tokens, dtype, torch.is_grad_enabled(), softmax)[0]
    return loss


def matrix_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of matrix products: autocast's if it is enabled, else that of `hidden`."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _gradient_(logits: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """Log normaliser of the softmax (n,); logits (n, V) become the gradient of the loss in place."""
    log_normaliser = torch.logsumexp(logits.float(), dim=-1)
    p = (logits.float() - log_normaliser[:, None]).exp_()
    p.add_(torch.arange(logits.shape[1], device=logits.device) == targets[:, None], alpha=-1)
    logits.copy_(p.mul_(scale[:, None]))
    return log_normaliser


_compiled_gradient_ = torch.compile(_gradient_, dynamic=False)


def _softmax_of(name: str) -> Softmax:
    if name in SOFTMAX:
        return SOFTMAX[name]
    gradient_ = _compiled_gradient_ if name == "compiled" else _gradient_

    def in_two(logits: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
        # outside of the graph that overwrites the logits: Inductor of torch 2.11 would read them afterwards
        target_logit = logits.gather(1, targets[:, None])[:, 0].float()
        return ((gradient_(logits, targets, scale) - target_logit) * scale).sum()

    return in_two


@torch.library.custom_op("autotune::chunked_cross_entropy", mutates_args=())
def _chunked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int,
    dtype: torch.dtype,
    with_gradient: bool,
    softmax: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss (), gradients of the sum by hidden (N, C) and by weight (V, C); empty without `with_gradient`."""
    softmax_ = _softmax_of(softmax)
    scale = (targets != -1).float()  # (N,): 0 where ignored
    count, targets = scale.sum().clamp(min=1), targets.clamp(min=0)
    hidden, low_weight = hidden.to(dtype), weight.to(dtype)
    loss = torch.zeros((), device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if with_gradient else hidden.new_empty(0)
    grad_weight = torch.zeros_like(weight) if with_gradient else weight.new_empty(0)
    buffer = hidden.new_empty((min(chunk_tokens, hidden.shape[0]), weight.shape[0]))  # (chunk, V)
    for start in range(0, hidden.shape[0], chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, hidden.shape[0]))
        logits = torch.mm(hidden[rows], low_weight.T, out=buffer[: rows.stop - start])
        loss += softmax_(logits, targets[rows], scale[rows])  # logits are their gradient now
        if not with_gradient:
            continue
        torch.mm(logits, low_weight, out=grad_hidden[rows])
        for first in range(0, weight.shape[0], step := VOCABULARY_SLICE[hidden.device.type]):
            words = slice(first, first + step)
            grad_weight[words] += logits[:, words].T @ hidden[rows]
    return loss / count, grad_hidden, grad_weight


@_chunked.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int,
    dtype: torch.dtype,
    with_gradient: bool,
    softmax: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_hidden = torch.empty_like(hidden, dtype=dtype) if with_gradient else hidden.new_empty(0, dtype=dtype)
    grad_weight = torch.empty_like(weight) if with_gradient else weight.new_empty(0)
    return hidden.new_empty((), dtype=torch.float32), grad_hidden, grad_weight


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    count = (inputs[2] != -1).sum().clamp(min=1)
    ctx.save_for_backward(output[1], output[2], count)
    ctx.hidden_dtype = inputs[0].dtype


def _scale(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad_hidden, grad_weight, count = ctx.saved_tensors
    grad = grad / count
    return (grad_hidden * grad).to(ctx.hidden_dtype), grad_weight * grad, None, None, None, None, None


_chunked.register_autograd(_scale, setup_context=_keep)

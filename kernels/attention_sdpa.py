"""Causal attention through torch's scaled_dot_product_attention, one function per backend."""

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def automatic(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Three (B, n_head, T, head_size) -> the same shape; torch selects the backend."""
    return scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)


def flash(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """FlashAttention 2 or an error, never another backend."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return automatic(query, key, value, dropout)


def cudnn(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """cuDNN's fused attention or an error, never another backend."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return automatic(query, key, value, dropout)


def efficient(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Memory-efficient attention or an error, never another backend."""
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return automatic(query, key, value, dropout)


def math(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Plain matrix products; holds all B * n_head * T * T scores."""
    with sdpa_kernel(SDPBackend.MATH):
        return automatic(query, key, value, dropout)

"""The memory guide that circulates among nanoGPT users, as candidates."""

from typing import NamedTuple

from autotune.config.candidate import Shape
from autotune.units import GIB


class GuideRow(NamedTuple):
    """The guide's configuration for a card, and its claim."""

    card: str
    memory_bytes: int
    """Memory of the smallest card that the row is for."""
    claimed: str
    """Parameters of the model according to the guide."""
    shape: Shape
    micro_batch_size: int
    gradient_accumulation_steps: int


GUIDE = (
    GuideRow("A100/H100", 80 * GIB, "~350M", Shape(n_layer=12, n_head=12, n_embd=768), 64, 8),
    GuideRow("A6000", 48 * GIB, "~250-300M", Shape(n_layer=12, n_head=12, n_embd=672), 32, 16),
    GuideRow("4090/3090", 24 * GIB, "~160-200M", Shape(n_layer=10, n_head=10, n_embd=640), 32, 16),
    GuideRow("4080", 16 * GIB, "~125M", Shape(n_layer=8, n_head=8, n_embd=512), 32, 12),
    GuideRow("4070 Ti", 0, "~84M", Shape(n_layer=6, n_head=6, n_embd=384), 16, 24),
)


def guide_row(memory_bytes: int) -> GuideRow:
    """The guide's row for a card with this much memory. Cards report up to 5 % less than their nominal size: a 24 GB
    card has 23.6 GiB."""
    return next(row for row in GUIDE if memory_bytes * 1.05 >= row.memory_bytes)

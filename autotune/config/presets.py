"""The memory guide that circulates among nanoGPT's users, as candidates to be measured."""

from typing import NamedTuple

from autotune.config.candidate import Shape
from autotune.units import GIB


class GuideRow(NamedTuple):
    """One row of the guide: what it advises for a card, and what it claims."""

    card: str
    memory_bytes: int
    """The smallest card that the row is meant for."""
    claimed: str
    """The size that the guide says the model has."""
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
    """The guide's advice for a card with this much memory. Cards report a little less than their name
    says (a 24 GB card has 23.6 GiB), hence the 5 percent."""
    return next(row for row in GUIDE if memory_bytes * 1.05 >= row.memory_bytes)

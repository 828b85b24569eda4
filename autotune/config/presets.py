"""The memory guide that circulates among nanoGPT's users, as candidates to be measured."""

from dataclasses import dataclass

from autotune.config.candidate import Shape
from autotune.units import GIB


@dataclass(frozen=True, kw_only=True)
class GuideRow:
    """One row of the guide: what it advises for a card, and what it claims."""

    card: str
    memory_bytes: int
    """The smallest card that the row is meant for."""
    claimed: str
    """The size that the guide says the model has."""
    shape: Shape
    micro_batch_size: int
    gradient_accumulation_steps: int


def _row(card: str, gib: int, claimed: str, layers: int, heads: int, width: int, micro: int, steps: int) -> GuideRow:
    return GuideRow(
        card=card,
        memory_bytes=gib * GIB,
        claimed=claimed,
        shape=Shape(n_layer=layers, n_head=heads, n_embd=width),
        micro_batch_size=micro,
        gradient_accumulation_steps=steps,
    )


GUIDE = (
    _row("A100/H100", 80, "~350M", 12, 12, 768, 64, 8),
    _row("A6000", 48, "~250-300M", 12, 12, 672, 32, 16),
    _row("4090/3090", 24, "~160-200M", 10, 10, 640, 32, 16),
    _row("4080", 16, "~125M", 8, 8, 512, 32, 12),
    _row("4070 Ti", 0, "~84M", 6, 6, 384, 16, 24),
)


def guide_row(memory_bytes: int) -> GuideRow:
    """The guide's advice for a card with this much memory. Cards report a little less than their name
    says (a 24 GB card has 23.6 GiB), hence the 5 percent."""
    return next(row for row in GUIDE if memory_bytes * 1.05 >= row.memory_bytes)

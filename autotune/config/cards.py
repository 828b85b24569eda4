"""NVIDIA's cards: memory, peak rates, bandwidth (`cards.json`, from data sheets), found by what people call them."""

import difflib
import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autotune.config.tables import read_json, read_table
from autotune.errors import SHOWN, ConfigError, shown
from autotune.units import GIB

_FILLERS = {"nvidia", "geforce", "tesla", "quadro", "rtx", "gpu", "graphics", "card", "generation"}
_LISTED = 6
"""Most names that a message suggests."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A card as its data sheet describes it. Rates are dense, half precision with float32 accumulation."""

    name: str
    aliases: tuple[str, ...] = ()
    """Further names, such as the driver's."""
    memory_gib: float
    """As the driver shows it."""
    bfloat16_tflops: float | None = None
    """None: the tensor cores do not have the type."""
    float16_tflops: float
    tfloat32_tflops: float | None = None
    float32_tflops: float
    """Without tensor cores."""
    gb_per_second: float
    """Memory bandwidth, 10^9 bytes."""
    capability: tuple[int, ...]
    """CUDA compute capability."""
    source: str
    """Address of the data sheet."""

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)

    @property
    def peak_flops(self) -> float:
        """FLOP/s in half precision: what MFU is a fraction of."""
        return 1e12 * (self.bfloat16_tflops or self.float16_tflops)


@dataclass(frozen=True, kw_only=True)
class _File:
    note: str
    cards: tuple[Card, ...]


@functools.cache
def cards() -> tuple[Card, ...]:
    """All known cards."""
    return read_table(_File, read_json(Path(__file__).with_name("cards.json")), "cards.json").cards


def find(words: str) -> Card:
    """The card that the user calls so: `4090`, `rtx-4090`, `a100 80gb`. Raises ConfigError with suggestions."""
    asked = _key(words)
    if exact := _named(asked):
        return exact
    near = [card for card in cards() if asked and any(asked <= key for key in _keys(card))]
    if len(near) == 1:
        return near[0]
    if near:
        raise ConfigError(f"--gpu {shown(words)} may be {_listed(near)}; name one of them")
    names = {" ".join(sorted(key)): card for card in cards() for key in _keys(card)}
    similar = difflib.get_close_matches(" ".join(sorted(asked))[:SHOWN], names, n=_LISTED, cutoff=0.5)
    found = list(dict.fromkeys(names[name].name for name in similar))
    advice = f"did you mean {', '.join(found)}?" if found else f"known: {', '.join(card.name for card in cards())}."
    raise ConfigError(
        f"--gpu {shown(words)} is not a known card; {advice} Or give its memory with --memory-limit 24GiB"
    )


def of_device(device_name: str) -> Card | None:
    """The card of a driver's name, `NVIDIA A100-SXM4-80GB`; None for one that is not in the table, such as a laptop's
    or a slice of a card."""
    return _named(_key(device_name))


def nearest(capability: Sequence[int], memory_bytes: int) -> Card:
    """The card that resembles an unknown one most: in its generation, then in memory."""
    generation = (*capability, 0)[0]

    def distance(card: Card) -> tuple[float, float, float]:
        size = abs(math.log(card.memory_bytes / max(memory_bytes, 1)))
        return abs(card.capability[0] - generation), float(card.capability != tuple(capability)), size

    return min(cards(), key=distance)


def _named(asked: frozenset[str]) -> Card | None:
    return next((card for card in cards() if asked in _keys(card)), None)


@functools.cache
def _keys(card: Card) -> Sequence[frozenset[str]]:
    return [_key(name) for name in (card.name, *card.aliases)]


def _key(name: str) -> frozenset[str]:
    """The words that tell cards apart: `GeForce RTX-3090Ti` is 3090 and ti, `A100-SXM4-80 GB` is a100, sxm and 80gb."""
    text = re.sub(r"[^a-z0-9.]+", " ", name.lower())
    text = re.sub(r"(\d)\s*(gib|gb|g)\b", r"\1gb", text)
    text = re.sub(r"\b(rtx|gtx)(?=[a-z]?\d)", r"\1 ", text)
    text = re.sub(r"(?<=\d{4})(ti)?(super)?\b", r" \1 \2", text)
    text = re.sub(r"\b(sxm)\d\b|\b(pci)e?\b|\bhbm\d?e?\b", r"\1\2", text)
    return frozenset(text.split()) - _FILLERS


def _listed(found: Sequence[Card]) -> str:
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(card.name for card in found[:_LISTED]) + more

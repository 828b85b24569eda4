"""Candidates as the Gaussian process sees them: one number a parameter, and the prior means of their answers."""

import functools
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from autotune.config.candidate import Candidate, Plan
from autotune.search.gp import Array, Mask
from autotune.search.priors import expected
from autotune.search.space import reads_chunks

NAMES = (*(field.name for field in fields(Plan)), "n_layer", "n_embd", "head_size", "block_size")
"""Every parameter that a search can vary."""

_CACHED = 8192


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """n candidates as numbers."""

    parameters: Array
    """(n, k): log2 of a number, or the code of a word."""
    prior: Array
    """(n, 2): prior means of log speed and of log trial seconds, up to a constant each."""


def encode(candidates: Sequence[Candidate], names: tuple[str, ...], device_kind: str) -> Features:
    """The parameters `names` of the candidates."""
    rows = [_features(candidate, names, device_kind) for candidate in candidates]
    table = np.array(rows, dtype=float).reshape(len(rows), len(names) + 2)
    return Features(parameters=table[:, :-2], prior=table[:, -2:])


def categorical(names: Iterable[str], candidate: Candidate) -> Mask:
    """(k,): which of the parameters are words."""
    return np.array([isinstance(value_of(candidate, name), str) for name in names], dtype=bool)


@functools.lru_cache(maxsize=_CACHED)
def _features(candidate: Candidate, names: tuple[str, ...], device_kind: str) -> tuple[float, ...]:
    values = (value_of(candidate, name) for name in names)
    coded = (zlib.crc32(value.encode()) if isinstance(value, str) else value for value in values)
    return (*coded, *expected(candidate, device_kind))


def value_of(candidate: Candidate, name: str) -> float | str:
    """A word, or log2 of a number. Micro batch and chunk count in the tokens that a kernel sees: without chunks, the
    chunk is the whole micro batch."""
    shape, plan = candidate.shape, candidate.plan
    tokens = plan.micro_batch_size * shape.block_size
    value: int | str = getattr(plan if hasattr(plan, name) else shape, name)
    if name == "micro_batch_size":
        value = tokens
    elif name == "loss_chunk_tokens":
        value = min(plan.loss_chunk_tokens, tokens) if reads_chunks(plan) else tokens
    return value if isinstance(value, str) else math.log2(value)

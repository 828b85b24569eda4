"""Training and validation batches as a pure function of the data, a seed and a step number; and their micro batches.

There is no state between batches. A resumed training continues by its step number alone, and neither the micro batch
nor the number of processes changes the data of a step.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from autotune.data.shards import Shard, check_length, open_split, split_paths
from autotune.errors import DataError

IntArray = npt.NDArray[np.int64]
Batch = tuple[IntArray, IntArray]
"""Inputs x and targets y, each (B, T) int64; y is x one token later."""

PIECE_TOKENS = 1024
"""Documents differ more than parts of one: a loss over many short pieces is nearer to the whole split's."""
_ROUNDS = 6
_HEAD_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchSource:
    """Windows of `block_size + 1` tokens at multiples of `block_size` inside each file."""

    train: Sequence[Shard]
    val: Sequence[Shard]
    seed: int
    """Seed of the order of training windows, together with the epoch."""
    global_batch_size: int
    """Sequences per training batch."""
    block_size: int
    """Tokens per sequence."""
    vocab_size: int
    """Tokens must be below this; a batch with another one is a DataError that names the file."""
    piece_tokens: int = PIECE_TOKENS
    """Tokens of the pieces in which the validation split is read."""

    def __post_init__(self) -> None:
        for kind, shards, have, need in (
            ("training", self.train, self.train_windows, self.global_batch_size),
            ("validation", self.val, self.validation_windows, 1),
        ):
            if have < need:
                tokens = sum(len(shard) for shard in shards)
                raise DataError(
                    f"{tokens} {kind} tokens give {have} sequences of {self.block_size}, {need} are needed; "
                    "prepare more data, or lower block_size or global_batch_size"
                )

    @cached_property
    def _train_ends(self) -> IntArray:
        return _window_ends(self.train, self.block_size)

    @cached_property
    def _val_ends(self) -> IntArray:
        return _window_ends(self.val, self.block_size)

    @property
    def train_windows(self) -> int:
        """Training sequences per epoch."""
        return int(self._train_ends[-1])

    @property
    def train_tokens(self) -> int:
        """Tokens of all training sequences."""
        return self.train_windows * self.block_size

    @property
    def validation_windows(self) -> int:
        """Distinct validation sequences."""
        return int(self._val_ends[-1])

    def train_batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Batch of optimizer step `step` (from 0), or some rows of it: x, y of (rows, block_size).

        Each epoch uses each window once, in an order drawn from (seed, epoch); a batch may span epochs.
        Raises DataError, naming the file, if a file was damaged since it was opened.
        """
        first = step * self.global_batch_size
        epochs, places = np.divmod(np.arange(first, first + self.global_batch_size)[rows], self.train_windows)
        windows = np.empty_like(places)
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            windows[mask] = shuffled(places[mask], self.train_windows, self.seed, int(epoch))
        return self._gather(self.train, self._train_ends, windows)

    def validation_batch(self, index: int, batch_size: int) -> Batch:
        """The `index`-th validation batch: x, y of (batch_size, block_size).

        The split is read in pieces, of which the first few lie evenly over it, as its beginning alone may be easier or
        harder than the rest. What fills no piece of its file comes last; then all begin again.
        """
        order = _validation_order(tuple(self._val_ends.tolist()), max(1, self.piece_tokens // self.block_size))
        place = index % -(-len(order) // batch_size) * batch_size
        return self._gather(self.val, self._val_ends, order[(place + np.arange(batch_size)) % len(order)])

    def _gather(self, shards: Sequence[Shard], ends: IntArray, windows: IntArray) -> Batch:
        rows = np.empty((len(windows), self.block_size + 1), dtype=np.int64)  # (B, T + 1)
        files = np.searchsorted(ends, windows, side="right")
        for file in np.unique(files):
            check_length(shards[file])
        for row, file, window in zip(rows, files, windows, strict=True):
            shard = shards[file]
            start = (window - (ends[file - 1] if file else 0)) * self.block_size
            row[:] = shard[start : start + self.block_size + 1]
        if (largest := int(rows.max())) >= self.vocab_size:
            path = shards[files[int(rows.max(axis=1).argmax())]].filename
            raise DataError(
                f"{path} holds token {largest}, vocab_size is {self.vocab_size}; "
                "raise vocab_size above it (GPT-2: 50257) or prepare the data with the model's tokenizer"
            )
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])


def open_batches(
    directory: Path, *, seed: int, global_batch_size: int, block_size: int, vocab_size: int,
    piece_tokens: int = PIECE_TOKENS,
) -> BatchSource:  # fmt: skip
    """Batches of a data directory. Raises DataError if it is missing, unfinished, damaged or too small."""
    return BatchSource(
        train=open_split(directory, "train"),
        val=open_split(directory, "val"),
        seed=seed,
        global_batch_size=global_batch_size,
        block_size=block_size,
        vocab_size=vocab_size,
        piece_tokens=piece_tokens,
    )


@functools.lru_cache(maxsize=4)
def _validation_order(ends: tuple[int, ...], piece: int) -> IntArray:
    """All sequences: in pieces of `piece` that follow each other in one file, then those that fill none. `ends`: as
    `_window_ends`.

    The order of pieces is that of multiples of the golden ratio, of which the first few, however many, lie about evenly
    apart (Knuth, The Art of Computer Programming, volume 3, section 6.4, theorem S).
    """
    files = list(itertools.pairwise((0, *ends)))
    firsts = np.concatenate([np.arange(begin, end - piece + 1, piece) for begin, end in files])
    rest = np.concatenate([np.arange(end - (end - begin) % piece, end) for begin, end in files])
    evenly = np.argsort(np.argsort(np.arange(len(firsts)) * ((math.sqrt(5) - 1) / 2) % 1.0))
    return np.concatenate([(firsts[evenly, None] + np.arange(piece)).ravel(), rest])


def _window_ends(shards: Sequence[Shard], block_size: int) -> IntArray:
    """Cumulative number of windows by file, (files,)."""
    # The last token of a window is a target only and the first input of the next window, so none is wasted.
    return np.cumsum([max(0, len(shard) - 1) // block_size for shard in shards], dtype=np.int64)


def shuffled(places: IntArray, size: int, seed: int, epoch: int) -> IntArray:
    """Image of `places` (N,) under a permutation of range(size) drawn from (seed, epoch).

    A Feistel network over the smallest even number of bits that holds `size`, repeated until the result is in range
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). It needs no table of 10M entries at each start
    and no generator whose stream may differ between NumPy versions.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.frombuffer(hashlib.sha512(f"{seed}/{epoch}".encode()).digest(), dtype="<u8")[:_ROUNDS]
    result = places.astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        left, right = result[outside] >> np.uint64(half), result[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        result[outside] = (left << np.uint64(half)) | right
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finalizer: every bit of the input moves every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def synthetic_batch(*, seed: int, step: int, global_batch_size: int, block_size: int, vocab_size: int) -> Batch:
    """Tokens without a data set: x, y of (global_batch_size, block_size) with p(id) ~ 1 / (id + 2.7).

    This Zipf-Mandelbrot law is skewed like real text: gradients of frequent tokens' embeddings collide, which uniform
    tokens would not show and zeros would exaggerate.
    """
    law = np.cumsum(1.0 / (np.arange(vocab_size) + 2.7))
    key = np.frombuffer(hashlib.sha256(f"synthetic/{seed}/{step}".encode()).digest()[:16], dtype="<u8")
    # Raw bits, whose stream is stable between NumPy versions; 53 of them make a uniform double.
    raw = np.random.Philox(key=key).random_raw(global_batch_size * (block_size + 1))
    uniform = (raw >> np.uint64(11)) * 2.0**-53
    rows = np.searchsorted(law, uniform * law[-1], side="right").reshape(global_batch_size, block_size + 1)
    np.minimum(rows, vocab_size - 1, out=rows)
    return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])


def micro_batches(
    tokens: IntArray, targets: IntArray, micro_batch_size: int, global_rows: int | None = None, count: int = 0
) -> Iterator[tuple[IntArray, IntArray, float]]:
    """tokens, targets (rows, T) -> (tokens, targets, share) with micro_batch_size rows each; the last one again, with a
    share of 0, until there are `count`, so that all processes have as many.

    If the division leaves a rest, the last micro batch is padded with token 0 and target -1, so that all micro batches
    have one shape (one compilation) and the global batch stays exact.
    share: counted rows of the micro batch over all rows, the weight of its mean loss. If the rows are one process's
    part of a batch of `global_rows`, over those.
    """
    rows = tokens.shape[0]
    for start in range(0, rows, micro_batch_size):
        x, y = tokens[start : start + micro_batch_size], targets[start : start + micro_batch_size]
        counted = x.shape[0]
        if counted < micro_batch_size:
            missing = ((0, micro_batch_size - counted), (0, 0))
            x = np.pad(x, missing, constant_values=0)
            y = np.pad(y, missing, constant_values=-1)
        yield x, y, counted / (global_rows or rows)
    for _ in range(-(-rows // micro_batch_size), count):
        yield x, y, 0.0


def fingerprint(directory: Path) -> str:
    """sha256 over the names, sizes and first 64 KiB of a data directory's token files. Raises DataError."""
    digest = hashlib.sha256()
    paths = [*split_paths(directory, "train"), *split_paths(directory, "val")]
    if not paths:
        raise DataError(f"{directory} holds no tokens; make some with `autotune data prepare`")
    for path in paths:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + head)
    return digest.hexdigest()

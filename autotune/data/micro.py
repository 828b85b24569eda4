"""A global batch in micro batches of one size, the last one padded with rows that do not count."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def micro_batches(
    tokens: IntArray, targets: IntArray, micro_batch_size: int, global_rows: int | None = None
) -> Iterator[tuple[IntArray, IntArray, float]]:
    """tokens, targets (rows, T) -> (tokens, targets, share) with micro_batch_size rows each.

    Where the division leaves a rest, the last micro batch is filled up with token 0 and target -1, so that
    every micro batch has one shape (one compilation) and the effective batch stays exactly that of the recipe.
    share: counted rows of the micro batch over all rows, the weight of its mean loss. Where the rows are one
    process's part of a batch of `global_rows`, over those.
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

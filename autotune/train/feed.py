"""The batches of a training, fetched one step ahead."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor

from autotune.config.candidate import Candidate
from autotune.data.batches import Batch, BatchSource, IntArray, micro_batches
from autotune.train.processes import Processes

MicroBatch = tuple[Tensor, Tensor, float]
"""tokens and targets (micro_batch_size, T) on the device, and their share of the global batch."""

Work = Literal["step", "evaluation"]


class Feed:
    """Micro batches on the device. A batch is a function of the data and its number, so a thread may run ahead."""

    def __init__(self, source: BatchSource, group: Processes, candidate: Candidate, device: torch.device) -> None:
        self.source, self.device = source, device
        self.rows = group.rows(source.global_batch_size)
        micro, part = candidate.plan.micro_batch_size, -(-source.global_batch_size // group.count)
        self.validation_rows = candidate.recipe.eval_batch_size or micro
        """Sequences of a validation batch; fixed, as they decide what a validation loss is of."""
        # many processes may have less to do each than a micro batch: no one pads
        self.sizes: dict[Work, int] = {"step": min(micro, part), "evaluation": self.validation_rows}
        """Sequences of a forward."""
        self.waited_seconds = 0.0
        """That steps have waited for their batch so far."""
        self._pool = ThreadPoolExecutor(1)
        self._ahead: tuple[int, Future[list[MicroBatch]]] | None = None

    def batch(self, number: int) -> list[MicroBatch]:
        """This process's part of batch `number`, while the next one is fetched. Raises DataError."""
        start = time.perf_counter()
        ready = self._ahead[1] if self._ahead and self._ahead[0] == number else self._pool.submit(self._load, number)
        found = ready.result()
        self.waited_seconds += time.perf_counter() - start
        self._ahead = number + 1, self._pool.submit(self._load, number + 1)
        return found

    def halve(self, work: Work) -> bool:
        """Give each forward half as many sequences from now on, also of a batch that was fetched already.
        False where it is one sequence already."""
        if self.sizes[work] == 1:
            return False
        self.sizes[work] = -(-self.sizes[work] // 2)
        self._ahead = None
        return True

    def validation(self, index: int) -> list[MicroBatch]:
        """Validation batch `index`, the same each time."""
        batch = self.source.validation_batch(index, self.validation_rows)
        return self._moved(batch, self.sizes["evaluation"], self.validation_rows)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _load(self, number: int) -> list[MicroBatch]:
        batch = self.source.train_batch(number, self.rows)
        return self._moved(batch, self.sizes["step"], self.source.global_batch_size)

    def _moved(self, batch: Batch, size: int, whole: int) -> list[MicroBatch]:
        return [(self._move(x), self._move(y), share) for x, y, share in micro_batches(*batch, size, whole)]

    def _move(self, ids: IntArray) -> Tensor:
        tensor = torch.from_numpy(ids)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

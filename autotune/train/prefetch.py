"""Training batches, loaded one step ahead."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor

from autotune.config.candidate import Candidate
from autotune.data.batches import Batch, BatchSource, IntArray, micro_batches
from autotune.model.distributed import DistributedContext

MicroBatch = tuple[Tensor, Tensor, float]
"""tokens and targets, both (micro_batch_size, T) on the device, and their share of the global batch."""

Work = Literal["step", "evaluation"]


class Prefetcher:
    """Micro batches on the device. A batch depends on the data and its number only, so a thread can load ahead."""

    def __init__(
        self, source: BatchSource, context: DistributedContext, candidate: Candidate, device: torch.device
    ) -> None:
        self.source, self.device = source, device
        self.rows = context.rows(source.global_batch_size)
        micro, self.largest_part = candidate.plan.micro_batch_size, -(-source.global_batch_size // context.world_size)
        self.validation_rows = candidate.evaluation.eval_batch_size or micro
        """Sequences of a validation batch. Fixed: the validation loss depends on it."""
        # a process may have fewer rows than a micro batch, which need no padding then
        self.sizes: dict[Work, int] = {
            "step": min(micro, self.largest_part), "evaluation": min(micro, self.validation_rows)
        }  # fmt: skip
        """Sequences of a forward: an evaluation must not need more memory than the steps."""
        self.waited_seconds = 0.0
        """Total time that steps waited for their batch."""
        self._pool = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[list[MicroBatch]]] | None = None

    def batch(self, number: int) -> list[MicroBatch]:
        """This process's part of batch `number`; starts to load the next one. Raises DataError."""
        start = time.perf_counter()
        future = self._next[1] if self._next and self._next[0] == number else self._pool.submit(self._load, number)
        batch = future.result()
        self.waited_seconds += time.perf_counter() - start
        self._next = number + 1, self._pool.submit(self._load, number + 1)
        return batch

    def shrink(self, work: Work) -> bool:
        """Halve the sequences of each forward from now on, those of the prefetched batch too. False: it is one."""
        if self.sizes[work] == 1:
            return False
        self.sizes[work] = -(-self.sizes[work] // 2)
        self._next = None
        return True

    def validation(self, index: int) -> list[MicroBatch]:
        """Validation batch `index`, the same at each evaluation."""
        batch = self.source.validation_batch(index, self.validation_rows)
        return self._moved(batch, self.sizes["evaluation"], self.validation_rows)

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(cancel_futures=True)

    def _load(self, number: int) -> list[MicroBatch]:
        batch = self.source.train_batch(number, self.rows)
        size = self.sizes["step"]
        return self._moved(batch, size, self.source.global_batch_size, -(-self.largest_part // size))

    def _moved(self, batch: Batch, size: int, total: int, count: int = 0) -> list[MicroBatch]:
        return [(self._move(x), self._move(y), share) for x, y, share in micro_batches(*batch, size, total, count)]

    def _move(self, ids: IntArray) -> Tensor:
        tensor = torch.from_numpy(ids)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

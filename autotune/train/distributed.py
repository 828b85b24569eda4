"""The processes of one training, as torchrun starts them; a single process is the ordinary case."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from autotune.errors import ConfigError
from autotune.measure.child import die_with


@dataclass(frozen=True, kw_only=True)
class DistributedContext:
    """This process's place among all; its collectives do nothing in a single process. Importable without torch."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank on this machine: the index of the CUDA device."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def rows(self, global_batch_size: int) -> slice:
        """This process's rows of a global batch; the counts differ by at most one."""
        start, stop = (rank * global_batch_size // self.world_size for rank in (self.rank, self.rank + 1))
        return slice(start, stop)

    def sum(self, values: Any) -> Any:
        """A tensor, summed in place over all processes."""
        if self.world_size > 1:
            import torch.distributed

            torch.distributed.all_reduce(values)
        return values

    def max(self, number: int) -> int:
        """The largest number of all processes. Also a barrier."""
        if self.world_size == 1:
            return number
        import torch.distributed

        shared = torch.tensor(number)  # on the CPU, so that the device keeps working
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        return int(shared)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.max(0)


def distributed_context() -> DistributedContext:
    """The context in torchrun's environment variables. Raises ConfigError if they are not numbers."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    try:
        rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in variables.items())
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK are not numbers: {error}; start it with torchrun") from None
    return DistributedContext(rank=rank, world_size=world_size, local_rank=local_rank)


@contextmanager
def process_group(context: DistributedContext) -> Iterator[None]:
    """torch's default process group for the block's duration: gloo for CPU tensors, NCCL for CUDA tensors."""
    if context.world_size == 1:
        yield
        return
    import torch.distributed

    die_with(os.getppid())  # torchrun starts each process in its own session, and may itself be killed
    if not context.is_main:
        for number in (signal.SIGTERM, signal.SIGHUP):  # a rank blocked on a dead rank 0 must be killable
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(context.local_rank)
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()

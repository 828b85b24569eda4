"""The processes of one training or trial, as torchrun starts them; a single process is the ordinary case."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from autotune.environment import part_of_cores
from autotune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DistributedContext:
    """This process's place among all; its collectives do nothing in a single process. Importable without torch."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank on this machine: the index of the CUDA device."""
    local_world_size: int = 1
    """Processes on this machine."""

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

    def any(self, mine: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self.max(int(mine)))

    def slowest(self, seconds: list[float]) -> list[float]:
        """The largest of all processes, number by number."""
        if self.world_size == 1:
            return seconds
        import torch.distributed

        shared = torch.tensor(seconds, dtype=torch.float64)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        largest: list[float] = shared.tolist()
        return largest

    def barrier(self) -> None:
        """Wait for all processes."""
        self.max(0)


def distributed_context() -> DistributedContext:
    """The context in torchrun's environment variables. Raises ConfigError if they are not numbers."""
    world = os.environ.get("WORLD_SIZE", "1")
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": world}
    try:
        found = {name.lower(): int(os.environ.get(name, default)) for name, default in variables.items()}
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK are not numbers: {error}; start it with torchrun") from None
    return DistributedContext(**found)


def die_with(parent: int) -> None:
    """End this process when its parent ends for whatever reason (man 2 prctl). Workers left behind by a killed search
    or torchrun would slow the next one down."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the call took effect
            os._exit(1)


@contextmanager
def process_group(context: DistributedContext) -> Iterator[None]:
    """torch's default process group for the block's duration: gloo for CPU tensors, NCCL for CUDA tensors.

    The processes of a machine divide its cores: a thread for each, which on the CPU runs nowhere else."""
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
    cores = part_of_cores(context.local_rank, context.local_world_size)
    torch.set_num_threads(len(cores))  # torchrun would leave one
    if cuda:
        torch.cuda.set_device(context.local_rank)
    else:
        os.sched_setaffinity(0, cores)
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()

"""The processes of one training, as torchrun starts them; one process is the ordinary case."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from autotune.errors import ConfigError
from autotune.measure.child import die_with


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Which of how many this one is. What they exchange is a no-op where there is one. Readable without torch."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    """Among those of this machine: the number of its CUDA device."""

    @property
    def first(self) -> bool:
        """The one that writes and prints."""
        return self.rank == 0

    def rows(self, global_batch_size: int) -> slice:
        """This process's part of a global batch; the parts differ by one row at most."""
        return slice(self.rank * global_batch_size // self.count, (self.rank + 1) * global_batch_size // self.count)

    def total(self, values: Any) -> Any:
        """A tensor, summed over all processes."""
        if self.count > 1:
            import torch.distributed

            torch.distributed.all_reduce(values)
        return values

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers; all of them wait for it."""
        if self.count == 1:
            return number
        import torch.distributed

        shared = torch.tensor(number)  # on the CPU: the device is left to work
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        return int(shared)


def processes() -> Processes:
    """From torchrun's environment variables. Raises ConfigError for nonsense in them."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    try:
        rank, count, local_rank = (int(os.environ.get(name, default)) for name, default in variables.items())
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK are not numbers: {error}; start it with torchrun") from None
    return Processes(rank=rank, count=count, local_rank=local_rank)


@contextmanager
def joined(group: Processes) -> Iterator[None]:
    """Within the block the processes can talk: tensors on the CPU through gloo, on CUDA through NCCL."""
    if group.count == 1:
        yield
        return
    import torch.distributed

    die_with(os.getppid())  # torchrun puts each process into a session of its own, and may itself be killed
    if not group.first:
        for number in (signal.SIGTERM, signal.SIGHUP):  # one that waits for a first one that has failed must end
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
    cards = torch.cuda.is_available()
    if cards:
        torch.cuda.set_device(group.local_rank)
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cards else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()

"""Entry of every worker process: dies with its parent, loads torch ahead of its request, then runs its module.

python -P -m autotune.measure.child PARENT autotune.measure.worker [standby] < request.json

`autotune.environment.child_command` makes this command; PARENT is the process id of who starts it.
"""

import ctypes
import importlib
import os
import runpy
import signal
import sys


def die_with(parent: int) -> None:
    """End this process when its parent ends, however that happens: what a killed search or torchrun leaves behind
    would slow the next one down (man 2 prctl)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call, which therefore does nothing
            os._exit(1)


if __name__ == "__main__":
    _, parent, module, *rest = sys.argv
    die_with(int(parent))  # before torch loads, which takes seconds
    sys.argv = [module, *rest]
    if rest == ["standby"]:
        # What torch.compile would load in the first step: twice as much as torch itself. Starts no process and
        # makes no CUDA context.
        importlib.import_module("torch._inductor.compile_fx")
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        # Taking torch down in good order takes as long as a small trial's build, and gains nothing: what a worker has
        # to say is in its files, and its process group is ended anyway.
        sys.stdout.flush()
        sys.stderr.flush()
        if isinstance(end.code, int):
            os._exit(end.code)
        raise

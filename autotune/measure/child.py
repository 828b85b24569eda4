"""Entry point of worker processes: ends with its parent, loads torch before its request arrives, runs its module.

python -P -m autotune.measure.child PARENT autotune.measure.worker < request.json

`autotune.environment.child_command` builds this command; PARENT is the parent's process id, or 0 in a process that
torchrun starts. With `standby` in the place of the module, the module's name is the first line of stdin.
"""

import importlib
import os
import runpy
import sys

from autotune.model.distributed import die_with

STANDBY = "standby"


if __name__ == "__main__":
    _, parent, module, *rest = sys.argv
    die_with(int(parent) or os.getppid())  # before torch loads, which takes seconds
    if module == STANDBY:
        # Loaded by torch.compile in the first step otherwise; takes twice as long as torch itself. Starts no process
        # and creates no CUDA context.
        importlib.import_module("torch._inductor.compile_fx")
        module = sys.stdin.readline().strip()
    sys.argv = [module, *rest]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        # A clean torch shutdown takes as long as the build of a small trial. Results are in files already, and the
        # parent kills the process group.
        sys.stdout.flush()
        sys.stderr.flush()
        if isinstance(end.code, int):
            os._exit(end.code)
        raise

"""Every kernel row on the card that this process finds: forward and backward, compiled to the end, nothing compared.

Prints one JSON object: row -> `runs`, or the reason why not.
"""

import json

import torch

from autotune.kernels import registry
from autotune.kernels.loss_auto_chunker import compile_in_chunks
from autotune.model.step import machine_of

DEVICE = torch.device("cuda:0")
TOKENS, WIDTH, WORDS, HEAD = 256, 64, 512, 64


def run(kernel: registry.Kernel, dtype: torch.dtype) -> None:
    function = registry.load(kernel)
    if kernel.name == "auto_chunker":
        function = compile_in_chunks(function, chunks=2, error=AssertionError("not chunked"))
    elif kernel.compiled_only:
        function = torch.compile(function, dynamic=False)
    if kernel.operation == "attention":
        given = [torch.zeros(2, 3, 128, HEAD, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(3)]
        result = function(*given, 0.0).float().sum()
    else:
        given = [torch.zeros(n, WIDTH, device=DEVICE, requires_grad=True) for n in (TOKENS, WORDS)]
        targets = torch.zeros(TOKENS, dtype=torch.long, device=DEVICE)
        with torch.autocast("cuda", dtype):
            result = function(*given, targets, 64)
    torch.autograd.grad(result, given)
    torch.cuda.synchronize()


def main() -> None:
    machine = machine_of(DEVICE)
    dtype = torch.bfloat16 if machine.capability >= (8, 0) else torch.float16
    found = {}
    for kernel in registry.KERNELS:
        wanted = str(dtype).removeprefix("torch.")
        reason = registry.why_unavailable(kernel, machine, dtype=wanted, head_size=HEAD)
        if reason is None:
            torch._dynamo.reset()
            try:
                run(kernel, dtype)
            except Exception as error:  # the row says what failed
                reason = f"FAILED: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        found[f"{kernel.operation} {kernel.name}"] = reason or "runs"
    print(json.dumps(found))


if __name__ == "__main__":
    main()

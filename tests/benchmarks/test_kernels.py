"""Every loss and attention row that runs here, forward and backward, interleaved in one run.

    scripts/bench -k kernels

Peaks are of what a row allocates, its gradients among them, above the inputs. On the CPU: 384 wide, 8 x 256 tokens;
on CUDA the guide's size for 24 GB: 768 wide, 32 x 1024 tokens.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from benchmarks.test_step import interleaved, ours, peak_above_state
from torch import Tensor

from autotune.kernels import registry
from autotune.kernels.loss_auto_chunker import compile_in_chunks
from autotune.measure.memory import MemoryMeter
from autotune.model.step import machine_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEQUENCES, TOKENS, WIDTH, WORDS = (32, 1024, 768, 50304) if DEVICE.type == "cuda" else (8, 256, 384, 50304)
CHUNKS = (2048, 4096, 8192) if DEVICE.type == "cuda" else (128, 256, 512)
ROUNDS = 20 if DEVICE.type == "cuda" else 3


def available(operation: registry.Operation, dtype: str) -> list[registry.Kernel]:
    """The rows that run here; the others are named with their reason."""
    found = []
    for kernel in registry.kernels(operation):
        reason = registry.why_unavailable(kernel, machine_of(DEVICE), dtype=dtype, head_size=64)
        if reason is None:
            found.append(kernel)
        else:
            print(f"{kernel.name}: {reason}")
    return found


def compiled(kernel: registry.Kernel, chunk: int) -> Callable[..., Tensor]:
    function = registry.load(kernel)
    if kernel.name == "auto_chunker":
        return compile_in_chunks(function, chunks=SEQUENCES * TOKENS // chunk, error=AssertionError("not chunked"))
    return torch.compile(function, dynamic=False)


def peak(run: Callable[[], None]) -> int:
    run()
    run()
    before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
    meter = MemoryMeter(DEVICE, lambda: 0)
    with meter.stage("steady"):
        run()
    found = meter.views()["steady"].allocated_bytes
    assert found is not None
    return found - before


def forward_and_backward(inputs: list[Tensor], dtype: str, function: Callable[[], Tensor]) -> None:
    with torch.autocast(DEVICE.type, getattr(torch, dtype), enabled=dtype != "float32"):
        result = function()
    result.float().sum().backward()
    for tensor in inputs:
        tensor.grad = None
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def table(title: str, runs: dict[str, Callable[[], None]], base: str, info: dict[str, object]) -> list[str]:
    """Print seconds and peaks as ratios to `base` and put them into `info`; returns what the rows that fail say."""
    peaks, failed = {}, []
    for name, run in runs.items():
        try:
            peaks[name] = peak(run)
        except Exception as error:  # one row is not to cost the others
            failed.append(f"{name}: {type(error).__name__}: {error}")
    seconds = interleaved({name: runs[name] for name in peaks}, ROUNDS)
    print(f"\n{title}, {torch.get_num_threads()} threads, {DEVICE.type}")
    print(f"{'':32}{'ms':>10}{'ratio':>8}{'peak MiB':>12}{'ratio':>8}")
    for name in peaks:
        slower, larger = seconds[name] / seconds[base], peaks[name] / peaks[base]
        print(f"{name:32}{1e3 * seconds[name]:10.1f}{slower:8.2f}{peaks[name] / 2**20:12.1f}{larger:8.2f}")
        info[name] = {"seconds": slower, "peak": larger}
    return failed


@pytest.mark.benchmark(group="kernels")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_losses(benchmark, dtype: str) -> None:
    torch._dynamo.reset()  # all chunk sizes and dtypes together would pass its limit of recompilations
    torch.manual_seed(0)
    hidden = torch.randn(SEQUENCES * TOKENS, WIDTH, device=DEVICE, requires_grad=True)
    weight = (0.02 * torch.randn(WORDS, WIDTH, device=DEVICE)).requires_grad_()
    targets = torch.randint(0, WORDS, (SEQUENCES * TOKENS,), device=DEVICE)
    functions: dict[str, Callable[..., Tensor]] = {}
    for kernel in available("loss", dtype):
        sizes = CHUNKS if DEVICE.type in kernel.searched else CHUNKS[1:2]
        for chunk in sizes if kernel.chunked else (1,):
            name = f"{kernel.name} {chunk}" if kernel.chunked else kernel.name
            functions[name] = partial(compiled(kernel, chunk), hidden, weight, targets, chunk)
    full = registry.load(registry.find("loss", "full"))
    functions["full, not compiled"] = partial(full, hidden, weight, targets, 1)
    inputs = [hidden, weight]
    runs = {name: partial(forward_and_backward, inputs, dtype, function) for name, function in functions.items()}
    title = f"head + loss, {SEQUENCES} x {TOKENS} tokens, {WIDTH} wide, {WORDS} words, {dtype}"
    info = benchmark.extra_info
    failed = table(title, runs, "full", info)
    benchmark.pedantic(runs[f"chunked {CHUNKS[0]}"], rounds=3)
    assert not failed
    # nanoGPT's own way of writing the loss is the one whose logits do not fit
    assert info[f"chunked {CHUNKS[1]}"]["peak"] <= 0.25 * info["full, not compiled"]["peak"]


@pytest.mark.benchmark(group="kernels")
def test_attention(benchmark) -> None:
    torch.manual_seed(0)
    shape = (SEQUENCES, WIDTH // 64, TOKENS, 64)
    inputs = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    rows = {kernel.name: compiled(kernel, 1) for kernel in available("attention", "bfloat16")}
    functions = {name: partial(row, *inputs, 0.0) for name, row in rows.items()}
    runs = {name: partial(forward_and_backward, inputs, "bfloat16", function) for name, function in functions.items()}
    failed = table(f"attention, {shape} bfloat16", runs, "sdpa", benchmark.extra_info)
    benchmark.pedantic(runs["sdpa"], rounds=3)
    assert not failed


@pytest.mark.benchmark(group="kernels")
@pytest.mark.skipif(DEVICE.type == "cuda", reason="scripts/gpu_acceptance compares whole steps there")
def test_a_chunked_step_keeps_its_speed(benchmark) -> None:
    torch._dynamo.reset()
    built = {"full": ours(loss="full")}
    built |= {f"chunked {chunk}": ours(loss="chunked", loss_chunk_tokens=chunk) for chunk in CHUNKS}
    peaks = {name: peak_above_state(*pair) for name, pair in built.items()}
    seconds = interleaved({name: run for name, (_, run) in built.items()})
    print(f"\nthe whole step, 6 layers, bfloat16, compiled, {torch.get_num_threads()} threads")
    for name in built:
        speed = seconds["full"] / seconds[name]
        benchmark.extra_info[name] = {"speed_ratio": speed, "peak_bytes": peaks[name]}
        print(f"{name:16}{speed:8.2f}x tokens/s{peaks[name] / 2**20:10.1f} MiB above state")
    benchmark.pedantic(built["full"][1], rounds=3)
    assert max(benchmark.extra_info[f"chunked {chunk}"]["speed_ratio"] for chunk in CHUNKS) >= 0.9

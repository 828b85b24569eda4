"""One step's memory against sizes that are known: to the byte where they are, and all of it explained."""

import inspect
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.kernels import loss_full
from autotune.measure.memory import MemoryMeter
from autotune.measure.runner import run_profile
from autotune.measure.types import MemoryProfile, TrialRequest, TrialResult, from_json
from autotune.measure.worker import Outcome, live_bytes, resident_batches
from autotune.model.gpt import GPT, MLP
from autotune.model.step import build
from autotune.profile.allocations import Allocation, _with_history, record
from autotune.profile.provenance import Wrapper, _inputs, our_line
from autotune.profile.recorder import profile

CPU = torch.device("cpu")
SHAPE = Shape(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=1024)
PLAN = Plan(micro_batch_size=6, compile="off", loss_chunk_tokens=64)
TOKENS = PLAN.micro_batch_size * SHAPE.block_size  # 384: not a dimension of any weight
CHUNKED = replace(PLAN, loss="chunked")


SMALL = replace(SHAPE, n_layer=1)  # to be compiled


def request(plan: Plan, shape: Shape = SHAPE, device: str = "cpu") -> TrialRequest:
    recipe = Recipe(shape=shape, global_batch_size=2 * plan.micro_batch_size)  # two micro steps
    candidate = Candidate(recipe=recipe, plan=plan)
    return TrialRequest(candidate=candidate, device=device, result_path="", measure_seconds=0.1, timeout_seconds=300)


def profile_here(plan: Plan, directory: Path, shape: Shape = SHAPE) -> MemoryProfile:
    """In this process, which saves the start of another one."""
    report = Outcome(directory / "result.json", TrialResult(status="crashed", phase="start"))
    try:
        profile(request(plan, shape), report)
    finally:
        torch.compiler.set_stance("default")
    assert report.result.status == "ok"
    return from_json(MemoryProfile, (directory / "profile.json").read_text())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> MemoryProfile:
    return profile_here(PLAN, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def chunked(tmp_path_factory: pytest.TempPathFactory) -> MemoryProfile:
    return profile_here(CHUNKED, tmp_path_factory.mktemp("chunked"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemoryProfile]:
    yield profile_here(replace(PLAN, compile="full"), tmp_path_factory.mktemp("compiled"), SMALL)
    torch._dynamo.reset()


def line_of(function: object, part: str) -> str:
    """`autotune/kernels/loss_full.py:12` of the line that holds `part`."""
    lines, first = inspect.getsourcelines(function)  # type: ignore[arg-type]
    file = inspect.getsourcefile(function)  # type: ignore[arg-type]
    assert file is not None
    return f"{file[file.rindex('autotune/') :]}:{first + next(i for i, line in enumerate(lines) if part in line)}"


def test_what_is_known_is_exact_to_the_byte(plain: MemoryProfile) -> None:
    tensors = len(list(build(request(PLAN).candidate, CPU).model.parameters()))
    assert plain.peak_bytes["parameters"] == 4 * SHAPE.parameters
    assert plain.peak_bytes["gradients"] == 4 * SHAPE.parameters
    assert plain.peak_bytes["optimizer state"] == 8 * SHAPE.parameters + 4 * tensors  # and AdamW's step counters
    assert plain.peak_bytes["batch"] == 2 * 2 * 8 * TOKENS
    matrices = SHAPE.n_layer * 12 * SHAPE.n_embd**2 + SHAPE.vocab_size * SHAPE.n_embd
    assert plain.peak_bytes["weight casts"] == 2 * matrices


def test_eager_logits_are_what_their_shapes_say(plain: MemoryProfile) -> None:
    # float32: the log-softmax, its gradient and that of the logits; the hidden states in bfloat16
    assert plain.peak_bytes["logits and loss"] == 3 * 4 * TOKENS * SHAPE.vocab_size + 2 * TOKENS * SHAPE.n_embd
    assert plain.peak_phase == "backward 2"


def test_everything_adds_up_to_the_measured_peak(plain: MemoryProfile) -> None:
    assert sum(plain.peak_bytes.values()) == plain.measured_peak_bytes
    assert plain.peak_bytes["unexplained"] == 0
    assert max(map(sum, zip(*plain.timeline.values(), strict=True))) == plain.measured_peak_bytes
    assert sum(tensor.bytes for tensor in plain.live) == plain.measured_peak_bytes
    candidate = request(PLAN).candidate
    step, batches = build(candidate, CPU), resident_batches(candidate, CPU, whole_step=False)
    meter = MemoryMeter(CPU, lambda: live_bytes(step, batches))
    step.step(batches, 0.0)
    with meter.stage("steady"):
        step.step(batches, 1e-3)
    assert meter.views()["steady"].allocated_bytes == plain.measured_peak_bytes


def test_chunks_shrink_logits_as_computed(plain: MemoryProfile, chunked: MemoryProfile) -> None:
    part = 3 * 4 * PLAN.loss_chunk_tokens * SHAPE.vocab_size
    gradients = 4 * SHAPE.vocab_size * SHAPE.n_embd + 4 * TOKENS * SHAPE.n_embd
    assert chunked.peak_bytes["logits and loss"] <= part + gradients + (1 << 16)
    assert chunked.peak_bytes["unexplained"] == 0
    before, after = (one.peak_bytes["logits and loss"] for one in (plain, chunked))
    assert before - after >= 3 * 4 * (TOKENS - PLAN.loss_chunk_tokens) * SHAPE.vocab_size - gradients - (1 << 16)


def test_checkpointing_keeps_the_blocks_inputs_only(plain: MemoryProfile, tmp_path: Path) -> None:
    found = profile_here(replace(PLAN, activation_checkpointing="block"), tmp_path)
    inputs = (SHAPE.n_layer + 1) * 4 * TOKENS * SHAPE.n_embd
    assert inputs <= found.peak_bytes["activations"] < 1.1 * inputs
    assert found.peak_bytes["activations"] < plain.peak_bytes["activations"] / 4
    assert found.peak_bytes["unexplained"] == 0


def test_largest_tensors_name_the_line_that_made_them(plain: MemoryProfile, chunked: MemoryProfile) -> None:
    logits = plain.live[0]
    assert logits.bytes == 4 * TOKENS * SHAPE.vocab_size
    assert logits.category == "logits and loss"
    assert logits.made_by == "aten::cross_entropy_loss"
    assert logits.lines == (line_of(loss_full.cross_entropy, "F.cross_entropy("),)
    made = {line: one.made_by for one in chunked.live for line in one.lines}
    assert made[line_of(MLP.forward, "F.gelu(")] in ("aten::gelu", "aten::linear")
    assert made[f"{line_of(GPT.hidden, 'def hidden')}.. hidden()"] == "aten::add"  # no call: the function is told


@pytest.mark.slow
def test_compiled_logits_are_found_by_their_source(compiled: MemoryProfile) -> None:
    assert compiled.unexplained < 0.02
    assert compiled.peak_bytes["parameters"] == 4 * SMALL.parameters
    assert compiled.peak_bytes["gradients"] == 4 * SMALL.parameters
    matrices = SMALL.n_layer * 12 * SHAPE.n_embd**2 + SHAPE.vocab_size * SHAPE.n_embd
    assert compiled.peak_bytes["weight casts"] == 2 * matrices
    logits = compiled.live[0]
    assert (logits.bytes, logits.category) == (2 * TOKENS * SHAPE.vocab_size, "logits and loss")
    assert logits.made_by == "extern_kernels.mm"
    assert logits.lines == (line_of(loss_full.cross_entropy, "F.linear("),)
    assert all(tensor.lines for tensor in compiled.live if tensor.category == "activations")


@pytest.mark.slow
def test_blocks_compiled_one_by_one_in_a_fresh_process(tmp_path: Path) -> None:
    result, found = run_profile(request(replace(CHUNKED, compile="block"), SMALL), tmp_path, tmp_path / "log")
    assert (result.status, result.phase, result.message) == ("ok", "done", "")
    assert found is not None
    assert found.unexplained < 0.02
    assert sum(found.peak_bytes.values()) == found.measured_peak_bytes
    assert [span.name for span in found.spans] == ["forward 1", "backward 1", "forward 2", "backward 2", "optimizer"]
    assert found.device_bytes is not None
    assert found.device_bytes > found.measured_peak_bytes


def test_outcomes_are_those_of_a_trial(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text("of another time")
    result, found = run_profile(request(replace(PLAN, attention="sdpa_flash")), tmp_path, tmp_path / "log")
    assert (result.status, found) == ("unsupported", None)
    assert "needs cuda, this is cpu" in result.message
    assert not (tmp_path / "profile.json").exists()


def test_a_recording_knows_size_life_and_line() -> None:
    kept: list[torch.Tensor] = []

    def work() -> None:
        kept.append(torch.ones(1000))
        torch.zeros(500)

    with_marks = partial(torch.profiler.record_function("autotune::step::forward")(work))
    found = record(with_marks, CPU, [], Path("unused"))
    first, second = found.allocations
    assert (first.bytes, first.freed, second.bytes, second.freed) == (4000, None, 2000, 2)
    assert first.frames[0].line == second.frames[0].line - 1
    assert first.operator == "aten::ones"
    assert [span.name for span in found.spans] == ["forward 1"]


WRAPPER = """\
    assert_size_stride(primals_1, (768, 256), (256, 1))
    with torch.cuda._DeviceGuard(0):
        buf0 = empty_strided_cuda((256, 768), (1, 256), torch.bfloat16)
        # Topologically Sorted Source Nodes: [linear], Original ATen: [aten._to_copy, aten.t]
        # [Provenance debug handles] triton_poi_fused__to_copy_t_0:1
        stream0 = get_raw_stream(0)
        triton_poi_fused__to_copy_t_0.run(primals_1, buf0, 196608, stream=stream0)
        buf1 = empty_strided_cuda((4096, 768), (768, 1), torch.bfloat16)
        buf2 = reinterpret_tensor(buf1, (768, 4096), (4096, 1), 0); del buf1  # reuse
        # [Provenance debug handles] extern_kernels.mm:2
        extern_kernels.mm(primals_2, buf0, out=buf2)
        # [Provenance debug handles] torch.ops.aten._flash.default:3
        buf3 = torch.ops.aten._flash.default(buf2)
""".splitlines()
TRACE = (
    'File "/a/site-packages/torch/nn/linear.py", line 9, in forward\n  File "/b/autotune/model/gpt.py", line {}, in f'
)


def test_generated_code_leads_back_to_our_lines() -> None:
    traces = {"extern_kernels.mm:2": [TRACE.format(46), TRACE.format(62), TRACE.format(46)]}
    wrapper = Wrapper(text=tuple(WRAPPER), inputs=_inputs(WRAPPER), traces=traces)
    cast, product, attention = wrapper.buffer(3), wrapper.buffer(8), wrapper.buffer(13)
    assert cast is not None
    assert (cast.kernel, cast.dtype) == ("triton_poi_fused__to_copy_t_0", "bfloat16")
    assert (cast.sizes, cast.reads, cast.lines) == ((256, 768), {(768, 256)}, ())  # no trace: no line, and no guess
    assert product is not None
    assert (product.kernel, product.lines) == (
        "extern_kernels.mm",
        ("autotune/model/gpt.py:46", "autotune/model/gpt.py:62"),
    )
    assert attention is not None
    assert (attention.kernel, attention.sizes) == ("torch.ops.aten._flash.default", None)
    assert our_line('File "/a/torch/x.py", line 3, in f') is None


def test_inputs_asserted_together_or_one_by_one_have_their_sizes() -> None:
    together = "  assert_size_stride_grouped((primals_1, primals_2), ((768, 256), (256, )), ((256, 1), (1, )), 'input')"
    both = {"primals_1": (768, 256), "primals_2": (256,)}
    assert _inputs(["assert_size_stride_grouped = torch._C._dynamo.guards.name", together]) == both
    assert _inputs([WRAPPER[0], "    assert_size_stride(primals_2, (256, ), (1, ), 'input')"]) == both


def test_cudas_history_adds_requested_bytes_and_stacks_in_order() -> None:
    made = [Allocation(address=a, bytes=512, requested_bytes=512, born=i) for i, a in enumerate((64, 128, 64, 192))]
    frame = {"filename": "autotune/model/gpt.py", "line": 7, "name": "forward"}
    history = [
        {"action": "alloc", "addr": 64, "size": 100, "frames": [frame]},
        {"action": "free_completed", "addr": 64, "size": 100, "frames": []},
        {"action": "alloc", "addr": 128, "size": 200, "frames": []},
        {"action": "alloc", "addr": 64, "size": 300, "frames": []},
    ]
    joined = _with_history(made, history)
    assert [one.requested_bytes for one in joined] == [100, 200, 300, 512]
    assert [one.bytes for one in joined] == [512] * 4
    assert joined[0].frames[0].line == 7

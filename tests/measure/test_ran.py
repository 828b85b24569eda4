"""A step that did not do what its plan names is told by the operators that ran, and the variable is named."""

import os
from collections.abc import Mapping

import pytest
import torch

from autotune.config.candidate import Plan
from autotune.errors import UnsupportedError
from autotune.measure.ran import check_ran

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GRAPH, STEP, NORM = "## Call CompiledFxGraph fx ##", "autotune::step::forward", "aten::native_layer_norm"
SDPA, FLASH = "aten::scaled_dot_product_attention", "aten::_scaled_dot_product_flash_attention"
CHUNKED = "autotune::chunked_cross_entropy"
FULL, BLOCK = {STEP: 2, GRAPH: 4}, {STEP: 2, GRAPH: 10, NORM: 2}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("TORCH", "PYTORCH_", "NVIDIA_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("plan", "ran"),
    [
        (Plan(compile="off"), {STEP: 2, NORM: 10, SDPA: 4}),
        (Plan(compile="full"), FULL),
        (Plan(compile="block"), BLOCK),
        (Plan(attention="sdpa"), {**FULL, FLASH: 4}),
        (Plan(attention="sdpa_flash"), {**FULL, FLASH: 4}),
        (Plan(attention="sdpa_math", compile="off"), {STEP: 2, NORM: 10, SDPA: 4, SDPA + "_math": 4}),
        (Plan(loss="chunked"), {**FULL, CHUNKED: 2}),
        (Plan(dtype="float32"), FULL),
    ],
)
def test_what_ran_as_planned(plan: Plan, ran: Mapping[str, int]) -> None:
    check_ran(plan, ran, CPU)


@pytest.mark.parametrize(
    ("plan", "ran", "said"),
    [
        (Plan(compile="full"), {STEP: 2, NORM: 10}, "plan.compile = 'full', but Inductor compiled nothing"),
        (Plan(compile="block"), {STEP: 2, NORM: 10}, "plan.compile = 'block', but Inductor compiled nothing"),
        (Plan(compile="full"), {**FULL, NORM: 2}, "a part of the model ran uncompiled"),
        (Plan(compile="block"), {**BLOCK, NORM: 6}, "a part of the model ran uncompiled"),
        (Plan(attention="sdpa_flash"), FULL, "_scaled_dot_product_flash_attention did not run"),
        (Plan(attention="sdpa_math"), {**FULL, FLASH: 4}, "_scaled_dot_product_flash_attention ran"),
        (Plan(attention="sdpa_efficient"), {**FULL, FLASH: 4}, "_scaled_dot_product_efficient_attention did not run"),
        (Plan(loss="chunked"), FULL, "autotune::chunked_cross_entropy did not run"),
        (Plan(loss="full"), {**FULL, CHUNKED: 2}, "autotune::chunked_cross_entropy ran"),
    ],
)
def test_what_ran_otherwise(plan: Plan, ran: Mapping[str, int], said: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{said}; no environment variable explains it") as caught:
        check_ran(plan, ran, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "blamed"),
    [
        ({"TORCHDYNAMO_DISABLE": "1"}, "unset TORCHDYNAMO_DISABLE"),
        ({"TORCH_COMPILE_DISABLE": "1", "TORCHINDUCTOR_MAX_AUTOTUNE": "1"}, "unset TORCH_COMPILE_DISABLE"),
        ({"TORCHDYNAMO_DISABLE": "0", "TORCH_COMPILE_DISABLE": "1"}, "unset TORCH_COMPILE_DISABLE"),
        ({"TORCH_COMPILE_OVERRIDE_BACKENDS": ">=0:eager"}, "unset TORCH_COMPILE_OVERRIDE_BACKENDS"),
        ({"TORCHDYNAMO_SOMETHING_NEW": "1"}, "unset TORCHDYNAMO_SOMETHING_NEW"),
    ],
)
def test_the_variable_is_named(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], blamed: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UnsupportedError, match=f"; {blamed}$"):
        check_ran(Plan(compile="full"), {STEP: 2, NORM: 10}, CPU)


@pytest.mark.parametrize(
    ("name", "value", "allocator", "refused"),
    [
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "default", True),
        ("PYTORCH_ALLOC_CONF", "max_split_size_mb:64", "default", True),
        ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1", "default", True),
        ("PYTORCH_ALLOC_CONF", "expandable_segments:True", "expandable_segments", False),
        ("PYTORCH_CUDA_ALLOC_CONF", "", "default", False),
    ],
)
def test_an_allocator_that_the_plan_does_not_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, allocator: str, refused: bool
) -> None:
    monkeypatch.setenv(name, value)
    plan = Plan(compile="full", allocator=allocator)  # type: ignore[arg-type]
    if not refused:
        check_ran(plan, FULL, CUDA)
        return
    with pytest.raises(UnsupportedError, match=f"plan.allocator = '{allocator}', but {name}"):
        check_ran(plan, FULL, CUDA)
    check_ran(plan, FULL, CPU)  # torch's allocator for the CPU reads none of these


def test_rounding_that_the_plan_does_not_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with pytest.raises(UnsupportedError, match=r"plan\.dtype = 'tfloat32', but NVIDIA_TF32_OVERRIDE = 0 forbids it"):
        check_ran(Plan(dtype="tfloat32"), FULL, CUDA)
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        if torch.full((256, 256), 1 + 2**-12).matmul(torch.ones(256, 256))[0, 0] == 256.0625:
            pytest.skip("this processor multiplies float32 in full all the same")
        with pytest.raises(UnsupportedError, match="matrix products round their factors"):
            check_ran(Plan(dtype="float32"), FULL, CPU)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before

from dataclasses import replace

import pytest
from fake_machine import CPU, CUDA, OLD_CUDA, settings
from hypothesis import given
from hypothesis import strategies as st

from autotune.config.candidate import Plan
from autotune.config.presets import guide_row
from autotune.errors import ConfigError
from autotune.search.space import (
    Space,
    baseline,
    build_space,
    candidate_at,
    canonical,
    describe_space,
    every_value,
    guide_candidate,
    values_of,
)

SPACES = {
    "cpu loss": build_space(settings(CPU, model=""), CPU),
    "cuda loss": build_space(settings(CUDA, model=""), CUDA),
    "cuda fixed": build_space(settings(CUDA), CUDA),
}


def values(space: Space) -> st.SearchStrategy[dict[str, str | int]]:
    return st.fixed_dictionaries({name: st.sampled_from(choices) for name, choices in space.choices.items()})


@pytest.mark.parametrize("name", SPACES)
@given(data=st.data())
def test_every_value_is_a_candidate_over_the_same_tokens_a_step(name: str, data: st.DataObject) -> None:
    space = SPACES[name]
    candidate = candidate_at(space, data.draw(values(space)))
    assert candidate.recipe.tokens_per_step == space.recipe.tokens_per_step
    assert candidate.plan.micro_batch_size <= candidate.recipe.global_batch_size
    assert candidate.shape.n_embd % candidate.shape.n_head == 0


@pytest.mark.parametrize("name", SPACES)
@given(data=st.data())
def test_the_canonical_form_is_final_and_takes_no_more_micro_steps(name: str, data: st.DataObject) -> None:
    space = SPACES[name]
    candidate = candidate_at(space, data.draw(values(space)))
    assert canonical(candidate) == candidate
    assert canonical(replace(candidate, plan=replace(candidate.plan, loss="full"))).plan.loss_chunk_tokens == 1024
    padded = candidate.plan.micro_batch_size * candidate.gradient_accumulation_steps
    assert padded - candidate.recipe.global_batch_size < candidate.gradient_accumulation_steps


TWO = replace(CUDA, processes=2)


def test_several_processes_may_divide_the_state() -> None:
    space = build_space(settings(TWO), TWO)
    assert space.choices["sharding"] == ("none", "optimizer", "full")
    assert "sharding" not in SPACES["cuda fixed"].choices
    assert "auto_chunker" not in space.choices["loss"]
    assert space.choices["micro_batch_size"][-1] == 256  # of 512 sequences
    first = {name: choices[0] for name, choices in space.choices.items()}
    full = candidate_at(space, first | {"sharding": "full", "compile": "full", "micro_batch_size": 192})
    assert (full.plan.compile, full.plan.processes, full.plan.micro_batch_size) == ("block", 2, 128)
    assert full.gradient_accumulation_steps == 2
    with pytest.raises(ConfigError, match="--choices sharding=full divides among processes; add for example --nproc 2"):
        settings(CUDA, choices=["sharding=full"])


@given(data=st.data())
def test_a_choice_that_a_plan_does_not_read_changes_nothing(data: st.DataObject) -> None:
    space = SPACES["cuda fixed"]
    chosen = data.draw(values(space)) | {"loss": "full"}
    chunk = data.draw(st.sampled_from([1024, 2048, 4096, 8192, 16384]))
    assert candidate_at(space, chosen).id == candidate_at(space, chosen | {"loss_chunk_tokens": chunk}).id


@given(data=st.data())
def test_candidates_of_the_space_are_filed_where_they_came_from(data: st.DataObject) -> None:
    space = SPACES["cuda loss"]
    chosen = data.draw(values(space))
    candidate = candidate_at(space, chosen)
    assert candidate_at(space, values_of(space, candidate)) == candidate


def test_a_large_micro_batch_becomes_its_share_of_the_global_batch() -> None:
    chosen = next(every_value(SPACES["cuda fixed"]))
    sizes = {wanted: candidate_at(SPACES["cuda fixed"], chosen | {"micro_batch_size": wanted}) for wanted in (12, 384)}
    assert {wanted: candidate.plan.micro_batch_size for wanted, candidate in sizes.items()} == {12: 12, 384: 256}


def test_micro_batches_are_not_only_powers_of_two() -> None:
    choices = SPACES["cuda fixed"].choices["micro_batch_size"]
    assert {1, 2, 3, 4, 6, 8, 12, 24, 48, 96, 512} <= set(choices)
    assert max(choices) == 512


def test_only_what_the_machine_can_run_is_searched() -> None:
    cpu = SPACES["cpu loss"].choices
    assert cpu["attention"] == ("sdpa", "sdpa_math")
    assert {"full", "chunked"} <= set(cpu["loss"])
    assert not {"liger", "cce", "chunked_triton"} & set(cpu["loss"])
    assert set(cpu["dtype"]) == {"float32", "bfloat16"}
    slow = replace(CPU, emulated="bfloat16")
    assert "dtype" not in build_space(settings(slow), slow).choices
    asked = settings(slow, choices=("dtype=float32,bfloat16",))
    assert build_space(asked, slow).choices["dtype"] == ("float32", "bfloat16")
    assert "allocator" not in cpu
    old = build_space(settings(OLD_CUDA), OLD_CUDA)
    assert old.plan.dtype == "float16"
    assert "dtype" not in old.choices
    assert "sdpa_flash" not in old.choices["attention"]
    new = SPACES["cuda fixed"].choices
    assert new["dtype"] == ("bfloat16", "bfloat16_residual")
    assert {"sdpa_flash", "sdpa_cudnn", "flex"} <= set(new["attention"])
    assert {"torch_linear_cross_entropy", "auto_chunker"} <= set(new["loss"])


def test_what_exists_only_compiled_is_searched_compiled() -> None:
    chosen = next(every_value(SPACES["cuda fixed"])) | {"compile": "off"}
    assert candidate_at(SPACES["cuda fixed"], chosen).plan.compile == "off"
    for change in ({"attention": "flex"}, {"loss": "auto_chunker"}):
        assert candidate_at(SPACES["cuda fixed"], chosen | change).plan.compile == "full"


def test_a_head_size_that_a_backend_cannot_run_leaves_it_out() -> None:
    odd = build_space(settings(CUDA, model="12x64x768"), CUDA)  # heads of 12
    assert odd.choices["attention"] == ("sdpa", "sdpa_math")


def test_shapes_are_searched_only_where_none_is_fixed() -> None:
    assert {"n_layer", "n_embd", "head_size", "block_size"} <= SPACES["cuda loss"].choices.keys()
    assert not {"n_layer", "n_embd", "head_size", "block_size"} & SPACES["cuda fixed"].choices.keys()


def test_the_baseline_is_exact_and_its_values_are_choices() -> None:
    asked = replace(settings(CUDA), baseline=Plan(micro_batch_size=5, dtype="float32"))
    choices = build_space(asked, CUDA).choices
    assert baseline(asked).plan.micro_batch_size == 5
    assert 5 in choices["micro_batch_size"]
    assert choices["dtype"] == ("bfloat16", "bfloat16_residual", "float32")


def test_the_guide_is_tried_on_cards_where_shapes_are_searched() -> None:
    asked = settings(CUDA, model="")
    candidate = guide_candidate(asked, CUDA)
    assert candidate is not None
    assert candidate.shape == guide_row(CUDA.device_memory_bytes).shape
    assert candidate.recipe.tokens_per_step == asked.recipe.tokens_per_step
    assert guide_candidate(settings(CUDA), CUDA) is None
    assert guide_candidate(settings(CPU, model=""), CPU) is None


def test_a_candidate_outside_the_space_is_filed_at_its_neighbours() -> None:
    asked = settings(replace(CUDA, device_memory_bytes=48 << 30), model="")
    guide = guide_candidate(asked, replace(CUDA, device_memory_bytes=48 << 30))
    assert guide is not None
    assert guide.shape.n_embd == 672
    filed = values_of(SPACES["cuda loss"], guide)
    assert (filed["n_embd"], filed["head_size"]) == (768, 64)


def test_the_size_is_the_number_of_combinations() -> None:
    space = SPACES["cuda fixed"]
    assert space.size == sum(1 for _ in every_value(space))
    assert f"{space.size:,} combinations" in describe_space(space)

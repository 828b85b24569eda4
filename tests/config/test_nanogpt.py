from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.config.nanogpt import DEFAULTS, format_nanogpt, parse_nanogpt, read_nanogpt
from autotune.errors import ConfigError

GUIDE = """
# best config for 24 GB
out_dir='out-fineweb-160M'
eval_interval=1000
eval_iters=200
log_interval=100
always_save_checkpoint=True
wandb_log=True
wandb_project='fineweb'
wandb_run_name='160M-fineweb'
dataset='fineweb'
gradient_accumulation_steps=16
batch_size=32
block_size=1024
n_layer=10
n_head=10
n_embd=640
dropout=0.0
learning_rate=6e-4
max_iters=50000
warmup_iters=2000
lr_decay_iters=max_iters
min_lr=6e-5
beta2=0.99
"""


def test_the_guides_file_becomes_its_recipe_and_baseline() -> None:
    read = parse_nanogpt(GUIDE, "fineweb.py", "cuda:0", (8, 9))
    assert read.recipe.shape == Shape(n_layer=10, n_head=10, n_embd=640)
    assert read.recipe.global_batch_size == 512
    assert (read.recipe.max_iters, read.recipe.lr_decay_iters, read.recipe.beta2) == (50000, 50000, 0.99)
    assert read.recipe.max_tokens == 26_214_400_000
    assert read.plan == Plan(micro_batch_size=32, compile="full", dtype="bfloat16")
    looked = read.recipe
    assert (looked.eval_interval, looked.eval_iters, looked.log_interval) == (1000, 200, 100)
    assert (looked.wandb_log, looked.wandb_project, looked.wandb_run_name) == (True, "fineweb", "160M-fineweb")
    assert looked.always_save_checkpoint
    assert not parse_nanogpt("always_save_checkpoint = False", "x.py", "cpu").recipe.always_save_checkpoint


def test_what_is_left_out_is_train_pys_default() -> None:
    read = parse_nanogpt("", "empty.py", "cuda:0", (8, 0))
    assert read.recipe.global_batch_size == 480
    assert read.recipe.learning_rate == 6e-4
    assert (read.recipe.max_iters, read.recipe.warmup_iters, read.recipe.schedule) == (600000, 2000, "cosine")
    assert (read.plan.micro_batch_size, read.plan.loss, read.plan.compile) == (12, "full", "full")


@pytest.mark.parametrize(
    ("device", "capability", "written", "dtype"),
    [
        ("cuda:0", (8, 0), "", "bfloat16"),
        ("cuda:0", (7, 5), "", "float16"),
        ("cuda:0", (8, 0), "dtype = 'float32'", "tfloat32"),
        ("cpu", (), "", "float32"),
        ("cpu", (), "dtype = 'float16'", "float32"),
        ("cpu", (), "dtype = 'bfloat16'", "float32"),
    ],
)
def test_the_dtype_is_what_train_py_would_use(
    device: str, capability: tuple[int, ...], written: str, dtype: str
) -> None:
    assert parse_nanogpt(written, "x.py", device, capability).plan.dtype == dtype


def test_without_decay_there_is_no_warmup_either() -> None:
    recipe = parse_nanogpt("decay_lr = False", "x.py", "cpu").recipe
    assert (recipe.schedule, recipe.warmup_iters) == ("constant", 0)


def test_arithmetic_is_computed() -> None:
    text = '"""a docstring"""\ngradient_accumulation_steps = 5 * 8\nmax_iters = 2**10 // 2 - -1\n'
    text += "min_lr = learning_rate / 10"
    recipe = parse_nanogpt(text, "x.py", "cpu").recipe
    assert (recipe.global_batch_size, recipe.max_iters) == (480, 513)
    assert recipe.min_lr == pytest.approx(6e-5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import time", "line 1: only `key = value` is read, code is not run"),
        ("n_layer = 2\nwandb_run_name = 'ft-' + str(time.time())", "line 2: only literals and arithmetic"),
        ("n_layer = __import__('os').getpid()", "line 1: only literals and arithmetic"),
        ("for x in []: pass", "line 1: only `key = value`"),
        ("n_layers = 12", "did you mean 'n_layer'"),
        ("a = b = 1", "is not a key"),
        ("n_layer = 'twelve'", "must be of type int"),
        ("compile = 1", "must be of type bool"),
        ("n_layer = 2.5", "whole number above 0"),
        ("batch_size = 0", "whole number above 0"),
        ("dropout = -1", "not allowed"),
        ("max_iters = 9**9**9", "above 64"),
        ("max_iters = 1e18 * 10", "beyond"),
        ("learning_rate = 1e999", "not allowed"),
        ("learning_rate = 1/0", "division by zero"),
        ("n_layer = (", "line 1"),
        ("n_layer = 'a' * 10**10", "arithmetic is for numbers"),
        ("init_from = 'gpt2'", "set it to 'scratch'"),
        ("n_embd = 100\nn_head = 3", "not a multiple"),
        ("dtype = 'int8'", "is not known"),
        ("dtype = 'bfloat16_residual'", "is not known"),
        ("\0", "write key = value lines"),
        ("n_layer = " + "-" * 100_000 + "1", "x.py"),
    ],
)
def test_what_is_not_a_plain_config_is_refused_on_one_line(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")) as caught:
        parse_nanogpt(text, "x.py", "cpu")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.py does not exist; give a nanoGPT config file"):
        read_nanogpt(tmp_path / "none.py", "cpu")


shapes = st.builds(
    lambda heads, head_size, **rest: Shape(n_head=heads, n_embd=heads * head_size, **rest),
    heads=st.integers(1, 16),
    head_size=st.sampled_from([32, 64, 128]),
    n_layer=st.integers(1, 48),
    block_size=st.sampled_from([64, 256, 1024]),
    bias=st.booleans(),
    dropout=st.floats(0, 0.9),
)
rates = st.floats(1e-6, 1.0)
recipes = st.builds(
    Recipe,
    shape=shapes,
    global_batch_size=st.integers(1, 1024),
    max_iters=st.integers(1, 10**6),
    learning_rate=rates,
    min_lr=rates,
    schedule=st.just("cosine"),
    warmup_iters=st.integers(0, 5000),
    lr_decay_iters=st.integers(1, 10**6),
    weight_decay=rates,
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.99),
    grad_clip=st.floats(0, 5),
    eval_interval=st.integers(1, 5000),
    eval_iters=st.integers(1, 500),
    log_interval=st.integers(1, 500),
)


@given(recipe=recipes, micro=st.integers(1, 1024), compiled=st.sampled_from(["off", "full"]))
def test_what_is_written_reads_as_the_same_recipe(recipe: Recipe, micro: int, compiled: str) -> None:
    micro = min(micro, recipe.global_batch_size)
    plan = Plan(micro_batch_size=micro, compile=compiled)  # type: ignore[arg-type]
    text = format_nanogpt(Candidate(recipe=recipe, plan=plan), "A heading.", "cuda:0")
    read = parse_nanogpt(text, "best_nanogpt.py", "cuda:0", (8, 0))
    # nanoGPT has no name for these
    expected = replace(recipe, eval_batch_size=read.plan.micro_batch_size, checkpoint_interval=recipe.eval_interval)
    assert read.recipe == expected
    assert read.plan.compile == plan.compile
    assert read.plan.micro_batch_size <= micro


def test_what_train_py_cannot_do_is_said_in_comments() -> None:
    recipe = Recipe(global_batch_size=512)
    plan = Plan(micro_batch_size=47, loss="chunked", activation_checkpointing="block", compile="block")
    text = format_nanogpt(Candidate(recipe=recipe, plan=plan), "A heading.", "cuda:0")
    assert "batch_size = 32\n" in text
    assert "47 does not divide the global batch of 512" in text
    assert "nanoGPT has no loss = chunked, activation_checkpointing = block, compile = block: expect" in text


def test_a_residual_stream_in_bfloat16_is_lost_in_words() -> None:
    text = format_nanogpt(Candidate(plan=Plan(dtype="bfloat16_residual")), "", "cuda:0")
    assert "nanoGPT has no dtype = bfloat16_residual: expect" in text
    assert "\ndtype = 'bfloat16'\n" in text


def test_train_py_knows_every_key_and_its_type() -> None:
    """What nanoGPT's train.py asks of a config file (karpathy/nanoGPT, train.py and configurator.py, 3adf61e1): it
    executes the file among its own globals, so that a name it does not know would be ignored in silence."""
    known: dict[str, object] = dict(DEFAULTS)
    scope: dict[str, object] = {}
    for device in ("cpu", "cuda:0"):
        exec(format_nanogpt(Candidate(), "A heading.", device), {"__builtins__": {}}, scope)
        assert scope.keys() <= known.keys()
        assert {name: type(value) for name, value in scope.items()} == {name: type(known[name]) for name in scope}
        assert scope["device"] == device
        assert scope["dtype"] in ("float32", "bfloat16", "float16")
    assert (scope["n_layer"], scope["compile"]) == (12, True)


def test_data_that_train_py_cannot_read_is_said(tmp_path: Path) -> None:
    candidate = Candidate(recipe=Recipe(data=str(tmp_path)))
    assert f"Set dataset: nanoGPT reads a train.bin and a val.bin, {tmp_path} holds" in format_nanogpt(
        candidate, "", "cpu"
    )
    (tmp_path / "train.bin").touch()
    assert f"dataset = {str(tmp_path)!r}" in format_nanogpt(candidate, "", "cpu")

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_machine import CPU, Machine
from hypothesis import given
from hypothesis import strategies as st

from autotune.cli import run
from autotune.config.candidate import Candidate, Checkpointing, Evaluation, Plan, Recipe, Shape, Tracking
from autotune.config.nanogpt import DEFAULTS, format_nanogpt, parse_nanogpt, read_nanogpt
from autotune.config.search_settings import read_settings, write_settings
from autotune.errors import ConfigError
from autotune.search.loop import rebuild, search
from autotune.search.resolve import resolve

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
    file = parse_nanogpt(GUIDE, "fineweb.py", "cuda:0", (8, 9))
    read = file.candidate
    assert (file.dataset, file.out_dir, file.vocab_size_given, file.notes) == (
        "fineweb", "out-fineweb-160M", False, (),
    )  # fmt: skip
    assert read.recipe.shape == Shape(n_layer=10, n_head=10, n_embd=640)
    assert read.recipe.global_batch_size == 512
    assert (read.recipe.max_iters, read.recipe.lr_decay_iters, read.recipe.beta2) == (50000, 50000, 0.99)
    assert read.recipe.max_tokens == 26_214_400_000
    assert read.plan == Plan(micro_batch_size=32, compile="full", dtype="bfloat16")
    assert read.evaluation == Evaluation(eval_interval=1000, eval_iters=200, eval_batch_size=32)
    assert read.tracking == Tracking(
        log_interval=100, wandb_log=True, wandb_project="fineweb", wandb_run_name="160M-fineweb"
    )
    assert read.checkpointing == Checkpointing(checkpoint_interval=1000)
    rarely = parse_nanogpt("always_save_checkpoint = False", "x.py", "cpu").candidate.checkpointing
    assert not rarely.always_save_checkpoint


def test_missing_keys_have_the_defaults_of_train_py() -> None:
    read = parse_nanogpt("", "empty.py", "cuda:0", (8, 0)).candidate
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
    assert parse_nanogpt(written, "x.py", device, capability).candidate.plan.dtype == dtype


def test_without_decay_there_is_no_warmup_either() -> None:
    recipe = parse_nanogpt("decay_lr = False", "x.py", "cpu").candidate.recipe
    assert (recipe.schedule, recipe.warmup_iters) == ("constant", 0)


def test_arithmetic_is_computed() -> None:
    text = '"""a docstring"""\ngradient_accumulation_steps = 5 * 8\nmax_iters = 2**10 // 2 - -1\n'
    text += "min_lr = learning_rate / 10"
    recipe = parse_nanogpt(text, "x.py", "cpu").candidate.recipe
    assert (recipe.global_batch_size, recipe.max_iters) == (480, 513)
    assert recipe.min_lr == pytest.approx(6e-5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("n_layer = __import__('os').getpid()", "line 1: n_layer: only literals and arithmetic"),
        ("for x in []: pass", "line 1: only `key = value`"),
        ("if True: n_layer = 2", "line 1: only `key = value`"),
        ("def f(): pass", "line 1: only `key = value`"),
        ("exec(open('base.py').read())", "line 1: only `key = value`"),
        ("import os; os.environ['X'] = '1'", "line 1: only `key = value`"),
        ("from base import *", "line 1: the values of `from base import *` are not read"),
        ("from base import n_layer", "line 1: the values of `from base import n_layer` are not read"),
        ("from base import n\nn_layer = n", "line 2: n_layer: only literals"),
        ("n_layer, n_head = f()", "line 1: only `key = value`"),
        ("n_layer = 0x" + 10000 * "f", "line 1: n_layer: the value is beyond 1e"),
        ("n_layer = 'a' + " + 2000 * "'a' + " + "'a'", "line 1: n_layer: "),
        ("use_rope = True", "use_rope is not a key of nanoGPT's train.py; remove it"),
        ("batch_size = 10**18\ngradient_accumulation_steps = 100", "beyond 1e"),
        ("n_layers = 12", "did you mean 'n_layer'"),
        ("a = b = 1", "is not a key"),
        ("n_layer = 'twelve'", "must be of type int"),
        ("compile = 1", "must be of type bool"),
        ("n_layer = 2.5", "whole number above 0"),
        ("batch_size = 0", "whole number above 0"),
        ("dropout = -1", "not allowed"),
        ("max_iters = 9**9**9", "above 64"),
        ("max_iters = 1e18 * 10", "beyond"),
        ("learning_rate = 1e999", "line 1: learning_rate: the value is beyond"),
        ("learning_rate = 1/0", "division by zero"),
        ("n_layer = (", "line 1"),
        ("n_layer = 'a' * 10**10", "arithmetic is for numbers"),
        ("init_from = 'resume'", "line 1: init_from = 'resume' takes the shape from a checkpoint; set it to 'scratch'"),
        ("init_from = 'gpt2'\nblock_size = 2048", "line 2: block_size = 2048 is more than gpt2's 1024"),
        ("n_embd = 100\nn_head = 3", "not a multiple"),
        ("dtype = 'int8'", "is not known"),
        ("dtype = 'bfloat16_residual'", "is not known"),
        ("\0", "write key = value lines"),
        ("n_layer = " + "-" * 100_000 + "1", "x.py"),
    ],
)
def test_what_is_not_a_plain_config_is_refused_on_one_line(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        parse_nanogpt(text, "x.py", "cpu")
    assert "\n" not in str(caught.value)


def test_every_problem_of_a_file_is_in_one_message() -> None:
    text = (
        "n_layers = 12\nif True: pass\nn_head, n_embd = 3, 100\ndtype = 'int8'\ndropout = 1.5\nbeta1 = 1\n"
        "import time\nlearning_rate = 0\nbatch_size = time.time()\nmax_iters = 'many'\n"
    )
    with pytest.raises(ConfigError) as caught:
        parse_nanogpt(text, "x.py", "cpu")
    count, *problems = re.split(r"(?:: |; )(?=line \d)", str(caught.value))
    assert count == "9 problems in x.py"
    assert [problem.partition(":")[0] for problem in problems] == [f"line {n}" for n in (1, 2, 3, 4, 5, 6, 8, 9, 10)]
    assert problems[2] == "line 3: n_embd = 100 is not a multiple of n_head = 3; change one of them"


def test_the_message_of_a_hopeless_file_is_bounded() -> None:
    with pytest.raises(ConfigError, match=r"^300 problems in x\.py: .*; and 280 more$") as caught:
        parse_nanogpt("n_layers = 1\n" * 300, "x.py", "cpu")
    assert len(str(caught.value)) < 3000


def test_nanogpts_own_finetuning_file_is_read_with_notes() -> None:
    """config/finetune_shakespeare.py, with typical additions."""
    text = """import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False # feel free to turn on
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())
wandb_entity = None

dataset = 'shakespeare'
init_from = 'gpt2-xl' # this is the largest GPT-2 model
always_save_checkpoint = False
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False
seed = 1337
device = 'cuda'
eval_only = True
print('configured')
"""
    file = parse_nanogpt(text, "ft.py", "cpu")
    recipe = file.candidate.recipe
    assert recipe.shape == Shape(n_layer=48, n_head=25, n_embd=1600, vocab_size=50257, bias=True)
    assert file.candidate.checkpointing.init_from == "gpt2-xl"
    tracking = file.candidate.tracking
    assert (tracking.wandb_run_name, tracking.wandb_project) == ("", "shakespeare")
    assert (file.vocab_size_given, file.dataset, file.out_dir) == (True, "shakespeare", "out-shakespeare")
    notes = "\n".join(file.notes)
    for said in ("line 8: wandb chooses the run's name", "line 12: gpt2-xl's shape is measured, 48x25x1600",
                 "line 20: device = 'cuda' is skipped: cpu is measured", "line 21: eval_only = True"):  # fmt: skip
        assert f"ft.py, {said}" in notes
    passed = "skipped, as it cannot change a step: `import time` (line 1), wandb_entity (line 9), seed (line 19), "
    assert passed + "`print('configured')` (line 22)" in notes
    again = format_nanogpt(file.candidate, "", "cpu", dataset=file.dataset, out_dir=file.out_dir)
    assert parse_nanogpt(again, "again.py", "cpu").candidate.shape == recipe.shape
    assert "init_from = 'gpt2-xl'" in again


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("wandb_run_name = None", "line 1: wandb chooses the run's name"),
        ("eval_interval = 'often'", "line 1: eval_interval stays 2000, which changes no step"),
        ("wandb_log = 1", "line 1: wandb_log stays False"),
        ("out_dir = os.environ['OUT']", "line 1: out_dir stays 'out'"),
        ("dataset = 'a\\nb'", "line 1: dataset stays 'openwebtext'"),
        ("backend = None", "line 1: backend stays 'nccl'"),
        ("import os, sys", "`import os, sys` (line 1)"),
        ("from pathlib import Path", "`from pathlib import Path` (line 1)"),
        ("num_samples = 3", "num_samples (line 1)"),
        ("torch.manual_seed(3)", "`torch.manual_seed(3)` (line 1)"),
        ("wandb_tags = ['a']", "wandb_tags (line 1)"),
    ],
)
def test_what_changes_no_step_is_a_note(line: str, note: str) -> None:
    plain, noted = (parse_nanogpt(text, "x.py", "cpu") for text in ("n_layer = 2", line + "\nn_layer = 2"))
    assert len(noted.notes) == 1
    assert note in noted.notes[0]
    assert noted.candidate.id == plain.candidate.id


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("n_layer: int = 2", {"n_layer": 2}),
        ("n_layer: int", {}),
        ("n_layer, n_head = 2, 4", {"n_layer": 2, "n_head": 4}),
        ("n_layer = n_head = 6", {"n_layer": 6, "n_head": 6}),
        ("n = 6\nn_layer = n * 2; n_head = (n)", {"n_layer": 12, "n_head": 6}),
        ("n_layer = 2\nn_layer *= 2", {"n_layer": 4}),
        ("n_embd = 1_536", {"n_embd": 1536}),
        ("dropout = 1e-1", {"dropout": 0.1}),
        ("block_size = 2e3", {"block_size": 2000}),
        ("vocab_size = 8192", {"vocab_size": 8192}),
        ("vocab_size = None", {}),
        ("\ufeffn_layer = 2\r\nn_head = 4\r\n", {"n_layer": 2, "n_head": 4}),
        ("wandb_run_name = 'run' + '-a'", {}),
        ("out_dir = 'C:\\Work'", {}),
    ],
)
def test_ways_to_write_a_value(tmp_path: Path, text: str, shape: dict[str, float]) -> None:
    file = tmp_path / "config.py"
    file.write_bytes(text.encode())
    read = read_nanogpt(file, "cpu")
    assert read.candidate.shape == replace(Shape(), **shape)  # type: ignore[arg-type]
    assert read.vocab_size_given == ("vocab_size" in shape)
    assert read.notes == ()


def test_strings_are_concatenated() -> None:
    text = "n_layer = 2\nwandb_run_name = 'run' + '-a'\nout_dir = f'out-{n_layer}-' 'x'"
    read = parse_nanogpt(text, "x.py", "cpu")
    assert (read.candidate.tracking.wandb_run_name, read.out_dir, read.notes) == ("run-a", "out-2-x", ())


def test_the_dtype_that_train_py_computes_is_its_default() -> None:
    text = (
        "dtype = 'bfloat16' if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else 'float16' # 'float32'"
    )
    assert parse_nanogpt(text, "x.py", "cuda:0", (7, 5)).candidate.plan.dtype == "float16"


def dry_run(capsys: pytest.CaptureFixture[str], file: Path, *more: str) -> tuple[str, str]:
    assert run(["search", "--from", str(file), "--device", "cpu", "--dry-run", *more]) == 0
    told = capsys.readouterr()
    return told.out, told.err


@pytest.mark.parametrize(
    "place",
    ["data", pytest.param("config/../data", marks=pytest.mark.slow), pytest.param("work/data", marks=pytest.mark.slow)],
)
def test_the_files_dataset_is_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """data/<dataset> in the working folder, as in nanoGPT; else beside the file or its config/."""
    for folder in ("config", "work"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    file = (tmp_path if place == "data" else tmp_path / "config") / "mine.py"
    file.write_text(
        "import time\ndataset = 'chars'\nout_dir = 'out-chars'\n" + "n_layer = n_head = 2\nn_embd = 64\n"
        "block_size = 16\nbatch_size = 4\ngradient_accumulation_steps = 2\ncompile = False\n"
    )
    out, told = dry_run(capsys, file)
    assert re.search(r"data +synthetic tokens", out)
    assert "note: " in told
    assert "dataset 'chars' has no folder of tokens here (data/chars); synthetic tokens are measured" in told
    assert "skipped, as it cannot change a step: `import time` (line 1)" in told
    folder = (tmp_path / place / "chars").resolve()
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        (np.arange(400) % 65).astype("<u2").tofile(folder / f"{split}.bin")
    out, told = dry_run(capsys, file)
    assert re.search(rf"data +{folder}\n", out)
    assert f"dataset 'chars' is {folder}, which is measured" in told
    asked = resolve(CPU, from_file=file)
    assert (asked.recipe.data, asked.dataset, asked.out_dir) == (str(folder), "chars", "out-chars")
    write_settings(tmp_path / "search.toml", asked)
    assert read_settings(tmp_path / "search.toml") == asked
    other = tmp_path / "other"
    folder.rename(other)
    asked = resolve(CPU, from_file=file, data=other)
    assert (asked.recipe.data, asked.dataset, asked.out_dir) == (str(other), "", "out-chars")


def test_a_run_and_its_rebuilding_keep_the_files_dataset_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data/chars").mkdir(parents=True)
    for split in ("train", "val"):
        (np.arange(400) % 65).astype("<u2").tofile(f"data/chars/{split}.bin")
    Path("mine.py").write_text(
        "dataset = 'chars'\nout_dir = 'out-chars'\nvocab_size = 128\nn_layer = n_head = 2\nn_embd = 64\n"
        "block_size = 16\nbatch_size = 4\ngradient_accumulation_steps = 2\n"
    )
    machine = Machine()
    asked = resolve(CPU, from_file=Path("mine.py"), budget="60s")
    search(asked, Path("run"), CPU, measure=machine.measure, clock=machine.clock)
    written = Path("run/best_nanogpt.py").read_text()
    read = parse_nanogpt(written, "best_nanogpt.py", "cpu")
    assert (read.dataset, read.out_dir, read.candidate.shape.vocab_size) == ("chars", "out-chars", 128)
    for name in ("best_nanogpt.py", "search.toml"):
        (Path("run") / name).unlink()
    rebuild(Path("run"))
    assert Path("run/best_nanogpt.py").read_text() == written
    assert read_settings(Path("run/search.toml")) == asked


def test_a_search_toml_without_them_is_read(tmp_path: Path) -> None:
    """A run of an earlier version, which did not keep them."""
    asked = resolve(CPU, model="2x2x64")
    write_settings(tmp_path / "search.toml", asked)
    lines = (tmp_path / "search.toml").read_text().splitlines(keepends=True)
    older = [line for line in lines if line.partition(" ")[0] not in ("dataset", "out_dir", "notes")]
    assert len(older) == len(lines) - 3
    (tmp_path / "search.toml").write_text("".join(older))
    assert read_settings(tmp_path / "search.toml") == asked


def test_data_and_folder_go_back_to_nanogpt(tmp_path: Path) -> None:
    (tmp_path / "train.bin").touch()
    candidate = Candidate(recipe=Recipe(data=str(tmp_path), shape=Shape(vocab_size=65)))
    text = format_nanogpt(candidate, "", "cpu", dataset="chars", out_dir="out-chars")
    assert "\ndataset = 'chars'\n" in text
    assert "\nout_dir = 'out-chars'\n" in text
    assert "from meta.pkl only" in text
    (tmp_path / "meta.pkl").touch()
    text = format_nanogpt(candidate, "", "cpu", dataset="chars", out_dir="out-chars")
    assert "from meta.pkl only" not in text
    read = parse_nanogpt(text, "again.py", "cpu")
    assert (read.dataset, read.out_dir, read.candidate.shape.vocab_size) == ("chars", "out-chars", 65)


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
)
evaluations = st.builds(Evaluation, eval_interval=st.integers(1, 5000), eval_iters=st.integers(1, 500))
trackings = st.builds(Tracking, log_interval=st.integers(1, 500))


@given(recipes, evaluations, trackings, st.integers(1, 1024), st.sampled_from(["off", "full"]))
def test_what_is_written_reads_as_the_same_recipe(
    recipe: Recipe, evaluation: Evaluation, tracking: Tracking, micro: int, compiled: str
) -> None:
    micro = min(micro, recipe.global_batch_size)
    plan = Plan(micro_batch_size=micro, compile=compiled)  # type: ignore[arg-type]
    candidate = Candidate(recipe=recipe, plan=plan, evaluation=evaluation, tracking=tracking)
    text = format_nanogpt(candidate, "A heading.", "cuda:0")
    read = parse_nanogpt(text, "best_nanogpt.py", "cuda:0", (8, 0)).candidate
    # nanoGPT has no name for these
    assert read.evaluation == replace(evaluation, eval_batch_size=read.plan.micro_batch_size)
    assert read.checkpointing == Checkpointing(checkpoint_interval=evaluation.eval_interval)
    assert (read.recipe, read.tracking) == (recipe, tracking)
    assert read.plan.compile == plan.compile
    assert read.plan.micro_batch_size <= micro


def test_what_train_py_cannot_do_is_said_in_comments() -> None:
    recipe = Recipe(global_batch_size=512, max_iters=77, train_seconds=180.0)
    plan = Plan(micro_batch_size=47, loss="chunked", activation_checkpointing="block", compile="block")
    text = format_nanogpt(Candidate(recipe=recipe, plan=plan), "A heading.", "cuda:0")
    assert "batch_size = 32\n" in text
    assert "nanoGPT has no train_seconds: max_iters is what was planned for 180 s." in text
    assert "\nmax_iters = 77\n" in text
    assert "47 does not divide the global batch of 512" in text
    assert "nanoGPT has no loss = chunked, activation_checkpointing = block, compile = block: expect" in text


def test_the_export_names_a_residual_stream_in_bfloat16() -> None:
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
    text = format_nanogpt(candidate, "", "cpu")
    assert f"nanoGPT reads a train.bin and a val.bin, {str(tmp_path)!r} holds shards: set dataset." in text
    (tmp_path / "train.bin").touch()
    assert f"dataset = {str(tmp_path)!r}" in format_nanogpt(candidate, "", "cpu")


def test_processes_divide_the_accumulation_that_is_written() -> None:
    plan = Plan(micro_batch_size=8, compile="full", processes=4)
    text = format_nanogpt(Candidate(recipe=Recipe(global_batch_size=16), plan=plan), "", "cuda:0")
    assert "batch_size = 4\n" in text
    assert "gradient_accumulation_steps = 4\n" in text
    assert "nanoGPT has no" not in text

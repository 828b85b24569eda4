import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_machine import CPU, CUDA, OLD_CUDA
from hypothesis import given
from hypothesis import strategies as st

from autotune.config.candidate import Candidate, Plan, Recipe, Shape, parse_shape
from autotune.config.search_settings import read_settings, write_settings
from autotune.config.toml import CandidateFile, format_candidate
from autotune.data.shards import write_shard
from autotune.errors import ConfigError, DataError
from autotune.search.resolve import describe_settings, resolve
from autotune.units import GIB


def test_defaults_on_a_card() -> None:
    asked = resolve(CUDA)
    assert (asked.objective, asked.search_shape, asked.budget_seconds) == ("loss", True, 3600)
    assert asked.recipe.tokens_per_step == 524288
    assert (asked.train_seconds, asked.train_tokens) == (86400, None)
    assert 23 * GIB < asked.memory_limit_bytes < 24 * GIB
    assert (asked.baseline.micro_batch_size, asked.baseline.dtype, asked.baseline.compile) == (12, "bfloat16", "full")
    assert resolve(OLD_CUDA).baseline.dtype == "float16"


def test_defaults_on_the_cpu() -> None:
    asked = resolve(CPU)
    assert asked.recipe.tokens_per_step == 4096
    assert asked.train_seconds == 120
    assert asked.memory_limit_bytes == int(0.8 * 16 * GIB)
    assert asked.baseline.dtype == "float32"  # nanoGPT does not autocast on the CPU


def test_a_model_fixes_the_shape_and_asks_for_throughput() -> None:
    asked = resolve(CUDA, model="24x16x1024x512")
    assert asked.recipe.shape == Shape(n_layer=24, n_head=16, n_embd=1024, block_size=512)
    assert (asked.objective, asked.search_shape) == ("throughput", False)
    assert asked.recipe.tokens_per_step == 524288
    assert not asked.keep_schedule


def test_a_nanogpt_file_is_recipe_and_baseline(tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_text("batch_size = 3\ngradient_accumulation_steps = 2\nmax_iters = 77\nlearning_rate = 1e-3\n")
    asked = resolve(CUDA, from_file=file)
    assert (asked.recipe.max_iters, asked.recipe.learning_rate, asked.keep_schedule) == (77, 1e-3, True)
    assert (asked.baseline.micro_batch_size, asked.recipe.global_batch_size) == (3, 6)
    assert asked.baseline_source == str(file)
    assert not resolve(CUDA, from_file=file, train_tokens="1B").keep_schedule


def test_a_race_for_the_files_shape_is_as_long_as_its_training(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_shard(tmp_path / f"x_{split}_000000.bin", np.arange(3000))
    file = tmp_path / "mine.toml"
    recipe = Recipe(global_batch_size=2, max_iters=77)
    for timed, expected in ((0.0, (None, 77 * recipe.tokens_per_step)), (180.0, (180.0, None))):
        candidate = Candidate(recipe=replace(recipe, train_seconds=timed), plan=Plan(micro_batch_size=2))
        file.write_text(format_candidate(CandidateFile(candidate=candidate)))
        asked = resolve(CUDA, from_file=file, objective="loss", data=tmp_path)
        assert (asked.race, asked.search_shape, asked.own_rate) == ("on", False, True)
        assert (asked.train_seconds, asked.train_tokens) == expected


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"model": "12x12x768", "from_file": Path("x.py")}, "--model 12x12x768 and --from x.py"),
        ({"train_time": "1h", "train_tokens": "1B"}, "exclude each other"),
        ({"objective": "throughput"}, "needs a shape"),
        ({"objective": "loss", "model": "12x12x768"}, "but --model fixes the shape; add --data DIR for a race"),
        ({"objective": "speed"}, "'speed' is not known"),
        ({"budget": "0"}, "leaves no time"),
        ({"budget": "soon"}, "not understood"),
        ({"train_time": "0s"}, "leaves nothing to train"),
        ({"train_tokens": "0"}, "leaves nothing to train"),
        ({"model": "12x768"}, "layers x heads x width"),
        ({"model": "12x5x768"}, "not a multiple"),
        ({"model": "0x12x768"}, "smallest value is 1"),
        ({"memory_limit": "25GiB"}, "more than Paper Card has"),
        ({"memory_limit": "0"}, "leaves no memory"),
        ({"data": Path("/nowhere/data")}, "autotune data prepare"),
        ({"law": "chinchila"}, "scaling law"),
        ({"seed": -1}, "--seed"),
        ({"from_file": Path("/nowhere/x.py")}, "does not exist; give a nanoGPT config file"),
        ({"choices": ["compile"]}, "write for example compile=off,block"),
        ({"choices": ["compile=off,,"]}, "is not understood"),
        ({"choices": ["compiler=off"]}, "did you mean 'compile'"),
        ({"choices": ["compile=of"]}, "compile = 'of' is not among what is searched here; choose from off, full,"),
        ({"choices": ["micro_batch_size=5"]}, "choose from 1, 2, 3, 4, 6, 8, "),
    ],
)
def test_what_is_not_allowed_is_refused_on_one_line(words: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        resolve(CUDA, **words)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [{}, {"model": "6x6x384"}, {"train_tokens": "1B"}, {"choices": ["compile=off"]}])
@pytest.mark.parametrize("environment", [CPU, CUDA])
def test_settings_come_back_from_their_file(tmp_path: Path, environment: object, words: dict[str, str]) -> None:
    asked = resolve(environment, **words)  # type: ignore[arg-type]
    write_settings(tmp_path / "search.toml", asked)
    assert read_settings(tmp_path / "search.toml") == asked


def test_a_file_that_is_not_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_settings(tmp_path / "search.toml")
    (tmp_path / "search.toml").write_text("= broken")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        read_settings(tmp_path / "search.toml")


def test_a_dry_run_says_what_would_be_searched() -> None:
    text = describe_settings(resolve(replace(CPU, device_name="Paper CPU"), budget="3m"), CPU)
    for part in ("budget        3m00s", "12.80 GiB", "4,096 tokens a step", "plain nanoGPT: 4x4x128", "combinations"):
        assert part in text


@given(st.text(alphabet="0123456789xX -", max_size=14))
def test_any_text_is_a_shape_or_a_config_error(text: str) -> None:
    try:
        shape = parse_shape(text, Shape())
    except ConfigError:
        return
    assert shape.n_layer >= 1


def test_a_data_directory_that_cannot_be_trained_on_costs_no_trial(tmp_path: Path) -> None:
    write_shard(tmp_path / "text_train_000001.bin", np.arange(40_000) % 1000)
    with pytest.raises(DataError, match="no validation tokens"):
        resolve(CPU, data=tmp_path)
    write_shard(tmp_path / "text_val_000000.bin", np.arange(1000))
    assert resolve(CPU, data=tmp_path).recipe.data == str(tmp_path)


CHARACTERS = "\n".join(
    ("dataset = 'chars'", "n_layer = 4", "n_head = 4", "n_embd = 128", "block_size = 64", "batch_size = 12",
     "gradient_accumulation_steps = 1", "max_iters = 2000", "compile = False")
)  # fmt: skip


def characters(folder: Path, words: int = 65) -> Path:
    """A folder as nanoGPT's prepare.py of characters leaves it."""
    ids = np.arange(60_000) % words
    ids[:54_000].astype("<u2").tofile(folder / "train.bin")
    ids[54_000:].astype("<u2").tofile(folder / "val.bin")
    names = [chr(33 + index) for index in range(words)]
    meta = {"vocab_size": words, "itos": dict(enumerate(names)), "stoi": {w: i for i, w in enumerate(names)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    (folder / "char.py").write_text(CHARACTERS)
    return folder


def test_a_folder_of_characters_is_measured_with_its_own_vocabulary(tmp_path: Path) -> None:
    folder = characters(tmp_path)
    asked = resolve(CPU, from_file=folder / "char.py", data=folder)
    assert asked.recipe.shape.vocab_size == 65
    assert asked.recipe.shape.parameters == 804_096  # nanoGPT's own count, position embeddings included
    text = describe_settings(asked, CPU)
    assert "vocabulary    65 words" in text
    assert "804,096 parameters" in text
    for words in ({}, {"model": "2x2x64"}):
        assert resolve(CPU, data=folder, **words).recipe.shape.vocab_size == 65  # type: ignore[arg-type]
    assert resolve(CPU, from_file=folder / "char.py").recipe.shape.vocab_size == 50304


def test_the_flag_decides_over_the_data(tmp_path: Path) -> None:
    folder = characters(tmp_path)
    padded = resolve(CPU, data=folder, vocab_size=128)
    assert padded.recipe.shape.vocab_size == 128
    write_settings(tmp_path / "search.toml", padded)
    assert read_settings(tmp_path / "search.toml").recipe.shape.vocab_size == 128
    assert resolve(CPU, model="2x2x64", vocab_size=8192).recipe.shape.vocab_size == 8192
    with pytest.raises(DataError, match=r"train\.bin holds token 64, the vocabulary has only 64 words"):
        resolve(CPU, data=folder, vocab_size=64)
    for wrong in (0, -5):
        with pytest.raises(ConfigError, match=f"--vocab-size = {wrong} is not allowed"):
            resolve(CPU, vocab_size=wrong)


def test_a_vocabulary_below_the_ids_costs_no_trial(tmp_path: Path) -> None:
    folder = characters(tmp_path, words=90)
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 80}))
    with pytest.raises(DataError, match="holds token 89, the vocabulary has only 80 words"):
        resolve(CPU, data=folder)
    (folder / "meta.pkl").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(DataError, match=r"meta\.pkl is not a plain vocabulary"):
        resolve(CPU, data=folder)
    (folder / "meta.pkl").unlink()
    assert resolve(CPU, data=folder).recipe.shape.vocab_size == 50304


def test_llama_3_shards_are_measured_with_llama_3s_vocabulary(tmp_path: Path) -> None:
    for split, count in (("train", 10_000), ("val", 1000)):
        header = np.zeros(256, "<i4")
        header[:3] = 20240801, 7, count
        ids = (np.arange(count) * 97 % 128_256).astype("<u4")
        (tmp_path / f"tiny_shakespeare_{split}.bin").write_bytes(header.tobytes() + ids.tobytes())
    assert resolve(CPU, data=tmp_path).recipe.shape.vocab_size == 128_256


@pytest.mark.parametrize("data", ["story.parquet", "folder", "HuggingFaceFW/fineweb"])
def test_text_given_as_data_names_the_command_that_prepares_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("story.parquet").write_bytes(b"")
    Path("folder").mkdir()
    Path("folder/a.txt").write_text("once")
    name = data.rpartition("/")[2].removesuffix(".parquet")
    with pytest.raises((ConfigError, DataError), match=f"`autotune data prepare {data} --out data/{name}`"):
        resolve(CPU, data=Path(data))


def test_there_is_no_race_with_several_processes(tmp_path: Path) -> None:
    write_shard(tmp_path / "text_val_000000.bin", np.arange(2000) % 211)
    write_shard(tmp_path / "text_train_000001.bin", np.arange(200_000) % 211)
    two = replace(CPU, processes=2)
    assert resolve(CPU, data=tmp_path).race == "on"
    assert resolve(two, data=tmp_path).race == "off"
    assert resolve(two).baseline.processes == 2
    with pytest.raises(ConfigError, match="--race on trains in one process, --nproc 2 is several"):
        resolve(two, data=tmp_path, race="on")

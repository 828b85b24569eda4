"""Text from a checkpoint."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from trainings import settings

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.data.shards import write_shard
from autotune.data.tokenizer import END_OF_TEXT, encode
from autotune.errors import CheckpointError, ConfigError, DataError
from autotune.model.checkpoint import TrainState, checkpoints, save_checkpoint
from autotune.model.step import build
from autotune.train.sample import sample
from autotune.train.trainer import train

SENTENCE = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training directory of a model that knows one sentence."""
    base = tmp_path_factory.mktemp("sample")
    tokens = [END_OF_TEXT, *encode(SENTENCE).tolist()] * 200
    write_shard(base / "x_val_000000.bin", tokens)
    write_shard(base / "x_train_000001.bin", tokens)
    shape = Shape(n_layer=1, n_head=2, n_embd=32, block_size=16)
    recipe = Recipe(shape=shape, data=str(base), global_batch_size=8, max_iters=30, warmup_iters=2, learning_rate=2e-2)
    train(settings(recipe, base / "run" / "train"))
    return base / "run" / "train"


def test_it_continues_a_sentence_it_has_learned(trained: Path) -> None:
    assert sample(trained, prompt="The quick", tokens=40, temperature=0) == SENTENCE


def test_the_seed_decides(trained: Path) -> None:
    def drawn(seed: int) -> str:  # beyond the window of 16 tokens
        return sample(trained, prompt="fox", tokens=30, temperature=3.0, top_k=0, seed=seed)

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1).startswith("fox")


def test_every_way_to_name_it(trained: Path) -> None:
    newest = checkpoints(trained / "checkpoints")[-1]
    texts = {sample(path, tokens=5, temperature=0) for path in (trained, trained.parent, newest, newest.parent)}
    assert len(texts) == 1


def test_the_vocabularys_padding_is_never_drawn(tmp_path: Path) -> None:
    candidate = Candidate(recipe=Recipe(shape=Shape(n_layer=1, n_head=1, n_embd=8, block_size=8)))
    step = build(replace(candidate, plan=Plan(compile="off")), torch.device("cpu"))
    with torch.no_grad():  # the padding's embeddings are far longer than the others', so half of the time far likelier
        step.model.wte.weight[50257:] = 100.0 * torch.randn(47, 8)
    save_checkpoint(tmp_path, step, TrainState(iteration=0, tokens=0, candidate=candidate))
    assert sample(tmp_path, tokens=50, top_k=0, temperature=1.0)
    assert sample(tmp_path, tokens=50, top_k=5)


WORDS = "\n abcdefghijklmnopqrstuvwxyz."
RHYME = "the cat sat.\n"


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training directory of a model of characters that knows one line; its vocabulary is padded to 64."""
    base = tmp_path_factory.mktemp("characters")
    stoi = {word: index for index, word in enumerate(WORDS)}
    ids = np.array([stoi[word] for word in RHYME * 200], dtype="<u2")
    ids.tofile(base / "train.bin")
    ids.tofile(base / "val.bin")
    meta = {"vocab_size": len(WORDS), "itos": dict(enumerate(WORDS)), "stoi": stoi}
    (base / "meta.pkl").write_bytes(pickle.dumps(meta))
    shape = Shape(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=64)
    recipe = Recipe(shape=shape, data=str(base), global_batch_size=8, max_iters=60, warmup_iters=2, learning_rate=2e-2)
    train(settings(recipe, base / "run" / "train"))
    return base / "run" / "train"


def test_character_models_use_meta_pkl(characters: Path) -> None:
    assert sample(characters, prompt="the c", tokens=21, temperature=0) == RHYME * 2
    assert sample(characters, tokens=13, temperature=0) == RHYME  # begins after a line break, as nanoGPT does
    drawn = sample(characters, prompt="the", tokens=60, temperature=50.0, top_k=0)
    assert drawn.startswith("the")
    assert len(drawn) == 63
    assert set(drawn) <= set(WORDS)


def test_characters_that_the_data_does_not_have(characters: Path) -> None:
    with pytest.raises(DataError, match=r"'C' is not one of the 29 characters of .*meta\.pkl"):
        sample(characters, prompt="the Cat")


def test_a_vocabulary_without_text(characters: Path) -> None:
    meta = characters.parent.parent / "meta.pkl"
    content = meta.read_bytes()
    try:
        meta.write_bytes(pickle.dumps({"vocab_size": 29}))
        with pytest.raises(ConfigError, match=r"meta\.pkl has no itos"):
            sample(characters)
        meta.write_bytes(pickle.dumps({"vocab_size": 65, "itos": {0: "a"}, "stoi": {"a": 0}}))
        with pytest.raises(ConfigError, match=r"meta\.pkl has 65 words, .* only 64"):
            sample(characters)
        meta.unlink()
        with pytest.raises(ConfigError, match=r"vocabulary of 64; text needs .*or a meta\.pkl with itos"):
            sample(characters)
    finally:
        meta.write_bytes(content)


def test_ids_beyond_the_vocabulary_end_a_training_before_it_begins(characters: Path, tmp_path: Path) -> None:
    shape = Shape(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=20)
    recipe = Recipe(shape=shape, data=str(characters.parent.parent), global_batch_size=8, max_iters=2)
    with pytest.raises(DataError, match=r"train\.bin holds token 28, the vocabulary has only 20 words"):
        train(settings(recipe, tmp_path / "train"))
    assert not (tmp_path / "train").exists()


def test_mistakes(trained: Path, tmp_path: Path, whole: tuple[Path, object]) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint; give a run"):
        sample(tmp_path)
    with pytest.raises(ConfigError, match="--temperature = -1"):
        sample(trained, temperature=-1)
    with pytest.raises(ConfigError, match="vocabulary of 256"):
        sample(whole[0])

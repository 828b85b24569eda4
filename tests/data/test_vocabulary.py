"""meta.pkl is read without executing it, and no id exceeds the vocabulary."""

import pickle
import string
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.data import vocabulary
from autotune.data.info import info
from autotune.data.shards import write_shard
from autotune.data.vocabulary import check_ids, data_vocabulary, largest_id, read_meta
from autotune.errors import DataError

WORDS = [*string.ascii_letters, *string.digits[:2], *"\n .,:;!?-é語"]
TABLE = {"vocab_size": len(WORDS), "itos": dict(enumerate(WORDS)), "stoi": {w: i for i, w in enumerate(WORDS)}}


def folder_of(folder: Path, meta: Any = TABLE, top: int = len(WORDS) - 1, protocol: int = 4) -> Path:
    ids = np.arange(2000) % (top + 1)
    for name in ("train.bin", "val.bin"):
        ids.astype("<u2").tofile(folder / name)
    if meta is not None:
        (folder / "meta.pkl").write_bytes(meta if isinstance(meta, bytes) else pickle.dumps(meta, protocol))
    return folder


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_meta_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    meta = read_meta(folder_of(tmp_path, protocol=protocol))
    assert meta is not None
    assert (meta.vocab_size, meta.itos, meta.stoi) == (65, TABLE["itos"], TABLE["stoi"])
    assert meta.decode(meta.encode("to be, é語\n")) == "to be, é語\n"
    assert data_vocabulary(tmp_path) == (65, "meta.pkl")
    assert info(tmp_path)["vocabulary"] == "65 words of meta.pkl"


def test_less_than_all_of_it(tmp_path: Path) -> None:
    bare = read_meta(folder_of(tmp_path, {"vocab_size": 70}))
    assert bare is not None
    assert (bare.vocab_size, bare.itos) == (70, {})
    with pytest.raises(DataError, match="has no stoi"):
        bare.encode("a")
    listed = read_meta(folder_of(tmp_path, {**TABLE, "itos": WORDS, "source": b"x", "made": None, "lr": 0.5}))
    assert listed is not None
    assert listed.itos == TABLE["itos"]
    (tmp_path / "meta.pkl").unlink()
    assert read_meta(tmp_path) is None
    assert data_vocabulary(tmp_path) is None


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_is_executed(tmp_path: Path, protocol: int) -> None:
    trap = tmp_path / "executed"
    folder_of(tmp_path, {**TABLE, "trap": Touch(trap)}, protocol=protocol)
    with pytest.raises(DataError, match=r"meta\.pkl is not a plain vocabulary .*more than plain values") as caught:
        read_meta(tmp_path)
    assert "\n" not in str(caught.value)
    assert not trap.exists()
    pickle.loads((tmp_path / "meta.pkl").read_bytes())
    assert trap.exists()  # the trap works


@pytest.mark.parametrize(
    "meta",
    [
        {**TABLE, "vocab_size": np.int64(65)}, OrderedDict(TABLE), {**TABLE, "words": Counter("ab")}, {1, 2}, [65], 65,
        {}, {"vocab_size": "65"}, {"vocab_size": 0}, {"vocab_size": True}, {"vocab_size": -(10**4000)},
        {**TABLE, "vocab_size": 64}, {**TABLE, "itos": {"a": 0}}, {**TABLE, "stoi": {0: "a"}}, {**TABLE, "itos": 5},
        {**TABLE, "stoi": {"a": -1}}, b"", b"\x80", b"no pickle", b"(lp0\n",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x80\x02K\x01r\xff\xff\xff\x7f.", b"Pabc\n.", b"}" + b"]" * 9 + b"s.", b"I" + b"9" * 5000 + b"\n.",
    ],
)  # fmt: skip
def test_what_is_no_plain_vocabulary_is_refused_in_one_line(tmp_path: Path, meta: Any) -> None:
    with pytest.raises(DataError, match=r"meta\.pkl") as caught:
        read_meta(folder_of(tmp_path, meta))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_LARGEST_META", 100)
    with pytest.raises(DataError, match=r"meta\.pkl has \d+ bytes, a vocabulary has at most 100"):
        read_meta(folder_of(tmp_path))


def test_an_unknown_character_is_named(tmp_path: Path) -> None:
    meta = read_meta(folder_of(tmp_path))
    assert meta is not None
    with pytest.raises(DataError, match=r"'€' is not one of the 65 characters of .*meta\.pkl"):
        meta.encode("10 €")
    with pytest.raises(DataError, match="no text for id 70"):
        meta.decode([1, 70])


def test_ids_beyond_the_vocabulary_name_the_file(tmp_path: Path) -> None:
    check_ids(folder_of(tmp_path), 65)
    check_ids(tmp_path, 128)
    with pytest.raises(DataError, match=r"train\.bin holds token 64, .*only 64 words; raise vocab_size .* to 65"):
        check_ids(tmp_path, 64)
    write_shard(tmp_path / "x.bin", [1])
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    write_shard(sharded / "x_train_000000.bin", [1, 2])
    write_shard(sharded / "x_train_000001.bin", [1, 700, 2])
    write_shard(sharded / "x_val_000000.bin", [50256])
    with pytest.raises(DataError, match=r"x_train_000001\.bin holds token 700"):
        check_ids(sharded, 256)
    with pytest.raises(DataError, match=r"x_val_000000\.bin holds token 50256"):
        check_ids(sharded, 1000)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 60}))
    assert info(tmp_path)["largest token"] == "64, which the vocabulary does not have"
    write_shard(sharded / "x_val_000000.bin", [0] * 100)
    with pytest.raises(DataError, match=r"x_val_000000\.bin holds nothing but zeros"):
        check_ids(sharded, 1000)
    ids = np.arange(2000, dtype="<i4")
    ids[77] = -1
    ids.tofile(tmp_path / "val.bin")
    with pytest.raises(DataError, match=r"val\.bin holds token \d+, .*damaged or no token ids"):
        check_ids(tmp_path, 50304)


def test_files_beyond_the_limit_are_sampled_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_BLOCK_BYTES", 200)
    ids = np.arange(1000)
    write_shard(tmp_path / "x_train_0.bin", ids)
    shards = vocabulary.open_split(tmp_path, "train")
    assert largest_id(shards) == (999, tmp_path / "x_train_0.bin")
    monkeypatch.setattr(vocabulary, "SCANNED_BYTES", 1000)  # half of it: every other block of 100 tokens
    assert largest_id(shards)[0] == 899


def test_llama_3_shards_have_a_vocabulary_of_their_own(tmp_path: Path) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = 20240801, 7, 3
    for split in ("train", "val"):
        ids = np.array([1, 128_000, 70_000], "<u4")
        (tmp_path / f"tiny_shakespeare_{split}.bin").write_bytes(header.tobytes() + ids.tobytes())
    assert vocabulary.open_split(tmp_path, "train")[0].tolist() == [1, 128_000, 70_000]
    assert data_vocabulary(tmp_path) == (128_256, "Llama 3 shards")
    assert info(tmp_path)["vocabulary"] == "128,256 words of Llama 3"
    with pytest.raises(DataError, match="holds token 128000, the vocabulary has only 50304"):
        check_ids(tmp_path, 50304)

"""Headerless files of other numbers than uint16: read as what they are, or refused in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.data.batches import open_batches
from autotune.data.info import info
from autotune.data.shards import open_shard
from autotune.data.vocabulary import check_ids
from autotune.errors import DataError


def zipf(words: int, count: int = 20_000) -> npt.NDArray[np.int64]:
    """Ids as in text: small ones are frequent, all of them occur."""
    drawn = np.random.default_rng(0).pareto(0.4, count) * 3
    return np.concatenate([np.minimum(drawn, words - 1).astype(np.int64), np.arange(words)])


def written(folder: Path, ids: npt.NDArray[Any], name: str = "train.bin") -> Path:
    ids.tofile(folder / name)
    return folder / name


@pytest.mark.parametrize("words", [3, 10, 65, 256, 300, 50257])
def test_uint16_is_read_as_it_is(tmp_path: Path, words: int) -> None:
    ids = zipf(words)
    assert np.array_equal(open_shard(written(tmp_path, ids.astype("<u2"))), ids)


@pytest.mark.parametrize("words", [4, 65, 50257, 65536, 128256, 262144])
@pytest.mark.parametrize("kind", ["<u4", "<i4"])
def test_32_bit_ids_are_read_as_32_bits(tmp_path: Path, words: int, kind: str) -> None:
    ids = zipf(words)
    found = open_shard(written(tmp_path, ids.astype(kind)))
    assert (found.dtype.itemsize, np.array_equal(found, ids)) == (4, True)


def test_batches_and_facts_of_a_folder_of_uint32(tmp_path: Path) -> None:
    for name in ("train.bin", "val.bin"):
        written(tmp_path, np.arange(100_000, 101_000).astype("<u4"), name)
    source = open_batches(tmp_path, seed=1, global_batch_size=2, block_size=8, vocab_size=128_256)
    assert source.validation_batch(0, 1)[0].tolist() == [list(range(100_000, 100_008))]
    found = info(tmp_path)
    assert (found["format"], found["training"]) == ("nanogpt, uint32", "1,000 tokens in 1 files")
    assert found["largest token"] == "100,999"
    with pytest.raises(DataError, match=r"train\.bin holds token 100999, the vocabulary has only 50304 words"):
        check_ids(tmp_path, 50304)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("<i8", "int64"), (">u2", "big-endian uint16"), (">u4", "big-endian uint32"), (">i8", "big-endian int64"),
        ("<f4", "float32"), ("<f8", "float64"), ("<f2", "float16"),
    ],
)  # fmt: skip
def test_other_numbers_are_refused_by_name(tmp_path: Path, kind: str, said: str) -> None:
    path = written(tmp_path, zipf(65).astype(kind))
    with pytest.raises(DataError, match=rf"train\.bin holds {said} numbers.*uint16 or uint32") as caught:
        open_shard(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["<i8", ">u4", ">i8", "<f4", "<f8"])
def test_other_numbers_of_a_large_vocabulary_too(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match=r"holds .* numbers"):
        open_shard(written(tmp_path, zipf(128_256).astype(kind)))


def test_one_byte_an_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds uint8 numbers"):
        open_shard(written(tmp_path, zipf(65)[: 2 * 10_000].astype("u1")))


def test_big_endian_gpt2_ids_are_told_where_they_exceed_the_vocabulary(tmp_path: Path) -> None:
    for name in ("train.bin", "val.bin"):
        written(tmp_path, zipf(50257).astype(">u2"), name)
    with pytest.raises(DataError, match=r"train\.bin holds token \d+, .*it seems to be big-endian; convert"):
        check_ids(tmp_path, 50304)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"To be, or not to be, that is the question. " * 20, "is text, not token ids"),
        ("Größe und Länge, für alle. ".encode() * 20, "is text, not token ids"),
        (b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<u2'}" * 8, r"is a NumPy \.npy file"),
        (b"PK\x03\x04" + bytes(range(256)), "is a zip archive"),
        (b"\x1f\x8b\x08\x00" + bytes(range(256)), "is a gzip file"),
        (bytes(2000), "ends in zeros"),
        (np.arange(5000, dtype="<u2").tobytes() + bytes(10_000), "ends in zeros.*interrupted"),
        (np.arange(1001, dtype="<u4").tobytes()[:-2], "truncated: it holds uint32"),
        (b"abc", "has 3 bytes"),
    ],
)
def test_what_is_no_tokens_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(DataError, match=said):
        open_shard(tmp_path / "train.bin")


def test_a_large_file_is_judged_by_all_of_its_parts(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 50257, 2_000_000).astype("<u2")
    assert np.array_equal(open_shard(written(tmp_path, ids)), ids)
    ids[-100_000:] = 0
    with pytest.raises(DataError, match="ends in zeros"):
        open_shard(written(tmp_path, ids))
    wide = np.random.default_rng(0).integers(0, 128_256, 1_000_000).astype("<u4")
    assert open_shard(written(tmp_path, wide)).dtype.itemsize == 4


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=12))
def test_a_few_tokens_are_never_judged(tmp_path_factory: pytest.TempPathFactory, ids: list[int]) -> None:
    path = written(tmp_path_factory.mktemp("few"), np.array(ids, "<u2"), "val.bin")
    assert open_shard(path).tolist() == ids


def test_a_shard_under_nanogpts_name_is_read_by_its_header(tmp_path: Path) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 3
    (tmp_path / "train.bin").write_bytes(header.tobytes() + np.array([1, 2, 3], "<u2").tobytes())
    assert open_shard(tmp_path / "train.bin").tolist() == [1, 2, 3]

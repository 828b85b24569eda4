import hashlib
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from full_disk import disk_of
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from autotune.data.info import info
from autotune.data.shards import append_tokens, open_shard, open_split, write_shard
from autotune.errors import DataError


@given(tokens=arrays(np.uint16, st.integers(0, 300)))
def test_a_shard_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, tokens: npt.NDArray[np.uint16]
) -> None:
    path = tmp_path_factory.mktemp("shard") / "x_train_000000.bin"
    write_shard(path, tokens)
    assert np.array_equal(open_shard(path), tokens)
    assert path.stat().st_size == 1024 + 2 * len(tokens)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_header_is_llm_c_s(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", [1, 2, 50256])
    header = np.fromfile(tmp_path / "a.bin", dtype="<i4", count=256)
    assert header[:3].tolist() == [20240520, 1, 3]
    assert not header[3:].any()
    assert np.fromfile(tmp_path / "a.bin", dtype="<u2", offset=1024).tolist() == [1, 2, 50256]


@pytest.mark.parametrize("tokens", [[65536], [-1], [0.5]])
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, tokens: list[float]) -> None:
    with pytest.raises(DataError, match=r"0\.\.65535"):
        write_shard(tmp_path / "a.bin", tokens)
    assert not list(tmp_path.iterdir())


def test_a_truncated_shard_names_file_and_sizes(tmp_path: Path) -> None:
    path = tmp_path / "a_train_0.bin"
    write_shard(path, np.arange(100))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"a_train_0\.bin is truncated.*1224 bytes, but it has 1214"):
        open_shard(path)
    path.write_bytes(b"\0" * 100)
    with pytest.raises(DataError, match="truncated: 100 bytes"):
        open_shard(path)


@pytest.mark.parametrize(("magic", "version"), [(20240801, 1), (20240520, 2), (0, 0), (20240522, 1)])
def test_another_format_is_refused(tmp_path: Path, magic: int, version: int) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:2] = magic, version
    (tmp_path / "a.bin").write_bytes(header.tobytes())
    with pytest.raises(DataError, match=f"magic {magic}, version {version}; allowed: 20240520 version 1"):
        open_shard(tmp_path / "a.bin")


def test_modded_nanogpt_directories_are_read_in_order(tmp_path: Path) -> None:
    for index in (2, 1, 3):
        write_shard(tmp_path / f"fineweb_train_{index:06d}.bin", [index] * index)
    write_shard(tmp_path / "fineweb_val_000000.bin", [9])
    assert [shard.tolist() for shard in open_split(tmp_path, "train")] == [[1], [2, 2], [3, 3, 3]]
    assert [shard.tolist() for shard in open_split(tmp_path, "val")] == [[9]]


def test_nanogpt_files_are_read(tmp_path: Path) -> None:
    np.arange(700, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(5, dtype=np.uint16).tofile(tmp_path / "val.bin")
    assert open_split(tmp_path, "train")[0].tolist() == list(range(700))
    found = info(tmp_path)
    assert (found["format"], found["training"]) == ("nanogpt", "700 tokens in 1 files")


def test_odd_or_empty_nanogpt_files_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"abc"):
        (tmp_path / "train.bin").write_bytes(content)
        with pytest.raises(DataError, match=f"has {len(content)} bytes"):
            open_split(tmp_path, "train")


def test_what_is_missing_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist; .*autotune data prepare"):
        open_split(tmp_path / "none", "train")
    with pytest.raises(DataError, match=r"no training tokens.*autotune data prepare"):
        open_split(tmp_path, "train")
    write_shard(tmp_path / "x_train_0.bin", [1])
    with pytest.raises(DataError, match=r"no validation tokens.*autotune data prepare"):
        open_split(tmp_path, "val")
    write_shard(tmp_path / "x_val_0.bin", [])
    with pytest.raises(DataError, match="no validation tokens"):
        open_split(tmp_path, "val")
    with pytest.raises(DataError, match="is a file"):
        open_split(tmp_path / "x_val_0.bin", "val")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("train.bin", "x_train_0.bin"),
        ("TinyStories_train.bin", "train.bin"),
        ("TinyStories_train.bin", "tiny_shakespeare_train.bin"),
        ("x_train.bin", "x_train_0.bin"),
        ("a_train_0.bin", "b_train_0.bin"),
    ],
)
def test_two_kinds_or_data_sets_side_by_side_are_refused(tmp_path: Path, one: str, other: str) -> None:
    write_shard(tmp_path / one, [1])
    write_shard(tmp_path / other, [1])
    first, second = (re.escape(name) for name in sorted((one, other)))
    with pytest.raises(DataError, match=f"both {first} and {second}"):
        open_split(tmp_path, "train")


@pytest.mark.parametrize("name", ["TinyStories", "tiny_shakespeare", "my-text.v2"])
def test_llm_c_s_whole_splits_are_found(tmp_path: Path, name: str) -> None:
    for split, count in (("train", 4000), ("val", 400)):
        write_shard(tmp_path / f"{name}_{split}.bin", np.arange(count))
    assert open_split(tmp_path, "train")[0].tolist() == list(range(4000))
    assert open_split(tmp_path, "val")[0].tolist() == list(range(400))
    found = info(tmp_path)
    assert (found["format"], found["training"]) == ("shards", "4,000 tokens in 1 files")
    assert (found["validation"], found["largest token"]) == ("400 tokens in 1 files", "3,999")


def test_tokens_are_appended_to_a_bare_file(tmp_path: Path) -> None:
    path = tmp_path / "train.bin.part"
    append_tokens(path, 0, np.array([1, 2, 3], dtype=np.uint16))
    assert append_tokens(path, 2, np.array([9, 8], dtype=np.uint16)) == hashlib.sha256(b"\x09\0\x08\0").hexdigest()
    assert np.fromfile(path, "<u2").tolist() == [1, 2, 9, 8]
    with disk_of(10), pytest.raises(DataError, match=r"cannot write .*train\.bin\.part: File too large"):
        append_tokens(path, 4, np.arange(100, dtype=np.uint16))
    assert np.fromfile(path, "<u2").tolist() == [1, 2, 9, 8]
    with disk_of(10), pytest.raises(DataError):
        append_tokens(tmp_path / "val.bin.part", 0, np.arange(100, dtype=np.uint16))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_info_of_an_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="autotune data prepare"):
        info(tmp_path)

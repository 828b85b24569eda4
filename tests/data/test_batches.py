import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.data.batches import BatchSource, fingerprint, open_batches, shuffled, synthetic_batch
from autotune.data.shards import write_shard
from autotune.errors import DataError


def directory_of(folder: Path, train: list[int], val: list[int]) -> Path:
    """Shards of these lengths; tokens count up through all of them, so its first token tells a window."""
    start = 0
    for split, lengths in (("train", train), ("val", val)):
        for index, length in enumerate(lengths):
            write_shard(folder / f"x_{split}_{index:06d}.bin", np.arange(start, start + length))
            start += length
    return folder


def batches(folder: Path, *, seed: int = 1, size: int = 4, block: int = 8, vocab: int = 65536) -> BatchSource:
    return open_batches(folder, seed=seed, global_batch_size=size, block_size=block, vocab_size=vocab)


def test_shapes_and_the_shift_by_one(tmp_path: Path) -> None:
    source = batches(directory_of(tmp_path, [100, 57], [33]))
    for x, y in (source.train_batch(0), source.validation_batch(0, 4)):
        assert (x.shape, y.shape, x.dtype, y.dtype) == ((4, 8), (4, 8), np.int64, np.int64)
        assert np.array_equal(y, x + 1)
        assert x.flags.c_contiguous
        assert y.flags.c_contiguous


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    block=st.integers(1, 20),
    size=st.integers(1, 7),
    seed=st.integers(0, 2**63),
)
@settings(max_examples=50, deadline=None)
def test_each_window_once_an_epoch_whatever_the_batch(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], block: int, size: int, seed: int
) -> None:
    folder = directory_of(tmp_path_factory.mktemp("batches"), lengths, [50])
    windows, start = [], 0
    for length in lengths:
        windows += [start + place for place in range(0, length - block, block)]
        start += length
    if len(windows) < size:
        with pytest.raises(DataError, match=f"{sum(lengths)} training tokens give {len(windows)} sequences"):
            batches(folder, seed=seed, size=size, block=block)
        return
    source = batches(folder, seed=seed, size=size, block=block)
    assert source.train_windows == len(windows)
    steps = -(-2 * len(windows) // size)
    firsts = [int(first) for step in range(steps) for first in source.train_batch(step)[0][:, 0]]
    assert sorted(firsts[: len(windows)]) == windows
    assert sorted(firsts[len(windows) : 2 * len(windows)]) == windows
    single = batches(folder, seed=seed, size=1, block=block)
    assert firsts == [int(single.train_batch(step)[0][0, 0]) for step in range(len(firsts))]


def test_batches_are_a_function_of_seed_and_step(tmp_path: Path) -> None:
    folder = directory_of(tmp_path, [4000], [50])
    first, again, other = batches(folder), batches(folder), batches(folder, seed=2)
    later = again.train_batch(77)
    assert np.array_equal(first.train_batch(77), later)
    assert np.array_equal(first.train_batch(77), later)
    assert not np.array_equal(first.train_batch(77), other.train_batch(77))
    assert not np.array_equal(first.train_batch(0), first.train_batch(1))


def test_epochs_differ_and_the_order_is_frozen() -> None:
    """A change here would give every resumed training other data than it had."""
    places = np.arange(10)
    assert shuffled(places, 10, seed=1337, epoch=0).tolist() == [6, 7, 9, 5, 2, 0, 1, 4, 8, 3]
    assert shuffled(places, 10, seed=1337, epoch=1).tolist() == [8, 7, 2, 3, 9, 5, 0, 1, 6, 4]


def test_the_order_looks_random() -> None:
    size = 100_000
    order = shuffled(np.arange(size), size, seed=3, epoch=0)
    assert np.array_equal(np.sort(order), np.arange(size))
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.01
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.01
    assert np.count_nonzero(np.abs(np.diff(order)) == 1) < 15  # 2 expected
    other = shuffled(np.arange(size), size, seed=3, epoch=1)
    assert np.count_nonzero(order == other) < 10  # 1 expected
    parts = order[: size // 10] // (size // 10)  # the first tenth of an epoch draws evenly from everywhere
    assert np.bincount(parts, minlength=10).std() < 90  # 30 expected


def test_validation_covers_the_split_and_begins_again(tmp_path: Path) -> None:
    source = batches(directory_of(tmp_path, [100], [20, 5, 17]))
    assert source.validation_windows == 4
    assert source.validation_batch(0, 3)[0][:, 0].tolist() == [100, 108, 125]  # no file fills a batch
    assert source.validation_batch(1, 3)[0][:, 0].tolist() == [133, 100, 108]
    assert source.validation_batch(2, 3)[0][:, 0].tolist() == [100, 108, 125]
    assert source.validation_batch(1, 2)[0][:, 0].tolist() == [125, 133]
    assert source.validation_batch(0, 6)[0][:, 0].tolist() == [100, 108, 125, 133, 100, 108]


@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=4).filter(lambda found: max(found) > 16))
@settings(max_examples=30, deadline=None)
def test_validation_batches_of_as_many_tokens_are_the_same_text_whatever_the_block(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
) -> None:
    folder = directory_of(tmp_path_factory.mktemp("blocks"), [100], lengths)
    short, long = (replace(batches(folder, block=block), piece_tokens=32) for block in (4, 16))
    for index in range(sum((length - 1) // 32 for length in lengths)):
        assert np.array_equal(short.validation_batch(index, 8)[0].ravel(), long.validation_batch(index, 2)[0].ravel())


@given(count=st.integers(1, 150), size=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_the_first_validation_batches_lie_evenly_over_the_split(
    tmp_path_factory: pytest.TempPathFactory, count: int, size: int
) -> None:
    folder = directory_of(tmp_path_factory.mktemp("even"), [33], [8 * count + 1])
    source = replace(batches(folder), piece_tokens=8 * size)
    indices = range(-(-count // size))
    seen = [(source.validation_batch(index, size)[0][:, 0] - 33) // 8 for index in indices]
    assert {int(window) for windows in seen for window in windows} == set(range(count))
    whole = count // size
    for few in range(2, whole + 1):
        places = sorted(int(windows[0]) / (whole * size) for windows in seen[:few])
        gaps = [after - before for before, after in itertools.pairwise([*places, 1 + places[0]])]
        assert max(gaps) <= 2 / few + 1e-9


def test_a_validation_batch_has_pieces_of_1024_tokens_from_several_places(tmp_path: Path) -> None:
    source = batches(directory_of(tmp_path, [3000], [40_001]), block=256)
    begins = [(source.validation_batch(index, 16)[0][:, 0] - 3000) // 256 for index in range(10)]
    pieces = begins[0].reshape(4, 4)
    assert (np.diff(pieces) == 1).all()
    assert len({int(piece) // 16 for piece in pieces[:, 0]}) == 4
    assert {int(window) for windows in begins for window in windows} == set(range(156))


def test_too_few_tokens_are_refused_with_numbers(tmp_path: Path) -> None:
    directory_of(tmp_path, [25], [8])
    with pytest.raises(DataError, match="25 training tokens give 3 sequences of 8, 4 are needed"):
        batches(tmp_path)
    with pytest.raises(DataError, match="8 validation tokens give 0 sequences of 8, 1 are needed"):
        batches(tmp_path, size=3)


def test_a_token_outside_the_vocabulary_names_the_shard(tmp_path: Path) -> None:
    source = batches(directory_of(tmp_path, [64, 64], [64]), vocab=100)
    with pytest.raises(DataError, match=r"x_train_000001\.bin holds token 12\d, vocab_size is 100"):
        [source.train_batch(step) for step in range(4)]


def test_synthetic_batches() -> None:
    options = {"global_batch_size": 16, "block_size": 128, "vocab_size": 50304}
    x, y = synthetic_batch(seed=1, step=2, **options)
    assert (x.shape, y.shape, x.dtype) == ((16, 128), (16, 128), np.int64)
    assert np.array_equal(x[:, 1:], y[:, :-1])
    assert np.array_equal(x, synthetic_batch(seed=1, step=2, **options)[0])
    assert not np.array_equal(x, synthetic_batch(seed=1, step=3, **options)[0])
    assert x.min() >= 0
    assert x.max() < 50304
    counts = np.bincount(x.ravel(), minlength=50304)
    assert 0.02 < counts[0] / x.size < 0.07  # 0.038 expected
    assert np.count_nonzero(counts) > 500


def test_a_file_that_is_cut_short_or_spoiled_later_is_named(tmp_path: Path) -> None:
    """Read through its old map, the cut one would end the process by SIGBUS."""
    source = batches(directory_of(tmp_path, [50_000], [33]), vocab=60_000)
    shard = tmp_path / "x_train_000000.bin"
    source.train_batch(0)
    with shard.open("r+b") as file:
        file.seek(1024)
        file.write(b"\xff" * 100_000)
    with pytest.raises(DataError, match=r"x_train_000000\.bin holds token 65535"):
        source.train_batch(1)
    os.truncate(shard, 1024)
    with pytest.raises(DataError, match=r"x_train_000000\.bin is damaged: it has 1024 bytes, 101024 when"):
        source.train_batch(2)


def test_rows_of_a_batch_are_what_they_are_in_the_whole(tmp_path: Path) -> None:
    source = batches(directory_of(tmp_path, [100], [33]))
    whole = source.train_batch(2)
    for ours, theirs in zip(source.train_batch(2, slice(1, 3)), whole, strict=True):
        assert np.array_equal(ours, theirs[1:3])


def test_the_fingerprint_tells_data_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = fingerprint(directory_of(tmp_path / "a", [100], [20]))
    assert first == fingerprint(directory_of(tmp_path / "b", [100], [20]))
    write_shard(tmp_path / "b" / "x_val_000000.bin", np.zeros(20, dtype=np.uint16))
    assert first != fingerprint(tmp_path / "b")
    with pytest.raises(DataError, match="holds no tokens"):
        fingerprint(tmp_path)

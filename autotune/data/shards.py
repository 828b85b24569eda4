"""Token files: llm.c and modded-nanogpt shards and nanoGPT's headerless files, read and written.

A shard is a header of 256 little-endian int32 (magic, version, token count, zeros), followed by one uint16 per token of
GPT-2 or one uint32 per token of Llama 3 (llm.c, dev/data/data_common.py). nanoGPT's `train.bin` and `val.bin` have no
header.
"""

import contextlib
import hashlib
import os
import re
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from autotune.data.headerless import token_dtype
from autotune.data.manifest import Split, read_manifest
from autotune.data.sources import how_to_prepare
from autotune.errors import DataError
from autotune.files import write_atomically

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
LLAMA3 = 20240801, 7
"""Magic and version of llm.c's shards for Llama 3."""
LLAMA3_WORDS = 128256

Tokens: TypeAlias = npt.NDArray[np.uint16]
Shard: TypeAlias = np.memmap[Any, np.dtype[np.uint16 | np.uint32]]

_PREPARE = "make one with `autotune data prepare SOURCE --out DIR`"
_DTYPES = {(MAGIC, VERSION): "<u2", LLAMA3: "<u4"}
_BARE = "train.bin", "val.bin"


def write_shard(path: Path, tokens: npt.ArrayLike) -> str:
    """Write `tokens` (T,), ids in 0..65535, atomically as one shard; returns its sha256.

    Raises DataError, without leaving a file, if the ids do not fit uint16 or the file cannot be written.
    """
    ids = np.asarray(tokens)
    if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() > 0xFFFF):
        raise DataError(f"token ids of {path} are not whole numbers in 0..65535; shards hold uint16")
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, ids.size
    return write_file(path, header.data, np.ascontiguousarray(ids, dtype="<u2").data)


def write_file(path: Path, *parts: bytes | memoryview) -> str:
    """`write_atomically` with DataError as its error.

    The temporary name is fixed, so that a run after a SIGKILL overwrites the file of the killed one.
    """
    try:
        return write_atomically(path, *parts, temporary=path.with_name(f".{path.name}.tmp"))
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; choose another place") from error


def append_tokens(path: Path, start: int, tokens: Tokens) -> str:
    """Truncate a headerless file to `start` tokens and append `tokens` (T,); returns the sha256 of their bytes.
    Raises DataError, with the file truncated to `start` tokens, if they cannot be written."""
    content = np.ascontiguousarray(tokens, dtype="<u2")
    size = start * content.itemsize
    try:
        with path.open("r+b" if path.exists() else "w+b", buffering=0) as file:
            try:
                file.truncate(size)
                file.seek(size)
                left = content.data.cast("B")
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise
    except BaseException as error:
        if size == 0:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DataError(f"cannot write {path}: {error.strerror}; choose another place") from error
        raise
    return hashlib.sha256(content.data).hexdigest()


def open_shard(path: Path) -> Shard:
    """The memory-mapped tokens (T,) of a shard, or of nanoGPT's `train.bin` or `val.bin`.
    Raises DataError for an incomplete file, or one whose numbers cannot be token ids."""
    try:
        actual = path.stat().st_size
        head = tuple(int(value) for value in np.fromfile(path, dtype="<i4", count=3))
        if path.name in _BARE and head[:2] not in _DTYPES:
            return np.memmap(path, dtype=token_dtype(path), mode="r")
        if actual < HEADER_BYTES:
            raise DataError(f"{path} is truncated: {actual} bytes, a shard's header alone has {HEADER_BYTES}")
        magic, version, count = head
        if (magic, version) not in _DTYPES:
            raise DataError(
                f"{path} is not a shard of tokens: magic {magic}, version {version}; allowed: "
                f"{', '.join(f'{magic} version {version}' for magic, version in _DTYPES)}; {_PREPARE}"
            )
        dtype = np.dtype(_DTYPES[magic, version])
        expected = HEADER_BYTES + dtype.itemsize * count
        if count < 0 or actual != expected:
            state = "truncated" if actual < expected else "damaged"
            raise DataError(
                f"{path} is {state}: its header promises {count} tokens, {expected} bytes, but it has {actual}; "
                "prepare or download it again"
            )
        return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; {_PREPARE}") from error


def split_paths(directory: Path, split: Split) -> list[Path]:
    """Files of one split in order: shards `*_train_*.bin`, llm.c's `*_train.bin`, or nanoGPT's `train.bin` (`val`
    likewise); empty if there are none.

    Raises DataError if `directory` is not a directory or holds several data sets.
    """
    if not directory.is_dir():
        state = "is a file" if directory.exists() else "does not exist"
        raise DataError(f"data directory {directory} {state}; {how_to_prepare(directory)}")
    sets: dict[str, list[Path]] = {}  # by the name before the split
    for path in sorted(directory.glob("*.bin")):
        if path.name == f"{split}.bin":
            sets.setdefault("", []).append(path)
        elif match := re.fullmatch(rf"(.+)_{split}(_.*)?\.bin", path.name):
            sets.setdefault(f"{match[1]}{'_*' if match[2] else ''}", []).append(path)
    if len(sets) > 1:
        first, second, *_ = sorted(paths[0].name for paths in sets.values())
        raise DataError(f"{directory} holds both {first} and {second}; keep only one data set in a directory")
    return next(iter(sets.values()), [])


def open_split(directory: Path, split: Split) -> list[Shard]:
    """Tokens of one split of a data directory, one memory map per file, in the order of file names.

    Reads shards of this project, modded-nanogpt and llm.c, and nanoGPT's `train.bin` and `val.bin`.
    Raises DataError for a missing, empty, damaged or unfinished directory.
    """
    paths = split_paths(directory, split)
    if (manifest := read_manifest(directory)) is not None:
        again = "run the same `autotune data prepare` again to complete it"
        if not manifest.finished:
            raise DataError(f"{directory} is unfinished ({len(manifest.shards)} shards so far); {again}")
        listed = {shard.file for shard in manifest.shards if shard.split == split}
        if missing := sorted(listed - {path.name for path in paths}):
            raise DataError(f"{directory} has lost {missing[0]}; {again}")
        if strange := [path.name for path in paths if path.name not in listed]:
            raise DataError(f"{directory} holds {strange[0]}, which its manifest does not know; remove it")
    shards = [open_shard(path) for path in paths]
    if not sum(len(shard) for shard in shards):
        kind = "training" if split == "train" else "validation"
        raise DataError(
            f"{directory} holds no {kind} tokens (*_{split}_*.bin, *_{split}.bin or {split}.bin); "
            f"{how_to_prepare(directory)}"
        )
    return shards


def check_length(shard: Shard) -> None:
    """Raise DataError if the file was truncated after it was mapped: reading beyond its end would be a SIGBUS, which
    ends the process without a message."""
    path, mapped = Path(str(shard.filename)), shard.offset + shard.nbytes
    if path.exists() and (actual := path.stat().st_size) < mapped:
        raise DataError(f"{path} is damaged: it has {actual} bytes, {mapped} when it was opened; prepare it again")

"""Token files: llm.c and modded-nanogpt shards, read and written, and nanoGPT's headerless files, read.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, token count, zeros) and then one
uint16 a token (llm.c, dev/data/data_common.py). nanoGPT's `train.bin` and `val.bin` are the bare tokens.
"""

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from autotune.config.toml import write_atomically
from autotune.data.manifest import Split, read_manifest
from autotune.errors import DataError

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4

Tokens: TypeAlias = npt.NDArray[np.uint16]
Shard: TypeAlias = np.memmap[Any, np.dtype[np.uint16]]

_PREPARE = "make one with `autotune data prepare SOURCE --out DIR`"


def write_shard(path: Path, tokens: npt.ArrayLike) -> str:
    """Write `tokens` (T,), ids in 0..65535, as one shard that appears only when whole; returns its sha256.

    Raises DataError, leaving nothing behind, when the ids do not fit uint16 or the file cannot be written.
    """
    ids = np.asarray(tokens)
    if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() > 0xFFFF):
        raise DataError(f"token ids of {path} are not whole numbers in 0..65535; shards hold uint16")
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, ids.size
    return write_file(path, header.data, np.ascontiguousarray(ids, dtype="<u2").data)


def write_file(path: Path, *parts: bytes | memoryview) -> str:
    """`write_atomically`, with DataError where it fails.

    The temporary name is fixed, so a run that goes on after a SIGKILL replaces what the killed one left.
    """
    try:
        return write_atomically(path, *parts, temporary=path.with_name(f".{path.name}.tmp"))
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; choose another place") from error


def open_shard(path: Path) -> Shard:
    """The tokens (T,) of a shard, or of nanoGPT's `train.bin` or `val.bin`, memory-mapped.
    Raises DataError for a file that is not whole."""
    try:
        actual = path.stat().st_size
        if path.name in ("train.bin", "val.bin"):
            if actual == 0 or actual % 2:
                raise DataError(f"{path} has {actual} bytes; tokens make an even number above 0; {_PREPARE}")
            return np.memmap(path, dtype="<u2", mode="r")
        if actual < HEADER_BYTES:
            raise DataError(f"{path} is truncated: {actual} bytes, a shard's header alone has {HEADER_BYTES}")
        magic, version, count = (int(value) for value in np.fromfile(path, dtype="<i4", count=3))
        if (magic, version) != (MAGIC, VERSION):
            raise DataError(
                f"{path} is no shard of GPT-2 tokens: magic {magic}, version {version}; "
                f"allowed: {MAGIC}, {VERSION}; {_PREPARE}"
            )
        expected = HEADER_BYTES + 2 * count
        if count < 0 or actual != expected:
            state = "truncated" if actual < expected else "damaged"
            raise DataError(
                f"{path} is {state}: its header promises {count} tokens, {expected} bytes, but it has {actual}; "
                "prepare or download it again"
            )
        return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; {_PREPARE}") from error


def split_paths(directory: Path, split: Split) -> list[Path]:
    """The files of one split in order: `*_train_*.bin` shards or nanoGPT's `train.bin` (`val` likewise).

    Empty where there are none. Raises DataError for what is no directory, and for both kinds side by side.
    """
    if not directory.is_dir():
        state = "is a file" if directory.exists() else "does not exist"
        raise DataError(f"data directory {directory} {state}; {_PREPARE}")
    sharded = sorted(directory.glob(f"*_{split}_*.bin"))
    headerless = directory / f"{split}.bin"
    if sharded and headerless.exists():
        raise DataError(f"{directory} holds both {headerless.name} and {sharded[0].name}; keep only one")
    return sharded or ([headerless] if headerless.exists() else [])


def open_split(directory: Path, split: Split) -> list[Shard]:
    """The tokens of one split of a data directory, one memory map a file, in the order of the files' names.

    Reads our own shards, modded-nanogpt's and llm.c's as they are, and nanoGPT's `train.bin`, `val.bin`.
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
        raise DataError(f"{directory} holds no {kind} tokens (*_{split}_*.bin or {split}.bin); {_PREPARE}")
    return shards


def check_length(shard: Shard) -> None:
    """Raise DataError, naming the file, where it was cut short since it was mapped: to read there would be
    a SIGBUS, which ends the process without a word."""
    path, mapped = Path(str(shard.filename)), shard.offset + shard.nbytes
    if path.exists() and (actual := path.stat().st_size) < mapped:
        raise DataError(f"{path} is damaged: it has {actual} bytes, {mapped} when it was opened; prepare it again")

"""Number type of a headerless token file. nanoGPT writes uint16, which the file does not record.

Other programs write other types under the same name. Read as uint16, those would be valid but wrong tokens.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from autotune.errors import DataError

_BLOCK_BYTES = 16 << 10
_MOST_BLOCKS = 64
_FEWEST_BYTES = 128
"""Smallest file whose type can be recognised."""
_FOREIGN = {
    b"\x93NUMPY": "a NumPy .npy file",
    b"PK\x03\x04": "a zip archive, as torch.save and numpy.savez write them",
    b"\x1f\x8b\x08": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a Zstandard file",
    b"PAR1": "a parquet file",
}
_HIGHEST_HALF = 15
"""Upper 16 bits of an id of 32: vocabularies of up to a million words."""


def token_dtype(path: Path) -> Literal["<u2", "<u4"]:
    """Type of the ids in `path`, from its size and up to 1 MiB of its content, spread evenly.

    Raises DataError for anything but little-endian 16- or 32-bit integers: text, floats, 64-bit or big-endian ids,
    archives, and files whose preparation was interrupted.
    """
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise DataError(f"{path} has {size} bytes; tokens make an even number above 0; prepare the data again")
    blocks = _sample(path, size)
    if size < _FEWEST_BYTES:
        return "<u2"
    if kind := _foreign(blocks):
        raise DataError(f"{path} is {kind}, not token ids; write them with ids.astype(numpy.uint16).tofile(path)")
    if np.frombuffer(blocks[-1], "<u2")[-4096:].size >= 64 and not any(blocks[-1][-8192:]):
        raise DataError(f"{path} ends in zeros, as a file whose preparation was interrupted; prepare the data again")
    sample = b"".join(block[: len(block) // 8 * 8] for block in blocks)
    found = _number_type(sample)
    if found not in ("uint16", "uint32"):
        raise DataError(
            f"{path} holds {found} numbers, tokens are read as uint16 or uint32 (little-endian); "
            "write them with ids.astype(numpy.uint16).tofile(path)"
        )
    if found == "uint32" and size % 4:
        raise DataError(f"{path} is truncated: it holds uint32 ids, and {size} bytes are not a multiple of 4")
    return "<u2" if found == "uint16" else "<u4"


def _sample(path: Path, size: int) -> list[bytes]:
    """A small file as one block; otherwise the beginnings of equal parts, and the end."""
    with path.open("rb") as file:
        if size <= _MOST_BLOCKS * _BLOCK_BYTES:
            return [file.read()]
        starts = [size * part // _MOST_BLOCKS // 8 * 8 for part in range(_MOST_BLOCKS - 1)]
        blocks = []
        for start in (*starts, (size - _BLOCK_BYTES) // 8 * 8):
            file.seek(start)
            blocks.append(file.read(_BLOCK_BYTES))
    return blocks


def _foreign(blocks: list[bytes]) -> str:
    """Kind of a file that holds no numbers; empty for numbers."""
    for magic, kind in _FOREIGN.items():
        if blocks[0].startswith(magic):
            return kind
    head = blocks[0][:_BLOCK_BYTES]
    try:  # ids are not valid UTF-8 for long, or contain zero bytes; the last character may be cut
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return ""
    return "" if b"\0" in head else "text"


def _number_type(sample: bytes) -> str:
    """`uint16`, `uint32`, or the name of an unsupported type. sample: a multiple of 8 bytes."""
    for name, code in (("float64", "<f8"), ("float32", "<f4"), ("float16", "<f2")):
        if _whole_floats(np.frombuffer(sample, code)):
            return name
    for order, code in (("", "<u2"), ("big-endian ", ">u2")):
        words = np.frombuffer(sample, code)
        if code == "<u2":
            quarters, halves = words.reshape(-1, 4), words.reshape(-1, 2)
        else:
            quarters, halves = words.reshape(-1, 4)[:, ::-1], words.reshape(-1, 2)[:, ::-1]
        if not quarters[:, 2:].any() and _is_low_half(quarters[:, 0], quarters[:, 1]):
            return order + "int64"
        if _is_low_half(halves[:, 0], halves[:, 1]):
            return order + "uint32"
    low, high = np.frombuffer(sample, np.uint8).reshape(-1, 2).T
    if not low.any() and _varied(high):
        return "big-endian uint16"
    # ids above 255 use all values of the low byte; a low byte below 128 is an id of its own
    if low.max() < 128 and high.max() < 128 and len(np.unique(high)) >= 8 and len(low) >= 64:
        return "uint8"
    return "uint16"


def _whole_floats(values: npt.NDArray[np.floating]) -> bool:
    with np.errstate(all="ignore"):
        return bool(np.all((values >= 0) & (values < 2**31) & (values == np.floor(values)))) and _varied(values)


def _is_low_half(low: npt.NDArray[np.uint16], high: npt.NDArray[np.uint16]) -> bool:
    """Whether these are the halves of 32-bit ids; with 16-bit tokens, even and odd positions look alike."""
    # a few high halves may have any value: int32 files use -1 for padding
    few = np.mean(high > _HIGHEST_HALF) <= 0.01 and np.mean(low > _HIGHEST_HALF) >= 0.5
    return _varied(low) and bool(few or not high.any())


def _varied(values: npt.NDArray[np.generic]) -> bool:
    return len(np.unique(values)) >= 3

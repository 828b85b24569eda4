"""Vocabulary of a data directory: nanoGPT's `meta.pkl`, read without executing it, and the largest id in use."""

import io
import pickle
import pickletools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never

from autotune.data.manifest import Split
from autotune.data.shards import LLAMA3_WORDS, Shard, open_split
from autotune.errors import DataError

META = "meta.pkl"
SCANNED_BYTES = 512 << 20
"""Bytes of one split that are searched for the largest id: all of a smaller one, else blocks of 1 MiB at equal
distances. Batches are checked again when they are read."""

_BLOCK_BYTES = 1 << 20
_LARGEST_META = 16 << 20
_MOST_WORDS = 1 << 21
"""Larger than the vocabulary of any tokenizer."""
# Opcodes of pickles of plain values. All others import, call or build objects.
_PLAIN = {
    "PROTO", "FRAME", "STOP", "MARK", "POP", "DUP", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1",
    "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "DICT", "EMPTY_DICT",
    "SETITEM", "SETITEMS", "LIST", "EMPTY_LIST", "APPEND", "APPENDS", "TUPLE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2",
    "TUPLE3", "GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Meta:
    """Content of `meta.pkl`: the words of a directory's ids."""

    path: Path
    vocab_size: int
    itos: Mapping[int, str]
    """Text of each id; empty if the file has none."""
    stoi: Mapping[str, int]

    def encode(self, text: str) -> list[int]:
        """One id per character, as in nanoGPT. Raises DataError for an unknown character."""
        if not self.stoi:
            raise DataError(f"{self.path} has no stoi, so text cannot be encoded; leave the prompt out")
        if unknown := sorted(set(text) - self.stoi.keys()):
            raise DataError(
                f"{unknown[0]!r} is not one of the {len(self.stoi)} characters of {self.path}; "
                "use only characters that the training data has"
            )
        return [self.stoi[character] for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Raises DataError for an unknown id."""
        numbers = list(ids)
        if unknown := [number for number in numbers if number not in self.itos]:
            raise DataError(f"{self.path} has no text for id {unknown[0]}; prepare the data again")
        return "".join(self.itos[number] for number in numbers)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Never:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")


def read_meta(directory: Path) -> Meta | None:
    """The directory's `meta.pkl`; None if it has none. Nothing in it is executed: only dict, list, tuple, str, bytes
    and numbers are read. Raises DataError for anything else, and for an invalid vocabulary."""
    path = directory / META
    try:
        if path.stat().st_size > _LARGEST_META:
            raise DataError(f"{path} has {path.stat().st_size} bytes, a vocabulary has at most {_LARGEST_META}")
        table = _plain_values(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; make it readable or remove it") from error
    except _BROKEN_PICKLE as error:
        raise DataError(
            f"{path} is not a plain vocabulary ({str(error)[:120]}); "
            "allowed: a pickled dict of vocab_size, itos and stoi"
        ) from error
    return _meta(path, table)


_BROKEN_PICKLE = (
    pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, MemoryError,
    RecursionError, OverflowError,
)  # fmt: skip
"""Exceptions of pickle for damaged files."""


def _plain_values(content: bytes) -> Any:
    for opcode, argument, _ in pickletools.genops(content):  # reads, builds nothing
        if opcode.name not in _PLAIN:
            raise pickle.UnpicklingError(f"it holds more than plain values: {opcode.name} {argument or ''}".rstrip())
        if "PUT" in opcode.name and int(str(argument)) > len(content):  # would allocate as many entries
            raise pickle.UnpicklingError(f"it numbers its values up to {argument}")
    return _PlainUnpickler(io.BytesIO(content)).load()


def _meta(path: Path, table: Any) -> Meta:
    def refuse(what: str) -> DataError:
        return DataError(f"{path}: {what}; allowed: a dict of vocab_size (a number), itos and stoi (dicts)")

    if not isinstance(table, dict):
        raise refuse(f"it is a {type(table).__name__}")
    size: Any = table.get("vocab_size")
    if not _is_id(size) or size < 1:
        raise refuse(f"vocab_size is {repr(size)[:120]}")
    itos, stoi = table.get("itos", {}), table.get("stoi", {})
    if isinstance(itos, list | tuple):
        itos = dict(enumerate(itos))
    for name, words, pairs in (
        ("itos", itos, isinstance(itos, dict) and itos.items()),
        ("stoi", stoi, isinstance(stoi, dict) and [(number, word) for word, number in stoi.items()]),
    ):
        if pairs is False or not all(_is_id(number) and isinstance(word, str) for number, word in pairs):
            raise refuse(f"{name} is not a table of words and their ids ({type(words).__name__})")
        if outside := [number for number, _ in pairs if not 0 <= number < size]:
            raise refuse(f"{name} has id {outside[0]}, vocab_size is {size}")
    return Meta(path=path, vocab_size=size, itos=itos, stoi=stoi)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def data_vocabulary(directory: Path) -> tuple[int, str] | None:
    """Vocabulary size that a model of this data needs, and its source; None if nothing names one: GPT-2 tokens, or
    tokens of unknown origin. Raises DataError."""
    if meta := read_meta(directory):
        return meta.vocab_size, META
    if any(shard.dtype.itemsize == 4 and shard.offset for shard in open_split(directory, "train")):
        return LLAMA3_WORDS, "Llama 3 shards"
    return None


def largest_id(shards: Sequence[Shard]) -> tuple[int, Path]:
    """The largest id in these files and the first file that contains it; see SCANNED_BYTES."""
    total = sum(shard.nbytes for shard in shards)
    stride = max(1, -(-total // SCANNED_BYTES))
    found = [(_largest(shard, stride), Path(str(shard.filename))) for shard in shards if len(shard)]
    return max(found, key=lambda one: one[0])


def _largest(shard: Shard, stride: int) -> int:
    length = _BLOCK_BYTES // shard.dtype.itemsize
    return max(int(shard[start : start + length].max()) for start in range(0, len(shard), stride * length))


def check_ids(directory: Path, vocab_size: int) -> None:
    """Raise DataError if a token of the directory is not below vocab_size or all are 0, before anything is measured or
    trained. A larger vocabulary is padding."""
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        shards = open_split(directory, split)
        largest, path = largest_id(shards)
        if largest == 0 and sum(map(len, shards)) >= 64:
            raise DataError(f"{path} holds nothing but zeros, as a file that was never filled; prepare the data again")
        if largest < vocab_size:
            continue
        swapped = max(int(shard[:_BLOCK_BYTES].byteswap().max()) for shard in shards if len(shard))
        if swapped < vocab_size and shards[0].dtype.itemsize == 2:
            advice = "it seems to be big-endian; convert it with numpy.fromfile(path, '>u2').astype('<u2').tofile(path)"
        elif largest >= _MOST_WORDS:
            advice = "the file is damaged or no token ids; prepare the data again"
        else:
            advice = f"raise vocab_size (--vocab-size) to {largest + 1} or more, or give data of the model's tokenizer"
        raise DataError(f"{path} holds token {largest}, the vocabulary has only {vocab_size} words; {advice}")

"""`manifest.json`: settings and progress of `autotune data prepare`."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from autotune.config.tables import read_json, read_table
from autotune.errors import ConfigError, DataError, shown

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1

Split = Literal["train", "val"]
Format = Literal["shards", "nanogpt"]
"""Shards with headers, or nanoGPT's `train.bin` and `val.bin` without."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """A position in a source's stream of documents, between two tokens."""

    documents: int
    """Whole documents before this position."""
    offset: int = 0
    """Tokens of the next document before this position, its end-of-text token included."""
    bookmark: dict[str, Any] | None = None
    """State of a streamed source, from which it continues without reading everything before it."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One complete shard; in nanoGPT's format a range of tokens in `train.bin` or `val.bin`."""

    file: str
    """Name inside the data directory."""
    split: Split
    tokens: int
    documents: int
    """Documents that begin in it."""
    sha256: str
    """Digest of the file, header included; in nanoGPT's format, of these tokens."""
    end: Position | None = None
    """End of the shard in the stream; None if shards do not follow the stream's order."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The settings that decide every byte of a data directory, and its shards so far."""

    source: str
    name: str | None
    tokenizer: str
    shard_tokens: int
    """Tokens of a full shard."""
    max_tokens: int | None
    """Limit over both splits; None for the whole source."""
    format: Format = "shards"
    source_fingerprint: str | None = None
    """Fingerprint of the source's files (names, sizes, times); None for a dataset on the hub."""
    finished: bool = False
    split_rule: str | None = None
    """Rule that divides documents into training and validation; None while undecided."""
    shards: tuple[ShardRecord, ...] = ()
    version: int = MANIFEST_VERSION

    def tokens(self, split: Split) -> int:
        """Tokens in the complete shards of one split."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    def to_json(self) -> str:
        """Text of the file, with totals for human readers."""
        documents = sum(shard.documents for shard in self.shards)
        totals = {"documents": documents, "train": self.tokens("train"), "val": self.tokens("val")}
        return json.dumps({"totals": totals} | asdict(self), indent=2) + "\n"


def read_manifest(directory: Path) -> Manifest | None:
    """Manifest of a directory; None if it has none. Raises DataError for a damaged or newer one."""
    path = directory / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        table = read_json(path, f"delete {directory} and prepare again")
    except ConfigError as error:
        raise DataError(str(error)) from None
    version = table.get("version")
    if version != MANIFEST_VERSION:
        has = f"{path} has version {shown(version)}"
        raise DataError(f"{has}, allowed is {MANIFEST_VERSION}; prepare another directory")
    table.pop("totals", None)
    try:
        return read_table(Manifest, table, "manifest")
    except ConfigError as error:
        raise DataError(f"{path} is damaged ({error}); delete {directory} and prepare again") from error


_ENDS = 1 << 20
"""Bytes at the beginning and end of a file that tell it from others."""


def content_id(directory: Path) -> str:
    """Ten hexadecimal digits, equal for copies of the same tokens in any place: a digest of the manifest's digests.
    Without a manifest, of the sizes and ends of the token files. Raises DataError."""
    manifest = read_manifest(directory)
    if manifest is not None:
        told: list[object] = [(shard.split, shard.tokens, shard.sha256) for shard in manifest.shards]
    else:
        told = [(file.name, file.stat().st_size, _ends(file)) for file in sorted(directory.glob("*.bin"))]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:10]


def _ends(file: Path) -> str:
    with file.open("rb") as handle:
        first = handle.read(_ENDS)
        handle.seek(max(0, file.stat().st_size - _ENDS))
        return hashlib.sha256(first + handle.read(_ENDS)).hexdigest()

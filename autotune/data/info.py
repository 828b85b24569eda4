"""`autotune data info`: what a data directory holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from autotune.data.manifest import Manifest, read_manifest
from autotune.data.shards import Shard, open_files, split_paths
from autotune.data.tokenizer import VOCAB_SIZE, decode
from autotune.errors import DataError

_OPENING = 64  # tokens shown


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """One split; zeros where the directory lacks it."""

    files: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """A data directory."""

    directory: Path
    format: Literal["shards", "nanogpt"]
    """llm.c's shards with headers, or nanoGPT's bare `train.bin` and `val.bin`."""
    train: SplitInfo
    val: SplitInfo
    opening: str | None
    """The text of the first training (else validation) tokens; None where they are not GPT-2's."""
    manifest: Manifest | None
    """Source, settings and whether it is finished; None for a directory made by another program."""


def info(directory: Path) -> DataInfo:
    """Reads sizes, headers and the first tokens. Raises DataError if it is missing, empty or damaged."""
    paths = {split: split_paths(directory, split) for split in ("train", "val")}
    train, val = open_files(paths["train"]), open_files(paths["val"])
    manifest = read_manifest(directory)
    if not train and not val and manifest is None:
        raise DataError(
            f"{directory} holds no tokens (no *_train_*.bin, no train.bin); "
            "make some with `autotune data prepare SOURCE --out DIR`"
        )
    headerless = any(path.name == f"{split}.bin" for split, files in paths.items() for path in files)
    return DataInfo(
        directory=directory,
        format="nanogpt" if headerless else "shards",
        train=_split_info(train),
        val=_split_info(val),
        opening=_opening([*train, *val]),
        manifest=manifest,
    )


def _split_info(shards: list[Shard]) -> SplitInfo:
    return SplitInfo(files=len(shards), tokens=sum(len(shard) for shard in shards))


def _opening(shards: list[Shard]) -> str | None:
    first = next((shard[:_OPENING] for shard in shards if len(shard)), None)
    if first is None or int(first.max()) >= VOCAB_SIZE:
        return None
    return decode(first)

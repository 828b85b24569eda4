"""`autotune data info`: describes a data directory."""

from pathlib import Path

from autotune.data.manifest import Split, read_manifest
from autotune.data.shards import LLAMA3_WORDS, Shard, open_shard, split_paths
from autotune.data.sources import how_to_prepare
from autotune.data.tokenizer import TOKENIZER, VOCAB_SIZE
from autotune.data.vocabulary import Meta, largest_id, read_meta
from autotune.errors import DataError
from autotune.units import format_count

_SPLITS: dict[str, Split] = {"training": "train", "validation": "val"}


def info(directory: Path) -> dict[str, str]:
    """Facts by name, from sizes, headers, ids, `meta.pkl` and the manifest. Raises DataError if the directory is
    missing, empty or damaged."""
    splits = {name: [open_shard(path) for path in split_paths(directory, split)] for name, split in _SPLITS.items()}
    manifest = read_manifest(directory)
    shards = [shard for split in splits.values() for shard in split if len(shard)]
    if manifest is None and not shards:
        raise DataError(f"{directory} holds no tokens (no *_train_*.bin, no train.bin); {how_to_prepare(directory)}")
    tokens = {
        name: f"{format_count(sum(map(len, split)))} tokens in {len(split)} files" for name, split in splits.items()
    }
    bare = any(not shard.offset for shard in shards) or (manifest is not None and manifest.format == "nanogpt")
    meta, largest = read_meta(directory), largest_id(shards)[0] if shards else 0
    beyond = ", which the vocabulary does not have" if meta and largest >= meta.vocab_size else ""
    gpt2 = manifest is not None and manifest.tokenizer == TOKENIZER
    return {
        "directory": str(directory),
        "format": ("nanogpt" if bare else "shards") + (", uint32" if any(map(_is_wide, shards)) else ""),
        **tokens,
        "vocabulary": _vocabulary(meta, gpt2, any(shard.offset and _is_wide(shard) for shard in shards)),
        "largest token": f"{largest:,}{beyond}" if shards else "",
        "source": " ".join(filter(None, (manifest.source, manifest.name))) if manifest else "-",
        "finished": "-" if manifest is None else "yes" if manifest.finished else "no: run the same prepare again",
    }


def _is_wide(shard: Shard) -> bool:
    return shard.dtype.itemsize == 4


def _vocabulary(meta: Meta | None, gpt2: bool, llama3: bool) -> str:
    if meta:
        return f"{meta.vocab_size:,} words of {meta.path.name}"
    if gpt2:
        return f"{VOCAB_SIZE:,} words of GPT-2"
    return f"{LLAMA3_WORDS:,} words of Llama 3" if llama3 else "not named; taken for GPT-2's"

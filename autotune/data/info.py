"""`autotune data info`: what a data directory holds."""

from pathlib import Path

from autotune.data.manifest import Split, read_manifest
from autotune.data.shards import open_shard, split_paths
from autotune.errors import DataError
from autotune.units import format_count

_SPLITS: dict[str, Split] = {"training": "train", "validation": "val"}


def info(directory: Path) -> dict[str, str]:
    """Names and values, from sizes, headers and the manifest. Raises DataError if it is missing, empty or damaged."""
    shards = {name: [open_shard(path) for path in split_paths(directory, split)] for name, split in _SPLITS.items()}
    manifest = read_manifest(directory)
    if manifest is None and not any(shards.values()):
        raise DataError(
            f"{directory} holds no tokens (no *_train_*.bin, no train.bin); "
            "make some with `autotune data prepare SOURCE --out DIR`"
        )
    bare = any((directory / name).exists() for name in ("train.bin", "val.bin"))
    tokens = {
        name: f"{format_count(sum(map(len, found)))} tokens in {len(found)} files" for name, found in shards.items()
    }
    return {
        "directory": str(directory),
        "format": "nanogpt" if bare else "shards",
        **tokens,
        "source": " ".join(filter(None, (manifest.source, manifest.name))) if manifest else "-",
        "finished": "-" if manifest is None else "yes" if manifest.finished else "no: run the same prepare again",
    }

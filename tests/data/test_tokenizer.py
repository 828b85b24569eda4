import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.data.tokenizer import END_OF_TEXT, decode, encode, encode_documents, encoder
from autotune.errors import DataError


def test_known_tokens() -> None:
    assert encode("hello world").tolist() == [31373, 995]
    assert [d.tolist() for d in encode_documents(["hello world", "hello"])] == [
        [END_OF_TEXT, 31373, 995],
        [END_OF_TEXT, 31373],
    ]
    assert encode("").tolist() == []


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    assert decode(encode(text)) == text
    assert encode(text).tolist() == encoder().encode_ordinary(text)


AWKWARD = ["<|endoftext|>", "<|endoftext|", ">", " \n ", "x\ud800"]


@given(st.lists(st.text() | st.sampled_from(AWKWARD), min_size=1))
def test_documents_are_encoded_one_by_one(texts: list[str]) -> None:
    expected = [[END_OF_TEXT, *encoder().encode_ordinary(text)] for text in texts]
    assert [document.tolist() for document in encode_documents(texts)] == expected


def test_the_end_of_text_marker_in_a_text_is_text() -> None:
    tokens = encode("a<|endoftext|>b")
    assert END_OF_TEXT not in tokens
    assert decode(tokens) == "a<|endoftext|>b"


def test_lone_surrogates_become_replacement_characters() -> None:
    assert decode(encode("x\ud800y")) == "x\ufffdy"
    assert decode(encode("\ud83d\ude00")) == "\U0001f600"


def test_unknown_ids_are_refused() -> None:
    with pytest.raises(DataError, match="token 50257"):
        decode([1, 50257])


def test_no_network_and_the_user_s_cache_is_left_alone(tmp_path: Path) -> None:
    code = (
        "import os, socket, sys\n"
        "def refuse(*a, **k): raise OSError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from autotune.data.tokenizer import encode\n"
        "print(encode('hello').tolist(), os.environ['TIKTOKEN_CACHE_DIR'], 'torch' in sys.modules)\n"
    )
    environment = os.environ | {"TIKTOKEN_CACHE_DIR": str(tmp_path)}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["[31373]", str(tmp_path), "False"]
    assert not list(tmp_path.iterdir())

"""Docstrings and comments are plain technical English: some of what they must not say."""

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import autotune

PACKAGE = Path(autotune.__file__).parent
BANNED = re.compile(
    r"\b(anew|as a whole|by turns|for ever|in good order|dear|told|says so|go(es)? on|lies? beyond|at hand)\b"
    r"|without a word|nobody (would|can|knows)|what it (is|was) (told|asked)|the last word",
    re.IGNORECASE,
)


def prose(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, kind and text of every docstring (those below fields included) and comment of a file."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, "docstring", " ".join(node.value.value.split())
    for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__):
        if token.type == tokenize.COMMENT:
            yield token.start[0], "comment", token.string.lstrip("# ")


def complaints(path: Path) -> list[str]:
    found = []
    for line, kind, text in prose(path):
        if kind == "docstring" and text.startswith("Of "):
            found.append(f"{path}:{line}: begins with 'Of'; name the thing first: {text[:60]}")
        elif match := BANNED.search(text):
            found.append(f"{path}:{line}: '{match[0]}' in: {text[:60]}")
    return found


def modules() -> list[Path]:
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")]  # a link, which rglob does not follow
    return sorted(set(files))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_prose_is_plain(path: Path) -> None:
    assert complaints(path) == []


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("x = 1\n'''Of the allocation that failed.'''\n", 1),
        ("# compiled anew each time\n", 1),
        ("def f():\n    '''Offset of the file.'''\n", 0),
        ("x = 1  # a dear trial\n", 1),
        ("x = 'anew'\n", 0),
    ],
)
def test_complaints_are_found_in_docstrings_and_comments(tmp_path: Path, code: str, count: int) -> None:
    (tmp_path / "module.py").write_text(code)
    assert len(complaints(tmp_path / "module.py")) == count

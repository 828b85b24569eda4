import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autotune.data import sources
from autotune.data.sources import PYTHON_DOCS, Bookmark, documents, find_source
from autotune.errors import DataError

TEXTS = ["one", "two\u2028lines", "", "drei <|endoftext|>", "4"]
READ = [text for text in TEXTS if text]


def read(source: Path | str, name: str | None = None) -> list[str]:
    return list(documents(find_source(str(source), name)))


def write_parquet(path: Path, texts: list[str | None], column: str = "text") -> Path:
    pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), path, row_group_size=2)
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_files_of_every_kind(tmp_path: Path) -> None:
    assert read(write_parquet(tmp_path / "a.parquet", [*TEXTS, None])) == READ
    assert read(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])) == READ
    assert read(write_jsonl(tmp_path / "a.jsonl.gz", [{"text": text} for text in TEXTS])) == READ
    (tmp_path / "a.txt").write_bytes(b"whole\r\nfile\n")
    assert read(tmp_path / "a.txt") == ["whole\r\nfile\n"]


def test_a_folder_is_read_recursively_and_sorted(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/1.txt", "c.txt", ".hidden/x.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a/1.txt", "b/2.txt", "c.txt"]


def test_saved_datasets(tmp_path: Path) -> None:
    train = datasets.Dataset.from_dict({"text": [*TEXTS, None], "id": list(range(6))})
    train.save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == READ
    datasets.DatasetDict(train=train.select([0]), test=train).save_to_disk(tmp_path / "dict")
    assert read(tmp_path / "dict") == ["one"]
    datasets.DatasetDict(test=train).save_to_disk(tmp_path / "untrained")
    with pytest.raises(DataError, match="no split 'train'; found: test"):
        read(tmp_path / "untrained")
    train.rename_column("text", "body").save_to_disk(tmp_path / "other")
    with pytest.raises(DataError, match=r"no column 'text'.*body \(string\), id"):
        read(tmp_path / "other")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for the hub: `someone/some` streams three local parquet files."""
    (tmp_path / "hub").mkdir()
    texts = [f"document {index}" for index in range(5000)]
    for number in range(3):
        write_parquet(tmp_path / "hub" / f"{number}.parquet", [*texts[number::3], None])
    load = datasets.load_dataset

    def local(path: str, name: str | None, **options: Any) -> Any:
        assert (path, name) == ("someone/some", "part")
        return load(str(tmp_path / "hub"), **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    return [text for number in range(3) for text in texts[number::3]]


def test_a_hub_dataset_streams_and_goes_on_from_a_mark(hub: list[str]) -> None:
    marks: list[Bookmark] = []
    source = find_source("someone/some", "part")
    assert list(documents(source, marks=marks)) == hub
    assert [mark["documents"] for mark in marks] == [1000, 2000, 3000, 4000, 5000]
    for mark in json.loads(json.dumps(marks)):
        assert list(documents(source, mark)) == hub[mark["documents"] :]


def test_hub_failures_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach it\nand a lot more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = r"HuggingFaceFW/fineweb \(sample-10BT\).*Couldn't reach it; check"
    with pytest.raises(DataError, match=message) as caught:
        read("HuggingFaceFW/fineweb")
    assert "\n" not in str(caught.value)


def test_missing_text_names_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.parquet has no column 'text'.*id \(int64\), body \(string\)"):
        read(write_parquet(tmp_path / "a.parquet", ["x"], column="body"))
    pq.write_table(pa.table({"text": [1]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"no column 'text' of strings; columns found: text \(int64\)"):
        read(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"a\.jsonl:2 has no string at key 'text'; found: body, id"):
        read(write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"body": "x", "id": 1}]))
    with pytest.raises(DataError, match=r"b\.jsonl:1 has no string at key 'text'; found: list"):
        read(write_jsonl(tmp_path / "b.jsonl", [["x"]]))


def test_damaged_files_name_the_place(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n{"text": \n')
    with pytest.raises(DataError, match=r"a\.jsonl:3 is not JSON"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text at byte 3"):
        read(tmp_path / "a.txt")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet"):
        read(tmp_path / "a.parquet")
    whole = write_jsonl(tmp_path / "a.jsonl.gz", [{"text": "x" * 1000}])
    whole.write_bytes(whole.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl\.gz"):
        read(whole)


@pytest.mark.parametrize("source", ["nowhere", "./a/b", "data/x.jsonl", "a/b/c", ""])
def test_an_unknown_source_says_what_is_allowed(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="allowed: owner/name on the hub"):
        find_source(source)


def test_files_that_hold_no_text_say_what_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    for source in (tmp_path, tmp_path / "a.csv"):
        with pytest.raises(DataError, match=r"no text this can read.*\.parquet"):
            find_source(str(source))


def test_a_subset_is_of_the_hub_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="--name 'y'"):
        find_source(str(tmp_path), "y")
    assert find_source("HuggingFaceFW/fineweb").name == "sample-10BT"
    assert find_source("HuggingFaceFW/fineweb", "CC-MAIN-2024-10").name == "CC-MAIN-2024-10"


def test_python_s_own_documentation() -> None:
    source = find_source(PYTHON_DOCS)
    assert len(source.files) > 500
    assert not any("site-packages" in str(path) for path in source.files)
    first = list(itertools.islice(documents(source), 120))
    assert first == list(itertools.islice(documents(source), 120))
    assert any('The "if" statement' in text for text in first)
    json_module = next(path for path in source.files if path.parts[-2:] == ("json", "decoder.py"))
    prose = sources._prose(json_module.read_bytes())
    assert prose.startswith("Implementation of JSONDecoder")
    assert "import" not in prose.split("\n")[0]


def test_a_line_of_a_docstring_that_looks_like_a_comment_is_there_once() -> None:
    code = b'"""About.\n\n# not a comment\n"""\nx = 1\n# a comment\n'
    assert sources._prose(code) == "About.\n\n# not a comment\n\na comment"

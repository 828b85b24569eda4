import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autotune.data import sources
from autotune.data.info import info
from autotune.data.shards import open_split
from autotune.data.sources import PYTHON_DOCS, Bookmark, documents, find_source, how_to_prepare
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


def counted(source: Path | str) -> tuple[list[str], dict[str, int]]:
    skipped: Counter[str] = Counter()
    return list(documents(find_source(str(source)), skipped=skipped)), dict(skipped)


def compressed(path: Path, content: bytes) -> Path:
    pack = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
    }
    path.write_bytes(pack.get(path.suffix.lower(), bytes)(content))
    return path


def csv_of(texts: list[str | None], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([("id", "text"), *enumerate(texts)])
    return text.getvalue().encode()


ROWS: list[dict[str, Any]] = [{"text": text} for text in [*TEXTS, None]]


@pytest.mark.parametrize("compression", ["", ".gz", ".bz2", ".xz", ".zst", ".ZST"])
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json lines", "json", "csv", "tsv", "parquet", "JSONL", "Csv"])
def test_files_of_every_kind_leave_out_the_same_texts(tmp_path: Path, kind: str, compression: str) -> None:
    lines = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)
    content = {
        "json": json.dumps(ROWS, indent=1).encode(),
        "csv": csv_of([*TEXTS, None]),
        "tsv": csv_of([*TEXTS, None], "\t"),
        "parquet": write_parquet(tmp_path / "x", [*TEXTS, None]).read_bytes(),
    }.get(kind.lower(), lines)
    read, skipped = counted(compressed(tmp_path / f"a.{kind.split()[0]}{compression}", content))
    assert read == READ
    assert skipped == ({"null": 2} if kind.lower() in ("csv", "tsv") else {"null": 1, "empty": 1})


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.txt.gz", "a.txt.zst"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    assert read(compressed(tmp_path / name, b"whole\r\nfile\n")) == ["whole\r\nfile\n"]
    assert read(compressed(tmp_path / name, b"\xef\xbb\xbfwhole")) == ["whole"]  # some editors mark UTF-8


@pytest.mark.parametrize("block", [1, 5, 13, 14, 1 << 20])
@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("one fox\n<|endoftext|>\ntwo dogs\n\nand a cat\n<|endoftext|>\n", ["one fox", "two dogs\n\nand a cat"]),
        ("one<|endoftext|>zwölf<|endoftext|>", ["one", "zwölf"]),
        ("<|endoftext|>one\r\n<|endoftext|>\r\ntwo", ["one", "two"]),
        ("a <|endoftext| > b <|endoftext|", ["a <|endoftext| > b <|endoftext|"]),
        ("\n<|endoftext|>\n", []),
    ],
)
def test_a_text_file_is_divided_at_end_of_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, texts: list[str], block: int
) -> None:
    monkeypatch.setattr(sources, "_READ_BYTES", block)
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert read(tmp_path / "a.txt") == texts


def test_a_long_field_of_a_csv_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(csv_of(["x" * 300_000, 'a "quoted",\nbroken text']))
    assert read(tmp_path / "a.csv") == ["x" * 300_000, 'a "quoted",\nbroken text']


def test_a_folder_is_read_recursively_and_sorted(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/1.TXT", "c.txt", ".hidden/x.txt", "notes.md", "b/more.md", "b/x.pdf", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert read(tmp_path) == ["a/1.TXT", "b/2.txt", "c.txt"]
    unread = find_source(str(tmp_path)).unread
    assert len(unread) == 5
    assert sources.count_by_suffix(unread) == "2 .md, 1 LICENSE, 1 .pdf, 1 .json"


def test_what_the_compressions_say_of_damaged_files(tmp_path: Path) -> None:
    whole = b"".join(json.dumps({"text": f"{number} " * 50}).encode() + b"\n" for number in range(2000))
    for suffix in (".gz", ".bz2", ".xz", ".zst"):
        content = compressed(tmp_path / f"a.jsonl{suffix}", whole).read_bytes()
        spoiled = content[: len(content) // 2] + bytes(range(64)) + content[len(content) // 2 + 64 :]
        inside = () if suffix == ".zst" else (spoiled,)  # this one was written without a checksum
        for damaged in (content[:4], content[:-9], b"nothing of the kind", *inside):
            path = tmp_path / f"b.jsonl{suffix}"
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=rf"cannot read .*b\.jsonl\{suffix}|b\.jsonl\{suffix}:\d+") as caught:
                read(path)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "id,body\n1,x\n", "no column 'text'.*columns found: id .*body"),
        ("a.csv", "", "no column 'text'.*columns found: none"),
        ("a.csv", 'text\n"never closed\n', r"a\.csv:1 is not CSV"),
        ("a.json", '[{"text": "x"}, {"body": "y"}]', r"a\.json, entry 2 has no string at key 'text'; found: body"),
        ("a.json", '[{"text": "x"}, ', r"a\.json is not JSON .*array of objects, or one object a line"),
        ("a.json", '["x"]', "entry 1 has no string at key 'text'; found: str"),
        ("a.json", '{"text": \n "x"}', r"a\.json:1 is not JSON"),
        ("a.jsonl", '{"text": 5}', "a.jsonl:1 has no string at key 'text'"),
    ],
)
def test_rows_without_text_name_the_place(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        read(tmp_path / name)


class TestWhatToPrepare:
    """`--data` pointed at what is no data directory yet."""

    @pytest.fixture(autouse=True)
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize(
        ("source", "out"),
        [
            ("raw/stories.parquet", "data/stories"),
            ("raw/stories.jsonl.zst", "data/stories"),
            ("my text.TXT", "'data/my text'"),
            ("raw", "data/raw"),
            ("saved", "data/saved"),
            ("data/fineweb.parquet", "data/fineweb"),
            ("data/corpus", "data/corpus-tokens"),
        ],
    )
    def test_of_something_that_is_here(self, source: str, out: str) -> None:
        for folder in ("raw", "data/corpus"):
            Path(folder).mkdir(parents=True)
        for file in ("raw/stories.parquet", "raw/stories.jsonl.zst", "my text.TXT", "data/fineweb.parquet"):
            Path(file).write_bytes(b"")
        Path("data/corpus/a.csv").write_bytes(b"")
        datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk("saved")
        command = f"`autotune data prepare {shlex.quote(source)} --out {out}`"
        assert how_to_prepare(Path(source)) == f"it holds text: {command}, then give {out.strip(chr(39))}"
        parsed = shlex.split(command.strip("`"))
        assert find_source(parsed[3]).location == str(Path(source).resolve())
        with pytest.raises(DataError, match=re.escape(command)):
            open_split(Path(source), "train")
        with pytest.raises(DataError, match=re.escape(command)):
            info(Path(source))

    @pytest.mark.parametrize("name", ["HuggingFaceFW/fineweb", "roneneldan/TinyStories"])
    def test_of_a_name_on_the_hub(self, name: str) -> None:
        out = f"data/{name.partition('/')[2]}"
        said = f"if it is a dataset on the hub: `autotune data prepare {name} --out {out}`, then give {out}"
        assert how_to_prepare(Path(name)) == said

    def test_of_other_things(self) -> None:
        for folder in ("empty", "tokens/one", "raw"):
            Path(folder).mkdir(parents=True)
        Path("tokens/one/train.bin").write_bytes(b"12")
        Path("notes.pdf").write_bytes(b"")
        assert how_to_prepare(Path("tokens")) == "give one of its folders, for example tokens/one"
        assert how_to_prepare(Path("tokens/one/train.bin")) == "give its folder tokens/one"
        assert how_to_prepare(Path("data/new")) == "make it: `autotune data prepare SOURCE --out data/new`"
        assert how_to_prepare(Path("raw/new")) == "make it: `autotune data prepare SOURCE --out raw/new`"
        for path in ("empty", "notes.pdf"):
            assert how_to_prepare(Path(path)) == "make one with `autotune data prepare SOURCE --out DIR`"


def test_saved_datasets(tmp_path: Path) -> None:
    train = datasets.Dataset.from_dict({"text": [*TEXTS, None], "id": list(range(6))})
    train.save_to_disk(tmp_path / "one")
    assert counted(tmp_path / "one") == (READ, {"null": 1, "empty": 1})
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
    skipped: Counter[str] = Counter()
    source = find_source("someone/some", "part")
    assert list(documents(source, marks=marks, skipped=skipped)) == hub
    assert skipped == {"null": 3}
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
    (tmp_path / "a.pdf").write_text("x")
    for source, found in ((tmp_path, ", only 1 .pdf"), (tmp_path / "a.pdf", "")):
        with pytest.raises(DataError, match=rf"no text this can read{found};.*\.parquet"):
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

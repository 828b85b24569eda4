"""Documents, one string each and in a fixed order, from the hub, from files or from Python's documentation."""

import ast
import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import re
import shlex
import sys
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeGuard

from autotune.errors import DataError

PYTHON_DOCS = "python-docs"
"""Name of the documentation inside the running Python's standard library as a source."""
DEFAULT_NAMES = {"HuggingFaceFW/fineweb": "sample-10BT", "HuggingFaceFW/fineweb-edu": "sample-10BT"}
"""Default subsets, instead of all 15 trillion tokens."""
FORMATS = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    "": lambda path: path.open("rb"),
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: _zstd(path),
}

Bookmark: TypeAlias = dict[str, Any]
"""A position in a streamed source: `documents` before it, and the `state` from which the stream continues."""

_TEXT = "text"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "manifest.json"}
"""Files beside texts that hold no text."""
_MARK_EVERY = 1000
_END_OF_TEXT = b"<|endoftext|>"
_READ_BYTES = 1 << 20
_ALLOWED = (
    f"allowed: owner/name on the hub, files or folders of {', '.join(FORMATS)} (or those with "
    f"{', '.join(filter(None, COMPRESSIONS))}), save_to_disk folders"
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """An existing source of a known kind."""

    kind: Literal["hub", "saved", "files", "python-docs"]
    location: str
    """owner/name on the hub, an absolute path, or `python-docs`."""
    name: str | None = None
    """Subset of a hub dataset (its `config`); None: the default."""
    files: tuple[Path, ...] = ()
    unread: tuple[Path, ...] = ()
    """Files of the folder in an unsupported format."""

    def fingerprint(self) -> str | None:
        """sha256 over the files' paths, sizes and modification times; None for a dataset on the hub."""
        digest = hashlib.sha256()
        for path in self.files:
            status = path.stat()
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest() if self.files else None


def find_source(source: str, name: str | None = None) -> Source:
    """Resolve `python-docs`, an existing path, or `owner/name` on the hub. Raises DataError."""
    path = Path(source).resolve()
    if source != PYTHON_DOCS and not path.exists():
        if not _HUB_NAME.fullmatch(source) or _text_format(Path(source)):
            raise DataError(f"there is no file or folder {source!r}; {_ALLOWED}")
        return Source(kind="hub", location=source, name=name or DEFAULT_NAMES.get(source))
    if name is not None:
        raise DataError(f"--name {name!r} picks a subset on the hub, {source!r} is not there; leave it out")
    if source == PYTHON_DOCS:
        return Source(kind="python-docs", location=source, files=_stdlib_modules())
    below = _files_below(path) if path.is_dir() else (path,)
    if _is_saved(path):
        return Source(kind="saved", location=str(path), files=below)
    files = tuple(file for file in below if _text_format(file))
    unread = tuple(file for file in below if not _text_format(file))
    if not files:
        found = f", only {count_by_suffix(unread)}" if unread and path.is_dir() else ""
        raise DataError(f"{source!r} holds no text this can read{found}; {_ALLOWED}")
    return Source(kind="files", location=str(path), files=files, unread=unread)


def count_by_suffix(paths: Iterable[Path]) -> str:
    """`3 .md, 1 .pdf`: the most frequent suffixes first."""
    counts = Counter(path.suffix.lower() or path.name for path in paths).most_common()
    more = [f"{sum(count for _, count in counts[5:])} others"] if counts[5:] else []
    return ", ".join([*(f"{count} {suffix}" for suffix, count in counts[:5]), *more])


def how_to_prepare(path: Path) -> str:
    """Advice if `path` was given as a data directory but is not one: the exact command, if it is a source."""
    if path.suffix == ".bin" and path.is_file():
        return f"give its folder {path.parent}"
    if path.is_dir() and (inside := sorted({file.parent for file in path.glob("*/*.bin")})):
        return f"give one of its folders, for example {inside[0]}"
    if not path.exists() and (not _HUB_NAME.fullmatch(str(path)) or path.parent.exists() or path.parts[0] == "data"):
        return f"make it: `autotune data prepare SOURCE --out {shlex.quote(str(path))}`"
    if path.exists() and not _holds_text(path):
        return "make one with `autotune data prepare SOURCE --out DIR`"
    name = path.resolve().name
    out = Path("data", name[: len(name) - len("".join(_text_format(path) or ""))])
    if out.exists():
        out = out.with_name(f"{out.name}-tokens")
    what = "it holds text" if path.exists() else "if it is a dataset on the hub"
    return f"{what}: `autotune data prepare {shlex.quote(str(path))} --out {shlex.quote(str(out))}`, then give {out}"


def _holds_text(path: Path) -> bool:
    if path.is_dir():
        return _is_saved(path) or any(map(_text_format, _files_below(path)))
    return bool(_text_format(path))


def _is_saved(path: Path) -> bool:
    """Whether the folder was written by `datasets.save_to_disk`."""
    saved = path / "state.json", path / "dataset_info.json"
    return (path / "dataset_dict.json").is_file() or all(file.is_file() for file in saved)


def _text_format(path: Path) -> tuple[str, str] | None:
    """Format and compression by the name, (".jsonl", ".gz"); None if unsupported."""
    name = path.name.lower()
    if name in _METADATA:
        return None
    for compression in sorted(COMPRESSIONS, reverse=True):
        for suffix in FORMATS:
            if name.endswith(suffix + compression):
                return suffix, compression
    return None


def documents(
    source: Source,
    start: Bookmark | None = None,
    marks: list[Bookmark] | None = None,
    skipped: Counter[str] | None = None,
) -> Iterator[str]:
    """All documents that are not empty, in order. Raises DataError for anything unreadable.

    A hub dataset is streamed from `start` on and regularly appends a bookmark to `marks`; other sources are read from
    their beginning. `skipped` counts the texts left out, as `null` or `empty`.
    """
    skipped = Counter() if skipped is None else skipped
    if source.kind == "hub":
        yield from _hub_documents(source, start, [] if marks is None else marks, skipped)
        return
    texts: Iterator[str | None]
    if source.kind == "saved":
        texts = _saved_documents(source)
    elif source.kind == "python-docs":
        texts = _python_documents(source.files)
    else:
        texts = (text for path in source.files for text in _file_documents(path))
    yield from (text for text in texts if _is_document(text, skipped))


def _is_document(text: str | None, skipped: Counter[str]) -> TypeGuard[str]:
    """Whether the text is not empty; counts it in `skipped` otherwise."""
    if not text:
        skipped["null" if text is None else "empty"] += 1
    return bool(text)


def _files_below(folder: Path, suffix: str = "") -> tuple[Path, ...]:
    """Files below `folder`, sorted by path, without hidden ones."""
    found = (path for path in folder.rglob(f"*{suffix}") if path.is_file())
    return tuple(sorted(path for path in found if "/." not in f"/{path.relative_to(folder)}"))


def _file_documents(path: Path) -> Iterator[str | None]:
    suffix, compression = _text_format(path) or (".txt", "")
    try:
        with COMPRESSIONS[compression](path) as file:
            if suffix == ".parquet":
                yield from _parquet_documents(path, file)
            elif suffix == ".txt":
                yield from _text_documents(path, file)
            elif suffix in (".csv", ".tsv"):
                yield from _csv_documents(path, file, "," if suffix == ".csv" else "\t")
            elif suffix == ".json" and _is_array(path, compression):
                yield from _array_documents(path, file)
            else:
                yield from _jsonl_documents(path, file)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"cannot read {path}: {_first_line(error)}; check the file or download it again") from error


def _zstd(path: Path) -> Any:
    import pyarrow

    try:
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    except pyarrow.ArrowException as error:
        raise OSError(_first_line(error)) from error


def _parquet_documents(path: Path, file: Any) -> Iterator[str | None]:
    import pyarrow
    import pyarrow.parquet

    try:
        # a compressed file is read sequentially, but a parquet's index is at its end
        whole = file if file.seekable() else pyarrow.BufferReader(file.read())
        with pyarrow.parquet.ParquetFile(whole) as table:
            schema = table.schema_arrow
            _check_column(str(path), {field.name: str(field.type) for field in schema})
            for batch in table.iter_batches(batch_size=1024, columns=[_TEXT]):
                yield from batch.column(0).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a parquet file: {_first_line(error)}; download it again") from error


def _check_column(where: str, columns: dict[str, str]) -> None:
    """Raise DataError unless `columns` (name -> type) has a text column `text`."""
    if columns.get(_TEXT) not in ("string", "large_string", "string_view"):
        found = ", ".join(f"{name} ({kind})" for name, kind in columns.items()) or "none"
        raise DataError(f"{where} has no column {_TEXT!r} of strings; columns found: {found}; rename one")


def _text_documents(path: Path, file: Any) -> Iterator[str]:
    """The whole file as one document; if it contains `<|endoftext|>`, each part without the line breaks around it."""
    held, start = bytearray(), 0
    divided = False
    while chunk := file.read(_READ_BYTES):
        seen, begin = max(0, len(held) - len(_END_OF_TEXT) + 1), 0
        held += chunk
        while (end := held.find(_END_OF_TEXT, max(seen, begin))) >= 0:
            divided = True
            yield _decoded(path, held[begin:end], start + begin).strip("\r\n")
            begin = end + len(_END_OF_TEXT)
        del held[:begin]
        start += begin
    rest = _decoded(path, held, start)
    if not divided or (rest := rest.strip("\r\n")):  # a marker at the end of the file is followed by no document
        yield rest


def _decoded(path: Path, content: bytes | bytearray, start: int) -> str:
    """Decode UTF-8, without the byte order mark of some editors. start: offset in the file."""
    try:
        return content.decode("utf-8").removeprefix("\ufeff" if start == 0 else "")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text at byte {start + error.start}; convert it to UTF-8") from error


def _lines(path: Path, file: Any) -> Iterator[str]:
    start = 0
    for line in file:
        yield _decoded(path, line, start)
        start += len(line)


def _csv_documents(path: Path, file: Any, delimiter: str) -> Iterator[str | None]:
    csv.field_size_limit(sys.maxsize)  # the default is 128 KiB
    rows = csv.DictReader(_lines(path, file), delimiter=delimiter, strict=True)
    try:
        _check_column(str(path), dict.fromkeys(rows.fieldnames or (), "string"))
        for row in rows:
            yield row[_TEXT] or None  # CSV has no null
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num} is not CSV ({error}); write it again") from error


def _is_array(path: Path, compression: str) -> bool:
    """Whether a .json file is an array of objects; otherwise it is one object per line."""
    with COMPRESSIONS[compression](path) as file:
        return next((line.strip()[:1] == b"[" for line in file if line.strip(b"\xef\xbb\xbf \t\r\n")), False)


def _array_documents(path: Path, file: Any) -> Iterator[str | None]:
    try:
        rows = json.loads(_decoded(path, file.read(), 0))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); write an array of objects, or one object a line") from error
    for number, row in enumerate(rows, start=1):
        yield _text_of(row, f"{path}, entry {number}")


def _jsonl_documents(path: Path, file: Any) -> Iterator[str | None]:
    for number, line in enumerate(_lines(path, file), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is not JSON ({error}); write one object a line") from error
        yield _text_of(row, f"{path}:{number}")


def _text_of(row: Any, where: str) -> str | None:
    if not isinstance(row, dict) or not isinstance(row.get(_TEXT, 0), str | None):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where} has no string at key {_TEXT!r}; found: {found or 'nothing'}")
    text: str | None = row[_TEXT]
    return text


def _saved_documents(source: Source) -> Iterator[str | None]:
    """Texts of a folder written by `datasets.save_to_disk`; of a DatasetDict, its `train`."""
    import datasets

    try:
        saved = datasets.load_from_disk(source.location)
    except Exception as error:  # whatever the library raises, the folder cannot be read
        raise DataError(f"{source.location} cannot be read by datasets: {_first_line(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        if "train" not in saved:
            raise DataError(f"{source.location} has no split 'train'; found: {', '.join(saved)}; save one")
        saved = saved["train"]
    columns = {name: getattr(feature, "dtype", "") for name, feature in saved.features.items()}
    _check_column(source.location, columns)
    for batch in saved.select_columns([_TEXT]).iter(batch_size=1024):
        yield from batch[_TEXT]


def _hub_documents(
    source: Source, start: Bookmark | None, marks: list[Bookmark], skipped: Counter[str]
) -> Iterator[str]:
    """Texts of a hub dataset, streamed without storing it on disk."""
    import datasets

    where = f"{source.location} ({source.name or 'default'})"
    given = 0
    try:
        stream = datasets.load_dataset(source.location, source.name, split="train", streaming=True)
        if stream.column_names is not None and _TEXT not in stream.column_names:
            raise DataError(f"{where} has no column {_TEXT!r}; found: {', '.join(stream.column_names)}")
        stream = stream.select_columns([_TEXT])
        if start is not None:
            given = start["documents"]
            stream.load_state_dict(start["state"])
        for row in stream:
            if _is_document(text := row[_TEXT], skipped):
                yield text
                given += 1
                if given % _MARK_EVERY == 0:
                    marks.append({"documents": given, "state": stream.state_dict()})
    except DataError:
        raise
    except Exception as error:  # many libraries are involved
        raise DataError(
            f"cannot read {where} from the Hugging Face hub: {_first_line(error)}; "
            "check the name and the network, or give local files"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _stdlib_modules() -> tuple[Path, ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    others = {"site-packages", "dist-packages", "pydoc_data"}  # third parties; the topics are read separately
    return tuple(path for path in _files_below(root, ".py") if others.isdisjoint(path.relative_to(root).parts))


def _python_documents(files: tuple[Path, ...]) -> Iterator[str]:
    """The help topics, one document each; then docstrings and comments by module."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    yield from (_prose(path.read_bytes()) for path in files)


def _prose(code: bytes) -> str:
    """Docstrings and whole-line comments of a module; empty for test files with invalid syntax."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old test modules
            tree = ast.parse(code)
        lines = code.decode("utf-8").split("\n")
    except (SyntaxError, ValueError):
        return ""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    documented = [node for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node)]
    pieces = [(node.body[0].lineno, (ast.get_docstring(node) or "") + "\n") for node in documented]
    ends = [(node.body[0].lineno, node.body[0].end_lineno or 0) for node in documented]
    inside = {number for first, last in ends for number in range(first, last + 1)}
    comments = ((number, line.strip()) for number, line in enumerate(lines, start=1) if number not in inside)
    pieces += [(number, line.lstrip("#! \t")) for number, line in comments if line.startswith("#")]
    return "\n".join(text for _, text in sorted(pieces)).strip()

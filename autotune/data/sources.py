"""Documents, one string each and always in the same order, from the hub, files or Python itself."""

import ast
import gzip
import hashlib
import json
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from autotune.errors import DataError

PYTHON_DOCS = "python-docs"
"""The source's name for the documentation inside the running Python's standard library."""
DEFAULT_NAMES = {"HuggingFaceFW/fineweb": "sample-10BT", "HuggingFaceFW/fineweb-edu": "sample-10BT"}
"""Subsets read where none is named, in place of the whole 15 trillion tokens."""
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".txt")

Bookmark: TypeAlias = dict[str, Any]
"""A place in a streamed source: `documents` before it, and the source's own `state`, from which it goes on."""

_TEXT = "text"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_MARK_EVERY = 1000
_ALLOWED = f"allowed: owner/name on the hub, {', '.join(SUFFIXES)} files or folders, save_to_disk folders"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source that exists and whose kind is known."""

    kind: Literal["hub", "saved", "files", "python-docs"]
    location: str
    """owner/name on the hub, an absolute path, or `python-docs`."""
    name: str | None = None
    """The hub dataset's subset (its `config`); None for its default."""
    files: tuple[Path, ...] = ()

    def fingerprint(self) -> str | None:
        """sha256 over the files' paths, sizes and modification times; None for a dataset on the hub."""
        digest = hashlib.sha256()
        for path in self.files:
            status = path.stat()
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest() if self.files else None


def find_source(source: str, name: str | None = None) -> Source:
    """What `source` means: `python-docs`, an existing path, or `owner/name` on the hub. Raises DataError."""
    path = Path(source).resolve()
    if source != PYTHON_DOCS and not path.exists():
        if not _HUB_NAME.fullmatch(source) or source.endswith(SUFFIXES):
            raise DataError(f"there is no file or folder {source!r}; {_ALLOWED}")
        return Source(kind="hub", location=source, name=name or DEFAULT_NAMES.get(source))
    if name is not None:
        raise DataError(f"--name {name!r} picks a subset on the hub, {source!r} is not there; leave it out")
    if source == PYTHON_DOCS:
        return Source(kind="python-docs", location=source, files=_stdlib_modules())
    saved = path / "state.json", path / "dataset_info.json"
    if (path / "dataset_dict.json").is_file() or all(file.is_file() for file in saved):
        return Source(kind="saved", location=str(path), files=_files_below(path, ""))
    files = _files_below(path, SUFFIXES) if path.is_dir() else (path,)
    if not files or not files[0].name.endswith(SUFFIXES):
        raise DataError(f"{source!r} holds no text this can read; {_ALLOWED}")
    return Source(kind="files", location=str(path), files=files)


def documents(source: Source, start: Bookmark | None = None, marks: list[Bookmark] | None = None) -> Iterator[str]:
    """Every document that is not empty, in order. Raises DataError for what cannot be read.

    A hub dataset is streamed from `start` on, and adds a bookmark to `marks` now and then; other sources are
    always read from their beginning.
    """
    if source.kind == "hub":
        texts = _hub_documents(source, start, [] if marks is None else marks)
    elif source.kind == "saved":
        texts = _saved_documents(source)
    elif source.kind == "python-docs":
        texts = _python_documents(source.files)
    else:
        texts = (text for path in source.files for text in _file_documents(path))
    return (text for text in texts if text)


def _files_below(folder: Path, suffixes: str | tuple[str, ...]) -> tuple[Path, ...]:
    """Files with these suffixes under `folder`, sorted by path, hidden ones left out."""
    found = (path for path in folder.rglob("*") if path.name.endswith(suffixes) and path.is_file())
    return tuple(sorted(path for path in found if "/." not in f"/{path.relative_to(folder)}"))


def _file_documents(path: Path) -> Iterator[str]:
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet_documents(path)
        elif path.name.endswith(".txt"):
            yield path.read_bytes().decode("utf-8")
        else:
            yield from _jsonl_documents(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text at byte {error.start}; convert it to UTF-8") from error
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}; check the file or download it again") from error


def _parquet_documents(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            _check_column(str(path), {field.name: str(field.type) for field in schema})
            for batch in file.iter_batches(batch_size=1024, columns=[_TEXT]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is no parquet file: {_first_line(error)}; download it again") from error


def _check_column(where: str, columns: dict[str, str]) -> None:
    """Raise DataError unless `columns` (name -> type) has a text column `text`."""
    if columns.get(_TEXT) not in ("string", "large_string", "string_view"):
        found = ", ".join(f"{name} ({kind})" for name, kind in columns.items()) or "none"
        raise DataError(f"{where} has no column {_TEXT!r} of strings; columns found: {found}; rename one")


def _jsonl_documents(path: Path) -> Iterator[str]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # bad JSON, or bytes that are not UTF-8
                raise DataError(f"{path}:{number} is not JSON ({error}); write one object a line") from error
            if not isinstance(row, dict) or not isinstance(row.get(_TEXT), str):
                found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise DataError(f"{path}:{number} has no string at key {_TEXT!r}; found: {found or 'nothing'}")
            yield row[_TEXT]


def _saved_documents(source: Source) -> Iterator[str]:
    """Of a folder written by `datasets.save_to_disk`; of a DatasetDict its `train`."""
    import datasets

    try:
        saved = datasets.load_from_disk(source.location)
    except Exception as error:  # a third party's format: whatever it raises, the folder cannot be read
        raise DataError(f"{source.location} cannot be read by datasets: {_first_line(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        if "train" not in saved:
            raise DataError(f"{source.location} has no split 'train'; found: {', '.join(saved)}; save one")
        saved = saved["train"]
    columns = {name: getattr(feature, "dtype", "") for name, feature in saved.features.items()}
    _check_column(source.location, columns)
    for batch in saved.select_columns([_TEXT]).iter(batch_size=1024):
        yield from (text or "" for text in batch[_TEXT])


def _hub_documents(source: Source, start: Bookmark | None, marks: list[Bookmark]) -> Iterator[str]:
    """Streamed, so nothing is kept on disk."""
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
            if text := row[_TEXT]:
                yield text
                given += 1
                if given % _MARK_EVERY == 0:
                    marks.append({"documents": given, "state": stream.state_dict()})
    except DataError:
        raise
    except Exception as error:  # many libraries stand between here and the hub
        raise DataError(
            f"cannot read {where} from the Hugging Face hub: {_first_line(error)}; "
            "check the name and the network, or give local files"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _stdlib_modules() -> tuple[Path, ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    others = {"site-packages", "dist-packages", "pydoc_data"}  # other people's, and the topics, read apart
    return tuple(path for path in _files_below(root, ".py") if others.isdisjoint(path.relative_to(root).parts))


def _python_documents(files: tuple[Path, ...]) -> Iterator[str]:
    """The help topics, one document each; then each module's docstrings and comments."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    yield from (_prose(path.read_bytes()) for path in files)


def _prose(code: bytes) -> str:
    """Docstrings and whole-line comments of a module; "" for the few test files that are no valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old test modules are full of invalid escapes
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

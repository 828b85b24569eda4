"""`autotune data prepare`: a source of documents -> shards of GPT-2 tokens, resumable with identical bytes.

Documents are tokenised in threads, because tiktoken releases Python's global lock and a killed run then leaves no
orphans, and packed in the order of the stream.

The validation split is decided once `2 * shard_tokens` tokens are known or the source has ended:
- at least two shards: the first shard, as in llm.c;
- fewer, with 10 documents or more: every 100th document, or every 50th, 20th, ... if those have too few tokens;
- fewer documents, or very unequal ones: the last tenth of the tokens, as in nanoGPT's Shakespeare.
For a source of less than two shards it has at least 1025 tokens (a block of GPT-2 and the target of its last token), or
a fifth of all tokens if that is less.

In nanoGPT's format, shards are appended to `train.bin` and `val.bin`. The names end in `.part` until the files are
complete, because nanoGPT's train.py would silently read an incomplete file.
"""

import contextlib
import hashlib
import itertools
import os
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from autotune.data.manifest import MANIFEST_NAME, Format, Manifest, Position, ShardRecord, Split, read_manifest
from autotune.data.shards import Tokens, append_tokens, open_shard, write_file, write_shard
from autotune.data.sources import Bookmark, Source, count_by_suffix, documents, find_source
from autotune.data.tokenizer import END_OF_TEXT, TOKENIZER, encode_documents, encoder
from autotune.errors import DataError, InterruptedByUser, suggest
from autotune.files import locked
from autotune.units import format_count, format_duration

FIRST_SHARD = "the first shard is validation"
LAST_TENTH = "the last tenth of the tokens is validation"

_LEAST_VALIDATION = 1025
_OTHER_OUT = "nothing was touched; choose another --out or delete this one"
_CHUNK_CHARACTERS = 1 << 20  # a task of about 60 ms
_MOST_SHARD_TOKENS = 2**31 - 1  # the header's count is an int32


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """What to prepare. Everything but `workers` determines the bytes written."""

    source: str
    """`owner/name` on the hub, a file, a folder, or `sources.PYTHON_DOCS`."""
    out: Path
    name: str | None = None
    """Subset of a hub dataset; None: sample-10BT of FineWeb, the default subset of any other."""
    max_tokens: int | None = None
    """Tokens in both splits, end-of-text tokens included; None: the whole source."""
    shard_tokens: int = 100_000_000
    """Tokens of a full shard; the default makes 200 MB."""
    format: Format = "shards"
    workers: int | None = None
    """Tokenising threads; None: one per core that this process may use."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Content of the data directory after `prepare`."""

    manifest: Manifest
    outcome: Literal["written", "resumed", "already finished"]


def prepare(settings: PrepareSettings) -> Prepared:
    """Fill `settings.out` with shards and a manifest; continue what a call with the same settings began.

    Prints progress on stderr. Raises DataError for bad settings or sources and for a directory that holds something
    else or cannot be written, InterruptedByUser on Ctrl-C. Complete shards are kept.
    """
    _check(settings)
    out, source = settings.out, find_source(settings.source, settings.name)
    with _locked(out):
        manifest = _take_up(settings, source)
        if manifest.finished:
            return Prepared(manifest=manifest, outcome="already finished")
        _save(out, manifest)
        if source.unread:
            print(f"not read: {len(source.unread)} files ({count_by_suffix(source.unread)})", file=sys.stderr)
        try:
            finished = _write(settings, source, manifest)
        except BaseException as error:
            so_far = read_manifest(out)
            if not _token_files(out):
                (out / MANIFEST_NAME).unlink(missing_ok=True)
            if isinstance(error, KeyboardInterrupt):
                kept = f"{len(so_far.shards) if so_far else 0} whole shards stay in {out}"
                raise InterruptedByUser(f"interrupted; {kept}; run the same command to go on") from None
            raise
        finally:
            if sys.stderr.isatty():  # end the live line
                print(file=sys.stderr)
    return Prepared(manifest=finished, outcome="resumed" if manifest.shards else "written")


def _check(settings: PrepareSettings) -> None:
    if settings.format not in get_args(Format):
        raise DataError(f"--format {settings.format!r} is not known; {suggest(settings.format, get_args(Format))}")
    if not 2 <= settings.shard_tokens <= _MOST_SHARD_TOKENS:
        raise DataError(f"--shard-tokens {settings.shard_tokens} is not in 2..{_MOST_SHARD_TOKENS}; try 100M")
    if settings.max_tokens is not None and settings.max_tokens < 2:
        raise DataError(f"--max-tokens {settings.max_tokens} is below 2; leave it out for the whole source")
    if settings.workers is not None and settings.workers < 1:
        raise DataError(f"--workers {settings.workers} is below 1; leave it out for one a core")


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Create and lock `out`; at the end, remove it if it was new and is still empty."""
    new = not out.exists()
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out, DataError(f"another process is preparing {out}; wait for it")))
        except OSError as error:
            raise DataError(f"cannot make directory {out}: {error.strerror}; choose another --out") from error
        try:
            yield
        finally:
            if new and not any(out.iterdir()):
                out.rmdir()


def _token_files(out: Path) -> list[Path]:
    return [*out.glob("*.bin"), *out.glob("*.bin.part")]


def _take_up(settings: PrepareSettings, source: Source) -> Manifest:
    """The manifest to continue from; an unfinished one lists the complete shards, which are kept."""
    out = settings.out
    wanted = Manifest(
        source=source.location,
        name=source.name,
        tokenizer=TOKENIZER,
        shard_tokens=settings.shard_tokens,
        max_tokens=settings.max_tokens,
        format=settings.format,
    )
    manifest = read_manifest(out)
    if manifest is None and _token_files(out):
        raise DataError(f"{out} holds *.bin files that were not prepared here; choose another --out")
    manifest = manifest or wanted
    if not manifest.finished:
        _restore_part_names(out, manifest)
    for key in ("source", "name", "tokenizer", "shard_tokens", "max_tokens", "format"):
        if (before := getattr(manifest, key)) != (now := getattr(wanted, key)):
            raise DataError(f"{out} was begun with {key} {before!r}, now {now!r}; {_OTHER_OUT}")
    shards = _whole_shards(out, manifest)
    if manifest.finished and shards == manifest.shards:
        return manifest
    if manifest.finished:
        _restore_part_names(out, manifest)
    fingerprint = source.fingerprint()
    if shards and fingerprint != manifest.source_fingerprint:
        raise DataError(f"the files of {source.location} changed since {out} was begun; {_OTHER_OUT}")
    return replace(manifest, shards=shards, finished=False, source_fingerprint=fingerprint)


def _whole_shards(out: Path, manifest: Manifest) -> tuple[ShardRecord, ...]:
    """Shards before the first missing or damaged one. Contents are verified only if the manifest is unfinished."""
    whole: list[ShardRecord] = []
    for shard in manifest.shards:
        before = sum(other.tokens for other in whole if other.file == shard.file)
        if not _is_whole(out, manifest, shard, before):
            break  # it and all later ones are written again
        whole.append(shard)
    return tuple(whole)


def _is_whole(out: Path, manifest: Manifest, shard: ShardRecord, before: int) -> bool:
    """Whether a shard is complete. before: tokens that precede it in its file."""
    if manifest.format == "nanogpt":
        path = out / shard.file if manifest.finished else _part(out / shard.file)
        start, size = 2 * before, 2 * shard.tokens
        exact = 2 * sum(other.tokens for other in manifest.shards if other.file == shard.file)
        try:
            actual = path.stat().st_size
        except FileNotFoundError:
            return False
        if manifest.finished:
            return actual == exact
        return actual >= start + size and _sha256(path, start, size) == shard.sha256
    try:
        tokens = len(open_shard(out / shard.file))
    except DataError:
        return False
    return tokens == shard.tokens and (manifest.finished or _sha256(out / shard.file) == shard.sha256)


def _part(path: Path) -> Path:
    """Name of an incomplete file of nanoGPT's format."""
    return path.with_name(f"{path.name}.part")


def _restore_part_names(out: Path, manifest: Manifest) -> None:
    """Rename incomplete files to `.part` again, after a run was killed while it removed that suffix."""
    for name in ("train.bin", "val.bin") if manifest.format == "nanogpt" else ():
        if (out / name).exists():
            (out / name).replace(_part(out / name))


def _sha256(path: Path, start: int = 0, size: int | None = None) -> str:
    """Digest of `size` bytes from `start` on; None: to the end of the file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        left = path.stat().st_size - start if size is None else size
        while left and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _save(out: Path, manifest: Manifest) -> None:
    write_file(out / MANIFEST_NAME, manifest.to_json().encode())


def _write(settings: PrepareSettings, source: Source, manifest: Manifest) -> Manifest:
    """Write the missing shards, and the manifest after each of them; returns the finished manifest."""
    start, skipped, done = Position(documents=0), 0, 0
    if manifest.shards and manifest.shards[-1].end:
        start, skipped = manifest.shards[-1].end, len(manifest.shards)
        done = sum(shard.tokens for shard in manifest.shards)
    marks: list[Bookmark] = [start.bookmark] if start.bookmark else []
    # A bookmark is at or before the start; the documents between the two are read and dropped.
    dropped = start.documents - (marks[0]["documents"] if marks else 0)
    skipped_texts: Counter[str] = Counter()
    texts = itertools.islice(documents(source, start.bookmark, marks, skipped_texts), dropped, None)
    encoder()  # report a missing tokenizer before the first download
    with ThreadPoolExecutor(workers := settings.workers or len(os.sched_getaffinity(0))) as pool:
        stream = _reported(_tokenised(texts, pool, 2 * workers), done, settings.max_tokens)
        stream = _limited(stream, start.offset, done, settings.max_tokens)
        parts: dict[Split, Iterable[Tokens]] = {"train": stream}
        rule = FIRST_SHARD
        if not skipped:
            rule, parts = _divided(stream, settings.shard_tokens)
            if manifest.shards and manifest.split_rule != rule:  # begun by a version with another rule
                for shard in manifest.shards:
                    (settings.out / shard.file).unlink(missing_ok=True)
                manifest = replace(manifest, shards=())
        in_order = rule == FIRST_SHARD
        packed = (
            (split, *shard) for split, part in parts.items() for shard in _packed(part, settings.shard_tokens, start)
        )
        for index, (split, tokens, end) in enumerate(packed, start=skipped):
            if index < len(manifest.shards):
                continue  # a small source is read again from its start, but its complete shards are kept
            if in_order and index == 0:
                split = "val"
            bookmark = next((mark for mark in reversed(marks) if mark["documents"] <= end.documents), None)
            file, sha256 = _write_tokens(settings.out, manifest, split, index, tokens)
            shard = ShardRecord(
                file=file,
                split=split,
                tokens=len(tokens),
                documents=int(np.count_nonzero(tokens == END_OF_TEXT)),
                sha256=sha256,
                end=replace(end, bookmark=bookmark) if in_order else None,
            )
            manifest = replace(manifest, split_rule=rule, shards=(*manifest.shards, shard))
            _save(settings.out, manifest)
    for path in settings.out.glob("*.bin.part"):
        path.replace(path.with_suffix(""))
    manifest = replace(manifest, finished=True)
    _save(settings.out, manifest)
    if skipped_texts:
        kinds = " and ".join(f"{format_count(count)} {kind}" for kind, count in sorted(skipped_texts.items()))
        print(f"left out: {kinds} texts", file=sys.stderr)
    return manifest


def _write_tokens(out: Path, manifest: Manifest, split: Split, index: int, tokens: Tokens) -> tuple[str, str]:
    """Write shard `index`; returns its file name and sha256."""
    if manifest.format == "shards":
        file = f"fineweb_{split}_{index:06d}.bin"
        return file, write_shard(out / file, tokens)
    file = f"{split}.bin"
    return file, append_tokens(_part(out / file), manifest.tokens(split), tokens)


def _tokenised(texts: Iterable[str], pool: ThreadPoolExecutor, ahead: int) -> Iterator[Tokens]:
    """End-of-text token and tokens of each text (1 + T,), in order, with at most `ahead` chunks in flight."""
    pending: deque[Future[list[Tokens]]] = deque()
    try:
        for chunk in _chunks(texts):
            pending.append(pool.submit(encode_documents, chunk))
            if len(pending) >= ahead:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts with about `_CHUNK_CHARACTERS` characters in total."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _reported(stream: Iterable[Tokens], done: int, total: int | None) -> Iterator[Tokens]:
    """The same stream, with progress on stderr: one live line on a terminal, otherwise a line every few seconds."""
    live = sys.stderr.isatty()
    began = last = time.monotonic()
    tokens = 0
    for document in stream:
        tokens += len(document)
        if (now := time.monotonic()) - last >= (0.5 if live else 5.0):
            last, line = now, progress_line(done + tokens, total, tokens / (now - began))
            room = shutil.get_terminal_size().columns - 1  # a full line would move the cursor to the next one
            print(f"\r{line[:room]:<{room}}" if live else line, end="" if live else "\n", file=sys.stderr, flush=True)
        yield document


def progress_line(tokens: int, total: int | None, tokens_per_second: float) -> str:
    """`5.0M of 10.0M tokens, 1.0M tokens/s, 5.0s left`. total: None if the end of the source is unknown."""
    speed = f"tokens, {format_count(tokens_per_second)} tokens/s"
    if total is None:
        return f"{format_count(tokens)} {speed}"
    left = format_duration((total - tokens) / tokens_per_second)
    return f"{format_count(tokens)} of {format_count(total)} {speed}, {left} left"


def _limited(stream: Iterable[Tokens], skip: int, done: int, max_tokens: int | None) -> Iterator[Tokens]:
    """The stream without the first `skip` tokens of its first document, up to `max_tokens - done` tokens."""
    for document in stream:
        rest, skip = document[skip:], 0
        if max_tokens is not None and done + len(rest) >= max_tokens:
            if max_tokens > done:
                yield rest[: max_tokens - done]
            return
        done += len(rest)
        yield rest


def _divided(stream: Iterator[Tokens], shard_tokens: int) -> tuple[str, dict[Split, Iterable[Tokens]]]:
    """Read up to two shards ahead and choose the validation tokens; returns the rule in words and the splits."""
    ahead: deque[Tokens] = deque()
    size = 0
    for document in stream:
        ahead.append(document)
        size += len(document)
        if size >= 2 * shard_tokens:
            return FIRST_SHARD, {"train": _drained(ahead, stream)}
    if size < 2:
        raise DataError("the source has no text; give one with documents that are not empty")
    least = min(_LEAST_VALIDATION, size // 5)
    for stride in (100, 50, 20, 10, 5, 2) if len(ahead) >= 10 else ():
        stride = min(stride, len(ahead))
        val = list(itertools.islice(ahead, stride // 2, None, stride))
        if least <= sum(map(len, val)) <= size // 2:
            train = [document for index, document in enumerate(ahead) if index % stride != stride // 2]
            return f"every {stride}th document is validation", {"val": val, "train": train}
    everything, held_out = np.concatenate(ahead), max(1, size // 10, least)
    rule = LAST_TENTH if held_out == size // 10 else f"the last {held_out} tokens are validation"
    return rule, {"val": [everything[-held_out:]], "train": [everything[:-held_out]]}


def _drained(ahead: deque[Tokens], stream: Iterator[Tokens]) -> Iterator[Tokens]:
    """The documents read ahead, each released when it is yielded, and then the rest of the stream."""
    while ahead:
        yield ahead.popleft()
    yield from stream


def _packed(stream: Iterable[Tokens], shard_tokens: int, start: Position) -> Iterator[tuple[Tokens, Position]]:
    """Full shards (shard_tokens,) and a shorter last one, each with its end; documents span shards as in llm.c.

    The array is reused: the tokens of a shard are valid until the next one is yielded.
    """
    buffer = np.empty(shard_tokens, dtype=np.uint16)
    filled, whole, offset = 0, start.documents, start.offset
    for rest in stream:
        while len(rest) > (room := shard_tokens - filled):
            buffer[filled:] = rest[:room]
            offset += room
            yield buffer, Position(documents=whole, offset=offset)
            rest, filled = rest[room:], 0
        buffer[filled : filled + len(rest)] = rest
        filled, whole, offset = filled + len(rest), whole + 1, 0
    if filled:
        yield buffer[:filled], Position(documents=whole)

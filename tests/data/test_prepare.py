import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from full_disk import disk_of
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.data.batches import open_batches
from autotune.data.info import info
from autotune.data.manifest import Manifest, read_manifest
from autotune.data.prepare import PrepareSettings, prepare, progress_line
from autotune.data.shards import append_tokens, open_split, write_shard
from autotune.data.sources import PYTHON_DOCS
from autotune.data.tokenizer import END_OF_TEXT, encode
from autotune.errors import DataError, InterruptedByUser

SAMPLE = "AUTOTUNE_FINEWEB_SAMPLE"
TEXTS = [f"Document {index} says {'more ' * (index % 7)}." for index in range(250)]


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "source.jsonl", TEXTS)


def wanted(source: Path | str, out: Path, **options: Any) -> PrepareSettings:
    return PrepareSettings(source=str(source), out=out, **{"workers": 2, "shard_tokens": 400} | options)


def stream_of(texts: list[str]) -> list[int]:
    return [token for text in texts if text for token in (END_OF_TEXT, *encode(text).tolist())]


def split(out: Path, name: Any) -> list[int]:
    return np.concatenate(open_split(out, name)).tolist()


def contents(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def test_a_large_source_gives_full_shards_in_the_stream_s_order(source: Path, tmp_path: Path) -> None:
    made = prepare(wanted(source, tmp_path / "out"))
    assert made.outcome == "written"
    whole = stream_of(TEXTS)
    assert split(tmp_path / "out", "val") == whole[:400]
    assert split(tmp_path / "out", "train") == whole[400:]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names[:2] == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert names[-2:] == ["fineweb_val_000000.bin", "manifest.json"]
    assert {len(shard) for shard in open_split(tmp_path / "out", "train")[:-1]} == {400}


def test_a_small_source_holds_out_every_hundredth_document(tmp_path: Path) -> None:
    texts = [f"Document {index} says {'more ' * 600}." for index in range(250)]
    source = write_texts(tmp_path / "long.jsonl", texts)
    made = prepare(wanted(source, tmp_path / "out", shard_tokens=200_000))
    assert split(tmp_path / "out", "val") == stream_of([texts[50], texts[150]])
    rest = [text for index, text in enumerate(texts) if index not in (50, 150)]
    assert split(tmp_path / "out", "train") == stream_of(rest)
    assert made.manifest.split_rule == "every 100th document is validation"
    assert sum(shard.documents for shard in made.manifest.shards) == 250


def test_more_documents_are_held_out_where_they_are_short(source: Path, tmp_path: Path) -> None:
    """Every 100th would be 18 tokens, in which no block fits."""
    made = prepare(wanted(source, tmp_path / "out", shard_tokens=10_000))
    assert made.manifest.split_rule == "every 5th document is validation"
    assert split(tmp_path / "out", "val") == stream_of(TEXTS[2::5])
    assert split(tmp_path / "out", "train") == stream_of([t for i, t in enumerate(TEXTS) if i % 5 != 2])


@pytest.mark.parametrize(
    "texts",
    [
        ["One short story."] * 12,
        ["x"] * 300,
        [f"Story {index} " + "goes on " * index for index in range(60)],
        ["The whole book. " * 4000, *["a note"] * 11],  # one document has nearly all tokens
        [*["a note"] * 6, "The whole book. " * 4000, *["a note"] * 6],  # as the one that would be held out
        ["The whole book. " * 400],
        ["a b c d " * 40] * 9,
    ],
)
def test_a_block_of_validation_always_fits(tmp_path: Path, texts: list[str]) -> None:
    made = prepare(wanted(write_texts(tmp_path / "s.jsonl", texts), tmp_path / "out", shard_tokens=1_000_000))
    train, val = made.manifest.tokens("train"), made.manifest.tokens("val")
    assert train + val == len(stream_of(texts))
    assert val >= min(1025, (train + val) // 5)
    assert val <= train
    block = min(1024, val - 1)
    source = open_batches(tmp_path / "out", seed=0, global_batch_size=1, block_size=block, vocab_size=50304)
    assert source.validation_windows >= 1


@given(
    texts=st.lists(st.text(max_size=30), min_size=1, max_size=40).filter(any),
    shard_tokens=st.integers(2, 150),
    max_tokens=st.none() | st.integers(2, 300),
)
@settings(max_examples=60, deadline=None)
def test_shards_are_the_documents_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], shard_tokens: int, max_tokens: int | None
) -> None:
    folder = tmp_path_factory.mktemp("prepare")
    source = write_texts(folder / "s.jsonl", texts)
    made = prepare(wanted(source, folder / "out", shard_tokens=shard_tokens, max_tokens=max_tokens))
    whole = stream_of(texts)[:max_tokens]
    val, train = split(folder / "out", "val"), split(folder / "out", "train")
    if len(whole) >= 2 * shard_tokens:
        assert (val, train) == (whole[:shard_tokens], whole[shard_tokens:])
    elif "tokens" in str(made.manifest.split_rule):
        assert (train, val) == (whole[: len(train)], whole[len(train) :])
    else:
        stride = int(re.findall(r"\d+", str(made.manifest.split_rule))[0])
        pieces = [list(piece) for piece in np.split(whole, np.flatnonzero(np.equal(whole, END_OF_TEXT))[1:])]
        assert val == [token for piece in pieces[stride // 2 :: stride] for token in piece]
        assert sorted(train + val) == sorted(whole)
    assert len(val) >= min(len(whole) // 5, shard_tokens)
    assert sum(shard.documents for shard in made.manifest.shards) == whole.count(END_OF_TEXT)


class Stop(BaseException):
    """Stands for a killed process: no handler of ours expects it."""


def stop_at(count: int, before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop right before or after the `count`th file (shard or manifest) gets its final name."""
    rename = Path.replace
    calls = iter(range(1, 1000))

    def renamed(path: Path, target: Path) -> Path:
        number = next(calls)
        if number == count and before:
            raise Stop
        result = rename(path, target)
        if number == count:
            raise Stop
        return result

    monkeypatch.setattr(Path, "replace", renamed)


@pytest.mark.parametrize("file_format", ["shards", "nanogpt"])
@pytest.mark.parametrize("shard_tokens", [400, 1700, 10_000])  # 8 shards; rather small; small
def test_resuming_after_any_file_gives_the_same_bytes(
    source: Path, tmp_path: Path, shard_tokens: int, file_format: str
) -> None:
    options = {"shard_tokens": shard_tokens, "max_tokens": 3001, "format": file_format}
    whole = prepare(wanted(source, tmp_path / "whole", **options))
    # the first manifest, a shard and the manifest each, the last one; nanoGPT's two files get their names at the end
    files = 2 + len(whole.manifest.shards) * 2 if file_format == "shards" else 2 + len(whole.manifest.shards) + 2
    for count in range(1, files + 1):
        for before in (True, False):
            out = tmp_path / f"out-{count}-{before}"
            with pytest.MonkeyPatch.context() as patch:
                stop_at(count, before, patch)
                with pytest.raises(Stop):
                    prepare(wanted(source, out, **options))
            assert prepare(wanted(source, out, **options)).manifest.finished
            assert contents(out) == contents(tmp_path / "whole")


def test_a_streamed_source_resumes_from_its_bookmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    (tmp_path / "hub").mkdir()
    for number in range(3):
        write_texts(tmp_path / "hub" / f"{number}.jsonl", [f"{number}: {text}" for text in TEXTS * 6])
    load, opened = datasets.load_dataset, []

    def local(_: str, name: str | None, **options: Any) -> Any:
        opened.append(load("json", data_files=str(tmp_path / "hub" / "*.jsonl"), **options))
        return opened[-1]

    monkeypatch.setattr(datasets, "load_dataset", local)
    options = {"shard_tokens": 11_000}
    prepare(wanted("some/one", tmp_path / "whole", **options))
    with pytest.MonkeyPatch.context() as patch:
        stop_at(7, False, patch)
        with pytest.raises(Stop):
            prepare(wanted("some/one", tmp_path / "out", **options))
    kept = read_manifest(tmp_path / "out")
    assert kept is not None
    assert kept.shards[-1].end is not None
    assert kept.shards[-1].end.bookmark is not None
    assert prepare(wanted("some/one", tmp_path / "out", **options)).outcome == "resumed"
    for path in (tmp_path / "whole").glob("*.bin"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("shards", [1, 3])
def test_a_killed_process_is_resumed(source: Path, tmp_path: Path, shards: int) -> None:
    code = f"""
import os, signal
from pathlib import Path
from autotune.data import prepare as p
write = p.write_shard
def killed(path, tokens):
    if path.name.endswith("{shards:06d}.bin"):
        path.with_name(f".{{path.name}}.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, tokens)
p.write_shard = killed
p.prepare(p.PrepareSettings(source={str(source)!r}, out=Path({str(tmp_path / "out")!r}), shard_tokens=400))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    with pytest.raises(DataError, match=f"unfinished \\({shards} shards so far\\).*autotune data prepare"):
        open_split(tmp_path / "out", "train")
    assert info(tmp_path / "out")["validation"] == "400 tokens in 1 files"
    assert prepare(wanted(source, tmp_path / "out")).outcome == "resumed"
    prepare(wanted(source, tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("half", [0, 1, 399])
@pytest.mark.parametrize("shards", [0, 1, 3])
def test_a_killed_process_is_resumed_in_nanogpts_format(source: Path, tmp_path: Path, shards: int, half: int) -> None:
    from autotune.data import prepare as module

    prepare(wanted(source, tmp_path / "whole", format="nanogpt"))
    out = tmp_path / "out"

    def killed(path: Path, start: int, tokens: Any) -> str:
        manifest = read_manifest(out)
        assert manifest is not None
        if len(manifest.shards) < shards:
            return append_tokens(path, start, tokens)
        with path.open("ab") as file:  # what a killed process has written of a shard
            file.write(tokens[:half].tobytes())
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "append_tokens", killed)
        with pytest.raises(Stop):
            prepare(wanted(source, out, format="nanogpt"))
    assert not list(out.glob("*.bin"))  # nanoGPT would train on half of it
    with pytest.raises(DataError, match=f"unfinished \\({shards} shards so far\\)"):
        open_split(out, "train")
    assert prepare(wanted(source, out, format="nanogpt")).outcome == ("resumed" if shards else "written")
    assert contents(out) == contents(tmp_path / "whole")


def test_nanogpts_files_that_were_spoiled_are_made_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(wanted(source, out, format="nanogpt"))
    before = contents(out)
    for spoil in (lambda: (out / "val.bin").unlink(), lambda: os.truncate(out / "train.bin", 100)):
        spoil()
        assert prepare(wanted(source, out, format="nanogpt")).manifest.finished
        assert contents(out) == before
    assert prepare(wanted(source, out, format="nanogpt")).outcome == "already finished"


def test_no_room_for_nanogpts_files(source: Path, tmp_path: Path) -> None:
    with disk_of(1100), pytest.raises(DataError, match=r"cannot write .*bin\.part: File too large"):
        prepare(wanted(source, tmp_path / "out", format="nanogpt", shard_tokens=700))
    assert not (tmp_path / "out").exists()
    with disk_of(2000), pytest.raises(DataError, match=r"cannot write .*train\.bin\.part: File too large"):
        prepare(wanted(source, tmp_path / "out", format="nanogpt", shard_tokens=700))
    assert prepare(wanted(source, tmp_path / "out", format="nanogpt", shard_tokens=700)).outcome == "resumed"


def nanogpt_batch(data_dir: Path, split: str, block_size: int, batch_size: int, rng: np.random.Generator) -> Any:
    """get_batch of nanoGPT's train.py in NumPy: random offsets into a memory map of uint16, y is x shifted by one."""
    data = np.memmap(data_dir / f"{split}.bin", dtype=np.uint16, mode="r")
    ix = rng.integers(len(data) - block_size, size=batch_size)
    x = np.stack([data[i : i + block_size].astype(np.int64) for i in ix])
    y = np.stack([data[i + 1 : i + 1 + block_size].astype(np.int64) for i in ix])
    return x, y


@pytest.mark.parametrize("shard_tokens", [400, 10_000])
def test_nanogpts_own_loader_reads_its_format(source: Path, tmp_path: Path, shard_tokens: int) -> None:
    shards, bare = tmp_path / "shards", tmp_path / "data" / "mine"
    prepare(wanted(source, shards, shard_tokens=shard_tokens))
    made = prepare(wanted(source, bare, shard_tokens=shard_tokens, format="nanogpt"))
    assert sorted(path.name for path in bare.iterdir()) == ["manifest.json", "train.bin", "val.bin"]
    for name in ("train", "val"):
        tokens = np.fromfile(bare / f"{name}.bin", dtype=np.uint16)
        assert tokens.tolist() == split(shards, name) == split(bare, name)
        assert len(tokens) == made.manifest.tokens(name)  # type: ignore[arg-type]
        x, y = nanogpt_batch(bare, name, 32, 12, np.random.default_rng(0))
        assert x.shape == y.shape == (12, 32)
        assert np.array_equal(x[:, 1:], y[:, :-1])
        assert max(x.max(), y.max()) <= END_OF_TEXT
        text = "".join(map(str, tokens.tolist()))
        assert "".join(map(str, x[0].tolist())) in text
    ours = open_batches(bare, seed=0, global_batch_size=2, block_size=64, vocab_size=50304)
    assert ours.train_batch(0)[0].shape == (2, 64)
    found = info(bare)
    assert (found["format"], found["vocabulary"]) == ("nanogpt", "50,257 words of GPT-2")


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [{"text": text} for text in ("a story", None, "", None)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.md", "b.md", "c.pdf"):
        (folder / name).write_text("x")
    prepare(wanted(folder, tmp_path / "out"))
    said = capsys.readouterr().err.splitlines()
    assert said == ["not read: 3 files (2 .md, 1 .pdf)", "left out: 1 empty and 2 null texts"]
    (folder / "bad.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(DataError, match=r"cannot read .*bad\.jsonl\.zst: Truncated compressed stream; check the file"):
        prepare(wanted(folder, tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_shards_begun_under_another_rule_are_made_again(source: Path, tmp_path: Path) -> None:
    """Divided otherwise, documents would be in both splits, or in none."""
    prepare(wanted(source, tmp_path / "whole", shard_tokens=1700))
    with pytest.MonkeyPatch.context() as patch:
        stop_at(3, False, patch)
        with pytest.raises(Stop):
            prepare(wanted(source, tmp_path / "out", shard_tokens=1700))
    manifest = tmp_path / "out" / "manifest.json"
    rule = "every 5th document is validation"
    assert rule in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(rule, "every 100th document is validation"))
    prepare(wanted(source, tmp_path / "out", shard_tokens=1700))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_ctrl_c_keeps_whole_shards(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autotune.data import prepare as module

    def interrupted(path: Path, tokens: Any) -> str:
        if path.name.endswith("2.bin"):
            raise KeyboardInterrupt
        return write_shard(path, tokens)

    monkeypatch.setattr(module, "write_shard", interrupted)
    with pytest.raises(InterruptedByUser, match="2 whole shards stay"):
        prepare(wanted(source, tmp_path / "out"))
    monkeypatch.undo()
    assert prepare(wanted(source, tmp_path / "out")).outcome == "resumed"


def test_a_finished_directory_is_left_alone_and_a_damaged_one_mended(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(wanted(source, out))
    before = contents(out)
    times = [path.stat().st_mtime_ns for path in sorted(out.iterdir())]
    again = prepare(wanted(source, out, workers=1))
    assert again.outcome == "already finished"
    assert [path.stat().st_mtime_ns for path in sorted(out.iterdir())] == times
    (out / "fineweb_train_000003.bin").unlink()
    (out / "fineweb_train_000004.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=r"has lost fineweb_train_000003\.bin; run the same"):
        open_split(out, "train")
    assert prepare(wanted(source, out)).outcome == "resumed"
    assert contents(out) == before
    write_shard(out / "fineweb_train_000099.bin", [1])
    with pytest.raises(DataError, match=r"holds fineweb_train_000099\.bin, which its manifest does not know"):
        open_split(out, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_tokens": 500}, "shard_tokens 400, now 500"),
        ({"max_tokens": 1000}, "max_tokens None, now 1000"),
        ({"format": "nanogpt"}, "format 'shards', now 'nanogpt'"),
    ],
)
def test_other_settings_are_refused(source: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    prepare(wanted(source, tmp_path / "out"))
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=f"{message}; nothing was touched"):
        prepare(wanted(source, tmp_path / "out", **change))
    assert contents(tmp_path / "out") == before


def test_a_source_changed_in_between_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(5, False, patch)
        with pytest.raises(Stop):
            prepare(wanted(source, tmp_path / "out"))
    write_texts(source, [*TEXTS, "one more"])
    with pytest.raises(DataError, match="changed since"):
        prepare(wanted(source, tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_tokens": 1}, "--shard-tokens 1"),
        ({"max_tokens": 0}, "--max-tokens 0"),
        ({"workers": 0}, "--workers 0"),
        ({"format": "nanogtp"}, "--format 'nanogtp' is not known; did you mean 'nanogpt'"),
    ],
)
def test_bad_settings(source: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(wanted(source, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_a_bad_source_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{')
    wrong = {"empty.txt": "has no text", "bad.jsonl": ":2 is not JSON", "none.txt": "no file"}
    for source, message in wrong.items():
        with pytest.raises(DataError, match=message):
            prepare(wanted(tmp_path / source, tmp_path / "out"))
        assert not (tmp_path / "out").exists()


def test_a_foreign_directory_is_not_touched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_shard(tmp_path / "out" / "fineweb_train_000001.bin", [1])
    with pytest.raises(DataError, match="not prepared here"):
        prepare(wanted(source, tmp_path / "out"))
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        prepare(wanted(source, tmp_path / "out"))
    (tmp_path / "out" / "manifest.json").write_text('{"version": 99}')
    with pytest.raises(DataError, match="version 99"):
        prepare(wanted(source, tmp_path / "out"))


@pytest.mark.parametrize("place", ["file/out", "file"])
def test_an_out_that_cannot_be_made(source: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"cannot make directory .*choose another --out"):
        prepare(wanted(source, tmp_path / place))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_out_without_permission(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(DataError, match=r"cannot write .*Permission denied"):
        prepare(wanted(source, tmp_path / "out"))


def test_no_room_leaves_nothing_half_written(source: Path, tmp_path: Path) -> None:
    message = r"cannot write .*fineweb_val_000000\.bin: File too large"
    with disk_of(1100), pytest.raises(DataError, match=message):
        prepare(wanted(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_two_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another process is preparing"):
        prepare(wanted(source, tmp_path / "out"))
    os.close(descriptor)
    prepare(wanted(source, tmp_path / "out"))


def test_the_manifest_tells_what_was_done(source: Path, tmp_path: Path) -> None:
    made = prepare(wanted(source, tmp_path / "out"))
    manifest = read_manifest(tmp_path / "out")
    assert manifest == made.manifest
    assert isinstance(manifest, Manifest)
    assert manifest.source == str(source)
    table = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert table["totals"] == {"documents": 250, "train": manifest.tokens("train"), "val": 400}
    assert table["finished"]
    for shard in manifest.shards:
        content = (tmp_path / "out" / shard.file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard.sha256
    assert (info(tmp_path / "out")["source"], info(tmp_path / "out")["finished"]) == (str(source), "yes")


def test_progress_says_what_is_known() -> None:
    assert progress_line(5_000_000, 10_000_000, 1e6) == "5.0M of 10.0M tokens, 1.0M tokens/s, 5.0s left"
    assert progress_line(5_000_000, None, 1e6) == "5.0M tokens, 1.0M tokens/s"


@pytest.mark.slow
def test_python_s_documentation_can_be_prepared(tmp_path: Path) -> None:
    made = prepare(wanted(PYTHON_DOCS, tmp_path / "out", max_tokens=50_000, shard_tokens=100_000_000))
    assert made.manifest.tokens("train") + made.manifest.tokens("val") == 50_000


@pytest.fixture(scope="module")
def fineweb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if SAMPLE not in os.environ:
        pytest.skip(f"set {SAMPLE} to a parquet file of 2,800 FineWeb documents")
    out = tmp_path_factory.mktemp("fineweb") / "out"
    prepare(PrepareSettings(source=os.environ[SAMPLE], out=out))
    return out


@pytest.mark.slow
def test_fineweb_s_sample(fineweb: Path) -> None:
    tokens = np.concatenate([*open_split(fineweb, "val"), *open_split(fineweb, "train")])
    assert len(tokens) == 4_364_780
    assert np.count_nonzero(tokens == END_OF_TEXT) == 2_800
    assert np.count_nonzero(np.concatenate(open_split(fineweb, "val")) == END_OF_TEXT) == 28


@pytest.mark.slow
def test_fineweb_s_sample_in_small_shards(fineweb: Path, tmp_path: Path) -> None:
    source, out = os.environ[SAMPLE], tmp_path / "out"
    made = prepare(PrepareSettings(source=source, out=out, shard_tokens=1_000_000, max_tokens=3_500_000))
    assert [shard.tokens for shard in made.manifest.shards] == [1_000_000, 1_000_000, 1_000_000, 500_000]

"""What a user does on a card, on cards that are not there; `scripts/cuda_rehearsal` runs it with torch's CUDA build.

Each part is a function of a `Card`, which returns what it saw, and fails by an exception. Speeds and losses mean
nothing here and are not recorded. tests/cuda_stand_in/README.md says what this can show.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # as a script, this folder comes first

from cuda_stand_in.build import CARDS, build, variables  # noqa: E402

from autotune.data.batches import synthetic_batch  # noqa: E402
from autotune.data.shards import write_shard  # noqa: E402
from autotune.units import GIB, MIB, format_bytes  # noqa: E402

HERE, OUT = Path(__file__).parent, ROOT / "results" / "reference" / "cuda-stand-in"
PEAKS = OUT / "peaks-torch-2.14.jsonl"
SMALL = "[model]\nn_layer = {layers}\nn_head = 4\nn_embd = {width}\nblock_size = 256\nvocab_size = 8192\n"
SMALL += "[training]\nglobal_batch_size = {batch}\n[plan]\nmicro_batch_size = {micro}\ncompile = '{compile}'\n"
SMALL += "dtype = '{dtype}'\n"
NANOGPT = "n_layer = 2\nn_head = 4\nn_embd = 256\nblock_size = 256\nbatch_size = 8\ngradient_accumulation_steps = 4\n"
NANOGPT += "compile = False\n"
SEGMENT_BYTES = 20 * MIB
"""What torch's allocator asks the driver for, for tensors between 1 and 10 MiB (CUDACachingAllocator.cpp)."""
ACCEPTANCE = "profile or (faults and not corrupted)"
"""Files and tests of tests/gpu that hold on a stand-in; the README says why the others do not."""


Ended = subprocess.CompletedProcess[str]


@dataclass(frozen=True, kw_only=True)
class Card:
    """One card of the stand-in, and where its files go."""

    name: str
    libraries: Path
    folder: Path

    @property
    def dtype(self) -> str:
        return "float16" if self.name == "T4" else "bfloat16"

    def run(self, *words: object, real: bool = False, ends: int = 0, **more: str) -> Ended:
        """A Python process on the card, or `real`ly without a driver; it must end with the exit code `ends`."""
        own = {} if real else variables(self.libraries, self.name)
        own |= {"PYTHONPATH": str(ROOT), "AUTOTUNE_CACHE_DIR": str(self.folder / "cache")} | more
        found = subprocess.run(
            [sys.executable, *map(str, words)], cwd=self.folder, env={**os.environ, **own},
            capture_output=True, text=True, check=False, timeout=1500,
        )  # fmt: skip
        last = (found.stderr.strip().splitlines() or ["no output"])[-1]
        assert found.returncode == ends, f"exit code {found.returncode}: {last}"
        return found

    def autotune(self, *words: object, **options: object) -> Ended:
        return self.run("-m", "autotune", *words, **options)  # type: ignore[arg-type]

    def toml(self, name: str, **changes: object) -> Path:
        """A candidate file: the small model, with other values for the words of SMALL."""
        path = self.folder / f"{name}.toml"
        values = {"layers": 2, "width": 256, "batch": 8, "micro": 4, "compile": "off", **changes}
        path.write_text(SMALL.format(**values, dtype=self.dtype))
        return path

    def trial(self, toml: Path, ends: int = 0, **more: str) -> dict[str, Any]:
        found = json.loads(self.autotune("trial", toml, "--json", ends=ends, **more).stdout)
        assert isinstance(found, dict)
        return found

    def data(self) -> Path:
        folder = self.folder / "data"
        folder.mkdir(exist_ok=True)
        sizes = {"block_size": 256, "vocab_size": 8192}
        for name, rows in (("fineweb_val_000000.bin", 200), ("fineweb_train_000001.bin", 2_000)):
            if not (folder / name).exists():
                tokens, _ = synthetic_batch(seed=rows, step=0, global_batch_size=rows, **sizes)
                write_shard(folder / name, tokens.ravel())
        return folder

    @property
    def best(self) -> Path:
        return self.folder / "results" / "rehearsal"


def given(choices: Sequence[str]) -> list[str]:
    return [word for choice in choices for word in ("--choices", choice)]


def search(card: Card) -> str:
    """A whole search: baseline, trials, finalists, verdict."""
    own = card.folder / "nanogpt.py"
    own.write_text(NANOGPT + f"dtype = '{card.dtype}'\n")
    words = ("--from", own, "--vocab-size", 8192, "--budget", "180s", "--name", "rehearsal", "--device", "cuda:0")
    choices = ("micro_batch_size=4,8", "compile=off", "attention=sdpa", "loss=full,chunked")
    choices += ("loss_chunk_tokens=1024", "activation_checkpointing=none", "allocator=default,expandable_segments")
    card.autotune("search", *words, "--data", card.data(), *given(choices))
    best = tomllib.loads((card.best / "best.toml").read_text())
    assert best["measured"]["status"] == "stand-in"
    assert "tokens_per_second" not in best["measured"]
    assert best["environment"]["fingerprint"].startswith("stand-in-")
    report = card.autotune("report", card.best).stdout
    assert "computes nothing" in " ".join(report.split())
    rows = list(csv.DictReader((card.best / "trials.csv").open()))
    ok = [row for row in rows if row["status"] == "ok"]
    assert ok, rows
    assert all(row["mfu"] == row["first_loss"] == "" for row in rows)
    half = {row["dtype"] for row in ok} - {"float32", "tfloat32"}
    assert half <= ({"float16"} if card.name == "T4" else {"bfloat16", "bfloat16_residual"}), half
    failed = {row["status"] for row in rows} - {"ok"}
    return f"{len(ok)} of {len(rows)} trials ran, dtypes {', '.join(sorted({row['dtype'] for row in ok}))}" + (
        f"; others: {', '.join(sorted(failed))}" if failed else ""
    )


def training(card: Card) -> str:
    """The winner trained, interrupted at its end and continued; its peak memory is the search's."""
    step = tomllib.loads((card.best / "best.toml").read_text())["training"]["global_batch_size"] * 256
    for steps, more in ((6, ()), (8, ("--resume",))):
        card.autotune("train", card.best, "--max-tokens", steps * step, "--device", "cuda:0", *more)
    summary = json.loads((card.best / "train" / "summary.json").read_text())
    assert summary["iterations"] == 8
    assert not [line for line in summary["warnings"] if "allocated" in line], summary["warnings"]
    measured = tomllib.loads((card.best / "best.toml").read_text())["measured"]["peak_reserved_bytes"]
    # of so small a model, one segment of the allocator is more than the 1 % that is promised
    assert abs(summary["peak_reserved_bytes"] - measured) <= SEGMENT_BYTES, (summary["peak_reserved_bytes"], measured)
    assert summary["comparison"], "nothing was compared"
    return f"{summary['iterations']} steps; " + "; ".join(line.split(" (")[0] for line in summary["comparison"])


def refused(card: Card) -> str:
    """On another device its best.toml is not trained as if it had been measured."""
    words = ("train", card.best, "--device", "cpu", "--out", card.folder / "other")
    said = card.autotune(*words, real=True, ends=1).stderr
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert "computes nothing" in lines[0], said
    return lines[0][:100] + "..."


def profile(card: Card) -> str:
    toml = card.toml("profiled", compile="block")
    card.autotune("profile", toml, "--device", "cuda:0", "--out", card.folder / "profile")
    found = json.loads((card.folder / "profile" / "profile.json").read_text())
    assert (card.folder / "profile" / "snapshot.pickle").stat().st_size > 0
    share = abs(found["peak_bytes"]["unexplained"]) / found["measured_peak_bytes"]
    assert share < 0.02, share
    return f"{format_bytes(found['measured_peak_bytes'])}, {share:.2%} unexplained"


def estimate(card: Card) -> str:
    said = " ".join(card.autotune("estimate", "--calibration", card.best).stdout.split())
    assert "on a stand-in for a card" in said
    return "calibrated by the search, and says by what"


def limit(card: Card) -> str:
    """A smaller card emulated on this one."""
    own = card.folder / "large_batch.py"
    own.write_text(NANOGPT.replace("batch_size = 8", "batch_size = 128") + f"dtype = '{card.dtype}'\n")
    words = ("--from", own, "--budget", "400s", "--name", "limited", "--memory-limit", "3GiB", "--device", "cuda:0")
    choices = ("micro_batch_size=4,128", "compile=off", "attention=sdpa", "loss=full", "allocator=default")
    choices += ("activation_checkpointing=none", f"dtype={card.dtype}")
    card.autotune("search", *words, *given(choices))
    rows = list(csv.DictReader((card.folder / "results" / "limited" / "trials.csv").open()))
    peaks = [int(row["peak_device_bytes"]) for row in rows if row["status"] == "ok"]
    assert peaks, [row["message"] for row in rows]
    assert max(peaks) <= 3 * GIB
    beyond = [row["status"] for row in rows if row["status"] in ("oom", "over_limit", "predicted_over_limit")]
    assert beyond, [row["status"] for row in rows]
    return f"{len(peaks)} fit below 3 GiB, the largest with {format_bytes(max(peaks))}; {', '.join(beyond)}"


def edge(card: Card) -> str:
    """Out of memory where the card ends; the next trial measures what the one before did."""
    small, large = card.toml("small"), card.toml("large", layers=24, width=1024, batch=4096, micro=2048)
    before, failed, after = card.trial(small), card.trial(large, ends=1), card.trial(small)
    assert failed["status"] == "oom", failed["message"]
    assert failed["wanted_bytes"], failed
    peaks = [max(view["allocated_bytes"] for view in one["memory"].values()) for one in (before, after)]
    assert peaks[0] == peaks[1], peaks
    return f"oom wanting {format_bytes(failed['wanted_bytes'])}; before and after {format_bytes(peaks[0])}"


def less_than_the_weights(card: Card) -> str:
    """A card with room for its context and little else."""
    found = card.trial(card.toml("heavy", layers=24, width=1024), ends=1, AUTOTUNE_STAND_IN_MEMORY=str(1024 * MIB))
    assert found["status"] == "oom", found["message"]
    assert "\n" not in str(found["message"])
    return f"{found['status']} in phase {found['phase']}"


def without_a_driver(card: Card) -> str:
    """The CUDA build on a machine that has none."""
    words = ("search", "--device", "cuda:0", "--model", "2x4x256", "--budget", "20s")
    said = card.autotune(*words, real=True, ends=1).stderr
    lines = said.strip().splitlines()
    assert lines[-1].startswith("error: "), said
    assert "Traceback" not in said
    return lines[-1]


def kernels(card: Card) -> str:
    found: Mapping[str, str] = json.loads(card.run(HERE / "kernels.py").stdout.splitlines()[-1])
    failed = {name: why for name, why in found.items() if why.startswith("FAILED")}
    known = {"attention sdpa_cudnn"}
    assert failed.keys() <= known, failed
    runs = [name for name, why in found.items() if why == "runs"]
    absent = [f"{name} ({why.split(': ')[0]})" for name, why in found.items() if why != "runs" and name not in known]
    return f"{len(runs)} of {len(found)} run; cuDNN's is left out" + (f"; {', '.join(absent)}" if absent else "")


def acceptance(card: Card) -> str:
    """The tests of scripts/gpu_acceptance that hold without computing."""
    rows = card.folder / "acceptance"
    words = ("-m", "pytest", ROOT / "tests" / "gpu", "-q", "-p", "no:cacheprovider", "--rootdir", ROOT, "--minutes", 60)
    card.run(*words, "--out", rows, "-k", ACCEPTANCE, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    every = [row for path in sorted(rows.glob("*.json")) for row in json.loads(path.read_text())["rows"]]
    assert every
    assert all(row["ok"] for row in every)
    return f"{len(every)} tests pass ({', '.join(sorted(path.stem for path in rows.glob('*.json')))})"


PARTS: tuple[Callable[[Card], str], ...] = (
    search, training, refused, profile, estimate, limit, edge, less_than_the_weights, without_a_driver, kernels,
    acceptance,
)  # fmt: skip


def rehearse(card: Card, parts: Sequence[Callable[[Card], str]], out: Path) -> bool:
    """Whether all parts hold; each is written as soon as it has ended."""
    every = True
    for part in parts:
        started = time.monotonic()
        try:
            ok, saw = True, part(card)
        except (AssertionError, KeyError, OSError, ValueError, subprocess.TimeoutExpired) as error:
            ok, saw = False, f"{type(error).__name__}: {error}".partition("\n")[0][:400]
        every &= ok
        write(out, card.name, part.__name__, {"ok": ok, "saw": saw, "seconds": round(time.monotonic() - started)})
        print(f"{card.name:9} {part.__name__:22} {'ok' if ok else 'FAILED':6} {saw}", flush=True)
    return every


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/cuda_rehearsal", description="Rehearse on stand-ins for cards.")
    parser.add_argument("cards", nargs="*", metavar="CARD", help=f"of {', '.join(CARDS)}; default: all")
    parser.add_argument("--record", type=int, metavar="COUNT", help=f"add COUNT rows a card to {PEAKS.name}")
    parser.add_argument("--only", action="append", metavar="PART", help="; ".join(part.__name__ for part in PARTS))
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where rehearsal.json and .md go")
    asked = parser.parse_args()
    if unknown := [card for card in asked.cards if card not in CARDS]:
        parser.error(f"{unknown[0]!r} is no card of the stand-in; choose from {', '.join(CARDS)}")
    if unknown := {*(asked.only or ())} - {part.__name__ for part in PARTS}:
        parser.error(f"{min(unknown)!r} is no part; choose from {', '.join(part.__name__ for part in PARTS)}")
    parts = [part for part in PARTS if not asked.only or part.__name__ in asked.only]
    scratch = Path(tempfile.mkdtemp(prefix="autotune-rehearsal-"))
    build(scratch / "libraries")
    print(f"files of this rehearsal: {scratch}", flush=True)
    every = True
    for name in asked.cards or CARDS:
        card = Card(name=name, libraries=scratch / "libraries", folder=scratch / name.replace(" ", "-"))
        card.folder.mkdir(exist_ok=True)
        if asked.record:
            print(card.run(HERE / "peaks.py", asked.record, PEAKS).stdout, flush=True)
        else:
            every &= rehearse(card, parts, asked.out)
    return int(not every)


def write(out: Path, card: str, part_name: str, row: Mapping[str, object]) -> None:
    """rehearsal.json keeps the rows of cards and parts that this run left out; rehearsal.md is made of it."""
    path = out / "rehearsal.json"
    cards = json.loads(path.read_text())["cards"] if path.exists() else {}
    cards.setdefault(card, {})[part_name] = row
    cards = {name: cards[name] for name in CARDS if name in cards}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    table = {"command": "scripts/cuda_rehearsal", "recorded_at": now, "cards": cards}
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
    lines = ["# Rehearsal without a card", "", f"`{table['command']}`, {now}. Nothing was computed.", ""]
    lines += ["| part | " + " | ".join(cards) + " |", "|---" * (len(cards) + 1) + "|"]
    for part in PARTS:
        cells = [cards[name].get(part.__name__) for name in cards]
        lines.append(f"| {part.__name__} | " + " | ".join(map(as_text, cells)) + " |")
    (out / "rehearsal.md").write_text("\n".join(lines) + "\n")


def as_text(cell: Mapping[str, object] | None) -> str:
    if cell is None:
        return "not run"
    return ("" if cell["ok"] else "**failed** ") + str(cell["saw"]).replace("|", "/")


if __name__ == "__main__":
    sys.exit(main())

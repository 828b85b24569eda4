"""What the GPU tests measure with: candidates, trials in worker processes, and the command line."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from autotune.config.candidate import Candidate, DType, Plan, Recipe, Shape
from autotune.config.toml import CandidateFile, parse_candidate
from autotune.environment import Environment
from autotune.measure.runner import run_trial
from autotune.measure.types import TrialRequest, TrialResult

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]

EAGER = Plan(micro_batch_size=16, compile="off", loss="full", attention="sdpa", dtype="bfloat16")
COMPILED = replace(EAGER, compile="full")
CHUNKED = replace(COMPILED, loss="chunked", loss_chunk_tokens=8192)
PLANS = {"eager": EAGER, "compiled": COMPILED, "chunked loss, compiled": CHUNKED}

LIKELY = (
    "micro_batch_size=32,64,128", "loss=full,chunked,chunked_triton", "loss_chunk_tokens=4096,8192,16384",
    "activation_checkpointing=none", "compile=full", "attention=sdpa,sdpa_flash", "allocator=default",
    "dtype=bfloat16,bfloat16_residual",
)  # fmt: skip
"""Choices of a six-minute search. A whole graph takes up to a minute to compile, so slow plans are left out."""

EXHAUSTIVE = (
    "micro_batch_size=8,16,24,32,48,64", "loss=full,chunked", "loss_chunk_tokens=2048,8192",
    "activation_checkpointing=none,block", "compile=off,full,block", "attention=sdpa,sdpa_flash", "allocator=default",
    "dtype=bfloat16",
)  # fmt: skip
"""Some 200 plans of 124M."""

DRY_MINUTES = 4.0
"""Budget of a dry run's search: a slow processor whose cores are shared takes a minute to compile its first plan."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The machine under test, and where rows and files go."""

    environment: Environment
    directory: Path
    """Rows, one JSON and CSV file for each test file."""
    scratch: Path
    """Logs, data, run directories."""
    dry: bool
    """Tiny shapes on the CPU."""
    deadline: float
    """time.monotonic() at which this call must end."""
    row: Row = field(default_factory=dict)
    """Row of the running test: what it measured, for the record."""

    @property
    def device(self) -> str:
        return self.environment.device

    @property
    def device_kind(self) -> str:
        return self.device.partition(":")[0]

    @property
    def half(self) -> DType:
        """The 16-bit format: a card older than bfloat16 has float16 only."""
        return "float16" if self.device_kind == "cuda" and self.environment.capability < (8, 0) else "bfloat16"

    def runnable(self, choices: Sequence[str]) -> tuple[str, ...]:
        """The choices without those that need a card with bfloat16, where this one has none."""
        if self.half == "bfloat16":
            return tuple(choices)
        kinds = (choice.replace(",bfloat16_residual", "").replace(",sdpa_flash", "") for choice in choices)
        return tuple(kind.replace("bfloat16", self.half) for kind in kinds)

    def shape(self, n_layer: int, n_head: int, n_embd: int) -> Shape:
        """The shape itself on a card, a tiny one with one or two layers in a dry run."""
        if self.dry:
            return Shape(n_layer=1 + n_layer % 2, n_head=2, n_embd=64, block_size=64, vocab_size=512)
        return Shape(n_layer=n_layer, n_head=n_head, n_embd=n_embd)

    def candidate(self, shape: Shape, plan: Plan, sequences: int = 512) -> Candidate:
        sequences = 8 if self.dry else sequences
        micro = min(plan.micro_batch_size, sequences)
        chunk = min(plan.loss_chunk_tokens, micro * shape.block_size)
        dtype = self.half if plan.dtype == "bfloat16" else plan.dtype
        plan = replace(plan, micro_batch_size=micro, loss_chunk_tokens=chunk, dtype=dtype)
        return Candidate(recipe=Recipe(shape=shape, global_batch_size=sequences), plan=plan)

    def trial(self, candidate: Candidate, limit: int | None = None, **changes: Any) -> TrialResult:
        """Measure in a fresh worker process and put the figures into the row."""
        request = TrialRequest(
            candidate=candidate, device=self.device, result_path="", memory_limit_bytes=limit,
            measure_seconds=0.3 if self.dry else 4.0, timeout_seconds=min(240.0, self.seconds_left()),
        )  # fmt: skip
        result = run_trial(replace(request, **changes), self.scratch / "logs" / f"{candidate.id}.log")
        self.row.update(measured(result))
        return result

    def rows(self, subject: str) -> dict[str, Row]:
        """Rows of the tests that passed in test_<subject>.py, by test."""
        return {name: row for name, row in rows_in(self.directory, subject).items() if row["ok"]}

    def winner(self, model: str) -> CandidateFile:
        """The winner that test_plain_nanogpt.py's search recorded."""
        row = self.rows("plain_nanogpt").get(f"test_search[{model}]")
        assert row, f"no winner of {model} is recorded; run scripts/gpu_acceptance -k 'plain_nanogpt and search'"
        file = parse_candidate(row["toml"], "the winner")
        recipe = replace(file.candidate.recipe, data=str(self.scratch / file.candidate.recipe.data))
        return replace(file, candidate=replace(file.candidate, recipe=recipe))

    def autotune(self, *words: object) -> str:
        """Standard output of the command line, run in the scratch directory."""
        return self.output([sys.executable, "-m", "autotune", *map(str, words)])

    def output(self, command: Sequence[str], variables: Mapping[str, str] | None = None) -> str:
        """Standard output of a command, which is killed when this call must end."""
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        run = subprocess.run(
            command, cwd=self.scratch, env={**os.environ, **(variables or {}), **paths}, capture_output=True,
            text=True, check=False, timeout=self.seconds_left(),
        )  # fmt: skip
        assert run.returncode == 0, (run.stderr.strip().splitlines() or ["no output"])[-1]
        return run.stdout

    def seconds_left(self) -> float:
        """Seconds until this call must end, at least twenty."""
        return max(20.0, self.deadline - time.monotonic())

    def search(self, shape: Shape, minutes: float, choices: Sequence[str], *words: object) -> tuple[Path, int]:
        """Run `autotune search`: its run directory, and how many trials it made."""
        name = f"{in_words(shape)}-{time.time():.0f}"
        chosen = (word for choice in self.runnable(choices) for word in ("--choices", choice))
        fixed = (
            "--device",
            self.device,
            "--model",
            in_words(shape),
            "--name",
            name,
            "--budget",
            f"{60 * minutes:.0f}s",
        )
        self.autotune("search", *fixed, *chosen, *words)
        run = self.scratch / "results" / name
        return run, len((run / "trials.csv").read_text().splitlines()) - 1


BENCH = pytest.StashKey[Bench | None]()
"""In the configuration's stash; None without a card."""


def in_words(shape: Shape) -> str:
    """Value of --model."""
    return f"{shape.n_layer}x{shape.n_head}x{shape.n_embd}x{shape.block_size}"


def measured(result: TrialResult) -> Row:
    """Figures of a trial that a row records."""
    return {
        "status": result.status,
        "message": result.message,
        "tokens_per_second": result.tokens_per_second,
        "tokens_per_second_ci95": result.tokens_per_second_ci95,
        "mfu": result.mfu,
        "peak_allocated_bytes": result.peak("allocated_bytes"),
        "peak_reserved_bytes": result.peak("reserved_bytes"),
        "peak_device_bytes": result.peak("device_bytes"),
        "num_alloc_retries": result.num_alloc_retries,
        "compile_seconds": result.compile_seconds,
    }


def rows_in(directory: Path, subject: str) -> dict[str, Row]:
    """All rows that earlier calls recorded for test_<subject>.py, by test."""
    path = directory / f"{subject}.json"
    return {row["test"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}

"""A new field of `Plan` needs no other line to be read, written, listed and named in an export."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import autotune

TESTS = Path(__file__).parents[1]
LAST = '    sharding: Sharding = "none"\n'
USE = """
import sys
from dataclasses import replace
from pathlib import Path

import recorded_run
from autotune.cli import run
from autotune.config.candidate import Candidate, Plan
from autotune.config.nanogpt import format_nanogpt
from autotune.config.toml import CandidateFile, format_candidate, parse_candidate

parent = Path(sys.argv[1])
records = [
    replace(one, candidate=replace(one.candidate, plan=replace(one.candidate.plan, streams=2 + number % 2)))
    for number, one in enumerate(recorded_run.records())
]
directory = recorded_run.write_run(parent, records, records[-1].candidate)
text = format_candidate(CandidateFile(candidate=records[0].candidate))
assert "\\nstreams = 2\\n" in text
assert parse_candidate(text, "x.toml", ("plan.streams=3",)).candidate.plan.streams == 3
assert Plan().streams == 1 and Candidate(plan=Plan(streams=2)).id != Candidate().id
assert "nanoGPT has no streams = 2: expect" in format_nanogpt(Candidate(plan=Plan(streams=2)), "", "cuda:0")
assert "streams" not in format_nanogpt(Candidate(), "", "cuda:0")
header, *rows = (directory / "trials.csv").read_text().splitlines()
column = header.split(",").index("streams")
assert [row.split(",")[column] for row in rows] == [str(one.candidate.plan.streams) for one in records]
assert run(["report", str(directory)]) == 0
"""


def test_a_new_knob_is_written_read_and_shown_everywhere(tmp_path: Path) -> None:
    package = tmp_path / "autotune"
    shutil.copytree(Path(autotune.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    source = package / "config" / "candidate.py"
    text = source.read_text()
    assert text.count(LAST) == 1
    source.write_text(text.replace(LAST, f"{LAST}    streams: int = 1\n"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(TESTS))), "COLUMNS": "300"}
    command = [sys.executable, "-c", USE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "streams" in done.stdout

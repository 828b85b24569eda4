"""Names of a run's files exist once; two searches never share a directory."""

import ast
from pathlib import Path

import pytest
from recorded_run import records, write_run

import autotune
from autotune.config import train_settings
from autotune.config.toml import read_candidate
from autotune.measure.types import PEAK_VIEWS
from autotune.runs import directory
from autotune.runs.directory import claim_name, publish
from autotune.runs.read import load_run
from autotune.units import GIB

PACKAGE = Path(autotune.__file__).parent
NAMES = {
    value for name, value in {**vars(directory), **vars(train_settings)}.items()
    if name.isupper() and not name.startswith("_") and isinstance(value, str) and "." in value
}  # fmt: skip
HOMES = {"runs/directory.py", "config/toml.py", "config/train_settings.py", "measure/runner.py"}
"""Modules that define names: the run directory's, and of rooms below it."""


def test_every_file_of_a_run_has_a_name() -> None:
    assert {"best.toml", "search.toml", "trials.csv", "study.db", "verdict.json", "recipe.toml"} <= NAMES


@pytest.mark.parametrize("file", sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")))
def test_no_other_module_holds_a_name(file: str) -> None:
    nodes = ast.walk(ast.parse((PACKAGE / file).read_text()))
    literals = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert file in HOMES or not literals & NAMES


def test_a_name_that_is_taken_gets_a_number(tmp_path: Path) -> None:
    assert [claim_name(tmp_path, "run") for _ in range(3)] == ["run", "run-2", "run-3"]


def test_the_best_of_a_stand_in_holds_peaks_and_no_speeds(tmp_path: Path) -> None:
    path = write_run(tmp_path, device_name="Card (stand-in)")
    run = load_run(path)
    publish(path, run.settings, run.environment, records(), run.verdict)
    best = read_candidate(path)
    assert best.measured["status"] == "stand-in"
    assert best.measured["peak_allocated_bytes"] == 7 * GIB
    assert set(best.measured) <= {"trial", "status", "objective", *(f"peak_{view}" for view in PEAK_VIEWS)}
    assert best.environment["fingerprint"].startswith("stand-in-")

"""Names of a run's files exist once; two searches never share a directory."""

import ast
from pathlib import Path

import pytest

import autotune
from autotune.config import train_settings
from autotune.runs import directory
from autotune.runs.directory import claim_name

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

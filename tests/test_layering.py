"""Imports point down only, and the process that searches never loads torch. Rules, not prose."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import autotune

PACKAGE = Path(autotune.__file__).parent
_COMMON = {"errors", "files", "places", "terminal", "units", "cgroup", "environment", "config"}
_MEASURE = {*_COMMON, "measure", "model", "data", "kernels"}
_RUNS = {*_MEASURE, "runs", "memory", "profile"}
ALLOWED = {
    "errors": set[str](),
    "files": {"errors"},
    "places": {"errors"},
    "terminal": {"errors"},
    "units": {"errors"},
    "config": {"errors", "files", "terminal", "units", "config", "kernels"},
    "cgroup": set[str](),
    "environment": {"errors", "places", "terminal", "units", "cgroup", "config", "kernels"},
    "kernels": {"kernels"},
    "data": {*_COMMON, "data", "kernels"},
    "model": {*_COMMON, "model", "kernels"},
    "measure": _MEASURE,
    "profile": {*_MEASURE, "profile"},
    "memory": {*_MEASURE, "memory"},
    "runs": {*_MEASURE, "runs"},
    "search": {*_RUNS, "search"},
    "train": {*_RUNS, "train"},
    "report": {*_RUNS, "report"},
    "cli": {*_RUNS, "search", "train", "report"},
    "__main__": {"cli"},
}
"""What each room may import of the package."""
WITHOUT_TORCH = (
    "cli", "config", "errors", "files", "memory", "places", "report", "runs", "search", "terminal", "units",
)  # fmt: skip
"""Rooms in which torch is not imported even inside a function."""
SEARCHING = ("environment", "measure.runner", "measure.types", "model.compile_cache", "kernels.registry")
"""Modules of other rooms that the searching process loads."""


def modules() -> Iterator[tuple[str, str, Path]]:
    """Room, dotted name and file of every module that exists."""
    for path in sorted(PACKAGE.iterdir()):
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.suffix == ".py" else []
        for file in files:
            parts = file.relative_to(PACKAGE).with_suffix("").parts
            if parts != ("__init__",):
                yield parts[0], ".".join(parts).removesuffix(".__init__"), file


def imported(source: str) -> Iterator[str]:
    """Every module that a source text imports, at any depth of it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module} in line {node.lineno}; write it in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_modules_import_in_no_circle() -> None:
    names = {name for _, name, _ in modules()}
    imports = {}
    for _, name, file in modules():
        targets = (target.removeprefix("autotune.") for target in imported(file.read_text()) if target != "autotune")
        found = (next((t for t in (target, target.rpartition(".")[0]) if t in names), None) for target in targets)
        imports[name] = {target for target in found if target}
    order = TopologicalSorter(imports)
    order.prepare()  # raises CycleError, which names the circle


def test_every_room_has_its_rule() -> None:
    assert {room for room, _, _ in modules()} == set(ALLOWED)


@pytest.mark.parametrize(("room", "name", "file"), [pytest.param(*found, id=found[1]) for found in modules()])
def test_imports_point_down(room: str, name: str, file: Path) -> None:
    del name
    ours = [target.split(".") for target in imported(file.read_text()) if target.split(".")[0] == "autotune"]
    rooms = {parts[1] for parts in ours if len(parts) > 1 and parts[1] != "__version__"}
    assert rooms <= ALLOWED[room]


@pytest.mark.parametrize(
    ("room", "file"), [pytest.param(room, file, id=name) for room, name, file in modules() if room in WITHOUT_TORCH]
)
def test_searching_rooms_name_no_torch(room: str, file: Path) -> None:
    del room
    assert not {target.split(".")[0] for target in imported(file.read_text())} & {"torch", "triton"}


def test_the_searching_process_loads_no_torch() -> None:
    names = [name for room, name, _ in modules() if room in WITHOUT_TORCH] + list(SEARCHING)
    code = "\n".join(f"import autotune.{name}" for name in names) + "\nimport sys; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch.nn", ["torch.nn"]),
        ("def f():\n    from autotune.search import loop", ["autotune.search.loop"]),
        ("if x:\n    import a, b.c as d", ["a", "b.c"]),
    ],
)
def test_the_walker_sees_imports_at_any_depth(source: str, found: list[str]) -> None:
    assert list(imported(source)) == found

"""GPU acceptance: options, resumption over several calls, one JSON and one CSV file of rows for each test file."""

import json
import shutil
import time
from collections.abc import Generator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import mkdtemp

import pandas as pd
import pytest
import torch
from gpu.bench import BENCH, ROOT, Bench, rows_in

from autotune.environment import describe
from autotune.units import GIB, format_bytes

ORDER = ["kernels", "profile", "faults", "limits", "plain_nanogpt", "promise", "breakdown", "memory_model", "guide"]
ORDER += ["largest", "search"]
"""Later files read rows of earlier ones."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("GPU acceptance")
    group.addoption("--minutes", type=float, default=1440.0, help="begin no test that may end later than this")
    group.addoption("--again", action="store_true", help="repeat what failed in an earlier call")
    group.addoption("--long", action="store_true", help="include the tests that take an hour")
    group.addoption("--dry-run-cpu", action="store_true", help="tiny shapes on the CPU, nothing kept")
    group.addoption("--out", type=Path, help="directory of the rows, else results/reference/<card>-torch-<version>")


def pytest_configure(config: pytest.Config) -> None:
    dry, out = config.option.dry_run_cpu, config.option.out
    config.stash[BENCH] = None
    if not dry and not torch.cuda.is_available():
        return  # tests/conftest.py skips all tests here
    here = describe("cpu" if dry else "cuda:0")
    card = f"{here.device_name.lower().replace(' ', '-')}-torch-{'.'.join(here.torch.split('.')[:2])}"
    scratch = Path(mkdtemp(prefix="autotune-dry-run-")) if dry else ROOT / "results" / "acceptance"
    config.stash[BENCH] = Bench(
        environment=here,
        directory=out or (scratch / "rows" if dry else ROOT / "results" / "reference" / card),
        scratch=scratch,
        dry=dry,
        deadline=time.monotonic() + 60 * config.option.minutes - 10,
    )


def pytest_report_header(config: pytest.Config) -> str:
    bench = config.stash[BENCH]
    if bench is None or bench.dry:
        return ""
    free, total = torch.cuda.mem_get_info()
    busy = f"; WARNING: others hold {format_bytes(total - free)} of the card, speeds will be too low"
    return f"rows: {bench.directory}" + busy * (total - free > 2 * GIB)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is recorded, what takes an hour, and in a dry run what only a card can do."""
    here = Path(__file__).parent
    ours = sorted((item for item in items if item.path.parent == here), key=lambda item: ORDER.index(subject(item)))
    bench, again = config.stash[BENCH], config.option.again
    known = {name: rows_in(bench.directory, name) if bench else {} for name in ORDER}

    def wanted(item: pytest.Item) -> bool:
        row = known[subject(item)].get(item.name)
        unrecorded = row is None or (again and not row["ok"])
        short = config.option.long or not item.get_closest_marker("long")
        return unrecorded and short and not (bench and bench.dry and item.get_closest_marker("card_only"))

    config.hook.pytest_deselected(items=[item for item in ours if not wanted(item)])
    items[:] = [item for item in items if item.path.parent != here] + [item for item in ours if wanted(item)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    bench, need = item.config.stash[BENCH], item.get_closest_marker("seconds")
    if bench and time.monotonic() + (need.args[0] if need else 60) > bench.deadline:
        pytest.exit("the time is over; call again to go on", returncode=2)


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Bench:
    found = request.config.stash[BENCH]
    assert found
    found.row.clear()
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Record the row of a test that ended, whatever its outcome."""
    report, bench = (yield), item.config.stash[BENCH]
    if bench and (report.when == "call" or report.failed):
        ok, why = not report.failed, str(call.excinfo.value).strip().partition("\n")[0][:300] if call.excinfo else ""
        row = {"test": item.name, "ok": ok, "outcome": report.outcome, "seconds": round(call.duration, 1), **bench.row}
        record(bench, subject(item), {**row, **({"why": why} if why else {})})
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With nothing left to run, the exit status is what was recorded. A dry run without failures leaves nothing."""
    bench = session.config.stash[BENCH]
    rows = [row for name in ORDER for row in rows_in(bench.directory, name).values()] if bench else []
    if rows and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = int(not all(row["ok"] for row in rows))
    if bench and bench.dry and session.exitstatus == pytest.ExitCode.OK:
        shutil.rmtree(bench.scratch, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name in ORDER if (bench := config.stash[BENCH]) else ():
        if rows := rows_in(bench.directory, name).values():
            passed, skipped = (sum(row["outcome"] == what for row in rows) for what in ("passed", "skipped"))
            line = f"{name}: {passed} passed, {skipped} skipped, {len(rows) - passed - skipped} failed"
            terminalreporter.write_line(f"recorded {line} in {bench.directory / name}.json")


def subject(item: pytest.Item) -> str:
    """`kernels` for test_kernels.py: the name of its rows' files."""
    return item.path.stem.removeprefix("test_")


def record(bench: Bench, subject: str, row: dict[str, object]) -> None:
    rows = list({**rows_in(bench.directory, subject), row["test"]: row}.values())
    table = {
        "command": f"scripts/gpu_acceptance -k {subject}",
        "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": asdict(bench.environment),
        "rows": rows,
    }
    bench.directory.mkdir(parents=True, exist_ok=True)
    (bench.directory / f"{subject}.json").write_text(json.dumps(table, indent=1) + "\n")
    flat = [{key: value for key, value in row.items() if not isinstance(value, dict | list)} for row in rows]
    pd.DataFrame(flat).to_csv(bench.directory / f"{subject}.csv", index=False)

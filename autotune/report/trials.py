"""The table of all trials for a page: plain numbers with the unit in the header, so that columns can be sorted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autotune.report.run import COUNT_COLUMNS, PLAN_COLUMNS, plan_text
from autotune.runs.directory import trial_log
from autotune.runs.read import Row, Run, peak_bytes
from autotune.terminal import visible
from autotune.units import GIB, MIB

LOG_LINES, _LOG_CHARACTERS, _LINE_CHARACTERS = 12, 1500, 300
MOST_TRIALS = 5000
"""Rows of a table."""


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One row of the table."""

    trial: int
    status: str
    cells: Sequence[str]
    message: str
    log: str
    """End of the log of a failed trial, or why there is none here; empty for one that ran."""


@dataclass(frozen=True, kw_only=True)
class TrialTable:
    """All trials."""

    headers: Sequence[str]
    figures: frozenset[str]
    """Headers of columns of numbers."""
    rows: Sequence[TrialRow]
    same: str
    """Columns that are the same in all trials, folded into a line."""
    unknown: str
    """Columns without any value, named in a line."""
    left_out: int
    """Trials beyond MOST_TRIALS."""
    logs_left_out: int
    """Failed trials whose log does not fit into the page."""

    @property
    def print_points(self) -> float:
        """Size in points at which a row fits an A4 page in landscape, 780 points wide."""
        widths = [_widest(header) for header in self.headers]
        for row in self.rows[:500]:
            widths = [max(wide, _widest(text)) for wide, text in zip(widths, row.cells, strict=True)]
        return round(min(8.0, max(4.0, 780 / (0.62 * (sum(widths) + 2 * len(widths) + 28)))), 2)


def _widest(text: str) -> int:
    """Characters of the longest part between spaces and underscores, at which lines are broken."""
    return max(map(len, text.replace("_", "_ ").split()), default=0)


def trial_table(run: Run, logs: int, message: int) -> TrialTable:
    """Cells of all trials without the columns that are constant. `logs`: most characters of all logs' ends together,
    `message`: of each reason."""
    best_first = list(dict.fromkeys([*run.verdict.ranking, *run.rows]))
    shown = {trial: run.rows[trial] for trial in sorted(best_first[:MOST_TRIALS])}
    largest = max((peak_bytes(row) or row["predicted_peak_bytes"] or 0 for row in shown.values()), default=0)
    unit = "GiB" if largest >= GIB else "MiB"
    columns = {trial: _cells(row, unit) for trial, row in shown.items()}
    headers = list(next(iter(columns.values()), {}))
    values = {header: {cells[header] for cells in columns.values()} for header in headers}
    fixed = {
        h for h in headers if len(values[h]) == 1 and h not in ("trial", "status", "tokens/s") and len(columns) > 1
    }
    unknown = [header for header in fixed if values[header] == {""}]
    same = [f"{header} {next(iter(values[header]))}" for header in headers if header in fixed and header not in unknown]
    kept = [header for header in headers if header not in fixed]
    rows, used, left_out = [], 0, 0
    for trial, row in shown.items():
        log = "" if row["status"] == "ok" else log_end(run.path, trial)
        if used + len(log) <= logs:
            used += len(log)
        elif log:
            log, left_out = f"see logs/{trial_log(run.path, trial).name}", left_out + 1
        cells = [columns[trial][header] for header in kept]
        text = str(row["message"] or "")
        text = text if len(text) <= message else f"{text[: message - 1]}…"
        rows.append(TrialRow(trial=trial, status=row["status"], cells=cells, message=text, log=log))
    return TrialTable(
        headers=kept,
        figures=frozenset(h for h in kept if h.removesuffix(f" {unit}") in _FIGURES),
        rows=rows,
        same=", ".join(same),
        unknown=", ".join(header for header in headers if header in unknown),
        left_out=len(run.rows) - len(shown),
        logs_left_out=left_out,
    )


_FIGURES = frozenset({
    "trial", "predicted loss", "tokens/s", "± 95 %", "MFU %", "step s", "peak", "allocated", "reserved",
    "predicted", "retries", "micro batch", "accumulation", "global batch", "layers", "heads", "width", "block",
    "vocabulary", "parameters M", "chunk tokens", "compile s", "trial s", "first loss",
})  # fmt: skip


def _cells(row: Row, unit: str) -> dict[str, str]:
    """Texts by header; empty where unknown."""
    return {
        "trial": str(row["trial"]),
        "role": row["role"],
        "status": row["status"],
        "predicted loss": _number(row["predicted_loss"], ".3f"),
        "tokens/s": _number(row["tokens_per_second"], ",.0f"),
        "± 95 %": _number(row["tokens_per_second_ci95"], ",.0f"),
        "MFU %": _number(row["mfu"] and 100 * row["mfu"], ".1f"),
        "step s": _number(row["step_seconds_p50"], ".4g"),
        f"peak {unit}": _size(peak_bytes(row), unit),
        f"allocated {unit}": _size(row["peak_allocated_bytes"], unit),
        f"reserved {unit}": _size(row["peak_reserved_bytes"], unit),
        f"predicted {unit}": _size(row["predicted_peak_bytes"], unit),
        "retries": _number(row["num_alloc_retries"], "d"),
        **{header: _number(row[name], "d") for header, name in COUNT_COLUMNS.items()},
        "parameters M": _number(row["parameters"] and row["parameters"] / 1e6, ".1f"),
        **{header: plan_text(row, name) for header, name in PLAN_COLUMNS.items()},
        "compile s": _number(row["compile_seconds"], ".1f"),
        "trial s": _number(row["trial_seconds"], ".1f"),
        "first loss": _number(row["first_loss"], ".3f"),
        "ended in": "" if row["status"] == "ok" else row["phase"],
    }


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _size(count: float | None, unit: str) -> str:
    return "" if count is None else f"{count / GIB:.3f}" if unit == "GiB" else f"{count / MIB:.1f}"


def log_end(run_dir: Path, trial: int) -> str:
    """Last lines of a trial's log, or the reason why they cannot be shown."""
    log = trial_log(run_dir, trial)
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16_384))
            text = file.read().decode("utf-8", errors="replace")
    except OSError as error:
        return f"{log}: {error.strerror}"
    lines = [visible(line.rstrip()[:_LINE_CHARACTERS], keep="\t") for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-LOG_LINES:])[-_LOG_CHARACTERS:] or f"{log} is empty"

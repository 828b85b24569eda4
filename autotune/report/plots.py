"""Plots of a run: speed against memory with the Pareto front, and the best so far against wall clock."""

from datetime import datetime
from itertools import accumulate
from pathlib import Path

from matplotlib.figure import Figure

from autotune.errors import ConfigError
from autotune.runs.directory import PLOTS
from autotune.runs.objective import pareto_front
from autotune.runs.read import Row, Run, peak_bytes
from autotune.units import GIB


def write_plots(run: Run) -> tuple[Path, ...]:
    """Draw plots/*.png of the run directory, without those that would be empty. Raises ConfigError."""
    folder = run.path / PLOTS
    figures = {"speed_memory.png": draw_speed_memory(run), "best_so_far.png": draw_best_so_far(run)}
    drawn = {folder / name: figure for name, figure in figures.items() if figure is not None}
    try:
        folder.mkdir(exist_ok=True)
        for path, figure in drawn.items():
            figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}; make it writable") from None
    return tuple(drawn)


def draw_speed_memory(run: Run) -> Figure | None:
    """Tokens/s against peak memory, with the Pareto front; None without a measured trial."""
    points = {number: _point(row) for number, row in run.rows.items() if row["tokens_per_second"] and peak_bytes(row)}
    if not points:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for status in sorted({run.rows[number]["status"] for number in points}):
        same = [point for number, point in points.items() if run.rows[number]["status"] == status]
        axes.scatter([peak for peak, _ in same], [speed for _, speed in same], s=24, label=status)
    front = pareto_front((*point, point) for number, point in points.items() if run.rows[number]["status"] == "ok")
    if front:
        axes.step([peak for peak, _ in front], [speed for _, speed in front], where="post", lw=1)
    for name, record in (("best", run.verdict.winner), ("baseline", run.verdict.baseline)):
        if record is not None and record.trial in points:
            place = points[record.trial]
            axes.annotate(name, place, xytext=(6, 6), textcoords="offset points", fontweight="bold")
    limit = run.settings.memory_limit_bytes / GIB
    if limit < 4 * max(peak for peak, _ in points.values()):  # a distant limit would squeeze the points
        axes.axvline(limit, ls="--", c="0.5", label="memory limit")
    axes.set(xlabel="peak memory (GiB)", ylabel="tokens/s", ylim=(0, None))
    axes.legend(fontsize="small")
    return figure


def _point(row: Row) -> tuple[float, float]:
    """Peak memory in GiB, tokens/s."""
    return (peak_bytes(row) or 0) / GIB, row["tokens_per_second"]


def draw_best_so_far(run: Run) -> Figure | None:
    """Objective of the best trial so far against minutes since the start of the search; None without a feasible one."""
    timed = [row for row in run.select(run.verdict.ranking) if row["started_at"] and row["trial_seconds"] is not None]
    if not timed:
        return None
    zero = datetime.fromisoformat(min(row["started_at"] for row in run.rows.values() if row["started_at"]))
    minutes, values = zip(*sorted((_minutes(row, zero), row["objective"]) for row in timed), strict=True)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(minutes, values, "o", ms=4, label="feasible trials")
    best = accumulate(values, min if run.lower_is_better else max)
    axes.step(minutes, list(best), where="post", label="best so far")
    baseline = run.verdict.baseline
    if baseline is not None and baseline.objective is not None:
        axes.axhline(baseline.objective, ls="--", c="0.5", label="baseline")
    axes.set(xlabel="minutes", ylabel="predicted loss" if run.lower_is_better else "tokens/s")
    axes.legend(fontsize="small")
    return figure


def _minutes(row: Row, zero: datetime) -> float:
    """End of the trial."""
    return ((datetime.fromisoformat(row["started_at"]) - zero).total_seconds() + float(row["trial_seconds"])) / 60

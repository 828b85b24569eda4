"""A run as pictures: speed against memory with the Pareto front, and the best so far against wall clock."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from autotune.errors import ConfigError
from autotune.report.run import Row, Run, baseline_trial, best_trial, pareto_front, peak_view, ranked
from autotune.units import GIB


def write_plots(run: Run) -> tuple[Path, ...]:
    """Draw plots/*.png of the run directory; those with nothing to show are left out."""
    folder = run.path / "plots"
    drawn = {"speed_memory.png": draw_speed_memory(run), "best_so_far.png": draw_best_so_far(run)}
    try:
        for name, figure in drawn.items():
            if figure is not None:
                folder.mkdir(exist_ok=True)
                # Replaced as a whole: a search redraws while somebody looks.
                figure.savefig(folder / f".{name}.tmp", format="png", dpi=120)
                (folder / f".{name}.tmp").replace(folder / name)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}; make it writable") from None
    return tuple(folder / name for name, figure in drawn.items() if figure is not None)


def draw_speed_memory(run: Run) -> Figure | None:
    """Tokens/s against peak memory. Trials that failed before they had a peak stand at the foot,
    at the peak that was predicted for them."""
    measured = [row for row in run.trials if row["tokens_per_second"] is not None]
    view = peak_view(measured) if measured else ""
    placed = [row for row in measured if row[view] is not None]
    if not placed:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for status in sorted({row["status"] for row in placed}):
        _scatter(axes, [row for row in placed if row["status"] == status], view, status)
    for status in sorted({row["status"] for row in run.trials}):
        lost = [row for row in run.trials if row["status"] == status and row["tokens_per_second"] is None]
        known = [row["predicted_peak_bytes"] / GIB for row in lost if row["predicted_peak_bytes"] is not None]
        if known:
            axes.scatter(known, [0.0] * len(known), marker="x", label=f"{status} ({len(lost)}), at its prediction")
    front = pareto_front([row for row in placed if row["status"] == "ok"], view)
    axes.step([row[view] / GIB for row in front], [row["tokens_per_second"] for row in front], where="post", lw=1)
    _mark(axes, best_trial(run), view, "best")
    _mark(axes, baseline_trial(run), view, "baseline")
    limit = run.settings.memory_limit_bytes
    if limit < 4 * max(row[view] for row in placed):  # far away it would squeeze the rest
        axes.axvline(limit / GIB, ls="--", c="0.5", label="memory limit")
    axes.set(xlabel=f"{view.removesuffix('_bytes').replace('_', ' ')} (GiB)", ylabel="tokens/s", ylim=(0, None))
    axes.legend(fontsize="small")
    return figure


def draw_best_so_far(run: Run) -> Figure | None:
    """The objective of the best trial so far against the minutes since the search began."""
    feasible = ranked(run)
    started = [row["started_at"] for row in run.trials if row["started_at"]]
    timed = [row for row in feasible if row["started_at"] and row["trial_seconds"] is not None]
    if not timed:
        return None
    zero = datetime.fromisoformat(min(started))
    points = sorted((_minutes(row, zero), row["objective"]) for row in timed)
    better = min if run.lower_is_better else max
    best = [better(value for _, value in points[: index + 1]) for index in range(len(points))]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*points, strict=True), "o", ms=4, label="feasible trials")
    axes.step([minutes for minutes, _ in points], best, where="post", label="best so far")
    baseline = baseline_trial(run)
    if baseline is not None and baseline["objective"] is not None:
        axes.axhline(baseline["objective"], ls="--", c="0.5", label="baseline")
    axes.set(xlabel="minutes", ylabel="predicted loss" if run.lower_is_better else "tokens/s")
    axes.legend(fontsize="small")
    return figure


def _minutes(row: Row, zero: datetime) -> float:
    """When the trial ended."""
    seconds: float = (datetime.fromisoformat(row["started_at"]) - zero).total_seconds() + row["trial_seconds"]
    return seconds / 60


def _scatter(axes: Axes, rows: Sequence[Row], view: str, status: str) -> None:
    axes.scatter(
        [row[view] / GIB for row in rows],
        [row["tokens_per_second"] for row in rows],
        marker="o" if status == "ok" else "s",
        alpha=1.0 if status == "ok" else 0.5,
        s=24,
        label=f"{status} ({len(rows)})",
    )


def _mark(axes: Axes, row: Row | None, view: str, name: str) -> None:
    if row is not None and row[view] is not None and row["tokens_per_second"] is not None:
        place = (row[view] / GIB, row["tokens_per_second"])
        axes.annotate(name, place, xytext=(6, 6), textcoords="offset points", fontweight="bold")

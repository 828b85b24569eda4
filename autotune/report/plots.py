"""A run as pictures: speed against memory with the Pareto front, and the best so far against wall clock."""

from collections.abc import Sequence
from datetime import datetime
from itertools import accumulate
from pathlib import Path

from matplotlib.figure import Figure

from autotune.errors import ConfigError
from autotune.report.run import Row, Run, baseline_trial, best_trial, pareto_front, peak_view, ranked
from autotune.units import GIB


def write_plots(run: Run) -> tuple[Path, ...]:
    """Draw plots/*.png of the run directory; those with nothing to show are left out."""
    folder = run.path / "plots"
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
    """Tokens/s against peak memory, with the Pareto front."""
    measured = [row for row in run.trials if row["tokens_per_second"] is not None]
    view = peak_view(measured) if measured else ""
    placed = [row for row in measured if row[view] is not None]
    if not placed:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for status in sorted({row["status"] for row in placed}):
        axes.scatter(*_places([row for row in placed if row["status"] == status], view), s=24, label=status)
    front = pareto_front([row for row in placed if row["status"] == "ok"], view)
    axes.step(*_places(front, view), where="post", lw=1)
    for name, row in (("best", best_trial(run)), ("baseline", baseline_trial(run))):
        if row in placed:
            (x,), (y,) = _places([row], view)
            axes.annotate(name, (x, y), xytext=(6, 6), textcoords="offset points", fontweight="bold")
    limit = run.settings.memory_limit_bytes
    if limit < 4 * max(row[view] for row in placed):  # far away it would squeeze the rest
        axes.axvline(limit / GIB, ls="--", c="0.5", label="memory limit")
    axes.set(xlabel=f"{view.removesuffix('_bytes').replace('_', ' ')} (GiB)", ylabel="tokens/s", ylim=(0, None))
    axes.legend(fontsize="small")
    return figure


def _places(rows: Sequence[Row], view: str) -> tuple[list[float], list[float]]:
    """Where the trials stand: GiB, tokens/s."""
    return [row[view] / GIB for row in rows], [row["tokens_per_second"] for row in rows]


def draw_best_so_far(run: Run) -> Figure | None:
    """The objective of the best trial so far against the minutes since the search began."""
    timed = [row for row in ranked(run) if row["started_at"] and row["trial_seconds"] is not None]
    if not timed:
        return None
    zero = datetime.fromisoformat(min(row["started_at"] for row in run.trials if row["started_at"]))
    minutes, values = zip(*sorted((_minutes(row, zero), row["objective"]) for row in timed), strict=True)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(minutes, values, "o", ms=4, label="feasible trials")
    best = accumulate(values, min if run.lower_is_better else max)
    axes.step(minutes, list(best), where="post", label="best so far")
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

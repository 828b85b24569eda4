"""Plots of a run by plotly. Points carry a trial's number; the page shows that trial's row beside them.

Colours are Okabe and Ito's, which differ without colour vision too, and every group has a symbol of its own.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate, pairwise

import plotly.graph_objects as go

from autotune.report.headline import TOO_LARGE
from autotune.report.run import SPENT
from autotune.report.training import TrainedRun
from autotune.runs.objective import pareto_front
from autotune.runs.read import Row, Run, peak_bytes
from autotune.terminal import visible
from autotune.units import GIB, MIB, format_duration

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#888888",
)  # fmt: skip
_MARKS = {
    "ok": (BLUE, "circle"),
    "over_limit": (RED, "square"),
    "oom": (RED, "x"),
    "predicted_over_limit": (ORANGE, "square-open"),
    "unsupported": (PURPLE, "diamond-open"),
    "incorrect": (GREEN, "star"),
    "timeout": (ORANGE, "hourglass"),
    "crashed": (PURPLE, "triangle-up"),
    "interrupted": (GREY, "cross-thin-open"),
}
"""Colour and symbol by status."""
_ROLES = {
    "baseline": (ORANGE, "diamond"), "guide": (PURPLE, "star"), "search": (BLUE, "circle"), "final": (GREEN, "square"),
}  # fmt: skip
_POINTS = 1000
"""Most points of a learning curve."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure of the page."""

    name: str
    title: str
    text: str
    """What it shows and how to read it; also its text for screen readers."""
    figure: go.Figure


def plain(text: str) -> str:
    """The text for plotly, which interprets some markup."""
    return html.escape(visible(text), quote=False)


def plots(run: Run, trainings: Sequence[TrainedRun], at_the_peak: tuple[str, Mapping[str, float]] | None) -> list[Plot]:
    """All plots that have something to show. `at_the_peak`: a heading, and the winner's bytes by category."""
    drawn = [
        speed_memory(run), history(run), neighbours(run), importance(run),
        memory_at_peak(run, *at_the_peak) if at_the_peak else None, predicted_measured(run), time_spent(run),
        *(learning_curve(training) for training in trainings),
    ]  # fmt: skip
    return [plot for plot in drawn if plot is not None]


def _figure(x: str, y: str, height: int = 420) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template=None, height=height, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 64, "r": 16, "t": 32, "b": 48}, hovermode="closest", barmode="relative",
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        hoverlabel={"align": "left", "bgcolor": "#ffffff", "bordercolor": "#555555", "font": {"color": "#111111"}},
    )  # fmt: skip
    axis = {"gridcolor": "#88888844", "zeroline": False, "linecolor": "#888888", "automargin": True}
    figure.update_xaxes(title_text=x, **axis)
    figure.update_yaxes(title_text=y, **axis)
    return figure


def _trials(
    rows: Sequence[Row], xs: Sequence[float], ys: Sequence[float], name: str, colour: str, symbol: str
) -> go.Scatter:
    """Points of trials; `meta` tells the page to fill in the rows."""
    return go.Scatter(
        x=xs, y=ys, mode="markers", name=f"{name} ({len(rows)})", customdata=[row["trial"] for row in rows],
        meta="trials", hoverinfo="text", cliponaxis=False,
        marker={"color": colour, "symbol": symbol, "size": 9, "line": {"width": 1, "color": colour}},
    )  # fmt: skip


def _bars(halves: Sequence[float | None], colour: str) -> dict[str, object] | None:
    """Half widths of 95 % intervals as error bars."""
    known = [half or 0.0 for half in halves]
    return {"type": "data", "array": known, "color": colour, "thickness": 1, "width": 3} if any(known) else None


def speed_memory(run: Run) -> Plot | None:
    """Tokens/s against peak memory."""
    measured = [row for row in run.rows.values() if row["tokens_per_second"] and peak_bytes(row)]
    failed = [row for row in run.rows.values() if not row["tokens_per_second"] and _needed(row)]
    if not measured and not failed:
        return None
    widest = max([peak_bytes(row) or 0 for row in measured] or map(_needed, failed))
    limit, (unit, name) = run.settings.memory_limit_bytes, _unit(widest)
    shows_limit = limit < 4 * widest  # a distant limit would squeeze the points
    ends = [min([peak_bytes(row) or 0 for row in measured] or [0]), max(widest, 1.05 * limit if shows_limit else 0)]
    left = 0.0 if ends[0] < 0.6 * ends[1] else (ends[0] - 0.15 * (ends[1] - ends[0])) / unit
    right = (ends[1] + 0.06 * (ends[1] - left * unit)) / unit
    figure = _figure(f"peak memory ({name})", "tokens/s", 480)
    for status, (colour, symbol) in _MARKS.items():
        if same := [row for row in measured if row["status"] == status]:
            peaks, speeds = [(peak_bytes(r) or 0) / unit for r in same], [r["tokens_per_second"] for r in same]
            points = _trials(same, peaks, speeds, status, colour, symbol)
            points.error_y = _bars([row["tokens_per_second_ci95"] for row in same], colour)
            figure.add_trace(points)
    for status, (colour, symbol) in _MARKS.items():
        if same := [row for row in failed if row["status"] == status]:
            edge = right - 0.015 * (right - left)
            peaks = [min(max(_needed(row) / unit, left), edge) for row in same]
            figure.add_trace(_trials(same, peaks, [0.0] * len(same), f"{status}, no speed", colour, symbol))
    if front := pareto_front((peak_bytes(r) or 0, r["tokens_per_second"], r) for r in measured if r["status"] == "ok"):
        xs, ys = [(peak_bytes(row) or 0) / unit for row in front], [row["tokens_per_second"] for row in front]
        figure.add_trace(_line(xs, ys, "Pareto front", BLUE, "hv"))
    for role, record in (("winner", run.verdict.winner), ("baseline", run.verdict.baseline)):
        if record is not None and record.result.tokens_per_second and (peak := record.result.peak_bytes):
            place = {"x": peak / unit, "y": record.result.tokens_per_second, "ay": 44 if role == "winner" else -30}
            figure.add_annotation(
                text=f"{role}, trial {record.trial}", **place, ax=-30, xanchor="right", arrowcolor=GREY
            )
    if shows_limit:
        _mark(figure, limit / unit, f"limit {limit / unit:.4g} {name}")
    figure.update_xaxes(range=[left, right])
    figure.update_yaxes(rangemode="tozero")
    nowhere = len(run.rows) - len(measured) - len(failed)
    text = (
        "Each point is a trial: right is more memory, up is faster; bars are 95 % intervals. Trials without a speed "
        "lie at the bottom, at the memory they had reached or were predicted to need, if beyond at the edge."
        + ("" if shows_limit else f" The limit of {limit / unit:.4g} {name} is far to the right.")
        + (f" Only in the table, for lack of both: {nowhere} trials." if nowhere else "")
    )
    return Plot(name="speed-memory", title="Speed against memory", text=text, figure=figure)


def _needed(row: Row) -> int:
    """Bytes that a trial without a speed needs: what it had reached, or at least what was predicted; 0 if unknown."""
    predicted = row["predicted_peak_bytes"] if row["status"] in TOO_LARGE or not peak_bytes(row) else None
    return max(peak_bytes(row) or 0, predicted or 0)


def _unit(size: float) -> tuple[int, str]:
    return (GIB, "GiB") if size >= GIB else (MIB, "MiB")


def _line(xs: Sequence[float], ys: Sequence[float], name: str, colour: str, shape: str = "linear") -> go.Scatter:
    line = {"color": colour, "width": 1.5, "shape": shape}
    return go.Scatter(x=xs, y=ys, mode="lines", name=name, line=line, hoverinfo="skip")


def _mark(figure: go.Figure, x: float, text: str) -> None:
    """A dashed vertical line with its name."""
    figure.add_vline(x=x, line={"dash": "dash", "color": RED, "width": 1.5})
    side = {"textangle": -90, "xanchor": "right", "yanchor": "top"}
    figure.add_annotation(x=x, y=1, yref="paper", text=text, showarrow=False, **side)


def history(run: Run) -> Plot | None:
    """Objective over the wall clock."""
    timed = _ends(run)
    if not timed:
        return None
    figure = _figure("minutes of search", "predicted loss" if run.lower_is_better else "tokens/s")
    corrected = run.verdict.drift_corrected
    found = {t: corrected.get(str(t), run.rows[t]["objective"]) for t in timed if run.rows[t]["objective"] is not None}
    for role, (colour, symbol) in _ROLES.items():
        if same := [run.rows[trial] for trial in found if run.rows[trial]["role"] == role]:
            xs, ys = [timed[row["trial"]] for row in same], [found[row["trial"]] for row in same]
            points = _trials(same, xs, ys, role, colour, symbol)
            points.error_y = _bars([None if run.lower_is_better else r["tokens_per_second_ci95"] for r in same], colour)
            figure.add_trace(points)
    order, end = sorted(found, key=timed.__getitem__), max([*timed.values(), _spent(run) / 60])
    if best := list(accumulate((found[trial] for trial in order), min if run.lower_is_better else max)):
        figure.add_trace(_line([*(timed[t] for t in order), end], [*best, best[-1]], "best so far", BLUE, "hv"))
    low, high = (min(found.values()), max(found.values())) if found else (0.0, 0.0)
    worst = high + 0.1 * (high - low) if run.lower_is_better else low - 0.1 * (high - low)
    for status, (colour, symbol) in _MARKS.items():
        if same := [run.rows[trial] for trial in timed.keys() - found.keys() if run.rows[trial]["status"] == status]:
            xs = [timed[row["trial"]] for row in same]
            figure.add_trace(_trials(same, xs, [worst] * len(same), status, colour, symbol))
    base, budget = run.verdict.baseline, run.settings.budget_seconds / 60
    if base is not None and base.objective is not None:
        figure.add_hline(y=base.objective, line={"dash": "dot", "color": ORANGE, "width": 1.5})
        side = {"xref": "paper", "xanchor": "left", "yanchor": "bottom"}
        figure.add_annotation(x=0, y=base.objective, text="baseline", showarrow=False, **side)
    _mark(figure, budget, "budget")
    for begin, stop in _finals(run, timed):
        figure.add_vrect(x0=begin, x1=stop, line_width=0, fillcolor=GREEN, opacity=0.12, layer="below")
    figure.update_xaxes(range=[0, 1.03 * max(end, budget)])
    text = (
        f"When each trial ended and what it reached ({'lower' if run.lower_is_better else 'higher'} is better). "
        "Failed trials lie at the edge. Shaded: finalists are measured again."
    )
    return Plot(name="history", title="History against the budget", text=text, figure=figure)


def _spent(run: Run) -> float:
    """Seconds of the search so far."""
    return run.verdict.spent_seconds if run.searching is None else run.searching


def _ends(run: Run) -> dict[int, float]:
    """End of each timed trial in minutes of search: idle time of a search that was resumed later does not count."""
    timed = [row for row in run.rows.values() if row["started_at"] and row["trial_seconds"] is not None]
    starts = {row["trial"]: datetime.fromisoformat(row["started_at"]).timestamp() for row in timed}
    order = sorted(timed, key=lambda row: starts[row["trial"]])
    if not order:
        return {}
    spans = [(starts[row["trial"]], starts[row["trial"]] + row["trial_seconds"]) for row in order]
    gaps = [max(0.0, later[0] - earlier[1]) for earlier, later in pairwise(spans)]
    idle = spans[-1][1] - spans[0][0] - _spent(run)
    cut = set[int]()
    for place in sorted(range(len(gaps)), key=lambda place: -gaps[place]):
        if idle <= 0 or gaps[place] < 60 or not _spent(run):
            break
        cut.add(place)
        idle -= gaps[place]
    passed, ends = spans[0][0], {}
    for place, (row, (_, stop)) in enumerate(zip(order, spans, strict=True)):
        passed += gaps[place - 1] if place - 1 in cut else 0.0
        ends[row["trial"]] = (stop - passed) / 60
    return ends


def _finals(run: Run, timed: Mapping[int, float]) -> list[tuple[float, float]]:
    """Begin and end of each time in which finalists were measured, in minutes."""
    spans: list[tuple[float, float]] = []
    before = ""
    for trial in sorted(timed, key=timed.__getitem__):
        row = run.rows[trial]
        if row["role"] == "final":
            begin = spans.pop()[0] if before == "final" else timed[trial] - row["trial_seconds"] / 60
            spans.append((begin, timed[trial]))
        before = row["role"]
    return spans


def time_spent(run: Run) -> Plot | None:
    """Where the budget went, as one bar."""
    verdict = run.verdict
    if not verdict.spent_seconds:
        return None
    spent = {name: sum(verdict.seconds.get(phase, 0.0) for phase in phases) for name, phases in SPENT.items()}
    spent["not spent"] = max(0.0, run.settings.budget_seconds - verdict.spent_seconds)
    figure = _figure("minutes", "", 190)
    shown = zip(
        spent.items(),
        (ORANGE, SKY, BLUE, PURPLE, GREY, GREEN, "rgba(136,136,136,0.15)"),
        ("/", "", "x", "+", ".", "\\", ""),
        strict=True,
    )
    hatched = {"solidity": 0.15, "fgcolor": "#ffffff", "fillmode": "overlay"}
    for (name, seconds), colour, pattern in shown:
        if seconds:
            share = seconds / max(run.settings.budget_seconds, verdict.spent_seconds)
            figure.add_trace(go.Bar(
                x=[seconds / 60], y=[" "], orientation="h", name=f"{name} {share:.0%}", hoverinfo="text",
                hovertext=f"{name}: {format_duration(seconds)}",
                marker={"color": colour, "pattern": {"shape": pattern, **hatched}},
            ))  # fmt: skip
    return Plot(name="time", title="Where the budget went", text="Wall clock by what it was spent on.", figure=figure)


def neighbours(run: Run) -> Plot | None:
    """Cost of changing one choice of the winner."""
    found, winner = run.verdict.neighbours, run.verdict.winner
    if not found or winner is None:
        return None
    labels = [plain(f"{near.knob}") + "<br>" + plain(f"{near.winner} → {near.value}") for near in found]
    scale, unit = (1.0, "nats") if run.lower_is_better else (100.0, "%")
    figure = _figure(f"change, {unit}", "", 150 + 48 * len(found))
    rows = [run.rows.get(near.trial) for near in found]
    colour = {"color": BLUE, "symbol": "circle", "size": 10}
    change = go.Scatter(
        x=[scale * near.objective for near in found], y=labels, mode="markers", marker=colour, hoverinfo="text",
        name="predicted loss" if run.lower_is_better else "tokens/s", customdata=[near.trial for near in found],
        meta="trials",
    )  # fmt: skip
    if not run.lower_is_better:
        halves = [_relative(row, run.rows[winner.trial]) for row in rows]
        change.error_x = _bars([half and 100 * half for half in halves], BLUE)
    figure.add_trace(change)
    if not run.lower_is_better and any(near.peak for near in found):
        known = [(near, label) for near, label in zip(found, labels, strict=True) if near.peak]
        figure.add_trace(go.Scatter(
            x=[100 * ((near.peak or 1.0) - 1) for near, _ in known], y=[label for _, label in known], mode="markers",
            name="peak memory", marker={"color": ORANGE, "symbol": "diamond-open", "size": 11, "line": {"width": 2}},
            customdata=[near.trial for near, _ in known], meta="trials", hoverinfo="text",
        ))  # fmt: skip
    figure.add_vline(x=0, line={"color": GREY, "width": 1.5})
    figure.update_yaxes(autorange="reversed")
    text = "What one step away from the winner costs: a trial that differs from it in a single choice."
    return Plot(name="neighbours", title="What each choice costs", text=text, figure=figure)


def _relative(row: Row | None, winner: Row) -> float | None:
    """Half width of the 95 % interval of a ratio of speeds, within the two processes."""
    if row is None:
        return None
    parts = [
        (one["tokens_per_second_ci95"] or 0.0) / one["tokens_per_second"]
        for one in (row, winner)
        if one["tokens_per_second"]
    ]
    return float(sum(part**2 for part in parts) ** 0.5)


def importance(run: Run) -> Plot | None:
    """Share of each choice in being among the best."""
    shares = {name: share for name, share in run.verdict.importance.items() if share > 0}
    if not shares:
        return None
    order = sorted(shares, key=shares.__getitem__)
    figure = _figure("share, %", "", 120 + 28 * len(order))
    values = [100 * shares[name] for name in order]
    figure.add_trace(go.Bar(
        x=values, y=[plain(name) for name in order], orientation="h", marker_color=BLUE,
        text=[f"{value:.0f} %" for value in values], textposition="auto", hoverinfo="skip", showlegend=False,
    ))  # fmt: skip
    text = "Share of each choice in whether a trial is among the best quarter (PED-ANOVA); how much to care about it."
    return Plot(name="importance", title="What matters", text=text, figure=figure)


def memory_at_peak(run: Run, heading: str, parts: Mapping[str, float]) -> Plot:
    """The winner's bytes by category."""
    unit, name = _unit(sum(parts.values()))
    order = sorted(parts, key=parts.__getitem__)
    figure = _figure(name, "", 120 + 28 * len(order))
    sizes = [parts[category] / unit for category in order]
    figure.add_trace(go.Bar(
        x=sizes, y=order, orientation="h", marker_color=BLUE, text=[f"{size:.2f}" for size in sizes],
        textposition="auto", hoverinfo="skip", showlegend=False,
    ))  # fmt: skip
    measured = run.verdict.winner and run.verdict.winner.result.peak_bytes
    against = f" Together {sum(parts.values()) / unit:.2f} {name}" + (
        f"; measured {measured / unit:.2f} {name}." if measured else "."
    )
    return Plot(name="memory", title="Where the winner's memory goes", text=heading + against, figure=figure)


def predicted_measured(run: Run) -> Plot | None:
    """Peaks predicted before the trials against the measured ones."""
    rows = [
        row
        for row in run.rows.values()
        if row["predicted_peak_bytes"] and peak_bytes(row) and row["status"] in ("ok", "over_limit")
    ]
    if not rows:
        return None
    unit, name = _unit(max(peak_bytes(row) or 0 for row in rows))
    figure = _figure(f"predicted peak ({name})", f"measured peak ({name})")
    for status in ("ok", "over_limit"):
        if same := [row for row in rows if row["status"] == status]:
            xs, ys = [row["predicted_peak_bytes"] / unit for row in same], [(peak_bytes(r) or 0) / unit for r in same]
            figure.add_trace(_trials(same, xs, ys, status, *_MARKS[status]))
    before, after = [row["predicted_peak_bytes"] / unit for row in rows], [(peak_bytes(r) or 0) / unit for r in rows]
    ends = [min(*before, *after), max(*before, *after)]
    figure.add_trace(_line(ends, ends, "equal", GREY))
    errors = sorted(abs(one / other - 1) for one, other in zip(before, after, strict=True))
    text = (
        f"Prediction made before each trial against what was measured; on the line they agree. "
        f"Half of them are within {errors[len(errors) // 2]:.1%}."
    )
    return Plot(name="predicted", title="Predicted against measured memory", text=text, figure=figure)


def learning_curve(training: TrainedRun) -> Plot | None:
    """Both losses of a training against its tokens."""
    rows = training.rows
    if not rows:
        return None
    figure = _figure("tokens", "loss (nats per token)")
    step = max(1, len(rows) // _POINTS)
    for column, name, colour, mode in (
        ("train_loss", "training", SKY, "lines"), ("validation_loss", "validation", BLUE, "lines+markers"),
    ):  # fmt: skip
        known = [row for row in rows if row[column] is not None]
        kept = known[::step] + known[-1:] if column == "train_loss" else known[:: max(1, len(known) // _POINTS)]
        figure.add_trace(go.Scatter(
            x=[row["tokens"] for row in kept], y=[row[column] for row in kept], mode=mode, name=name,
            line={"color": colour, "width": 1.5}, marker={"symbol": "circle", "size": 6},
        ))  # fmt: skip
    promised = training.file.measured.get("predicted_loss")
    if promised is not None:
        figure.add_hline(y=promised, line={"dash": "dash", "color": RED, "width": 1.5})
        figure.add_annotation(
            x=1, xref="paper", y=promised, text="predicted", showarrow=False, xanchor="right", yanchor="bottom"
        )
    text = f"Losses of {training.path}" + (", and the loss that was predicted for its end." if promised else ".")
    return Plot(name="learning", title="Learning curve", text=text, figure=figure)


def side_by_side(runs: Sequence[Run], names: Sequence[str]) -> list[Plot]:
    """Tokens/s and peak memory of the winners and baselines of several runs."""
    labels, height = [plain(name) for name in names], 140 + 60 * len(runs)
    speed, memory = _figure("tokens/s", "", height), _figure("peak memory (GiB)", "", height)
    for role, colour, symbol in (("winner", BLUE, "circle"), ("baseline", ORANGE, "diamond")):
        winner = role == "winner"
        speeds = [run.verdict.speed if winner else run.verdict.baseline_speed for run in runs]
        records = [run.verdict.winner if winner else run.verdict.baseline for run in runs]
        mark = {"color": colour, "symbol": symbol, "size": 10}
        points = {"y": labels, "mode": "markers", "name": role, "marker": mark}
        bars = _bars([one.ci95 if one else None for one in speeds], colour)
        speed.add_trace(go.Scatter(x=[one and one.tokens_per_second for one in speeds], error_x=bars, **points))
        peaks = [record.result.peak_bytes if record else None for record in records]
        memory.add_trace(go.Scatter(x=[peak and peak / GIB for peak in peaks], **points))
    for figure in (speed, memory):
        figure.update_xaxes(rangemode="tozero")
        figure.update_yaxes(autorange="reversed")
    return [
        Plot(name="speeds", title="Speed", text="Winners and baselines; bars are 95 % intervals.", figure=speed),
        Plot(name="peaks", title="Memory", text="Peak memory of winners and baselines.", figure=memory),
    ]

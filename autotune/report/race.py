"""A race of the user's candidates: table, curves and JSON."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Group

from autotune.errors import ConfigError
from autotune.report.table import FIGURES, Prose, fmt, make_table
from autotune.runs.races import Reading, Rival, difference, interval95, loss_ci95
from autotune.units import format_bytes, format_count, format_duration

CURVES_PNG = "curves.png"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One candidate over its seeds."""

    name: str
    readings: tuple[Reading, ...]
    """Those with a loss, by seed."""
    loss: float
    ci95: float | None
    """Half width of the 95 % interval over seeds; with one seed, of the validation text."""
    behind: float = 0.0
    """Nats behind the best, seed by seed."""
    behind_ci95: float | None = None


def standings(rivals: Sequence[Rival], readings: Sequence[Reading]) -> list[Standing]:
    """Candidates with a loss, best first."""
    known = {rival.rival: rival for rival in rivals}
    by_name: dict[str, dict[int, Reading]] = {}
    for reading in readings:
        if reading.loss is not None:
            rival = known[reading.rival]
            by_name.setdefault(rival.name, {})[rival.candidate.recipe.seed] = reading
    means = {name: statistics.fmean(one.loss or 0.0 for one in found.values()) for name, found in by_name.items()}
    ordered = sorted(means, key=lambda name: means[name])
    return [_standing(name, by_name[name], by_name[ordered[0]]) for name in ordered]


def _standing(name: str, own: Mapping[int, Reading], best: Mapping[int, Reading]) -> Standing:
    readings = tuple(own[seed] for seed in sorted(own))
    loss, ci95 = interval95([reading.loss or 0.0 for reading in readings])
    apart = [gap for seed in sorted(own) if seed in best and (gap := difference(own[seed], best[seed])) is not None]
    behind, behind_ci95 = interval95([gap.nats for gap in apart]) if apart else (0.0, None)
    return Standing(
        name=name, readings=readings, loss=loss, ci95=loss_ci95(readings[0]) if ci95 is None else ci95,
        behind=behind, behind_ci95=apart[0].ci95 if behind_ci95 is None and apart else behind_ci95,
    )  # fmt: skip


def race_report(rivals: Sequence[Rival], readings: Sequence[Reading], notes: Sequence[str]) -> Group:
    """The table of a race, and what to know about it."""
    found = standings(rivals, readings)
    lines = [
        {
            "": "*" if number == 0 else "",
            "candidate": one.name,
            "loss": f"{one.loss:.4f}" + ("" if one.ci95 is None else f" ± {one.ci95:.4f}"),
            "behind": "" if number == 0 else f"{one.behind:+.4f} ± {one.behind_ci95 or 0.0:.4f}",
            "seeds": str(len(one.readings)),
            "tokens": format_count(one.readings[0].tokens or 0),
            "tokens/s": fmt(one.readings[0].tokens_per_second, ",.0f"),
            "time of steps": format_duration(statistics.fmean(r.stepping_seconds for r in one.readings)),
            "peak": format_bytes(one.readings[0].peak_device_bytes),
        }
        for number, one in enumerate(found)
    ]
    few = bool(found) and max(len(one.readings) for one in found) == 1
    over = "the validation text; --seeds 3 shows that of the seeds" if few else "the seeds"
    told = (
        [f"Intervals of 95 % are over {over}; `behind` is paired: same seed, same data, same tokens."] if lines else []
    )
    tied = [one.name for one in found[1:] if one.behind_ci95 is not None and abs(one.behind) <= one.behind_ci95]
    if tied:
        told.append(f"tie: {', '.join(tied)} cannot be distinguished from {found[0].name}")
    told += [f"{name}: {why}" for name, why in failures(rivals, readings).items()] + [f"note: {n}" for n in notes]
    figures = {*FIGURES, "loss", "behind", "seeds", "tokens", "time of steps"}
    return Group(*([make_table(lines, figures)] if lines else []), *map(Prose, told))


def failures(rivals: Sequence[Rival], readings: Sequence[Reading]) -> dict[str, str]:
    """Why trainings have no loss, by candidate and seed."""
    known = {rival.rival: rival for rival in rivals}
    return {
        f"{known[r.rival].name}, seed {known[r.rival].candidate.recipe.seed}": f"{r.status} ({r.message})"
        for r in readings if r.loss is None
    }  # fmt: skip


def as_json(rivals: Sequence[Rival], readings: Sequence[Reading], notes: Sequence[str]) -> dict[str, Any]:
    """The race as one object; unknown values are null."""
    return {
        "standings": [asdict(one) for one in standings(rivals, readings)],
        "rivals": [asdict(rival) for rival in rivals],
        "failures": failures(rivals, readings),
        "notes": list(notes),
    }


def write_curves(path: Path, rivals: Sequence[Rival], readings: Sequence[Reading]) -> None:
    """Draw validation loss against tokens, one colour a candidate, one line a seed. Raises ConfigError."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, one in enumerate(standings(rivals, readings)):
        for place, reading in enumerate(one.readings):
            label = f"{one.name}: {one.loss:.3f}" if place == 0 else None
            axes.plot(reading.curve_tokens, reading.curve_losses, ".-", color=f"C{number % 10}", label=label, lw=1)
    axes.set(xlabel="tokens", ylabel="validation loss (nats)")
    if axes.lines:
        axes.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; make its folder writable") from None

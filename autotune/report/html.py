"""A run, or several side by side, as one self-contained page: no external resources, all text escaped."""

import base64
import functools
import json
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import plotly.offline
from markupsafe import Markup, escape

from autotune.config.tables import read_json, read_table
from autotune.config.toml import BEST_TOML
from autotune.errors import ConfigError
from autotune.files import read_text, write_atomically
from autotune.measure.types import MemoryProfile
from autotune.memory import model as memory_model
from autotune.memory.breakdown import predicted_breakdown
from autotune.report import compare, headline, training
from autotune.report.plots import plots, side_by_side
from autotune.report.run import heading, next_command, race_sections, state, training_command, verdict_lines
from autotune.report.trials import trial_table
from autotune.runs.directory import BEST_NANOGPT, COMPARISON_HTML, MEMORY_MODEL_JSON, REPORT_HTML
from autotune.runs.read import Run, advice
from autotune.terminal import visible

T = TypeVar("T")

PROFILE = Path("profile", "profile.json")
"""Memory profile of a run's best.toml, written by `autotune profile RUN --out RUN/profile`."""
LARGEST = 5_000_000
"""Bytes of a page, to be sent by mail."""
_SHARES = ((600_000, 300), (200_000, 150), (0, 80))
"""Most characters of all logs and of each reason; smaller ones where the page would be too large."""


def write_html(run: Run) -> Path:
    """Write report.html into the run directory. Raises ConfigError."""
    context = _context(run)
    for logs, message in _SHARES:
        page = _rendered("run.html", {**context, "table": trial_table(run, logs, message)})
        if len(page) < LARGEST:
            break
    return _write(run.path / REPORT_HTML, page)


def write_comparison(runs: Sequence[Run]) -> Path:
    """Write comparison.html of several runs into the folder that holds the first. Raises ConfigError."""
    lines, same = compare.changed(runs)
    context = {
        "title": f"{', '.join(compare.names(runs))}: autotune",
        "sentence": compare.sentence(runs),
        "notes": compare.notes(runs),
        "differences": compare.differences(runs),
        "changed": lines,
        "same": ", ".join(f"{name} {text}" for name, text in same.items()),
        "plots": side_by_side(runs, compare.names(runs)),
        "commands": [next_command(run) for run in runs],
    }
    return _write(runs[0].path.resolve().parent / COMPARISON_HTML, _rendered("several.html", context))


def _rendered(template: str, context: Mapping[str, Any]) -> bytes:
    common = {"style": _source("style.css"), "script": _source("page.js"), "plotly": _plotly()}
    return _templates().get_template(template).render({**common, **context}).encode()


def _write(page: Path, content: bytes) -> Path:
    try:
        write_atomically(page, content)
    except OSError as error:
        raise ConfigError(f"{page} cannot be written: {error.strerror}; make {page.parent} writable") from None
    return page


def _source(name: str) -> Markup:
    return Markup((resources.files("autotune.report") / "page" / name).read_text(encoding="utf-8"))


@functools.cache
def _plotly() -> str:
    """plotly.js, compressed: a third of its size, which the browser unpacks."""
    packer = zlib.compressobj(9, wbits=31)  # with gzip's header, but without a time
    return base64.b64encode(packer.compress(plotly.offline.get_plotlyjs().encode()) + packer.flush()).decode()


@functools.cache
def _templates() -> jinja2.Environment:
    """Every text is escaped, and with it characters that change how others are displayed."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("autotune.report", "page"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_finalized,
    )  # fmt: skip
    environment.filters["figure_json"] = lambda figure: json.loads(figure.to_json())
    environment.filters["breakable"] = lambda text: escape(visible(text)).replace("_", Markup("_<wbr>"))
    return environment


def _finalized(value: object) -> object:
    return visible(value, keep="\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value


def _context(run: Run) -> dict[str, Any]:
    winner, damage = run.verdict.winner, list(run.damage)

    def known(part: Callable[[Run], T], otherwise: T) -> T:
        """A part of the page; what prevents it is named instead."""
        try:
            return part(run)
        except ConfigError as error:
            damage.append(str(error))
            return otherwise

    trainings, broken = training.trainings_of([run.path])
    damage += broken
    drawn = plots(run, trainings, known(_at_the_peak, None))
    return {
        "title": f"{run.path.name}: autotune",
        "path": str(run.path),
        "heading": heading(run),
        "sentence": headline.sentence(run),
        "damage": damage,
        "advice": advice(run),
        "state": state(run),
        "numbers": headline.figures(run),
        "commands": _commands(run),
        "best_toml": known(lambda run: _text(run.path / BEST_TOML), ""),
        "best_nanogpt": known(lambda run: _text(run.path / BEST_NANOGPT), ""),
        "in_short": headline.in_short(run),
        "plots": drawn,
        "race": race_sections(run.verdict.race) if run.verdict.race else {},
        "trainings": [training.line(one) for one in trainings],
        "statuses": Counter(row["status"] for row in run.rows.values()).most_common(),
        "winner": winner and winner.trial,
        "verdict": verdict_lines(run),
        "made": _made(run),
        "machine": compare.readable(vars(run.environment)),
        "settings": compare.settings(run),
    }


def _commands(run: Run) -> list[tuple[str, str]]:
    """What to type, each with its title."""
    after = next_command(run)
    if run.verdict.winner is None or run.damage:
        return [("Next", after)]
    train = training_command(run)
    return [("Train the winner", train), *([("Trained: see what it writes", after)] if after != train else [])]


def _text(file: Path) -> str:
    return read_text(file) if file.exists() else ""


def _at_the_peak(run: Run) -> tuple[str, Mapping[str, float]] | None:
    """The winner's memory by category: from a profile in the run, else predicted."""
    winner, profile = run.verdict.winner, run.path / PROFILE
    if winner is None:
        return None
    if profile.exists():
        found = read_table(MemoryProfile, read_json(profile), PROFILE.name).peak_bytes
        return "Recorded by autotune profile.", {name: count for name, count in found.items() if count}
    file = run.path / MEMORY_MODEL_JSON
    known = memory_model.load(file) if file.exists() else memory_model.MemoryModel(device=run.settings.device_kind)
    how = f"calibrated by {known.trials} trials" if known.trials else "not calibrated by trials yet"
    command = f"autotune profile {run.path} --out {run.path / PROFILE.parent} records it"
    return f"Predicted by the memory model, {how}; {command}.", predicted_breakdown(known, winner.candidate)


def _made(run: Run) -> dict[str, str]:
    return {
        "command": run.settings.command or "not recorded",
        "seed": str(run.settings.seed),
        "sampler": run.settings.sampler,
        "autotune": run.environment.autotune,
        "torch": run.environment.torch,
        "reproduce a row": f"autotune trial {run.path}, with --set for what differs from the winner",
    }

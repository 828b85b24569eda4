"""A run as one self-contained page: nothing is loaded from elsewhere, everything is escaped."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from autotune.config.toml import write_atomically
from autotune.errors import ConfigError
from autotune.report.plots import write_plots
from autotune.report.run import Run, failures, next_command, ranked
from autotune.report.table import cells, heading, importance_cells, step_cells, trade_off_cells, verdict

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; margin: 1rem 0 }}
th, td {{ padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap }}
td:last-child {{ white-space: normal }}
tr.best {{ background: #e6f4e6; font-weight: 600 }}
img {{ max-width: 100% }}
code {{ background: #f2f2f2; padding: .1rem .3rem }}
</style>
<h1>{title}</h1>
<p>{verdict}</p>
<p>Next: <code>{command}</code></p>
{plots}
<h2>Feasible trials</h2>
{trials}
<h2>Speed against memory</h2>
{trade_offs}
<h2>One step from the best</h2>
{steps}
<h2>What matters</h2>
{importance}
<h2>Not feasible</h2>
{failures}
<h2>Machine</h2>
{machine}
</html>
"""


def write_html(run: Run) -> Path:
    """Write report.html, and the plots that it embeds, into the run directory."""
    page, plots = run.path / "report.html", write_plots(run)
    try:
        write_atomically(page, _page(run, plots))
    except OSError as error:
        raise ConfigError(f"{page} cannot be written: {error.strerror}; make {run.path} writable") from None
    return page


def _page(run: Run, plots: Sequence[Path]) -> str:
    failed = [[f.status, str(len(f.trials)), ", ".join(map(str, f.trials)), f.reason] for f in failures(run)]
    return _PAGE.format(
        title=escape(heading(run)),
        verdict="<br>".join(map(escape, verdict(run))),
        command=escape(next_command(run)),
        plots="\n".join(map(_image, plots)),
        trials=_cells([cells(run, row) for row in ranked(run)]),
        trade_offs=_cells(trade_off_cells(run), "One trial beats all others in both."),
        steps=_cells(step_cells(run), "Not measured."),
        importance=_cells(importance_cells(run), "Too few trials to say."),
        failures=_table(["status", "count", "trials", "reason"], failed) if failed else "<p>None.</p>",
        machine=_table(["name", "value"], [[key, _text(value)] for key, value in vars(run.environment).items()]),
    )


def _cells(lines: Sequence[dict[str, str]], none: str = "None.") -> str:
    return _table(list(lines[0]), [list(line.values()) for line in lines]) if lines else f"<p>{none}</p>"


def _text(value: object) -> str:
    return "-" if value in (None, "", ()) else str(value)


def _table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    body = "\n".join(
        ('<tr class="best">' if line[0] == "*" else "<tr>") + "".join(f"<td>{escape(cell)}</td>" for cell in line)
        for line in lines
    )
    return f"<table><tr>{head}</tr>\n{body}\n</table>"


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}"></p>'

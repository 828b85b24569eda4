"""A run as one self-contained HTML page: no external resources, all text escaped."""

import base64
from collections.abc import Sequence
from html import escape as _escape
from pathlib import Path

import pandas as pd

from autotune.errors import ConfigError
from autotune.files import write_atomically
from autotune.report.plots import write_plots
from autotune.report.run import cells, heading, next_command, sections, verdict_lines
from autotune.report.table import Line
from autotune.runs.directory import REPORT_HTML
from autotune.runs.read import Run
from autotune.terminal import visible

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
{tables}
</html>
"""


def escape(text: str) -> str:
    """The text with markup escaped, and with it characters that change how others are displayed."""
    return _escape(visible(text))


def write_html(run: Run) -> Path:
    """Write report.html, and the plots that it embeds, into the run directory. Raises ConfigError."""
    page, plots = run.path / REPORT_HTML, write_plots(run)
    try:
        write_atomically(page, _page(run, plots))
    except OSError as error:
        raise ConfigError(f"{page} cannot be written: {error.strerror}; make {run.path} writable") from None
    return page


def _page(run: Run, plots: Sequence[Path]) -> str:
    machine = [{"name": name, "value": str(value)} for name, value in vars(run.environment).items() if value]
    ranked = [cells(run, row) for row in run.select(run.verdict.ranking)]
    tables: dict[str, Sequence[Line]] = {"Feasible trials": ranked, **sections(run), "Machine": machine}
    return _PAGE.format(
        title=escape(heading(run)),
        verdict="<br>".join(map(escape, verdict_lines(run))),
        command=escape(next_command(run)),
        plots="\n".join(map(_image, plots)),
        tables="\n".join(f"<h2>{title}</h2>\n{_table(lines)}" for title, lines in tables.items() if lines),
    )


def _table(lines: Sequence[Line]) -> str:
    """HTML table, in which the best trial has the class `best`."""
    frame = pd.DataFrame(lines).map(visible)
    with pd.option_context("display.max_colwidth", None):
        table = frame.to_html(index=False, border=0, justify="left")
    return table.replace("<tr>\n      <td>*</td>", '<tr class="best">\n      <td>*</td>')


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}"></p>'

"""A run as one self-contained page: nothing is loaded from elsewhere, everything is escaped."""

import base64
from collections.abc import Sequence
from html import escape as _escape
from pathlib import Path

from autotune.errors import ConfigError
from autotune.files import write_atomically
from autotune.report.plots import write_plots
from autotune.report.run import Run, next_command, ranked
from autotune.report.table import Line, cells, heading, sections, verdict
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
    """As text of the page: neither markup nor a character that changes how others are read."""
    return _escape(visible(text))


def write_html(run: Run) -> Path:
    """Write report.html, and the plots that it embeds, into the run directory."""
    page, plots = run.path / "report.html", write_plots(run)
    try:
        write_atomically(page, _page(run, plots))
    except OSError as error:
        raise ConfigError(f"{page} cannot be written: {error.strerror}; make {run.path} writable") from None
    return page


def _page(run: Run, plots: Sequence[Path]) -> str:
    machine = [{"name": name, "value": str(value)} for name, value in vars(run.environment).items() if value]
    tables: dict[str, Sequence[Line]]
    tables = {"Feasible trials": [cells(run, row) for row in ranked(run)], **sections(run), "Machine": machine}
    return _PAGE.format(
        title=escape(heading(run)),
        verdict="<br>".join(map(escape, verdict(run))),
        command=escape(next_command(run)),
        plots="\n".join(map(_image, plots)),
        tables="\n".join(f"<h2>{title}</h2>\n{_table(lines)}" for title, lines in tables.items() if lines),
    )


def _table(lines: Sequence[Line]) -> str:
    head = "".join(f"<th>{escape(header)}</th>" for header in lines[0])
    body = "\n".join(
        ('<tr class="best">' if line.get("") else "<tr>") + "".join(f"<td>{escape(c)}</td>" for c in line.values())
        for line in lines
    )
    return f"<table><tr>{head}</tr>\n{body}\n</table>"


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}"></p>'

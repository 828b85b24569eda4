"""The pictures and the page."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from recorded_run import candidate, records

from autotune.errors import ConfigError
from autotune.report.html import write_html
from autotune.report.plots import write_plots
from autotune.runs.objective import pareto_front
from autotune.runs.read import load_run

WriteRun = Callable[..., Path]
PNG = b"\x89PNG\r\n\x1a\n"


def test_plots_are_pictures(write_run: WriteRun) -> None:
    drawn = write_plots(load_run(write_run(best=candidate(24))))
    assert [path.name for path in drawn] == ["speed_memory.png", "best_so_far.png"]
    assert all(path.read_bytes().startswith(PNG) for path in drawn)
    assert sorted(path.name for path in drawn[0].parent.iterdir()) == ["best_so_far.png", "speed_memory.png"]


def test_nothing_feasible_draws_nothing(write_run: WriteRun) -> None:
    path = write_run([record for record in records() if record.result.status != "ok"])
    assert write_plots(load_run(path)) == ()
    assert "No candidate is feasible" in write_html(load_run(path)).read_text()


def test_the_front_is_what_no_other_beats() -> None:
    points = [(1, 10.0), (2, 9.0), (2, 12.0), (3, 12.0), (4, 15.0)]
    front = pareto_front((*point, point) for point in points)
    assert front == [(1, 10.0), (2, 12.0), (4, 15.0)]


def test_the_page_is_self_contained_and_escaped(write_run: WriteRun) -> None:
    page = write_html(load_run(write_run(best=candidate(24)))).read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert "Test &lt;Card&gt;" in page
    assert page.count('src="data:image/png;base64,') == 2
    assert "http" not in page
    assert page.count('<tr class="best">') == 1


def test_the_page_cannot_be_turned_around(write_run: WriteRun) -> None:
    trials = records()
    trials[5] = replace(trials[5], result=replace(trials[5].result, message="\u202e<b>\x1b[2J"))
    page = write_html(load_run(write_run(trials))).read_text()
    assert r"\u202e&lt;b&gt;\x1b[2J" in page
    assert not set(page) & set("\u202e\x1b")


def test_a_directory_that_cannot_be_written_is_one_line(write_run: WriteRun) -> None:
    path = write_run(best=candidate(24))
    (path / "plots").write_text("a file where a folder belongs")
    with pytest.raises(ConfigError, match=r"plots cannot be written: File exists"):
        write_html(load_run(path))
    (path / "plots").unlink()
    (path / "report.html").mkdir()
    with pytest.raises(ConfigError, match=r"report.html cannot be written"):
        write_html(load_run(path))

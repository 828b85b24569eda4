"""The pages in a real browser: silent, without requests, and they react."""

import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from recorded_run import SUMMARY, candidate, complete, records, write_run, write_training

from autotune.report.html import write_comparison, write_html
from autotune.runs.read import load_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow
REQUIRED = "AUTOTUNE_BROWSER_REQUIRED"
"""Variable with which a missing browser is a failure instead of a skip; .ci/run sets it."""
_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
ODD = "<img src=x onerror=alert(1)> & 'run'"
A4 = {"width": 1054, "height": 720}
"""Landscape, within its margins, in CSS pixels."""


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """An installed Chromium, headless, with a profile of its own."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        absent = "no Chromium is installed; install the package chromium"
        pytest.fail(absent) if os.environ.get(REQUIRED) else pytest.skip(absent)
    driver = importlib.import_module("playwright.sync_api")  # of the extra dev, like pytest
    with driver.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=program, args=list(_FLAGS))
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with failures, a log, a training, and names that would be markup."""
    trials = records()
    trials[5] = replace(trials[5], result=replace(trials[5].result, message=ODD))
    path = write_run(tmp_path_factory.mktemp("runs"), trials, candidate(24), name=ODD, verdict=complete)
    (path / "logs").mkdir()
    (path / "logs" / "trial-0005.log").write_text("the last words </pre><script>alert(2)</script>")
    write_training(path / "train", SUMMARY)
    return write_html(load_run(path))


@pytest.fixture
def open_page(browser: "Browser") -> "Iterator[Callable[..., Page]]":
    """Open a file; console messages, errors, dialogs and requests fail the test at its end."""
    heard: list[str] = []
    contexts: list[Any] = []

    def open_file(file: Path, drawn: bool = True, **settings: Any) -> "Page":
        contexts.append(browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **settings}))
        page = contexts[-1].new_page()
        page.on("console", lambda message: heard.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (heard.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url == file.as_uri() or heard.append(f"request: {request.url}"))
        page.goto(file.as_uri())
        if drawn:
            page.locator("html[data-plots]").wait_for()
        return page  # type: ignore[no-any-return]

    yield open_file
    for context in contexts:
        context.close()
    assert heard == []


def column(page: "Page", name: str) -> list[str]:
    """Texts of a column in the rows that are shown."""
    headers = page.locator("#table thead th").all_inner_texts()
    place = [header.split(" ▲")[0].split(" ▼")[0] for header in headers].index(name) + 1
    return page.locator(f"#table tbody tr:not([hidden]) > td:nth-child({place})").all_inner_texts()


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_silent_and_fits(open_page: "Callable[..., Page]", run_page: Path, width: int, scheme: str) -> None:
    page = open_page(run_page, viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert page.locator(".plot .main-svg").count() >= 7
    assert page.locator(".plot .point").count() > 20
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    text = page.evaluate("getComputedStyle(document.querySelector('.xtick text')).fill")
    shades = [int(colour.split("(")[1].split(",")[0]) for colour in (back, text)]
    assert (shades[0] > 200 > 100 > shades[1]) if scheme == "light" else (shades[0] < 60 < 180 < shades[1])


def test_it_is_silent_on_several_runs(open_page: "Callable[..., Page]", tmp_path: Path) -> None:
    paths = [write_run(tmp_path, name=name, best=candidate(24)) for name in ("a", ODD)]
    page = open_page(write_comparison([load_run(path) for path in paths]), viewport={"width": 390, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("img").count() == 0


def test_columns_sort_by_mouse_and_by_keyboard(open_page: "Callable[..., Page]", run_page: Path) -> None:
    page = open_page(run_page)
    assert column(page, "trial") == ["0", "1", "2", "3", "4", "5", "6"]
    head = page.get_by_role("columnheader", name="tokens/s").get_by_role("button")
    head.click()
    assert column(page, "tokens/s") == ["10,000", "14,000", "15,000", "15,100", "", "", ""]
    head.focus()
    page.keyboard.press("Enter")
    assert column(page, "tokens/s") == ["15,100", "15,000", "14,000", "10,000", "", "", ""]
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    page.get_by_role("columnheader", name="loss", exact=True).get_by_role("button").click()
    assert column(page, "loss")[:4] == ["chunked"] * 4


def test_the_table_is_filtered_by_text_and_by_status(open_page: "Callable[..., Page]", run_page: Path) -> None:
    page = open_page(run_page)
    page.get_by_label("Filter").fill("12.00 wanted")
    assert column(page, "trial") == ["3"]
    assert page.get_by_role("status").inner_text() == "1 of 7 trials"
    page.get_by_label("Filter").fill("")
    page.get_by_label("Status").select_option("oom")
    assert column(page, "trial") == ["3", "4"]


def test_a_point_shows_its_row_and_a_click_finds_it(open_page: "Callable[..., Page]", run_page: Path) -> None:
    page = open_page(run_page)
    page.get_by_label("Status").select_option("oom")  # a filtered row is found too
    plot = page.locator("#plot-0")
    plot.scroll_into_view_if_needed()
    place = plot.locator(".scatterlayer .trace .point").nth(1).bounding_box()  # trial 1
    assert place is not None
    page.mouse.move(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
    told = page.locator("#plot-0 .hoverlayer").text_content() or ""
    for text in ("trial 1", "tokens/s 14,000", "peak GiB 6.000", "micro batch 16"):
        assert text in told
    page.mouse.down()
    page.mouse.up()
    assert page.locator("tr.marked").get_attribute("id") == "t1"
    assert page.locator("#t1").is_visible()


def test_a_failure_shows_its_log_by_one_click_or_key(open_page: "Callable[..., Page]", run_page: Path) -> None:
    page = open_page(run_page)
    row = page.locator("#t5")
    assert not row.locator("pre").is_visible()
    row.locator("summary").click()
    assert row.locator("pre").inner_text() == "the last words </pre><script>alert(2)</script>"
    row.locator("summary").focus()
    page.keyboard.press("Enter")
    assert not row.locator("pre").is_visible()


def test_odd_names_are_text(open_page: "Callable[..., Page]", run_page: Path) -> None:
    page = open_page(run_page)
    assert page.locator("img").count() == 0
    assert ODD in page.locator("#t5 summary").inner_text()
    assert page.locator("#command").inner_text().endswith(ODD)
    page.get_by_role("button", name="Copy").first.click()
    page.get_by_role("button", name="Copied").or_(page.get_by_role("button", name="Selected")).wait_for()


def test_everything_can_be_reached_by_keyboard(open_page: "Callable[..., Page]", run_page: Path) -> None:
    page = open_page(run_page)
    seen, name_of = [], "(e => e.id || e.className || e.tagName + ' ' + e.textContent)(document.activeElement)"
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(name_of))
    for name in ("skip", "command", "filter", "status", "BUTTON trial", "BUTTON reason"):
        assert name in seen
    assert any(name.startswith("SUMMARY best.toml") for name in seen)


def test_paper_gets_every_column(open_page: "Callable[..., Page]", run_page: Path) -> None:
    page = open_page(run_page, viewport=A4, color_scheme="dark")
    count = page.locator("#table thead th").count()
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")  # as printing does
    edges = page.evaluate("[...document.querySelectorAll('#table th')].map(e => e.getBoundingClientRect().right)")
    assert len(edges) == count >= 15
    assert max(edges) <= A4["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= A4["width"]
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("#plot-0 .main-svg").first.get_attribute("width") == "505"
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")


def test_a_browser_without_scripts_shows_every_row(open_page: "Callable[..., Page]", run_page: Path) -> None:
    page = open_page(run_page, drawn=False, java_script_enabled=False)
    assert page.locator("#table tbody tr").count() == 7


def test_an_old_browser_says_why_it_draws_nothing(browser: "Browser", run_page: Path) -> None:
    page = browser.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(run_page.as_uri())
    page.locator("#no-plots").wait_for(state="visible")
    told = page.locator("#no-plots").inner_text()
    assert "cannot be drawn by this browser (DecompressionStream is not defined)" in told
    assert column(page, "trial") == ["0", "1", "2", "3", "4", "5", "6"]
    page.close()

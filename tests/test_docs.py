"""The README stays short, links lead somewhere, and the site builds without network."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 140
    assert any("All other figures here are from CPUs" in line for line in lines[:10])


def test_the_readmes_figures_of_a_card_are_those_recorded() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    folder = ROOT / "results" / "reference" / "nvidia-h100-80gb-hbm3-torch-2.11"
    rows = {row["test"]: row for row in json.loads((folder / "plain_nanogpt.json").read_text())["rows"]}
    ours = rows["test_search[124M]"]["tokens_per_second"]
    compiled, eager = (
        max(rows[f"test_plain[{how}-{micro}-124M]"]["tokens_per_second"] for micro in (16, 64))
        for how in ("compiled", "eager")
    )
    assert f"GPT-2 124M at {round(ours, -3):,.0f} tokens/s" in text
    assert f"{ours / compiled:.2f} times compiled nanoGPT's best, {ours / eager:.2f} times eager nanoGPT's" in text
    (promise,) = json.loads((folder / "promise.json").read_text())["rows"]
    assert promise["tokens_per_second"] == pytest.approx(ours, rel=0.01)


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site generator derive them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in headings(file), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    """Paths of this repository in code spans: a page must not name a module that has moved."""
    for path in re.findall(r"`((?:autotune|kernels|scripts|tests|docs)/[\w./-]+)", page.read_text()):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_site_builds_offline(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "trials-csv" / "index.html").exists()

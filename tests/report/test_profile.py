"""A profile rendered: tables that add up, a timeline, two candidates side by side, and what is not a candidate."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from autotune.config.candidate import Candidate, Plan
from autotune.errors import AutotuneError, ConfigError, UnsupportedError
from autotune.measure.types import CATEGORIES, LiveTensor, MemoryProfile, Span, TrialResult
from autotune.report import profile as pages
from autotune.report.profile import Profiled, comparison, draw_timeline, profile_report, timeline_csv
from autotune.units import MIB

PEAK = dict.fromkeys(CATEGORIES, 0) | {"parameters": 60 * MIB, "logits and loss": 40 * MIB, "unexplained": -MIB}
LOGITS = LiveTensor(
    bytes=40 * MIB, category="logits and loss", made_by="extern_kernels.mm",
    lines=("autotune/kernels/loss_full.py:12", "autotune/model/gpt.py:5", "autotune/model/gpt.py:6", "autotune/a.py:7"),
    phase="forward 1",
)  # fmt: skip
PROFILE = MemoryProfile(
    measured_peak_bytes=99 * MIB,
    peak_bytes=PEAK,
    peak_phase="backward 1",
    peak_seconds=0.5,
    device_bytes=299 * MIB,
    live=(LOGITS, *(LiveTensor(bytes=20 * MIB, category="parameters", name=f"weight {i}") for i in range(3))),
    spans=(
        Span(name="forward 1", begin_seconds=0.1, end_seconds=0.5),
        Span(name="backward 1", begin_seconds=0.5, end_seconds=1.0),
    ),
    seconds=(0.0, 0.5, 1.0),
    timeline={name: (60 * MIB,) * 3 if name == "parameters" else (0, PEAK[name], 0) for name in CATEGORIES},
)
FULL = Profiled(name="full", candidate=Candidate(), profile=PROFILE, directory=Path("out"))


def shown(content: RenderableType) -> str:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        console.print(content)
    return capture.get()


def test_the_table_adds_up_and_names_its_largest() -> None:
    text = shown(profile_report(FULL))
    assert "99.0 MiB at the peak, which is reached in: backward 1" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["parameters", "62,914,560", "60.0", "MiB", "60.6%"] in rows
    assert ["unexplained", "-1,048,576", "-1.0", "MiB", "-1.0%"] in rows
    assert "200.0 MiB" in text  # context and cache: the device's view less the allocated
    assert "kernels/loss_full.py:12, model/gpt.py:5, model/gpt.py:6 and 1 more" in text
    assert "temporaries" not in text  # empty
    assert ["3", "20.0", "MiB", "parameters", "weight", "0,", "...", "-", "before", "the", "step"] in rows


def test_what_the_device_does_not_tell_is_not_zero() -> None:
    text = shown(profile_report(replace(FULL, profile=replace(PROFILE, device_bytes=None))))
    assert [line.split() for line in text.splitlines() if "context" in line] == [["context", "and", "cache", "-", "-"]]


def test_a_comparison_shows_changes_and_saved_bytes() -> None:
    held = PEAK | {"logits and loss": 8 * MIB}
    smaller = replace(PROFILE, peak_bytes=held, measured_peak_bytes=67 * MIB, peak_phase="optimizer")
    other = replace(FULL, name="chunked", candidate=Candidate(plan=Plan(loss="chunked")), profile=smaller)
    text = shown(comparison(FULL, other))
    assert "full -> chunked: loss full -> chunked" in text
    lines = {line.split("  ")[0].strip(): line.split()[-2:] for line in text.splitlines() if "MiB" in line}
    assert lines["logits and loss"] == ["-32.0", "MiB"]
    assert lines["parameters"] == ["0.0", "MiB"]
    assert lines["allocated"] == ["-32.0", "MiB"]
    assert ["reached", "in", "backward", "1", "optimizer"] in [line.split() for line in text.splitlines()]


def test_the_csv_holds_every_event_with_its_phase() -> None:
    rows = list(csv.DictReader(io.StringIO(timeline_csv(PROFILE))))
    assert [row["phase"] for row in rows] == ["", "backward 1", "backward 1"]
    assert int(rows[1]["allocated_bytes"]) == PROFILE.measured_peak_bytes
    for row in rows:
        assert sum(int(row[f"{name.replace(' ', '_')}_bytes"]) for name in CATEGORIES) == int(row["allocated_bytes"])


def test_the_picture_is_stacked_by_category_with_the_peak_marked(tmp_path: Path) -> None:
    figure = draw_timeline(PROFILE)
    figure.savefig(tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {"forward 1", "backward 1", "peak 99.00 MiB"} <= texts
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {
        "parameters",
        "logits and loss",
        "unexplained",
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "x.toml does not exist; give a run directory or a TOML file"),
        ("[model]\nn_layer = 1\n", "has no table [plan]"),
        ("[model]\n[plan]\ncompile = 'offf'\n", "did you mean 'off'?"),
    ],
)
def test_a_file_that_is_not_a_candidate_is_one_line(text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        pages.read_named([tmp_path / "x.toml"], ())
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_candidates_are_called_by_their_file_or_run(tmp_path: Path) -> None:
    files = [tmp_path / "plain.toml", tmp_path / "run" / "best.toml", tmp_path / "plain.toml"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("[model]\n[plan]\n")
    named = pages.read_named([*files, tmp_path / "run"], ("plan.loss=chunked",))
    assert list(named) == ["plain", "run", "plain-2", "run-2"]
    assert {candidate.plan.loss for candidate in named.values()} == {"chunked"}


@pytest.mark.parametrize(("status", "kind"), [("unsupported", UnsupportedError), ("oom", AutotuneError)])
def test_a_candidate_that_does_not_run_is_an_error_with_its_reason(
    status: str, kind: type[AutotuneError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = TrialResult(status=status, phase="build", message="needs cuda, this is cpu")  # type: ignore[arg-type]
    monkeypatch.setattr(pages, "run_profile", lambda *_: (failed, None))
    with pytest.raises(kind) as error:
        pages.profile_candidates({"x": Candidate()}, out=tmp_path, device="cpu")
    assert str(error.value) == f"x: {status} in phase build: needs cuda, this is cpu"


def test_what_is_written_lies_in_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(request: object, directory: Path, log: Path) -> tuple[TrialResult, MemoryProfile]:
        directory.mkdir(parents=True)
        return TrialResult(status="ok", phase="done"), PROFILE

    monkeypatch.setattr(pages, "run_profile", fake)
    pages.profile_candidates({"a": Candidate(), "b": Candidate()}, out=tmp_path, device="cpu")
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")} == {
        f"{name}/timeline.{kind}" for name in "ab" for kind in ("csv", "png")
    }

"""Names and values that would act on a terminal, in a spreadsheet or in nanoGPT's exec are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
from fake_machine import CUDA, settings

from autotune.config.candidate import Candidate, Checkpointing, Recipe, Tracking
from autotune.config.nanogpt import format_nanogpt, parse_nanogpt
from autotune.config.search_settings import SearchSettings
from autotune.config.toml import parse_candidate
from autotune.errors import ConfigError

CONTROLS = [
    "\n", "\r", "\x00", "\t", "\x1b[2J", "\x7f", "\x85", "\x9b", "\u2028", "\u2029", "\u202e", "\u2066", "\udcff",
]  # fmt: skip
CODE = "x\nopen('trace', 'w')\n"


@pytest.mark.parametrize("control", CONTROLS)
def test_control_characters_are_refused_everywhere(control: str) -> None:
    text = f"a{control}b"
    changes: list[tuple[object, str]] = [
        *((settings(), name) for name in ("name", "device", "baseline_source", "law", "storage")),
        (Recipe(), "data"),
        (Checkpointing(), "init_from"),
        *((Tracking(), name) for name in ("wandb_project", "wandb_run_name")),
        *((CUDA, name) for name in ("device_name", "driver", "torch", "platform")),
    ]
    for before, name in changes:
        with pytest.raises(ConfigError) as caught:
            replace(before, **{name: text})  # type: ignore[type-var]
        assert name in str(caught.value)
        assert str(caught.value).isprintable()
    with pytest.raises(ConfigError, match=r"compile = .* holds a control character"):
        replace(settings(), choices={"compile": ("off", text)})


def test_a_refused_storage_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        replace(settings(), storage="postgresql://me:secret@host/db\n")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "-x", "--rm", "a/b", "/a", "a\\b", " a", "a ", "a" * 201, "ä" * 101],
)
def test_names_that_are_not_allowed(name: str) -> None:
    with pytest.raises(ConfigError, match="is not the plain name of a directory") as caught:
        settings(name=name) if name else replace(settings(), name=name)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("name", ["a", "a" * 200, "ä" * 100, "my run", "2025-01-01", "größe", "日本語", "a.b"])
def test_names_that_are_allowed(name: str) -> None:
    assert settings(name=name).name == name


def test_control_characters_in_files_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"training.wandb_run_name = .a\\nb. holds a control character"):
        parse_candidate('[model]\n[plan]\n[training]\nwandb_run_name = "a\\nb"\n', "x.toml")
    read = parse_nanogpt("wandb_project = 'a\\u202eb'\n", "x.py", "cpu")  # changes no step: a note, and not kept
    assert read.candidate.tracking.wandb_project == "owt"
    assert "wandb_project stays 'owt'" in read.notes[0]
    assert read.notes[0].isprintable()


@pytest.mark.parametrize("separator", ["\n", "\r", "\x0c", "\x0b", "\x85", "\u2028", "\r\n"])
def test_a_note_cannot_leave_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str) -> None:
    """The second line of defence: whatever the heading and the values hold, nanoGPT executes assignments only."""
    monkeypatch.chdir(tmp_path)
    code = f"x{separator}open('trace', 'w'){separator}"
    recipe, tracking = Recipe(), Tracking()
    for part, name in ((recipe, "data"), (tracking, "wandb_project"), (tracking, "wandb_run_name")):
        object.__setattr__(part, name, code)  # past what refuses it
    found: dict[str, object] = {}
    exec(format_nanogpt(Candidate(recipe=recipe, tracking=tracking), f"Found: {code}", code), found)
    assert found["wandb_project"] == found["device"] == code
    assert list(tmp_path.iterdir()) == []


def test_settings_are_checked_before_a_directory_is_named_after_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'--name = "x\\nopen\(.trace., .w.\)\\n" holds a control character'):
        settings(name=CODE)
    assert isinstance(settings(), SearchSettings)

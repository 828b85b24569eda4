"""`autotune estimate --gpu`: what a search on a card would try first, labelled as predicted."""

import json
import tomllib
from pathlib import Path

import pytest

from autotune.cli import run
from autotune.config.presets import GUIDE
from autotune.config.toml import read_candidate
from autotune.search.resolve import resolve
from autotune.units import GIB

Capture = pytest.CaptureFixture[str]


def rows_of(capsys: Capture, *words: str) -> tuple[dict[str, object], list[dict[str, object]]]:
    assert run(["estimate", "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    return found, found["rows"]


def test_every_shape_of_the_guide_has_a_plan(capsys: Capture) -> None:
    found, rows = rows_of(capsys, "--gpu", "RTX 4090")
    assert found["predicted"] is True
    assert [row["parameters"] for row in rows] == [row.shape.parameters for row in GUIDE]
    for row in rows:
        plan = row["found"]
        assert isinstance(plan, dict)
        for name in ("peak_device_bytes", "tokens_per_second", "mfu", "training_seconds", "loss"):
            assert 0 < plan[name]["low"] < plan[name]["value"] < plan[name]["high"]
        assert plan["peak_device_bytes"]["high"] <= found["memory_limit_bytes"] < 24 * GIB
        assert plan["largest_micro_batch"] >= plan["candidate"]["plan"]["micro_batch_size"]
        assert row["tokens"] == 20 * int(str(row["parameters"]))


def test_a_plan_can_be_fixed_in_part(capsys: Capture) -> None:
    words = ("--gpu", "3090", "--model", "12x12x768", "--tokens", "50B", "--set", "plan.loss=chunked",
             "--set", "plan.compile=off", "--set", "plan.micro_batch_size=8")  # fmt: skip
    _, (row,) = rows_of(capsys, *words)
    plan = row["found"]["candidate"]["plan"]  # type: ignore[index]
    assert (plan["loss"], plan["compile"], plan["micro_batch_size"]) == ("chunked", "off", 8)
    assert row["tokens"] == 50 * 10**9


def test_less_memory_is_a_smaller_plan(capsys: Capture) -> None:
    whole, half = (rows_of(capsys, "--gpu", "4090", "--model", "12x12x768", *more)[1][0]["found"]
                   for more in ((), ("--memory-limit", "9GiB")))  # fmt: skip
    assert half["peak_device_bytes"]["value"] < whole["peak_device_bytes"]["value"]  # type: ignore[index]
    assert half["largest_micro_batch"] < whole["largest_micro_batch"]  # type: ignore[index]


def test_the_text_says_that_nothing_was_measured(capsys: Capture) -> None:
    assert run(["estimate", "--gpu", "t4", "--model", "12x12x768"]) == 0
    text = capsys.readouterr().out
    assert "predicted for T4, not measured" in text
    assert "float16" in text
    assert "bfloat16" not in text
    assert all(len(line) <= 80 for line in text.splitlines() if line.startswith("  "))


def test_weights_that_do_not_fit_are_said(capsys: Capture) -> None:
    assert run(["estimate", "--gpu", "3070", "--model", "48x25x1600"]) == 0
    assert "no plan fits: weights, gradients and optimizer state take 23.20 GiB" in capsys.readouterr().out


def test_the_written_config_starts_a_search(capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "start.toml"
    assert run(["estimate", "--gpu", "4090", "--model", "10x10x640", "--toml", str(file)]) == 0
    text = file.read_text()
    assert text.startswith("# Predicted for RTX 4090")
    assert {"measured", "environment"}.isdisjoint(tomllib.loads(text))
    candidate = read_candidate(file).candidate
    assert (candidate.shape.n_layer, candidate.recipe.global_batch_size) == (10, 512)
    assert run(["search", "--from", str(file), "--device", "cpu", "--dry-run", "--name", "x"]) == 0
    assert f"start.toml: 10x10x640, 82,015,360 parameters, micro batch {candidate.plan.micro_batch_size}" in (
        capsys.readouterr().out
    )


def test_a_candidate_file_is_recipe_and_baseline(tmp_path: Path) -> None:
    from fake_machine import CUDA

    file = tmp_path / "mine.toml"
    file.write_text("[model]\nn_layer = 3\n[training]\nmax_iters = 77\n[plan]\nmicro_batch_size = 3\n")
    asked = resolve(CUDA, from_file=file)
    assert (asked.recipe.shape.n_layer, asked.recipe.max_iters, asked.keep_schedule) == (3, 77, True)
    assert (asked.baseline.micro_batch_size, asked.baseline_source, asked.recipe.data) == (3, str(file), "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "4091"], "--gpu '4091' is not a known card; did you mean"),
        (["--gpu", "a100"], "--gpu 'a100' may be A100 40GB PCIe"),
        (["--gpu", "4090", "--memory-limit", "64GiB"], "more than RTX 4090 has (23.65 GiB)"),
        (["--gpu", "4090", "--tokens", "many"], "count 'many' is not understood"),
        (["--gpu", "4090", "--tokens", "0"], "--tokens = 0 is not allowed"),
        (["--gpu", "4090", "--toml", "x.toml"], "--toml writes one candidate, there are 5 shapes"),
        (["--gpu", "3070", "--model", "48x25x1600", "--toml", "x.toml"], "no plan of 48x25x1600 fits"),
        (["--gpu", "4090", "--set", "plan.loss=chunke"], "did you mean 'chunked'?"),
        (["--gpu", "4090", "--model", "12x12x768", "--toml", "nowhere/x.toml"], "nowhere"),
        (["--tokens", "1B"], "--tokens and --toml belong to --gpu"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["estimate", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not list(tmp_path.iterdir())

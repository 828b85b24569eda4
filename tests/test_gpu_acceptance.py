"""The acceptance script on a machine without a card: refusals, time running out, going on, failures recorded."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fake_machine import CUDA, settings

from autotune.search.space import build_space, every_candidate

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the script needs of a checkout, so that nothing is recorded in this one."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("autotune", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def accept(checkout: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(checkout / "scripts" / "gpu_acceptance"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
def test_without_a_card_it_says_so_in_one_line(checkout: Path) -> None:
    run = accept(checkout)
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert "cuda:0 does not exist" in run.stderr
    assert "--rehearse" in run.stderr


def test_time_running_out_marks_the_part_and_the_next_call_goes_on(checkout: Path) -> None:
    run = accept(checkout, "--rehearse", "--only", "limits", "--minutes", "0")
    assert run.returncode == 0
    assert "4 not run: time" in run.stdout
    assert not (checkout / "results" / "rehearsal" / "limits.json").exists()
    known = {"item": "2 GiB, fits", "ok": True, "status": "ok", "message": "kept"}
    (checkout / "results" / "rehearsal").mkdir(parents=True)
    (checkout / "results" / "rehearsal" / "limits.json").write_text(json.dumps({"rows": [known]}))
    assert "3 not run: time" in accept(checkout, "--rehearse", "--only", "limits", "--minutes", "0").stdout
    one = accept(checkout, "--rehearse", "--only", "limits", "--minutes", "0", "--item", "1 GiB, does not fit")
    assert "1 not run: time" in one.stdout


def test_what_failed_is_run_again_when_that_is_asked_for(checkout: Path) -> None:
    (checkout / "results" / "rehearsal").mkdir(parents=True)
    failed = {"item": "2 GiB, fits", "ok": False, "status": "crashed", "message": ""}
    (checkout / "results" / "rehearsal" / "limits.json").write_text(json.dumps({"rows": [failed]}))
    run = accept(checkout, "--rehearse", "--only", "limits", "--minutes", "0")
    assert "1 FAILED, 3 not run: time" in run.stdout
    assert "4 not run: time" in accept(checkout, "--rehearse", "--only", "limits", "--minutes", "0", "--again").stdout


def test_a_failure_is_a_row_and_the_rest_goes_on(checkout: Path) -> None:
    """No search was recorded, so there is no winner to train."""
    run = accept(checkout, "--rehearse", "--only", "promise", "--minutes", "1")
    assert run.returncode == 1
    assert "1 FAILED" in run.stdout
    table = json.loads((checkout / "results" / "rehearsal" / "promise.json").read_text())
    assert [row["ok"] for row in table["rows"]] == [False]
    assert "scripts/gpu_acceptance --only throughput" in table["rows"][0]["message"]
    assert table["environment"]["device"] == "cpu"
    assert (checkout / "results" / "rehearsal" / "promise.csv").read_text().startswith("item,ok,message")


@pytest.mark.parametrize("choices", ["LIKELY", "SEARCHED"])
def test_what_it_searches_is_in_a_cards_space(choices: str) -> None:
    """A rehearsal searches all that a CPU has, so only a card would meet a choice that does not exist."""
    found = settings(CUDA, choices=getattr(parts(), choices))
    assert len(every_candidate(build_space(found, CUDA))) > 20


def parts() -> ModuleType:
    """`scripts` is no package."""
    spec = importlib.util.spec_from_file_location("acceptance_parts", ROOT / "scripts" / "acceptance_parts.py")
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

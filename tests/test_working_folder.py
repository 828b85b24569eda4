"""Files of common names in the user's working folder are never imported."""

import subprocess
import sys
from pathlib import Path

import pytest

NAMES = (
    "random", "queue", "tokenize", "copy", "select", "numbers", "inspect", "token", "typing", "torch", "numpy",
    "profile", "json", "types", "triton", "optuna", "kernels", "secrets", "string", "code", "test", "utils", "model",
)  # fmt: skip


@pytest.mark.parametrize("start", ["console script", "module"])
def test_a_search_starts_among_files_of_common_names(start: str, tmp_path: Path) -> None:
    names = (*NAMES, "autotune") if start == "console script" else NAMES  # `-m` means the first autotune on the path
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported from the working folder')\n")
    config = "n_layer = 2\nn_head = 2\nn_embd = 64\nblock_size = 64\nbatch_size = 4\ncompile = False\n"
    (tmp_path / "c.py").write_text(config)
    code = "import sys; from autotune.cli import main; sys.argv[0] = 'autotune'; main()"  # as the script has it
    script = tmp_path / "bin" / "autotune"
    script.parent.mkdir()
    script.write_text(code)
    command = [str(script)] if start == "console script" else ["-m", "autotune"]
    run = subprocess.run(
        [sys.executable, *command, "search", "--from", "c.py", "--dry-run"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "combinations" in run.stdout

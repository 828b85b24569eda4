"""The installed package beside Hugging Face's `kernels` and `transformers`, in one environment."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the project installed from a wheel, as a user's site-packages would have it."""
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(CHECKOUT))
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(folder / "site")
    tops = {name.split("/")[0] for name in names}
    assert tops == {"autotune", next(top for top in tops if top.endswith(".dist-info"))}
    assert {"autotune/kernels/registry.py", "autotune/py.typed", "autotune/report/page/run.html"} <= set(names)
    return folder / "site"


@pytest.mark.slow
def test_ours_and_theirs_are_all_importable(installed: Path, tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(installed)!r})
import kernels, transformers, autotune.kernels.registry as ours
assert ours.__file__.startswith({str(installed)!r}), ours.__file__
assert not kernels.__file__.startswith({str(installed)!r}) and hasattr(kernels, 'get_kernel'), kernels.__file__
from transformers import GPT2LMHeadModel  # the module that looks for `kernels`
print(ours.names('loss')[0])
"""
    assert run("-I", "-c", code, cwd=tmp_path) == "full"


def test_a_package_index_would_take_it(installed: Path) -> None:
    """It refuses requirements by direct URL."""
    (metadata,) = installed.glob("*.dist-info/METADATA")
    required = [line for line in metadata.read_text().splitlines() if line.startswith("Requires-Dist:")]
    assert required
    assert not [line for line in required if "@" in line]

"""The registry is readable without torch and says why something is not available."""

import subprocess
import sys

from autotune.kernels import registry


def test_reading_the_registry_imports_no_torch() -> None:
    code = (
        "import sys; from autotune.kernels import registry; assert registry.KERNELS; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_are_unique_and_every_row_loads() -> None:
    for operation in ("attention", "loss"):
        assert len(set(registry.names(operation))) == len(registry.names(operation))
    for kernel in registry.KERNELS:
        if not kernel.package:
            assert callable(registry.load(kernel))


def test_no_row_is_itself_kept_out_of_graphs() -> None:
    """plan.compile = block compiles the loss alone, and torch.compile ignores the mark on the function it is given:
    what must not be compiled is marked one level below."""
    for kernel in registry.KERNELS:
        assert not hasattr(registry.load(kernel), "_torchdynamo_orig_callable"), kernel.name


def test_the_reason_for_an_absence_names_what_is_needed() -> None:
    flash = registry.find("attention", "sdpa_flash")
    old, new = (registry.machine("cuda:0", capability, "2.13.0+cu130") for capability in ((7, 5), (9, 0)))
    assert registry.why_unavailable(flash, registry.machine("cpu", (), "2.13.0+cpu")) == "needs cuda, this is cpu"
    assert registry.why_unavailable(flash, old) == "needs compute capability 8.0, this card has 7.5"
    assert "float32" in str(registry.why_unavailable(flash, new, dtype="float32"))
    assert registry.why_unavailable(flash, new, dtype="bfloat16", head_size=64) is None

"""Priors files: what a script writes from committed records, and refused in one line where they are damaged."""

import json
from collections import Counter
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.errors import ConfigError
from autotune.kernels import registry
from autotune.memory import priors
from autotune.memory.model import MemoryModel, predict
from autotune.memory.structure import keys, overhead, peak_points, settled

SCRIPT = Path(__file__).parents[2] / "scripts" / "fit_priors"


@pytest.fixture(scope="module")
def script() -> Any:
    loader = SourceFileLoader("fit_priors", str(SCRIPT))
    spec = spec_from_loader("fit_priors", loader)
    assert spec
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "fit_priors", module)  # dataclasses look their module up
        loader.exec_module(module)
        yield module


def test_the_files_are_what_the_script_writes(script: Any) -> None:
    for written in script.priors():
        packaged = priors.of(written.device)
        assert (written.provenance, written.noise) == (packaged.provenance, packaged.noise)
        new, old = written.coefficients, packaged.coefficients
        assert list(new) == list(old)
        assert [c.mean for c in new.values()] == pytest.approx([c.mean for c in old.values()], abs=0.02)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_candidate_has_its_coefficients(device: str) -> None:
    for loss in registry.names("loss"):
        for dtype in ("float32", "tfloat32", "bfloat16", "bfloat16_residual", "float16"):
            for recompute in ("none", "block", "every_2", "selective", "budget_0.3"):
                for compiled in ("off", "block", "full"):
                    for attention in ("sdpa", "sdpa_math"):
                        plan = Plan(micro_batch_size=2, loss=loss, dtype=dtype, activation_checkpointing=recompute,
                                    compile=compiled, attention=attention)  # type: ignore[arg-type]  # fmt: skip
                        candidate = Candidate(recipe=Recipe(shape=Shape(n_layer=3)), plan=plan)
                        assert {key for point in peak_points(candidate, device) for key in point.sizes} <= keys(
                            device
                        ).keys()
                        assert overhead(candidate, device).sizes.keys() <= keys(device).keys()


@pytest.mark.parametrize(("records", "tolerance"), [("cpu_peaks", 0.15), ("stand_in", 0.06)])
def test_known_peaks_are_predicted_before_any_trial(records: str, tolerance: float, script: Any) -> None:
    """The records behind the priors: exact counts of the CPU's and of CUDA's allocator."""
    for record in getattr(script, records)():
        device = "cpu" if records == "cpu_peaks" else "cuda"
        close = tolerance if settled(record.candidate.plan) else 0.5
        found = predict(MemoryModel(device=device), record.candidate).peak_allocated_bytes
        assert found == pytest.approx(record.bytes, rel=close), record.candidate


def test_published_peaks_of_real_cards_are_predicted_before_any_trial(script: Any) -> None:
    """With what their own programs add."""
    records = script.published()
    errors = [abs(found / r.bytes - 1) for r, found in zip(records, script.shipped(records), strict=True)]
    assert len(errors) >= 40
    assert max(errors) <= 0.04
    assert median(errors) <= 0.03


def test_intervals_hold_peaks_that_the_fit_has_not_seen(script: Any) -> None:
    """Published peaks without their source, and those of the stand-in: 95 % of them, and tight for compiled plans."""
    found, noise = script.cuda_held_out(), priors.of("cuda").noise
    covered = abs(found.predicted - found.measured) <= script.intervals(found, noise)
    assert 0.9 <= covered.mean() <= 0.985
    compiled = found.only(script.compiled)
    assert median(script.intervals(compiled, noise) / compiled.predicted) <= 0.06
    public = found.only(lambda record: record.source != "cuda-stand-in")
    assert median(abs(public.errors)) <= 0.03
    assert max(abs(public.errors)) <= 0.09


def test_no_kind_of_coefficient_is_without_records() -> None:
    """On CUDA, some kinds have the CPU's only."""
    counted = Counter[str]()
    for device in ("cpu", "cuda"):
        for name, coefficient in priors.of(device).coefficients.items():
            counted[name.split()[0]] += coefficient.trials
    assert min(counted.values()) > 0, counted


def damaged(change: Callable[[dict[str, Any]], object], folder: Path) -> str:
    """What `read` says of the CPU's file after `change`."""
    tables = json.loads(Path(priors.__file__).with_name("cpu.json").read_text())
    change(tables)
    (folder / "cpu.json").write_text(json.dumps(tables))
    with pytest.raises(ConfigError) as caught:
        priors.read(folder / "cpu.json")
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t["coefficients"].update({"end": t["coefficients"].pop("ends")}),
            "cpu.json.coefficients has 'end', which is not a known coefficient; did you mean 'ends'?",
        ),
        (
            lambda t: t["coefficients"].pop("layer dtype=half residual=half mode=eager recompute=none"),
            "cpu.json.coefficients lacks 'layer dtype=half residual=half mode=eager recompute=none' (1 in all); "
            "write it again with scripts/fit_priors",
        ),
        (
            lambda t: [t["coefficients"].pop(f"process compile={word}") for word in ("off", "block", "full")],
            "cpu.json.coefficients lacks 'process compile=off' (3 in all); ",
        ),
        (lambda t: t.update(device="tpu"), "cpu.json.device = 'tpu' is not known; "),
        (lambda t: t.pop("provenance"), "cpu.json.provenance is missing; "),
        (lambda t: t["provenance"].pop("torch"), "cpu.json.provenance.torch is missing; "),
        (
            lambda t: t["coefficients"]["ends"].update(sigma=1.0),
            "cpu.json.coefficients.ends.sigma is not a known key; ",
        ),
        (lambda t: t["coefficients"]["ends"].update(sd=0.0), "cpu.json.coefficients.ends.sd = 0.0 must be above 0; "),
        (
            lambda t: t["correlations"].pop(),
            "cpu.json.correlations needs 97 rows of 0, 1, 2, ... numbers; write it again with scripts/fit_priors",
        ),
        (
            lambda t: t["correlations"][1].__setitem__(0, 1.5),
            "cpu.json.correlations is not positive definite; write it again with scripts/fit_priors",
        ),
        (lambda t: t.update(nose=1), "cpu.json.nose is not a known key; did you mean 'noise'?"),
    ],
)
def test_an_unknown_or_missing_key_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    message = damaged(change, tmp_path)
    assert message.startswith(said)
    assert "\n" not in message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cpu\.json does not exist; write it again with scripts/fit_priors"):
        priors.read(tmp_path / "cpu.json")

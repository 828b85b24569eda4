"""Predicted peaks: exact where the structure is known, honest about the rest, better with every trial."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.config.presets import GUIDE
from autotune.errors import ConfigError
from autotune.measure.memory import MemoryMeter
from autotune.measure.types import MemoryView, TrialResult
from autotune.measure.worker import live_bytes, resident_batches
from autotune.memory import estimate as estimates
from autotune.memory import model as memory_model
from autotune.memory import priors
from autotune.memory.estimate import estimate, largest_micro_batch, with_micro_batch
from autotune.memory.model import MemoryModel, calibrate, load, predict, save
from autotune.memory.structure import peak_points
from autotune.model.step import build
from autotune.units import GIB

PRIOR = MemoryModel(device="cpu")


def candidates(count: int, seed: int = 0) -> list[Candidate]:
    rng = np.random.default_rng(seed)

    def one() -> Candidate:
        heads = int(rng.integers(2, 7))
        shape = Shape(
            n_layer=int(rng.integers(1, 7)),
            n_head=heads,
            n_embd=64 * heads,
            block_size=int(rng.choice([64, 128, 256])),
        )
        micro = int(rng.choice([1, 2, 3, 4, 6, 8]))
        plan = Plan(
            micro_batch_size=micro,
            loss=str(rng.choice(["full", "chunked"])),
            loss_chunk_tokens=int(rng.choice([128, 512])),
            compile=str(rng.choice(["off", "full", "block"])),  # type: ignore[arg-type]
            dtype=str(rng.choice(["bfloat16", "float32"])),  # type: ignore[arg-type]
            activation_checkpointing=str(rng.choice(["none", "block", "every_2", "selective"])),  # type: ignore[arg-type]
        )
        return Candidate(recipe=Recipe(shape=shape, global_batch_size=micro * int(rng.choice([1, 4]))), plan=plan)

    return [one() for _ in range(count)]


def truth(candidate: Candidate, factor: float) -> TrialResult:
    """A machine whose every coefficient is `factor` times the prior's."""
    known = priors.of("cpu").coefficients
    points = peak_points(candidate, "cpu")
    sums = [p.exact + sum(factor * known[str(key)].mean * size for key, size in p.sizes.items()) for p in points]
    peak = round(max(sums))
    view = MemoryView(allocated_bytes=peak, device_bytes=peak + 500_000_000)
    return TrialResult(status="ok", phase="done", memory={"steady": view})


def errors(model: MemoryModel, factor: float) -> np.ndarray:
    held_out = candidates(40, seed=9)
    peaks = [truth(c, factor).peak("allocated_bytes") or 0 for c in held_out]
    return np.array([abs(predict(model, c).peak_allocated_bytes / p - 1) for c, p in zip(held_out, peaks, strict=True)])


def test_calibration_moves_the_priors_to_another_machine() -> None:
    before = errors(PRIOR, 1.25)
    trials = [(c, truth(c, 1.25)) for c in candidates(60)]
    after = errors(calibrate("cpu", trials), 1.25)
    assert np.median(before) > 0.05
    assert np.median(after) < 0.02
    assert after.max() < before.max() / 2


def test_calibration_is_bounded_and_knows_every_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_model, "CALIBRATED", 40)
    trials = [(c, truth(c, 1.25)) for c in candidates(120)]
    model = calibrate("cpu", trials)
    assert model.trials == 120
    assert np.median(errors(model, 1.25)) < 0.02
    early = trials[1][0]
    peak = truth(early, 1.25).peak("allocated_bytes")
    assert predict(model, early).peak_allocated_bytes == peak


def test_the_interval_narrows_with_trials_and_covers_the_truth() -> None:
    trials = [(c, truth(c, 1.1)) for c in candidates(60)]
    model = calibrate("cpu", trials)
    for candidate in candidates(30, seed=5):
        wide, narrow = predict(PRIOR, candidate), predict(model, candidate)
        width = narrow.high_device_bytes - narrow.low_device_bytes
        assert width < wide.high_device_bytes - wide.low_device_bytes
    device = [(predict(model, c), truth(c, 1.1).peak("device_bytes") or 0) for c in candidates(60, seed=6)]
    covered = np.mean([p.low_device_bytes <= peak <= p.high_device_bytes for p, peak in device])
    assert covered >= 0.9
    assert PRIOR.trials == 0
    assert model.trials == 60


def test_a_few_trials_show_how_far_processes_of_this_machine_differ() -> None:
    """Between machines they differ much; here, all of them hold the same beyond their allocated bytes."""
    known = [(c, truth(c, 1.0)) for c in candidates(8)]
    found = [predict(calibrate("cpu", known[:n]), known[-1][0]) for n in (0, 8)]
    wide, narrow = ((p.high_device_bytes - p.low_device_bytes) / 2 - p.half_width_allocated_bytes for p in found)
    assert wide > 100e6
    assert narrow < 15e6


@pytest.mark.parametrize(("optimizer", "width"), [("muon", 384), ("adamw", 256)])
def test_the_optimizers_update_is_a_peak_point_where_tokens_are_few(optimizer: Any, width: int) -> None:
    """Its bytes are known without any coefficient."""
    shape = Shape(n_layer=2, n_head=4, n_embd=width, vocab_size=64, block_size=16)
    recipe = Recipe(shape=shape, global_batch_size=1, optimizer=optimizer)
    candidate = Candidate(recipe=recipe, plan=Plan(micro_batch_size=1, compile="off", dtype="float32"))
    step = build(candidate, torch.device("cpu"))
    batches = resident_batches(candidate, torch.device("cpu"), whole_step=False)
    step.step(batches[:1], 0.0)
    meter = MemoryMeter(torch.device("cpu"), lambda: live_bytes(step, batches))
    with meter.stage("steady"):
        step.step(batches[:1], 1e-4)
    measured = meter.views()["steady"].allocated_bytes
    assert peak_points(candidate, "cpu")[-1].exact == pytest.approx(measured, rel=0.02)  # oneDNN's buffers differ


def test_two_measured_micro_batches_give_the_third() -> None:
    base = candidates(1)[0]
    known = [with_micro_batch(base, size) for size in (8, 16)]
    # a machine on which the structure is quite wrong: 3 times the activations
    model = calibrate("cpu", [(c, truth(c, 3.0)) for c in known])
    third = with_micro_batch(base, 24)
    expected = truth(third, 3.0).peak("allocated_bytes")
    assert predict(model, third).peak_allocated_bytes == pytest.approx(expected, rel=0.02)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_more_of_anything_never_needs_less(seed: int) -> None:
    candidate = candidates(1, seed)[0]
    peak = predict(PRIOR, candidate).peak_allocated_bytes
    assert peak > 12 * candidate.shape.parameters
    bigger = replace(candidate.shape, n_layer=candidate.shape.n_layer + 1)
    taller = replace(candidate, recipe=replace(candidate.recipe, shape=bigger))
    assert predict(PRIOR, taller).peak_allocated_bytes > peak


def test_a_failed_trial_calibrates_nothing() -> None:
    oom = TrialResult(status="oom", phase="compile", wanted_bytes=10)
    assert calibrate("cpu", [(candidates(1)[0], oom)]).trials == 0


def test_the_guides_24_gb_row_does_not_fit_as_plain_nanogpt_and_does_when_chunked() -> None:
    row = next(row for row in GUIDE if "4090" in row.card)
    eager = Candidate(recipe=Recipe(shape=row.shape), plan=Plan(micro_batch_size=32, compile="off"))
    chunked = replace(eager, plan=replace(eager.plan, loss="chunked", compile="full", loss_chunk_tokens=4096))
    model = MemoryModel(device="cuda")
    assert predict(model, eager).peak_allocated_bytes > 24 * GIB
    assert largest_micro_batch(model, eager, 24 * GIB) < 32
    assert largest_micro_batch(model, chunked, 24 * GIB) >= 32


def test_estimate_rows_grow_with_the_micro_batch() -> None:
    ((row,), certainty) = estimate(PRIOR, candidates(1), limit_bytes=2 * GIB)
    cells = {int(key[2:]): value for key, value in row.items() if key.startswith("b=")}
    peaks = [float(cell.rstrip("?")) for cell in cells.values() if cell != "-"]
    assert peaks == sorted(peaks)
    assert list(cells.values())[len(peaks) :] == ["-"] * (len(cells) - len(peaks))
    fitting = [size for size, cell in cells.items() if "?" not in cell and cell != "-"]
    assert int(row["largest"]) >= max(fitting, default=0)
    interval, provenance = certainty.splitlines()
    assert interval.startswith("not calibrated by trials on a card; 95 % interval ±")
    assert interval.endswith("19 of 20 measured peaks should lie within it")
    assert provenance == f"priors (cpu): {priors.of('cpu').provenance}"


def test_estimates_of_another_vocabulary() -> None:
    small, large = (estimates.candidates(["4x4x128x64"], (), words)[0] for words in (65, None))
    assert (small.shape.parameters, large.shape.vocab_size) == (804_096, 50304)
    assert estimates.candidates([], (), 65)[0].shape.vocab_size == 65
    rows, _ = estimate(PRIOR, [small, large], limit_bytes=2 * GIB)
    assert [row["vocabulary"] for row in rows] == ["65", "50,304"]
    assert int(rows[0]["largest"]) > 5 * int(rows[1]["largest"])


def test_a_model_survives_its_file(tmp_path: Path) -> None:
    model = calibrate("cpu", [(c, truth(c, 1.1)) for c in candidates(5)])
    save(model, tmp_path / "memory_model.json")
    assert load(tmp_path / "memory_model.json") == model
    with pytest.raises(ConfigError, match=r"give a run, or the memory_model\.json that a search writes"):
        load(tmp_path / "missing.json")


def test_an_estimate_says_that_it_rests_on_a_stand_in() -> None:
    known = MemoryModel(device="cuda", fingerprint="stand-in-0123456789", trials=3)
    _, certainty = estimate(known, estimates.candidates(["2x4x256"], ()), 24 * GIB)
    assert "by 3 trials on a stand-in for a card" in certainty
    _, certainty = estimate(replace(known, fingerprint="0123456789"), estimates.candidates(["2x4x256"], ()), 24 * GIB)
    assert "stand-in" not in certainty.splitlines()[0]


def test_divided_bytes_are_counted_once_a_process() -> None:
    """Batches and gradients aside: weights 4, state 8 bytes a parameter, of which a process keeps its part."""
    shape = Shape(n_layer=4, n_head=4, n_embd=256)

    def update(sharding: str, processes: int) -> float:
        plan = Plan(micro_batch_size=8, processes=processes, sharding=sharding)  # type: ignore[arg-type]
        return peak_points(Candidate(recipe=Recipe(shape=shape, global_batch_size=256), plan=plan), "cpu")[-1].exact

    batches, parameters = 4 * 16.0 * 8 * shape.block_size, shape.parameters
    assert update("none", 2) - batches == 16 * parameters
    assert update("optimizer", 4) - batches == (4 + 4 + 8 / 4) * parameters
    assert update("full", 2) - batches == 16 / 2 * parameters

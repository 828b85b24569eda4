"""Rungs of a race: tiny trainings in processes of their own."""

from dataclasses import replace
from pathlib import Path

import pytest
from trainings import changed, curve, settings

from autotune.config.candidate import Candidate
from autotune.measure.runner import run_rung
from autotune.measure.types import RungRequest, RungResult
from autotune.model.checkpoint import checkpoints, read_checkpoint
from autotune.train.trainer import train

pytestmark = pytest.mark.slow


def request(candidate: Candidate, checkpoints: Path | str, iterations: int, **more: object) -> RungRequest:
    asked = RungRequest(
        candidate=candidate, device="cpu", result_path="", checkpoints=str(checkpoints), chunk_tokens=256, chunks=8,
        target_tokens=iterations * candidate.recipe.tokens_per_step, timeout_seconds=120.0,
    )  # fmt: skip
    return replace(asked, **more)  # type: ignore[arg-type]


def go(asked: RungRequest, log: Path) -> RungResult:
    result = run_rung(asked, log)
    print(result, log.read_text() if log.exists() else "")
    return result


@pytest.fixture
def rival(candidate: Candidate) -> Candidate:
    return changed(candidate, schedule="wsd", max_iters=200, lr_decay_iters=200, learning_rate=3e-3, warmup_iters=2)


def test_a_rung_continues_from_the_level_phase(rival: Candidate, tmp_path: Path) -> None:
    folder = tmp_path / "rival"
    first = go(request(rival, folder, 20), tmp_path / "1.log")
    assert (first.status, first.phase, first.iterations, first.level_iterations) == ("ok", "done", 20, 16)
    assert len(first.chunk_losses) == 8
    assert first.tokens_per_second
    assert first.peak("allocated_bytes")
    assert first.peak("device_bytes")
    assert [path.name for path in checkpoints(folder)] == ["step_00000016"]
    second = go(request(rival, folder, 60), tmp_path / "2.log")
    assert (second.iterations, second.level_iterations, second.measured_steps) == (60, 48, 60 - 16 - 3)
    assert sum(second.chunk_losses) < sum(first.chunk_losses) - 8 * 0.1
    # the same as a training without a break: the first rung's decay leaves no trace
    whole = go(request(rival, "", 60), tmp_path / "3.log")
    assert whole.chunk_losses == second.chunk_losses


def test_the_warm_up_is_short_against_the_first_rung_and_stays(rival: Candidate, tmp_path: Path) -> None:
    slow, folder = changed(rival, warmup_iters=50), tmp_path / "rival"
    for iterations in (20, 30):
        assert go(request(slow, folder, iterations), tmp_path / "log").status == "ok"
        assert read_checkpoint(checkpoints(folder)[-1]).state.candidate.recipe.warmup_iters == 2


def test_equal_time_is_by_the_rung_s_own_speed(rival: Candidate, tmp_path: Path) -> None:
    asked = request(rival, "", 20, target_seconds=1.5)  # far more than 20 steps, the length that was expected
    result = go(asked, tmp_path / "log")
    assert result.tokens_per_second
    assert result.iterations
    seconds = result.iterations * rival.recipe.tokens_per_step / result.tokens_per_second
    assert seconds == pytest.approx(1.5, rel=0.3)  # a busy machine changes its speed meanwhile


def test_a_cosine_schedule_ends_with_the_rung_and_is_drawn_as_a_curve(rival: Candidate, tmp_path: Path) -> None:
    cosine = changed(rival, schedule="cosine")
    result = go(request(cosine, tmp_path / "none", 24, evaluations=4), tmp_path / "log")
    assert result.curve_tokens == tuple(k * 6 * rival.recipe.tokens_per_step for k in (1, 2, 3, 4)) or (
        len(result.curve_tokens) == 4 and result.curve_tokens[-1] == 24 * rival.recipe.tokens_per_step
    )
    assert result.curve_losses[-1] == pytest.approx(sum(result.chunk_losses) / 8)
    assert result.level_iterations is None
    assert not (tmp_path / "none").exists()


def test_blocks_of_any_length_are_evaluated_on_the_same_tokens(rival: Candidate, tmp_path: Path) -> None:
    """Before anything is learned, each chunk's loss is that of its tokens whatever the block."""
    untrained = changed(rival, learning_rate=1e-12, min_lr=0.0, weight_decay=0.0)
    shape = replace(untrained.recipe.shape, block_size=128, dropout=0.0)
    short = changed(untrained, shape=replace(shape, block_size=32))
    results = [go(request(one, "", 1), tmp_path / "log") for one in (short, changed(untrained, shape=shape))]
    assert results[0].chunk_losses == pytest.approx(results[1].chunk_losses, abs=0.1)
    assert len(set(results[0].chunk_losses)) > 1


def test_what_goes_wrong_is_a_status(rival: Candidate, tmp_path: Path) -> None:
    wild = go(request(changed(rival, learning_rate=1e4, grad_clip=0.0), "", 60), tmp_path / "1.log")
    assert wild.status == "incorrect"
    assert "diverged" in wild.message
    peak = wild.peak_bytes
    assert peak
    tight = go(request(rival, "", 20, memory_limit_bytes=peak), tmp_path / "2.log")
    assert tight.status == "over_limit"
    late = go(request(rival, tmp_path / "late", 10**6, timeout_seconds=6.0), tmp_path / "3.log")
    assert late.status == "timeout"
    assert not checkpoints(tmp_path / "late")
    small = go(request(changed(rival, global_batch_size=5000), "", 20), tmp_path / "4.log")
    assert small.status == "crashed"
    assert "5000 are needed" in small.message


def test_a_damaged_level_phase_is_trained_again(rival: Candidate, tmp_path: Path) -> None:
    folder = tmp_path / "rival"
    first = go(request(rival, folder, 20), tmp_path / "1.log")
    (checkpoints(folder)[0] / "model.safetensors").write_bytes(b"torn")
    again = go(request(rival, folder, 20), tmp_path / "2.log")
    assert again.chunk_losses == first.chunk_losses


def test_a_training_goes_on_from_the_race_as_if_it_had_not_been_interrupted(
    rival: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rival, folder = changed(rival, max_iters=40, lr_decay_iters=40), tmp_path / "rival"
    assert go(request(rival, folder, 20), tmp_path / "log").level_iterations == 16
    whole, after = train(settings(rival, tmp_path / "whole")), train(settings(rival, tmp_path / "after", race=folder))
    assert whole is not None
    assert after is not None
    assert (whole.raced_iterations, after.raced_iterations, after.iterations) == (0, 16, 40)
    assert after.tokens == whole.tokens
    assert curve(tmp_path / "after") == [row for row in curve(tmp_path / "whole") if int(row[0]) > 16]
    assert "continuing from the race: 16 iterations, 3,584 tokens, are" in " ".join(capsys.readouterr().err.split())
    timed = changed(rival, train_seconds=8.0)
    longer = train(settings(timed, tmp_path / "timed", race=folder))
    assert longer is not None
    assert longer.schedule == pytest.approx(1.0)
    assert longer.iterations > 17
    first = float(curve(tmp_path / "timed")[0][4])
    assert first == pytest.approx(rival.recipe.learning_rate)  # no second warm-up


def test_what_the_race_trained_of_another_recipe_is_trained_again(
    rival: Candidate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "rival"
    go(request(rival, folder, 20), tmp_path / "log")
    other = changed(rival, max_iters=40, lr_decay_iters=40, weight_decay=0.3)
    early = changed(rival, max_iters=40, lr_decay_iters=40, warmup_iters=17)
    faster = changed(rival, max_iters=40, lr_decay_iters=40, learning_rate=1.2 * rival.recipe.learning_rate)
    own = "has another recipe or other data"
    for number, (one, why) in enumerate(((other, own), (faster, own), (early, "in the level phase"))):
        summary = train(settings(one, tmp_path / str(number), race=folder))
        assert summary is not None
        assert (summary.raced_iterations, summary.iterations) == (0, 40)
        said = capsys.readouterr().err
        assert "is trained again" in said
        assert why in " ".join(said.split())

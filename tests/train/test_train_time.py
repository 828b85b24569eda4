"""A training that was asked for a time takes that time, and its schedule is complete."""

import math
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor
from trainings import PLAN, changed, curve, settings, start, wait_for_rows

from autotune.config.candidate import Candidate
from autotune.config.toml import CandidateFile, read_candidate
from autotune.config.train_settings import TrainSettings
from autotune.errors import CheckpointError, ConfigError
from autotune.model.checkpoint import checkpoints, read_checkpoint
from autotune.model.step import TrainStep
from autotune.train import training_loop
from autotune.train.output import TrainSummary, summary_text
from autotune.train.trainer import train

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


def rates(out: Path) -> list[float]:
    return [float(row[4]) for row in curve(out)]


def assert_complete(out: Path, candidate: Candidate) -> None:
    """After the warm-up the rate only falls, and the last step has min_lr."""
    found = rates(out)
    assert found[-1] == candidate.recipe.min_lr
    falling = found[found.index(max(found)) :]
    assert falling == sorted(falling, reverse=True)
    last = read_checkpoint(checkpoints(out / "checkpoints")[-1]).state
    assert (last.iteration, last.schedule) == (len(found), 1.0)


class Clock:
    """Seconds that pass only when they are read."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 0.005
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The training loop's clock; processes start at 0."""
    clock = Clock()
    monkeypatch.setattr(training_loop, "time", clock)
    return clock


def trained(candidate: Candidate, out: Path, **changes: object) -> TrainSummary:
    summary = train(settings(candidate, out, **{"started": 0.0, **changes}))
    assert summary is not None
    return summary


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_the_schedule_ends_with_the_time(schedule: str, candidate: Candidate, tmp_path: Path) -> None:
    """Forty iterations are planned, the time has room for more."""
    out, asked = tmp_path / "train", changed(candidate, schedule=schedule, train_seconds=4.0, eval_interval=30)
    summary = trained(asked, out)
    assert (summary.stopped_by, summary.schedule, summary.train_seconds) == ("train_time", 1.0, 4.0)
    assert 3.8 < summary.seconds < 4.1
    assert summary.iterations > 60
    assert summary.validation_loss is not None
    assert f"in {summary.seconds:.1f}s of 4.0s asked" in summary_text(summary)
    assert_complete(out, candidate)
    level = sum(rate > 0.9999 * candidate.recipe.learning_rate for rate in rates(out))
    if schedule == "wsd":  # but for warm-up and decay
        assert level == pytest.approx(0.7 * summary.iterations, rel=0.15)


@pytest.mark.usefixtures("clock")
def test_a_finished_training_is_left_alone_and_may_be_given_more_time(
    candidate: Candidate, tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    out, asked = tmp_path / "train", changed(candidate, train_seconds=2.0)
    summary = trained(asked, out)
    assert trained(asked, out, resume=True, started=clock.now).iterations == summary.iterations
    assert "nothing left to do; give a longer --train-time to train longer" in capsys.readouterr().err
    longer = trained(asked, out, resume=True, started=clock.now, train_seconds=4.0)
    assert longer.iterations > summary.iterations
    assert 3.8 < longer.seconds < 4.1
    assert_complete(out, candidate)


def test_a_paused_training_continues_with_its_schedule(candidate: Candidate, tmp_path: Path, clock: Clock) -> None:
    out = tmp_path / "train"
    first = trained(candidate, out, train_seconds=4.0, max_seconds=2.0)
    assert first.stopped_by == "max_time"
    assert 0.3 < read_checkpoint(checkpoints(out / "checkpoints")[-1]).state.schedule < 0.7
    before = rates(out)
    clock.now += 1000.0  # between the processes
    summary = trained(read_candidate(out / "recipe.toml").candidate, out, resume=True, started=clock.now)
    assert summary.stopped_by == "train_time"
    assert 3.8 < summary.seconds < 4.1
    assert rates(out)[: len(before)] == before
    assert_complete(out, candidate)


@pytest.mark.usefixtures("clock")
def test_time_for_one_step_only(candidate: Candidate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = trained(candidate, tmp_path / "train", train_seconds=0.01)
    assert summary.iterations == 1
    assert checkpoints(tmp_path / "train" / "checkpoints")[0].name == "step_00000001"
    said = capsys.readouterr().err
    assert "warning: 0.0s were over at 0% of the schedule" in said
    assert "give more --train-time" in said


@pytest.mark.usefixtures("clock")
def test_evaluations_larger_than_their_share_are_made_smaller(
    candidate: Candidate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, large = tmp_path / "train", changed(candidate, eval_iters=10**6, train_seconds=2.0)
    assert trained(large, out).validation_loss is not None
    said = capsys.readouterr().err
    assert said.count("batches instead of 1000000, which would take more than 5% of 2.0s") == 1
    assert_complete(out, candidate)
    kept = read_checkpoint(checkpoints(out / "checkpoints")[-1]).state.candidate.evaluation.eval_iters
    assert kept < 100


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("share", [0.0, 1e6])
def test_an_evaluation_is_compiled_where_there_is_time(
    share: float, candidate: Candidate, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """share: what it takes, as a multiple of the first step."""
    monkeypatch.setattr(training_loop, "EVALUATION_CODE", share)
    compiled, evaluate = set[bool](), TrainStep.evaluate

    def noting(step: TrainStep, x: Tensor, y: Tensor, **words: bool) -> Tensor:
        compiled.add(words["compiled"])
        return evaluate(step, x, y, **words)

    monkeypatch.setattr(TrainStep, "evaluate", noting)
    plan = replace(PLAN, compile="block")
    summary = trained(changed(candidate, train_seconds=4.0), tmp_path / "train", plan=plan)
    assert summary.validation_loss is not None
    assert summary.validation_loss < math.log(211)
    assert ("evaluations are not compiled: that would take" in capsys.readouterr().err) == (share > 0)
    assert compiled == {share == 0}


@pytest.mark.usefixtures("clock")
def test_fewer_tokens_than_planned_are_said(candidate: Candidate, tmp_path: Path) -> None:
    file = CandidateFile(candidate=candidate, measured={"tokens_per_second": 1e9})
    summary = train(TrainSettings(file=file, out=tmp_path / "train", device="cpu", train_seconds=2.0, started=0.0))
    assert summary is not None
    assert summary.planned_tokens == pytest.approx(2e9, rel=1e-3)
    assert "planned 2.00B tokens, trained " in summary_text(summary)


def test_what_is_refused(candidate: Candidate, tmp_path: Path) -> None:
    out = tmp_path / "train"
    with pytest.raises(ConfigError, match="--max-tokens and --train-time exclude each other"):
        settings(candidate, out, train_seconds=1.0, max_tokens=1000)
    with pytest.raises(ConfigError, match="--train-time 0 leaves no time"):
        settings(candidate, out, train_seconds=0.0)
    with pytest.raises(ConfigError, match=r"training\.train_seconds = -1"):
        changed(candidate, train_seconds=-1.0)
    train(settings(changed(candidate, max_iters=2), out))
    with pytest.raises(CheckpointError, match=r"training\.train_seconds = 9\.0 \(checkpoint: 0\.0\)"):
        train(settings(candidate, out, train_seconds=9.0, resume=True))


def test_tokens_replace_the_time(candidate: Candidate, tmp_path: Path) -> None:
    summary = trained(changed(candidate, train_seconds=60.0), tmp_path / "train", max_tokens=1000)
    assert (summary.iterations, summary.stopped_by, summary.train_seconds) == (5, "max_iters", None)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_command_resumes_in_the_time_asked(number: int, candidate: Candidate, tmp_path: Path) -> None:
    out, asked = tmp_path / "train", changed(candidate, train_seconds=40.0, eval_interval=50, checkpoint_interval=50)
    process = start(asked, out)
    wait_for_rows(out, 60)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    spent = read_checkpoint(checkpoints(out / "checkpoints")[-1]).state.seconds
    began = time.monotonic()
    process = start(asked, out, flags=("--resume",))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert spent + time.monotonic() - began < 50.0  # tests/benchmarks holds it to 5 %
    assert_complete(out, candidate)


@pytest.mark.slow
def test_two_processes_end_at_the_same_step(candidate: Candidate, tmp_path: Path) -> None:
    out = tmp_path / "train"
    process = start(changed(candidate, train_seconds=25.0, log_interval=20), out, launcher=TORCHRUN)
    printed, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert printed.count("of 25s asked") == 1
    last = read_checkpoint(checkpoints(out / "checkpoints")[-1]).state
    assert (last.schedule, rates(out)[-1]) == (1.0, candidate.recipe.min_lr)

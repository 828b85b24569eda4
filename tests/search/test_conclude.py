"""The verdict beyond the winner: gain, Pareto front, failures; and its file."""

from dataclasses import replace
from pathlib import Path

import pytest
import recorded_run
from fake_machine import CUDA, Machine, settings

from autotune.config.search_settings import read_settings
from autotune.measure.types import MemoryView
from autotune.runs.records import TrialRecord
from autotune.runs.verdict import Verdict, read_verdict, write_verdict
from autotune.search.conclude import conclude
from autotune.search.loop import search
from autotune.search.space import build_space
from autotune.search.state import Event


def concluded(tmp_path: Path, records: list[TrialRecord], objective: str = "throughput") -> Verdict:
    path = recorded_run.write_run(tmp_path, [], objective=objective)  # type: ignore[arg-type]
    asked = read_settings(path / "search.toml")
    return conclude(records, asked, recorded_run.ENVIRONMENT, build_space(asked, recorded_run.ENVIRONMENT))


def test_the_confirmation_is_the_winner_and_ranked_first(tmp_path: Path) -> None:
    verdict = concluded(tmp_path, recorded_run.records())
    assert verdict.winner is not None
    assert (verdict.winner.trial, verdict.ranking) == (6, (6, 2, 1, 0))
    assert (verdict.status, verdict.ended) == ("confirmed", False)


def test_lower_is_better_for_the_loss(tmp_path: Path) -> None:
    losses = {0: 4.2, 1: 4.0, 2: 3.9, 6: 3.9}
    trials = [
        replace(record, objective=loss, predicted_loss=loss) if (loss := losses.get(record.trial)) else record
        for record in recorded_run.records()
    ]
    verdict = concluded(tmp_path, trials, "loss")
    assert verdict.ranking == (6, 2, 1, 0)
    assert verdict.gain is not None
    assert verdict.gain.loss == pytest.approx(-0.3)
    assert verdict.trade_offs == (1, 6)


def test_gain_over_the_baseline(tmp_path: Path) -> None:
    gain = concluded(tmp_path, recorded_run.records()).gain
    assert gain is not None
    assert gain.speed == pytest.approx(1.5, rel=0.01)
    assert gain.speed_ci95 == pytest.approx(0.02, abs=0.005)
    assert (gain.memory, gain.loss) == (0.8, None)


def test_peaks_are_compared_in_a_view_that_both_know(tmp_path: Path) -> None:
    first, *others = recorded_run.records()
    allocated = {"steady": MemoryView(allocated_bytes=first.result.peak("allocated_bytes"))}
    verdict = concluded(tmp_path, [replace(first, result=replace(first.result, memory=allocated)), *others])
    assert verdict.gain is not None
    assert verdict.gain.memory == pytest.approx(7 / 9)
    assert verdict.trade_offs == (1, 6)


def test_failures_are_grouped_by_message_without_its_numbers(tmp_path: Path) -> None:
    failures = concluded(tmp_path, recorded_run.records()).failures
    assert [(f.status, f.trials) for f in failures] == [("oom", (3, 4)), ("crashed", (5,))]
    assert failures[0].reason == "wanted 12.00 GiB"


def test_the_file_holds_the_whole_verdict(tmp_path: Path) -> None:
    for number, trials in enumerate(([], recorded_run.records()[3:6], recorded_run.records())):
        (tmp_path / str(number)).mkdir()
        verdict = concluded(tmp_path / str(number), trials)
        write_verdict(tmp_path / "verdict.json", verdict)
        assert read_verdict(tmp_path / "verdict.json") == verdict


def test_a_running_search_has_a_verdict_after_every_trial(tmp_path: Path) -> None:
    machine, read = Machine(), list[Verdict]()

    def notify(event: Event) -> None:
        read.append(read_verdict(tmp_path / "run" / "verdict.json"))

    search(settings(budget="40s"), tmp_path / "run", CUDA, measure=machine.measure, clock=machine.clock, notify=notify)
    assert read[0] == Verdict()
    assert [verdict.trials for verdict in read] == sorted(2 * [*range(len(machine.requests) + 1)])[1:-1]
    assert not any(verdict.ended for verdict in read)
    assert read_verdict(tmp_path / "run" / "verdict.json").ended

from dataclasses import replace

import pytest
from fake_machine import CUDA, settings

from autotune.measure.records import Role, TrialRecord
from autotune.measure.types import MemoryView, Status, TrialResult
from autotune.search.space import baseline
from autotune.search.verdict import Verdict, at_first_speed, decide, unconfirmed

SETTINGS = settings(CUDA)


def record(
    trial: int,
    micro: int,
    speed: float,
    role: Role = "search",
    status: Status = "ok",
    ci95: float = 1.0,
    peak: int = 1000,
) -> TrialRecord:
    candidate = baseline(SETTINGS)
    candidate = replace(candidate, plan=replace(candidate.plan, micro_batch_size=micro))
    ok = status == "ok"
    result = TrialResult(
        status=status,
        phase="done",
        tokens_per_second=speed if ok else None,
        tokens_per_second_ci95=ci95 if ok else None,
        memory={"steady": MemoryView(allocated_bytes=peak, device_bytes=peak)},
    )
    return TrialRecord(trial=trial, role=role, candidate=candidate, result=result, objective=speed if ok else None)


SEARCH = [record(0, 1, 100, "baseline"), record(1, 2, 200), record(2, 3, 190), record(3, 4, 150)]


def decided(records: list[TrialRecord]) -> Verdict:
    verdict = decide(records, SETTINGS)
    assert verdict is not None
    return verdict


def test_nothing_feasible_is_no_verdict() -> None:
    assert decide([], SETTINGS) is None
    assert decide([record(0, 1, 0, status="oom")], SETTINGS) is None


def test_the_best_so_far_before_anything_is_confirmed() -> None:
    verdict = decided(SEARCH)
    assert (verdict.winner.trial, verdict.confirmed) == (1, False)


def test_the_winner_is_by_confirmed_values() -> None:
    verdict = decided([*SEARCH, record(4, 2, 180, "final"), record(5, 3, 191, "final")])
    assert (verdict.winner.trial, verdict.confirmed, verdict.tied_with) == (5, True, ())


def test_a_failed_confirmation_falls_back_to_the_runner_up() -> None:
    verdict = decided([*SEARCH, record(4, 2, 0, "final", "oom"), record(5, 3, 191, "final")])
    assert (verdict.winner.trial, verdict.fell_through) == (5, (1,))
    alone = decided([*SEARCH, record(4, 2, 0, "final", "oom")])
    assert (alone.winner.trial, alone.confirmed) == (2, False)


def test_running_out_of_budget_is_no_failure_of_the_candidate() -> None:
    verdict = decided([*SEARCH, record(4, 2, 0, "final", "interrupted")])
    assert (verdict.winner.trial, verdict.confirmed, verdict.fell_through) == (1, False, ())


def test_a_tie_goes_to_the_one_with_less_memory() -> None:
    finals = [record(4, 2, 200, "final", ci95=6, peak=2000), record(5, 3, 190, "final", ci95=6, peak=1000)]
    verdict = decided([*SEARCH, *finals])
    assert (verdict.winner.trial, verdict.tied_with) == (5, (4,))
    sharper = [replace_ci(final, 4.0) for final in finals]
    clear = decided([*SEARCH, *sharper])
    assert (clear.winner.trial, clear.tied_with) == (4, ())


def replace_ci(final: TrialRecord, ci95: float) -> TrialRecord:
    return replace(final, result=replace(final.result, tokens_per_second_ci95=ci95))


def test_a_machine_that_changed_is_told_by_its_baseline() -> None:
    finals = [record(4, 2, 200, "final"), record(5, 1, 125, "final")]
    verdict = decided([*SEARCH, *finals])
    assert verdict.drift == 1.25
    steady = decided([*SEARCH, finals[0], record(5, 1, 101, "final")])
    assert steady.drift is None


def test_a_baseline_that_did_not_run_leaves_a_verdict() -> None:
    verdict = decided([record(0, 1, 0, "baseline", "oom"), record(1, 2, 200)])
    assert (verdict.winner.trial, verdict.drift) == (1, None)


def test_the_next_best_takes_the_place_of_a_failed_finalist() -> None:
    failed = record(4, 2, 0, "final", "crashed")
    assert waiting([*SEARCH, failed]) == [2, 0, 3]  # the baseline second: it tells whether the machine has changed
    done = record(5, 3, 190, "final")
    assert waiting([*SEARCH, failed, done]) == [0, 3]


def waiting(records: list[TrialRecord]) -> list[int]:
    return [record.trial for record in unconfirmed(records, SETTINGS)]


def test_trials_of_a_machine_that_slowed_down_are_ranked_without_its_drift() -> None:
    early, late = record(1, 2, 200), record(9, 3, 170)
    slower = [record(0, 1, 100, "baseline"), early, late, record(10, 2, 160, "final"), record(11, 1, 80, "final")]
    corrected = {r.trial: r.objective for r in at_first_speed(slower, SETTINGS)}
    assert corrected[0] == 100
    assert corrected[1] == pytest.approx(200 / (1 - 0.2 / 11))
    assert corrected[9] == pytest.approx(170 / (1 - 0.2 * 9 / 11))  # 203: as good as the early one
    assert corrected[11] == pytest.approx(100)
    others = [record(n, 3 + n, speed) for n, speed in ((2, 180), (3, 179), (8, 165))]
    assert waiting(sorted([*slower, *others], key=lambda r: r.trial)) == [9, 8]  # 8 by its corrected 193
    steady = [*slower[:4], record(11, 1, 96, "final")]
    assert at_first_speed(steady, SETTINGS) == steady

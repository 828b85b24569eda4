import math
import random
import statistics
from dataclasses import replace

import pytest
from fake_machine import CPU, CUDA, settings

from autotune.measure.types import MemoryView, Status, TrialResult
from autotune.runs.records import Role, TrialRecord
from autotune.runs.verdict import Verdict
from autotune.search.decide import decide, drift_corrected, unconfirmed
from autotune.search.space import baseline

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
    return decide(records, SETTINGS)


def test_nothing_feasible_has_no_winner() -> None:
    assert decided([]) == Verdict()
    failed = decided([record(0, 1, 0, "baseline", status="oom")])
    assert (failed.status, failed.winner, failed.baseline_speed) == ("nothing feasible", None, None)
    assert failed.baseline is not None


def test_the_ranking_starts_with_the_winner() -> None:
    assert decided([*SEARCH, record(4, 2, 150, "final"), record(5, 3, 191, "final")]).ranking == (5, 1, 2, 3, 4, 0)


def test_a_confirmation_counts_although_another_one_was_interrupted() -> None:
    found = decided([*SEARCH, record(4, 2, 199, "final"), record(5, 2, 0, "final", status="interrupted")])
    assert (found.status, found.winner and found.winner.trial) == ("confirmed", 4)


def test_a_race_elects_the_winner_whatever_the_objective() -> None:
    rivals = [record(4, 8, 90, "race"), record(5, 9, 80, "race")]
    first, second = (rival.candidate.id for rival in rivals)
    found = decide([*SEARCH, *rivals], SETTINGS, (first, second))
    assert (found.status, found.winner) == ("not confirmed", rivals[0])
    waiting = unconfirmed([*SEARCH, *rivals], SETTINGS, (first, second))
    assert [r.trial for r in waiting] == [4, 0]
    crashed = record(6, 8, 0, "final", status="crashed")
    assert unconfirmed([*SEARCH, *rivals, crashed], SETTINGS, (first, second))[0].trial == 5
    found = decide([*SEARCH, *rivals, crashed, record(7, 9, 81, "final")], SETTINGS, (first, second))
    assert (found.status, found.winner and found.winner.trial, found.fell_through) == ("confirmed", 7, (4,))


def test_the_ranking_is_corrected_for_drift() -> None:
    slower = [record(0, 1, 100, "baseline"), record(1, 2, 200), record(9, 3, 190)]
    drifted = decided([*slower, record(10, 3, 160, "final"), record(11, 1, 80, "final")])
    assert drifted.ranking == (10, 9, 1, 0, 11)
    assert drifted.drift_corrected["9"] == pytest.approx(190 / (1 - 0.2 * 9 / 11))


def test_the_best_so_far_before_anything_is_confirmed() -> None:
    verdict = decided(SEARCH)
    assert (verdict.winner.trial, verdict.confirmed) == (1, False)


def test_the_winner_is_by_all_measurements_of_the_finalists() -> None:
    verdict = decided([*SEARCH, record(4, 2, 180, "final"), record(5, 3, 191, "final", peak=900)])
    assert (verdict.winner.candidate.plan.micro_batch_size, verdict.confirmed, verdict.unsettled) == (3, True, "")
    assert verdict.speed.measurements == 2
    assert verdict.speed.tokens_per_second == pytest.approx(190.7, rel=0.01)


def test_a_failed_confirmation_falls_back_to_the_runner_up() -> None:
    verdict = decided([*SEARCH, record(4, 2, 0, "final", "oom"), record(5, 3, 191, "final")])
    assert (verdict.winner.trial, verdict.fell_through) == (5, (1,))
    alone = decided([*SEARCH, record(4, 2, 0, "final", "oom")])
    assert (alone.winner.trial, alone.confirmed) == (2, False)


def test_running_out_of_budget_is_no_failure_of_the_candidate() -> None:
    verdict = decided([*SEARCH, record(4, 2, 0, "final", "interrupted")])
    assert (verdict.winner.trial, verdict.confirmed, verdict.fell_through) == (1, False, ())


def test_a_tie_goes_to_the_one_with_less_memory() -> None:
    finals = [record(4, 2, 196, "final", peak=2000), record(5, 3, 194, "final", peak=1000)]
    verdict = decided([SEARCH[0], SEARCH[1], record(2, 3, 199), *finals])
    assert (verdict.winner.trial, verdict.tied_with) == (5, (4,))
    finals = [record(4, 2, 200, "final", peak=2000), record(5, 3, 150, "final", peak=1000)]
    clear = decided([SEARCH[0], SEARCH[1], record(2, 3, 150), *finals])
    assert (clear.winner.trial, clear.tied_with) == (4, ())


def test_the_interval_holds_for_the_next_process() -> None:
    """One process knows nothing of the spread between processes; what a run repeats shows it."""
    alone = decided([record(0, 1, 100, "baseline", ci95=0.1)])
    assert alone.speed.relative_ci95 > 0.005  # not the 0.1 % of the process
    repeated = [SEARCH[0], SEARCH[1], record(2, 2, 188, "final"), record(3, 1, 106, "final")]
    wide = decided(repeated).speed
    assert wide.process_sd > 0.02
    assert wide.next_process_ci95 > wide.ci95 > 0.02 * wide.tokens_per_second


def test_the_largest_of_many_noisy_figures_is_not_promised() -> None:
    """Sixteen equal candidates whose processes spread by 3 %: the promise is nearer to their mean than the maximum."""
    asked = settings(CPU, model="2x2x64")
    plain = replace(baseline(asked), recipe=replace(asked.recipe, global_batch_size=512))
    largest, promised = [], []
    for seed in range(20):
        rng, records = random.Random(seed), []
        for i in range(16):
            measured = record(i, 64, 1000 * math.exp(rng.gauss(0, 0.03)), ci95=3)
            plan = replace(plain.plan, micro_batch_size=64 + 16 * i)
            records.append(replace(measured, candidate=replace(plain, plan=plan)))
        verdict = decide(records, asked)
        largest.append(max(r.objective or 0.0 for r in records))
        promised.append(verdict.speed.tokens_per_second)
    assert statistics.fmean(largest) > 1045
    assert 990 < statistics.fmean(promised) < 1030


def test_a_finalist_with_a_wide_interval_is_not_settled_and_measured_again() -> None:
    noisy = [SEARCH[0], SEARCH[1], record(2, 1, 100, "final"), record(3, 2, 190, "final", ci95=133)]
    verdict = decided(noisy)
    assert "search again on a quiet machine" in verdict.unsettled
    assert waiting(noisy) == [1]
    given_up = [*noisy, *(record(n, 2, 190, "final", ci95=133) for n in (4, 5, 6))]
    assert waiting(given_up) == []


def test_a_finalist_confirmed_at_a_tenth_of_its_speed_is_noted() -> None:
    slow = [*SEARCH, record(4, 2, 20, "final"), record(5, 1, 100, "final"), record(6, 3, 190, "final")]
    verdict = decided(slow)
    assert verdict.winner.trial == 6
    assert verdict.notes == (
        "trials 1 and 4 measured 20 to 200 tokens/s of one candidate: something disturbed one of them",
    )
    assert verdict.unsettled.startswith("trial 1 may be faster")
    assert waiting(slow) == [3, 1] or waiting(slow)[-1] == 1
    again = decided([*slow, record(7, 2, 198, "final")])  # two of three agree
    assert (again.winner.trial, again.unsettled) == (7, "")


def test_drift_is_measured_by_the_baseline() -> None:
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


def test_trials_are_ranked_without_drift() -> None:
    early, late = record(1, 2, 200), record(9, 3, 170)
    slower = [record(0, 1, 100, "baseline"), early, late, record(10, 2, 160, "final"), record(11, 1, 80, "final")]
    corrected = {r.trial: r.objective for r in drift_corrected(slower, SETTINGS)}
    assert corrected[0] == 100
    assert corrected[1] == pytest.approx(200 / (1 - 0.2 / 11))
    assert corrected[9] == pytest.approx(170 / (1 - 0.2 * 9 / 11))  # 203: as good as the early one
    assert corrected[11] == pytest.approx(100)
    others = [record(n, 3 + n, speed) for n, speed in ((2, 180), (3, 179), (8, 165))]
    assert waiting(sorted([*slower, *others], key=lambda r: r.trial)) == [9, 8]  # 8 by its corrected 193
    steady = [*slower[:4], record(11, 1, 96, "final")]
    assert drift_corrected(steady, SETTINGS) == steady

import contextlib
import random
import sqlite3
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from fake_machine import CUDA, Machine, answer, settings

from autotune.config.candidate import Candidate
from autotune.errors import ConfigError
from autotune.measure.types import MemoryView, Status, TrialRequest, TrialResult
from autotune.runs.records import TrialRecord
from autotune.search import study as studies
from autotune.search.loop import search
from autotune.search.sampler import implied, propose, unknown
from autotune.search.simulation import ask, optuna_sampler
from autotune.search.space import build_space, candidate_at, every_value, ordered
from autotune.units import GIB

SETTINGS = settings(CUDA, choices=("attention=sdpa,sdpa_cudnn,sdpa_math", "loss=full,chunked"))
SPACE = build_space(SETTINGS, CUDA)
LIMIT = SETTINGS.memory_limit_bytes


def new_study(tmp_path: Path) -> optuna.Study:
    return studies.create_study(tmp_path, SETTINGS)


def request_of(candidate: object) -> TrialRequest:
    return TrialRequest(candidate=candidate, device="cuda:0", result_path="", memory_limit_bytes=LIMIT)  # type: ignore[arg-type]


def measured(study: optuna.Study, number: int) -> TrialRecord:
    pool = unknown(SPACE, studies.answered(studies.records(study)), SETTINGS)
    candidate = random.Random(number).choice(pool)
    trial = studies.begin(study, SPACE, number, "search", request_of(candidate))
    record = record_of(number, candidate)
    studies.finish(study, trial, record, LIMIT, untold(study))
    return record


def untold(study: optuna.Study) -> Path:
    """Beside study.db."""
    return Path(study._storage._backend.engine.url.database).with_name(studies.UNTOLD)


def record_of(number: int, candidate: Candidate) -> TrialRecord:
    result = answer(request_of(candidate))
    return TrialRecord(
        trial=number, role="search", candidate=candidate, result=result, objective=result.tokens_per_second
    )


def test_records_come_back_as_they_were_kept(tmp_path: Path) -> None:
    study = new_study(tmp_path)
    kept = [measured(study, number) for number in range(12)]
    again = studies.load_study(tmp_path, SETTINGS)
    assert studies.records(again) == kept


def test_infeasible_trials_are_pruned_with_their_violation_never_failed(tmp_path: Path) -> None:
    study = new_study(tmp_path)
    kept = [measured(study, number) for number in range(20)]
    assert {record.result.status for record in kept} == {"ok", "oom"}
    for trial, record in zip(study.trials, kept, strict=False):
        if record.objective is None:
            assert trial.state == optuna.trial.TrialState.PRUNED
            assert trial.constraints["feasible"] > 0
        else:
            assert trial.state == optuna.trial.TrialState.COMPLETE
            assert trial.constraints["feasible"] <= 0


@pytest.mark.parametrize("status", ["timeout", "crashed", "incorrect", "unsupported"])
def test_other_failures_are_worse_than_any_overshoot(status: Status) -> None:
    overshoot = TrialResult(status="oom", phase="build", wanted_bytes=5 * LIMIT)
    assert studies.violation(TrialResult(status=status, phase="build"), LIMIT) > studies.violation(overshoot, LIMIT)


def test_the_violation_is_the_overshoot_over_the_limit() -> None:
    def result(status: Status, peak: int, wanted: int | None = None) -> TrialResult:
        memory = {"steady": MemoryView(allocated_bytes=peak // 2, device_bytes=peak)}
        return TrialResult(status=status, phase="done", memory=memory, wanted_bytes=wanted)

    assert studies.violation(result("over_limit", 12 * GIB), 10 * GIB) == pytest.approx(0.2)
    assert studies.violation(result("oom", 9 * GIB, 4 * GIB), 10 * GIB) == pytest.approx(0.3)
    assert studies.violation(result("oom", 5 * GIB), 10 * GIB) == 0.05
    assert studies.violation(result("ok", 5 * GIB), 10 * GIB) == pytest.approx(-0.5)


def test_a_known_candidate_is_answered_from_its_record(tmp_path: Path) -> None:
    study = optuna.create_study(direction="maximize", sampler=optuna_sampler("tpe", 0))
    known: dict[str, TrialRecord] = {}
    for number in range(40):
        asked = ask(study, SPACE, known, SETTINGS, "tpe")
        assert asked is not None
        trial, candidate = asked
        assert candidate.id not in known
        known[candidate.id] = record_of(number, candidate)
        studies.tell(study, trial, known[candidate.id], LIMIT)
    assert len(study.trials) > 40
    for told in study.trials:
        assert told.value == implied(candidate_of(told), known).objective  # type: ignore[union-attr]


def candidate_of(trial: optuna.trial.FrozenTrial) -> Candidate:
    chosen = {n: c[trial.params[n]] if ordered(c) else trial.params[n] for n, c in SPACE.choices.items()}
    return candidate_at(SPACE, chosen)


def test_a_space_that_is_known_to_its_last_candidate_ends() -> None:
    small = replace(SPACE, choices={name: SPACE.choices[name] for name in ("micro_batch_size", "loss")})
    last = propose(small, {}, SETTINGS)
    assert last is not None
    ok = TrialRecord(trial=0, role="search", candidate=last, result=answer(request_of(last)), objective=1.0)
    known = {candidate_at(small, values).id: ok for values in every_value(small)}
    del known[last.id]
    assert propose(small, known, SETTINGS) == last
    assert propose(small, {**known, last.id: ok}, SETTINGS) is None


def test_stale_trials_are_closed_and_what_was_in_flight_is_interrupted(tmp_path: Path) -> None:
    study = new_study(tmp_path)
    first = measured(study, 0)
    study.enqueue_trial({})  # killed before it was asked for
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    study.enqueue_trial({})
    study.ask()  # killed before its values were drawn
    asked = propose(SPACE, {}, SETTINGS)
    assert asked is not None
    studies.begin(study, SPACE, 1, "search", request_of(asked))  # killed while it was measured
    study.enqueue_trial({})

    again = studies.load_study(tmp_path, SETTINGS)
    assert studies.records(again) == [first]
    studies.close_stale(again, tmp_path / studies.UNTOLD, LIMIT)
    states = {trial.state for trial in again.trials}
    assert not states & {optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.WAITING}
    interrupted = studies.records(again)[1]
    assert (interrupted.trial, interrupted.result.status, interrupted.candidate) == (1, "interrupted", asked)
    assert interrupted.candidate.id not in studies.answered([first, interrupted])
    # what the sampler searches has not shrunk
    assert set(optuna.search_space.IntersectionSearchSpace(include_pruned=True).calculate(again)) == set(SPACE.choices)


def test_a_storage_or_study_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    for url in ("nonsense", "mysql://nowhere/x"):
        with pytest.raises(ConfigError, match="cannot be opened"):
            studies.create_study(tmp_path, replace(SETTINGS, storage=url))
    optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db", study_name="theirs")
    with pytest.raises(ConfigError, match="not one of autotune's"):
        studies.load_study(tmp_path, replace(SETTINGS, name="theirs"))
    with pytest.raises(ConfigError, match="has no study 'ours'; it has: theirs"):
        studies.load_study(tmp_path, replace(SETTINGS, name="ours"))
    with pytest.raises(ConfigError, match="already"):
        studies.create_study(tmp_path, replace(SETTINGS, name="theirs"))
    with contextlib.closing(sqlite3.connect(tmp_path / "thesis.db")) as database:
        database.execute("CREATE TABLE chapters (text)")
        with pytest.raises(ConfigError, match=r"holds something else \(chapters\)"):
            studies.create_study(tmp_path, replace(SETTINGS, storage=f"sqlite:///{tmp_path}/thesis.db"))
        assert database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (1,)


def test_what_ran_out_of_memory_answers_for_all_that_need_more(tmp_path: Path) -> None:
    chosen = {name: choices[0] for name, choices in SPACE.choices.items()} | {"micro_batch_size": 64}
    candidate = candidate_at(SPACE, chosen)
    oom = TrialResult(status="oom", phase="build")
    known = {candidate.id: TrialRecord(trial=7, role="search", candidate=candidate, result=oom)}
    for change, follows in (
        ({"micro_batch_size": 128}, True),
        ({"micro_batch_size": 48}, False),
        ({"activation_checkpointing": "block"}, False),
        ({"compile": "full"}, False),
        ({"attention": "sdpa_math"}, False),
    ):
        answer_to = implied(candidate_at(SPACE, chosen | change), known)
        assert (answer_to is not None) == follows, change


def test_infeasible_trials_teach_the_sampler(tmp_path: Path) -> None:
    """Fewer trials run out of memory than if candidates were drawn at random from the same space."""
    machine = Machine()
    asked = settings(CUDA, memory_limit="8GiB", budget="150s")
    search(asked, tmp_path / "run", CUDA, measure=machine.measure, clock=machine.clock)
    searched = [answer(request).status for request in machine.requests if not request.final]
    taught = searched[10:].count("oom") / len(searched[10:])
    rng, drawn = random.Random(0), 400
    values = [{name: rng.choice(choices) for name, choices in SPACE.choices.items()} for _ in range(drawn)]
    requests = [
        replace(request_of(candidate_at(SPACE, v)), memory_limit_bytes=asked.memory_limit_bytes) for v in values
    ]
    blind = sum(answer(request).status == "oom" for request in requests) / drawn
    print(f"out of memory: {taught:.0%} of {len(searched) - 10} trials after the first 10, {blind:.0%} at random")
    assert taught < 0.6 * blind

"""The study: what it holds, what is read back, and how it looks in Optuna's own tools."""

import contextlib
import random
import shutil
import sqlite3
import warnings
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
from autotune.search import study_trials
from autotune.search.loop import rebuild, resume, search
from autotune.search.pool import by_candidate, dominated_by_oom, pool, unanswered
from autotune.search.propose import Proposer
from autotune.search.space import build_space, candidate_at
from autotune.units import GIB

SETTINGS = settings(CUDA, choices=("attention=sdpa,sdpa_cudnn,sdpa_math", "loss=full,chunked"))
SPACE = build_space(SETTINGS, CUDA)
LIMIT = SETTINGS.memory_limit_bytes
CARD = replace(CUDA, device_memory_bytes=48 * GIB)
"""For which the guide advises a width of 672, which is no choice."""


def new_study(tmp_path: Path) -> optuna.Study:
    study = studies.create_study(tmp_path, SETTINGS)
    assert study is not None
    studies.describe(study, SETTINGS, CUDA, SPACE)
    return study


def request_of(candidate: Candidate) -> TrialRequest:
    return TrialRequest(candidate=candidate, device="cuda:0", result_path="", memory_limit_bytes=LIMIT)


def proposer_of(study: optuna.Study) -> Proposer:
    return Proposer(study, SPACE, SETTINGS, CUDA)


def measured(study: optuna.Study, proposer: Proposer, number: int) -> TrialRecord:
    records = study_trials.records(study)
    candidate = random.Random(number).choice(unanswered(pool(SPACE, {}, SETTINGS), by_candidate(records)).candidates)
    trial = proposer.claim(candidate, study_trials.requested("search", request_of(candidate), "here", 0.0))
    record = record_of(trial.number, candidate)
    assert study_trials.finish(study, trial, record, LIMIT, study_trials.Journal(folder_of(study))) == record
    return record


def folder_of(study: optuna.Study) -> Path:
    """The folder of study.db."""
    return Path(study._storage._backend.engine.url.database).parent


def record_of(number: int, candidate: Candidate) -> TrialRecord:
    result = answer(request_of(candidate))
    return TrialRecord(
        trial=number, role="search", candidate=candidate, result=result, objective=result.tokens_per_second
    )


def test_records_come_back_as_they_were_kept(tmp_path: Path) -> None:
    study = new_study(tmp_path)
    proposer = proposer_of(study)
    kept = [measured(study, proposer, number) for number in range(12)]
    again = studies.load_study(tmp_path, SETTINGS)
    assert study_trials.records(again) == kept


def test_infeasible_trials_are_pruned_with_their_violation_never_failed(tmp_path: Path) -> None:
    study = new_study(tmp_path)
    proposer = proposer_of(study)
    kept = [measured(study, proposer, number) for number in range(20)]
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
    failed = TrialResult(status=status, phase="build")
    assert study_trials.violation(failed, LIMIT) > study_trials.violation(overshoot, LIMIT)


def test_the_violation_is_the_overshoot_over_the_limit() -> None:
    def result(status: Status, peak: int, wanted: int | None = None) -> TrialResult:
        memory = {"steady": MemoryView(allocated_bytes=peak // 2, device_bytes=peak)}
        return TrialResult(status=status, phase="done", memory=memory, wanted_bytes=wanted)

    assert study_trials.violation(result("over_limit", 12 * GIB), 10 * GIB) == pytest.approx(0.2)
    assert study_trials.violation(result("oom", 9 * GIB, 4 * GIB), 10 * GIB) == pytest.approx(0.3)
    assert study_trials.violation(result("oom", 5 * GIB), 10 * GIB) == 0.05
    assert study_trials.violation(result("ok", 5 * GIB), 10 * GIB) == pytest.approx(-0.5)


def test_stale_trials_are_closed_and_what_was_in_flight_is_interrupted(tmp_path: Path) -> None:
    study = new_study(tmp_path)
    proposer = proposer_of(study)
    first = measured(study, proposer, 0)
    study.enqueue_trial({})  # killed before it was asked for
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    study.enqueue_trial({})
    study.ask()  # killed before its values were drawn
    candidate = pool(SPACE, {}, SETTINGS).candidates[0]
    attributes = study_trials.requested("search", request_of(candidate), "here", 0.0)
    proposer.claim(candidate, attributes)  # killed while it was measured
    study.enqueue_trial({})

    again = studies.load_study(tmp_path, SETTINGS)
    assert study_trials.records(again) == [first]
    study_trials.close_stale(again, tmp_path, LIMIT)
    states = {trial.state for trial in again.trials}
    assert not states & {optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.WAITING}
    interrupted = study_trials.records(again)[1]
    assert (interrupted.trial, interrupted.result.status, interrupted.candidate) == (3, "interrupted", candidate)
    assert interrupted.candidate.id not in by_candidate([first, interrupted])
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
        other = candidate_at(SPACE, chosen | change)
        assert (dominated_by_oom(other, known) is not None) == follows, change
        everything = pool(replace(SPACE, choices={n: (v,) for n, v in (chosen | change).items()}), {}, SETTINGS)
        assert (not unanswered(everything, known).candidates) == follows, change


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over shapes with its guide, some trials of which are out of memory."""
    machine, path = Machine(), tmp_path_factory.mktemp("runs") / "run"
    asked = settings(CARD, model="", budget="150s", memory_limit="12GiB")
    search(asked, path, CARD, measure=machine.measure, clock=machine.clock)
    return path


def test_a_runs_study_reads_naturally_in_optunas_tools(run: Path) -> None:
    study = optuna.load_study(study_name="paper", storage=f"sqlite:///{run}/study.db")
    frame = study.trials_dataframe()
    roles = frame["user_attrs_role"].tolist()
    assert roles[:3] == ["baseline", "guide", "search"]
    assert {"final"} < set(roles)
    found = study_trials.records(studies.load_study(run, None))
    for record, (_, row) in zip(found, frame.iterrows(), strict=True):
        shape, plan = record.candidate.shape, record.candidate.plan
        assert row["params_n_embd"] == shape.n_embd
        assert row["params_n_layer"] == shape.n_layer
        assert row["params_micro_batch_size"] == plan.micro_batch_size
        assert row["params_attention"] == plan.attention
        assert row["user_attrs_status"] == record.result.status
        assert row["user_attrs_candidate_id"] == record.candidate.id
        if record.objective is not None:
            assert row["value_predicted loss"] == record.objective
            assert row["user_attrs_tokens_per_second"] == record.result.tokens_per_second
            peak = record.result.peak("device_bytes") or 0
            assert row["user_attrs_peak_gib"] == pytest.approx(peak / GIB, abs=1e-3)
        else:
            assert row["state"] == "PRUNED"
            assert row["user_attrs_reason"] == record.result.message
    assert (frame["user_attrs_predicted_peak_gib"] > 0).all()
    assert "PRUNED" in frame["state"].tolist()
    assert study.metric_names == ["predicted loss"]
    assert study.user_attrs["verdict"]["status"] == "confirmed"


def test_values_outside_the_choices_are_recorded_as_they_are(run: Path) -> None:
    guide = studies.load_study(run, None).trials[1]
    assert guide.params["n_embd"] == 672
    assert 672 not in build_space(settings(CARD, model=""), CARD).choices["n_embd"]
    distribution = guide.distributions["n_embd"]
    assert isinstance(distribution, optuna.distributions.IntDistribution)
    assert (distribution.low, distribution.high, distribution.log) == (384, 1280, True)


def test_importances_and_slices_of_a_run(run: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    study = studies.load_study(run, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shares = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
        )
        axes = optuna.visualization.matplotlib.plot_slice(study, params=["n_embd", "micro_batch_size", "attention"])
    space = build_space(settings(CARD, model=""), CARD)
    assert set(shares) <= set(space.choices)
    assert len(shares) > 5
    width = axes[1] if axes[1].get_xlabel() == "n_embd" else next(a for a in axes if a.get_xlabel() == "n_embd")
    shown = {float(x) for collection in width.collections for x, _ in collection.get_offsets()}
    assert shown <= {384, 512, 640, 672, 768, 896, 1024, 1280}


def test_optunas_own_samplers_see_every_parameter_of_a_run(run: Path) -> None:
    study = studies.load_study(run, None)
    common = optuna.search_space.IntersectionSearchSpace(include_pruned=True).calculate(study)
    assert set(common) == set(build_space(settings(CARD, model=""), CARD).choices)


def test_a_run_of_an_older_version_is_read_and_not_resumed(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "old"
    shutil.copytree(run, path)
    studies.load_study(path, None).set_user_attr("autotune", 1)
    with pytest.raises(ConfigError, match="written by another version of autotune; its report can be read"):
        resume(path, CARD, budget_seconds=30.0)
    (path / "trials.csv").unlink()
    assert rebuild(path) is not None
    assert (path / "trials.csv").read_text() == (run / "trials.csv").read_text()


@pytest.mark.parametrize("choices", [None, [], {"n_embd": [64]}, "x"])
def test_damaged_choices_are_one_line(run: Path, tmp_path: Path, choices: object) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(run, path)
    studies.load_study(path, None).set_user_attr("choices", choices)
    with pytest.raises(ConfigError, match="the study is damaged: its choices are"):
        resume(path, CARD, budget_seconds=30.0)

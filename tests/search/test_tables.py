"""What few statements write is what Optuna's own calls would write."""

from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from autotune.search import storage, tables

KINDS: dict[str, optuna.distributions.BaseDistribution] = {
    "micro_batch_size": IntDistribution(1, 64, log=True), "attention": CategoricalDistribution(("sdpa", "manual")),
    "rate": FloatDistribution(0.0, 1.0),
}  # fmt: skip
RUNNING = create_trial(
    state=TrialState.RUNNING, distributions=KINDS, params={"micro_batch_size": 8, "attention": "manual", "rate": 0.25},
    user_attrs={"role": "search", "spent": 1.5}, constraints={"before": 0.5},
)  # fmt: skip


def study_in(folder: Path) -> optuna.Study:
    folder.mkdir()
    return optuna.create_study(storage=storage.open_storage(folder, "", storage.soon))


def comparable(trial: FrozenTrial) -> dict[str, object]:
    """All but the times."""
    known = vars(trial).copy()
    started, ended = known.pop("_datetime_start"), known.pop("datetime_complete")
    assert (started is not None, ended is not None) == (True, trial.state.is_finished())
    return known


@pytest.mark.parametrize(("state", "values"), [(TrialState.COMPLETE, (float("inf"),)), (TrialState.PRUNED, ())])
def test_optuna_reads_what_it_would_have_written(
    tmp_path: Path, state: TrialState, values: tuple[float, ...]
) -> None:
    ours, theirs = study_in(tmp_path / "ours"), study_in(tmp_path / "theirs")
    for number in range(2):
        trial_id, found = tables.insert(ours, RUNNING, beats=False)
        tables.update(ours, trial_id, user_attrs={"role": "final"})
        tables.update(ours, trial_id, state, values, {"reason": "é", "answer": [1, None]}, {"constraints:limit": -0.5})
        assert found == number
        same = theirs._storage.create_new_trial(theirs._study_id, RUNNING)
        trial = optuna.trial.Trial(theirs, same)
        for name, value in {"role": "final", "reason": "é", "answer": [1, None]}.items():
            trial.set_user_attr(name, value)
        theirs._storage.set_trial_system_attr(same, "constraints:limit", -0.5)
        theirs.tell(trial, list(values) or None, state=state)
    assert [comparable(trial) for trial in ours.trials] == [comparable(trial) for trial in theirs.trials]
    assert ours.trials_dataframe(("number", "value", "params", "user_attrs")).equals(
        theirs.trials_dataframe(("number", "value", "params", "user_attrs"))
    )


def test_a_trial_ends_once(tmp_path: Path) -> None:
    study = study_in(tmp_path / "run")
    trial_id, _ = tables.insert(study, RUNNING, beats=False)
    for _ in range(2):  # the answer of the first was lost
        tables.update(study, trial_id, TrialState.COMPLETE, (2.0,), {"record": "mine"})
    for state, attributes in ((TrialState.COMPLETE, {"record": "another's"}), (TrialState.FAIL, {"record": "mine"})):
        with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
            tables.update(study, trial_id, state, user_attrs=attributes)
    (trial,) = study.trials
    assert (trial.value, trial.user_attrs["record"]) == (2.0, "mine")


def test_only_what_is_new_is_read(tmp_path: Path) -> None:
    study, other = study_in(tmp_path / "run"), optuna.create_study(storage=f"sqlite:///{tmp_path}/run/study.db")
    other.add_trial(RUNNING)
    ids = [tables.insert(study, RUNNING, beats=False)[0] for _ in range(5)]
    for place in (1, 4):
        tables.update(study, ids[place], TrialState.PRUNED, user_attrs={"record": f"of {place}"})

    def read(*arguments: object) -> list[tuple[int, bool, dict[str, object]]]:
        found = tables.read(study, *arguments)  # type: ignore[arg-type]
        return [(row.number, row.state.is_finished(), row.user_attrs) for row in found]

    running = {"role": "search"}
    assert read(2, ("role", "record")) == [(3, False, running), (4, True, {**running, "record": "of 4"})]
    ended = [(number, True, {"record": f"of {number}"}) for number in (1, 4)]
    assert read(3, ("record",), (0,), (1, 2)) == [(0, False, {}), *ended]
    assert read(4, ("role",)) == []

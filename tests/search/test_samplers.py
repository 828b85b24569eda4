"""Optuna's samplers and the user's own in our search: what they may do wrong costs a note and no more."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from fake_machine import CUDA, Machine, settings
from proposals import Trials

from autotune.config.search_settings import read_settings
from autotune.errors import ConfigError
from autotune.search.loop import resume, search
from autotune.search.pool import CandidateProblem, by_candidate, dominated_by_oom
from autotune.search.samplers import make_sampler
from autotune.search.space import build_space, candidate_at, distributions

MISTAKES = '''
import optuna

class Random(optuna.samplers.RandomSampler):
    """Constructed with the search's seed."""

class Raises(optuna.samplers.BaseSampler):
    def infer_relative_search_space(self, study, trial):
        raise KeyError("no space")
    def sample_relative(self, study, trial, search_space):
        raise RuntimeError("relative")
    def sample_independent(self, study, trial, name, distribution):
        raise ZeroDivisionError("two\\nlines")
    def before_trial(self, study, trial):
        raise ValueError("before")
    def after_trial(self, study, trial, state, values):
        raise ValueError("after")

class Outside(optuna.samplers.BaseSampler):
    def infer_relative_search_space(self, study, trial):
        return {}
    def sample_relative(self, study, trial, search_space):
        return {"micro_batch_size": 10**9}
    def sample_independent(self, study, trial, name, distribution):
        return "no such kernel" if name == "attention" else float("nan")

class Repeats(optuna.samplers.RandomSampler):
    def __init__(self):
        super().__init__(seed=0)
    def sample_independent(self, study, trial, name, distribution):
        return distribution.choices[0] if hasattr(distribution, "choices") else distribution.low

class Unmade(optuna.samplers.RandomSampler):
    def __init__(self, wanted):
        super().__init__()

class NoSampler:
    pass
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "mistakes.py").write_text(MISTAKES)
    monkeypatch.syspath_prepend(str(tmp_path / "package"))
    monkeypatch.delitem(sys.modules, "mistakes", raising=False)
    return "mistakes"


def go(tmp_path: Path, sampler: str, **words: Any) -> Any:
    machine = Machine()
    asked = settings(CUDA, budget="60s", sampler=sampler, **words)
    verdict = search(asked, tmp_path / "run", CUDA, measure=machine.measure, clock=machine.clock)
    searched = [request.candidate.id for request in machine.requests if not request.final]
    assert len(searched) == len(set(searched)) >= 5
    assert verdict.confirmed
    return verdict


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_optunas_samplers_search(tmp_path: Path, sampler: str) -> None:
    assert not [note for note in go(tmp_path, sampler).notes if "sampler" in note]
    assert read_settings(tmp_path / "run" / "search.toml").sampler == sampler
    machine = Machine()
    assert resume(tmp_path / "run", CUDA, budget_seconds=30.0, measure=machine.measure, clock=machine.clock).confirmed


def test_optunas_process_needs_scipy_which_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    space = build_space(settings(CUDA), CUDA)
    problem = CandidateProblem(space, settings(CUDA), distributions(space))
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None if name == "scipy" else object())
        with pytest.raises(ConfigError, match=r"--sampler gp needs scipy; install it, or use additive or tpe"):
            make_sampler("gp", 0, problem)


@pytest.mark.slow
def test_optunas_process_searches(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    go(tmp_path, "gp")


def test_a_sampler_of_the_users_own(tmp_path: Path, module: str) -> None:
    assert not [note for note in go(tmp_path, f"{module}:Random").notes if "sampler" in note]


@pytest.mark.parametrize(
    ("name", "notes"),
    [
        ("Raises", ["failed: KeyError: 'no space'; a random value", "failed: ZeroDivisionError: two lines; a random"]),
        ("Outside", ["'micro_batch_size', which its own", "'no such kernel' for attention, which is outside"]),
        ("Repeats", ["proposed known candidates 10 times in a row; random ones were taken"]),
    ],
)
def test_a_sampler_that_misbehaves_costs_a_note(tmp_path: Path, module: str, name: str, notes: list[str]) -> None:
    said = go(tmp_path, f"{module}:{name}").notes
    for note in notes:
        assert any(note in line for line in said), said
    assert all("\n" not in line for line in said)
    assert len(said) <= 7


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("bayes", r"--sampler = 'bayes' is not known; allowed: additive, gp, package\.module:Class, random, tpe"),
        ("addtive", r"--sampler = 'addtive' is not known; did you mean 'additive'\?"),
        ("nowhere.to_be:Found", r"'nowhere\.to_be:Found' cannot be imported: ModuleNotFoundError.*PYTHONPATH"),
        ("mistakes:Missing", r"cannot be imported: AttributeError"),
        ("mistakes:NoSampler", r"is not a class derived from optuna\.samplers\.BaseSampler"),
        ("mistakes:Unmade", r"cannot be made: TypeError.*'wanted'; use another"),
        (":", r"cannot be imported: ValueError"),
    ],
)
def test_an_unknown_sampler_is_one_line_and_nothing_is_left(
    tmp_path: Path, module: str, sampler: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        go(tmp_path, sampler)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_working_folder_holds_no_sampler(tmp_path: Path) -> None:
    """A user's own files cannot stand in for a package; PYTHONPATH is his word that they shall."""
    (tmp_path / "mine.py").write_text(MISTAKES)
    command = [sys.executable, "-m", "autotune", "search", "--model", "2x2x64x64", "--device", "cpu", "--budget", "1s"]
    done = subprocess.run(
        [*command, "--sampler", "mine:Random"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "--sampler 'mine:Random' cannot be imported: ModuleNotFoundError" in done.stderr


def test_a_known_candidate_is_answered_from_its_record() -> None:
    trials = Trials(settings(CUDA, sampler="tpe", choices=("micro_batch_size=8,64,512", "loss=full", "dtype=bfloat16")))
    trials.run(40)
    repeats = [trial for trial in trials.study.trials if trial.user_attrs.get("role") == "repeat"]
    assert repeats
    known, space = by_candidate(trials.records), build_space(trials.asked, CUDA)
    for trial in repeats:
        candidate = candidate_at(space, trial.params)
        answer = known.get(candidate.id) or dominated_by_oom(candidate, known)
        assert answer is not None
        assert trial.value == answer.objective
        assert trial.user_attrs["answered_by"] == answer.trial
    assert all(isinstance(trial.params["micro_batch_size"], int) for trial in trials.study.trials)
    assert {trial.params["micro_batch_size"] for trial in repeats} <= {8, 64, 512}


def test_only_optunas_process_loads_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from fake_machine import *\nfrom autotune.search.loop import search\n"
        "for name in ('additive', 'tpe', 'random'):\n"
        "    machine = Machine()\n"
        "    asked = settings(budget='40s', sampler=name)\n"
        "    search(asked, Path('run', name), CUDA, measure=machine.measure, clock=machine.clock)\n"
        "print('torch' in sys.modules, 'scipy' in sys.modules)\n"
    )
    folder = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", code, folder]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_space_that_is_known_to_its_last_candidate_ends() -> None:
    few = (
        "micro_batch_size=8,16", "attention=sdpa", "loss=full", "compile=off,full", "allocator=default",
        "dtype=bfloat16", "activation_checkpointing=none",
    )  # fmt: skip
    for sampler in ("additive", "tpe"):
        trials = Trials(settings(CUDA, choices=few, sampler=sampler))
        trials.run(5)  # the baseline's micro batch is 12
        assert trials.propose() is None


def test_optunas_trials_are_logged_nowhere(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    go(tmp_path, "tpe")
    assert "Trial" not in capfd.readouterr().err

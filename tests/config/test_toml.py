"""Candidate files: round trips, overrides, errors, atomic writes, and files of earlier versions."""

import os
from dataclasses import asdict
from pathlib import Path

import pytest
import tomli_w
from fake_machine import settings
from hypothesis import given
from hypothesis import strategies as st

from autotune.config.candidate import Candidate, Checkpointing, Evaluation, Plan, Recipe, Shape, Tracking
from autotune.config.search_settings import SearchSettings
from autotune.config.tables import read_table
from autotune.config.toml import CandidateFile, format_candidate, parse_candidate, read_candidate
from autotune.errors import ConfigError
from autotune.files import write_atomically

shapes = st.builds(
    lambda heads, size, layers, bias, dropout: Shape(
        n_layer=layers, n_head=heads, n_embd=heads * size, bias=bias, dropout=dropout
    ),
    heads=st.integers(1, 16),
    size=st.integers(1, 128),
    layers=st.integers(1, 48),
    bias=st.booleans(),
    dropout=st.floats(0, 0.99),
)
recipes = st.builds(
    Recipe,
    shape=shapes,
    global_batch_size=st.integers(64, 4096),
    learning_rate=st.floats(1e-8, 1.0),
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    data=st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"])),
    seed=st.integers(0, 2**63 - 1),
)
plans = st.builds(
    Plan,
    micro_batch_size=st.integers(1, 64),
    compile=st.sampled_from(["off", "full", "block"]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    loss=st.sampled_from(["full", "chunked"]),
)
candidates = st.builds(Candidate, recipe=recipes, plan=plans)
TEXT = format_candidate(CandidateFile(candidate=Candidate()))


@given(candidates, st.dictionaries(st.text("abc_", min_size=1), st.floats(0, 1e12) | st.integers(0, 2**60)))
def test_what_is_written_is_read(candidate: Candidate, measured: dict[str, float]) -> None:
    file = CandidateFile(candidate=candidate, measured=measured, environment={"device": "cpu"})
    back = parse_candidate(format_candidate(file), "best.toml")
    assert back == file
    assert back.candidate.id == candidate.id


def test_unknown_values_are_left_out() -> None:
    text = format_candidate(CandidateFile(candidate=Candidate(), measured={"mfu": None, "tokens_per_second": 1.5}))
    assert parse_candidate(text, "best.toml").measured == {"tokens_per_second": 1.5}


def test_assignments_override() -> None:
    sets = ("plan.loss=chunked", "plan.micro_batch_size = 3", 'plan.dtype="float32"', "training.learning_rate=1e-3")
    candidate = parse_candidate(TEXT, "best.toml", sets).candidate
    assert (candidate.plan.loss, candidate.plan.micro_batch_size, candidate.plan.dtype) == ("chunked", 3, "float32")
    assert candidate.recipe.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("text", "sets", "said"),
    [
        ("[model", (), "x.toml is not valid TOML"),
        ("[modle]\n", (), "x.toml: [modle] is not a known table; did you mean 'model'?"),
        ("model = 3\n", (), "[model]"),
        ("[model]\n", (), "x.toml has no table [plan]"),
        ("[plan]\n", (), "x.toml has no table [model]"),
        ("[model]\nn_layers = 3\n[plan]\n", (), "model.n_layers is not a known key; did you mean 'n_layer'?"),
        ("[model]\n[plan]\n[training]\nshape = 3\n", (), "write the shape's values in [model]"),
        ("[model]\n[plan]\nmicro_batch_size = 600\n", (), "plan.micro_batch_size = 600 is larger than"),
        (TEXT, ("plan.los=chunked",), "plan.los is not a known key; did you mean 'loss'?"),
        (TEXT, ("plan.loss",), "--set 'plan.loss' is not understood"),
        (TEXT, ("loss=chunked",), "--set 'loss=chunked' is not understood"),
        (TEXT, ("measured.mfu=1",), "--set 'measured.mfu=1' is not understood"),
        (TEXT, ("plan.micro_batch_size=many",), "plan.micro_batch_size = 'many' is of type str"),
        (TEXT, ("plan.micro_batch_size=",), "plan.micro_batch_size = '' is of type str"),
    ],
)
def test_mistakes_are_named(text: str, sets: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_candidate(text, "x.toml", sets)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_directory_stands_for_its_best(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the run has no feasible trial yet"):
        read_candidate(tmp_path)
    (tmp_path / "best.toml").write_text(TEXT)
    assert read_candidate(tmp_path) == read_candidate(tmp_path / "best.toml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; give a run directory or a TOML file"):
        read_candidate(tmp_path / "missing.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_candidate(tmp_path / "binary.toml")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "best.toml"
    write_atomically(path, "old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_a_windows_editor_is_read(tmp_path: Path) -> None:
    text = format_candidate(CandidateFile(candidate=Candidate()))
    (tmp_path / "best.toml").write_bytes(("\ufeff" + text).replace("\n", "\r\n").encode())
    assert read_candidate(tmp_path / "best.toml").candidate == Candidate()


OLD = {
    "global_batch_size": 4, "optimizer": "adamw_unfused", "eval_interval": 7, "always_save_checkpoint": False,
    "log_interval": 3, "wandb_log": True,
}  # fmt: skip
"""Keys of a training in earlier versions: all in the recipe."""
READ = Candidate(
    recipe=Recipe(global_batch_size=4),
    plan=Plan(micro_batch_size=4),
    evaluation=Evaluation(eval_interval=7),
    checkpointing=Checkpointing(always_save_checkpoint=False),
    tracking=Tracking(log_interval=3, wandb_log=True),
)


def test_files_of_earlier_versions_are_read() -> None:
    text = tomli_w.dumps({"model": {}, "training": OLD, "plan": {"micro_batch_size": 4}})
    assert parse_candidate(text, "best.toml").candidate == READ
    assert read_table(Candidate, {"recipe": OLD, "plan": {"micro_batch_size": 4}}, "candidate") == READ
    search = asdict(settings()) | {"recipe": OLD}
    for part in ("evaluation", "checkpointing", "tracking"):
        search.pop(part)
    assert read_table(SearchSettings, search, "search").completed(Candidate(recipe=READ.recipe, plan=READ.plan)) == READ


def test_a_key_of_any_part_of_a_training_is_suggested() -> None:
    with pytest.raises(ConfigError, match=r"training\.eval_intervall is not a known key; did you mean 'eval_interval'"):
        parse_candidate("[model]\n[plan]\n[training]\neval_intervall = 3\n", "x.toml")


def test_ids_stay() -> None:
    """Every trials.csv and study has them, so a step has the same id in all versions."""
    assert Candidate().id == "2f95b33fe6"
    shape = Shape(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=128, dropout=0.2, bias=True)
    plan = Plan(micro_batch_size=4, compile="off", dtype="float32")
    assert Candidate(recipe=Recipe(shape=shape, global_batch_size=4, learning_rate=0.5), plan=plan).id == "4bb7cb28d2"

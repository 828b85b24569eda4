"""A search over data of another vocabulary measures, and hands on, a model of that vocabulary."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from fake_machine import CUDA, Machine, settings

from autotune.config.toml import read_candidate
from autotune.search.loop import search


@pytest.mark.slow
@pytest.mark.parametrize("words", [{"model": "4x4x128x64"}, {"model": "", "objective": "loss", "train_time": "1h"}])
def test_every_trial_has_the_data_s_vocabulary(tmp_path: Path, words: dict[str, str]) -> None:
    data = tmp_path / "chars"
    data.mkdir()
    ids = (np.arange(700_000) % 65).astype("<u2")
    ids.tofile(data / "train.bin")
    ids[:4000].tofile(data / "val.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 65, "itos": {}, "stoi": {}}))
    machine = Machine()
    asked = settings(budget="60s", data=data, **words)
    search(asked, tmp_path / "run", CUDA, measure=machine.measure, clock=machine.clock)
    assert {request.candidate.shape.vocab_size for request in machine.requests} == {65}
    best = read_candidate(tmp_path / "run").candidate
    assert (best.shape.vocab_size, best.recipe.data) == (65, str(data))
    if words["model"]:
        assert {request.candidate.shape.parameters for request in machine.requests} == {804_096}

"""Checkpoints are written whole, verified, and restored exactly."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autotune.config.candidate import Candidate, Checkpointing, Evaluation, Plan, Recipe, Shape, Tracking
from autotune.errors import CheckpointError
from autotune.model.checkpoint import (
    TrainState,
    checkpoints,
    clean,
    latest_good,
    read_checkpoint,
    save_checkpoint,
    set_aside,
)
from autotune.model.step import TrainStep, build

SHAPE = Shape(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=128, dropout=0.2, bias=True)
RECIPE = Recipe(shape=SHAPE, global_batch_size=4, learning_rate=1e-2)
CANDIDATE = Candidate(recipe=RECIPE, plan=Plan(micro_batch_size=4, compile="off", dtype="float32"))


def state(iteration: int, **changes: object) -> TrainState:
    base = TrainState(iteration=iteration, tokens=iteration * 64, candidate=CANDIDATE, seconds=1.5)
    return replace(base, **changes)  # type: ignore[arg-type]


def stepped(steps: int, optimizer: str = "adamw") -> TrainStep:
    recipe = replace(RECIPE, optimizer=optimizer)  # type: ignore[arg-type]
    step = build(replace(CANDIDATE, recipe=recipe), torch.device("cpu"))
    for _ in range(steps):
        one_more(step)
    return step


def one_more(step: TrainStep) -> float:
    tokens = torch.randint(0, 128, (4, 16))  # the state of torch's generator decides, and dropout too
    return step.step([(tokens, tokens, 1.0)], 1e-2)[0].item()


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw_8bit"])
def test_what_comes_back_is_what_went_in(optimizer: str, tmp_path: Path) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")
    step = stepped(3, optimizer)
    path = save_checkpoint(tmp_path, step, state(3, best_validation_loss=0.1 + 0.2, data_fingerprint="abc"))
    expected = [one_more(step) for _ in range(3)]
    other = stepped(1, optimizer)
    found = read_checkpoint(path)
    found.restore(other)
    assert found.state == state(3, best_validation_loss=0.1 + 0.2, data_fingerprint="abc")
    assert [one_more(other) for _ in range(3)] == expected
    for ours, theirs in zip(other.model.parameters(), step.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        kept, held = step.optimizer.state[theirs], other.optimizer.state[ours]
        assert kept.keys() == held.keys() != set()
        for key, value in kept.items():
            assert type(held[key]) is type(value)
            assert torch.equal(torch.as_tensor(held[key]), torch.as_tensor(value))
            assert torch.as_tensor(held[key]).dtype == torch.as_tensor(value).dtype


def test_before_the_first_step(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, stepped(0), state(0))
    other = stepped(2)
    read_checkpoint(path).restore(other)
    assert one_more(other) == one_more(stepped(0))


def test_the_last_two_and_the_best_are_kept(tmp_path: Path) -> None:
    step = stepped(1)
    for iteration in (10, 20, 30, 40):
        save_checkpoint(tmp_path, step, state(iteration, best_iteration=20 if iteration >= 20 else 10))
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000020", "step_00000030", "step_00000040"]
    assert (tmp_path / "best").resolve().name == "step_00000020"
    assert read_checkpoint(tmp_path / "best").state.iteration == 20
    assert {path.name for path in (tmp_path / "step_00000040").iterdir()} == {
        "model.safetensors", "optimizer.safetensors", "state.json",
    }  # fmt: skip


def test_the_same_iteration_again_replaces(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, stepped(1), state(10))
    path = save_checkpoint(tmp_path, stepped(2), state(10, seconds=9.0))
    assert read_checkpoint(path).state.seconds == 9.0
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000010"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_damage_is_found_and_the_previous_checkpoint_is_used(name: str, damage: object, tmp_path: Path) -> None:
    step = stepped(1)
    save_checkpoint(tmp_path, step, state(10))
    newest = save_checkpoint(tmp_path, step, state(20, best_iteration=20))
    damage(newest / name)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(newest)
    found, notes = latest_good(tmp_path)
    assert found.state.iteration == 10
    assert len(notes) == 1
    assert str(newest) in notes[0]
    set_aside(tmp_path, found.state.iteration)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged_step_00000020", "step_00000010"]


def test_a_tampered_state_is_damage(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, stepped(1), state(10))
    content = json.loads((path / "state.json").read_text())
    content["body"]["train"]["iteration"] = 11
    (path / "state.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="does not match its sha256"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged: .*; start over with another --out"):
        latest_good(tmp_path)


def test_a_future_format_is_not_damage(tmp_path: Path) -> None:
    step = stepped(1)
    save_checkpoint(tmp_path, step, state(10))
    path = save_checkpoint(tmp_path, step, state(20)) / "state.json"
    path.write_text(json.dumps({"format": 3, "new": "things"}))
    with pytest.raises(CheckpointError, match="checkpoint format 3, this version reads up to 2"):
        latest_good(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; give a directory step_"):
        read_checkpoint(tmp_path / "step_00000010")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        latest_good(tmp_path / "nowhere")


def test_another_shape_does_not_fit(tmp_path: Path) -> None:
    found = read_checkpoint(save_checkpoint(tmp_path, stepped(1), state(10)))
    wider = replace(CANDIDATE, recipe=replace(RECIPE, shape=replace(SHAPE, block_size=8)))
    with pytest.raises(CheckpointError, match=r"another model: size mismatch for wpe\.weight"):
        found.restore(build(wider, torch.device("cpu")))


def test_a_failure_to_write_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = stepped(1)
    save_checkpoint(tmp_path, step, state(10))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("autotune.files.os.fsync", full)
    with pytest.raises(CheckpointError, match=r"step_00000020 cannot be written: No space left on device; earlier"):
        save_checkpoint(tmp_path, step, state(20))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000010"]
    assert latest_good(tmp_path)[0].state.iteration == 10


def test_what_a_killed_writer_left_is_cleaned(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, stepped(1), state(10))
    shutil.copytree(path, tmp_path / ".step_00000020.tmp")
    assert checkpoints(tmp_path) == [path]
    clean(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000010"]


def body_of(path: Path) -> dict[str, object]:
    return json.loads((path / "state.json").read_text())["body"]


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"5", b"null", b'"text"', b"{}", b"[" * 100_000, b"9" * 5000, b"\xff\x00", b'{"format": []}',
     b'{"format": true}', b'{"format": 1}', b'{"format": 1, "body": [], "sha256": {}}'],
)  # fmt: skip
def test_a_state_of_any_content_is_damage(content: bytes, tmp_path: Path) -> None:
    step = stepped(1)
    save_checkpoint(tmp_path, step, state(10))
    newest = save_checkpoint(tmp_path, step, state(20))
    (newest / "state.json").write_bytes(content)
    found, (note,) = latest_good(tmp_path)
    assert found.state.iteration == 10
    assert len(note) < 400


@pytest.mark.parametrize(
    "change",
    [{"train": 3}, {"files": []}, {"files": {"../x": "y"}}, {"random": {"cpu": 5}}, {"scaler": None}, {"more": 1},
     {"train": {"iteration": "x"}}],
)  # fmt: skip
def test_a_state_of_another_form_under_its_own_sha256_is_one_line(change: dict[str, object], tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, stepped(1), state(10))
    body = body_of(path) | change
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (path / "state.json").write_text(json.dumps({"format": 1, "sha256": digest, "body": body}))
    with pytest.raises(CheckpointError, match=r"state\.json") as caught:
        read_checkpoint(path)
    assert len(str(caught.value)) < 400


def test_invalid_random_states_are_refused(tmp_path: Path) -> None:
    step = stepped(1)
    path = save_checkpoint(tmp_path, step, state(10))
    for random in ({}, {"cpu": "AAAA"}, {"cpu": "no base64!"}):
        found = replace(read_checkpoint(path), random=random)
        with pytest.raises(CheckpointError, match="does not fit this training"):
            found.restore(step)


def test_a_file_with_a_checkpoints_name_is_no_checkpoint(tmp_path: Path) -> None:
    step = stepped(1)
    (tmp_path / "step_00000005").write_text("mine")
    (tmp_path / "step_00000030").write_text("mine")
    for iteration in (10, 20, 30, 40):
        save_checkpoint(tmp_path, step, state(iteration))
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000030", "step_00000040"]
    assert latest_good(tmp_path)[0].state.iteration == 40
    set_aside(tmp_path, 40)
    assert (tmp_path / "step_00000005").read_text() == "mine"


def test_a_checkpoint_of_format_1_is_read(tmp_path: Path) -> None:
    """Earlier versions had all settings of a training in the recipe, and an optimizer `adamw_unfused`."""
    path = save_checkpoint(tmp_path, stepped(1), state(10))
    body = body_of(path) | {"train": json.loads(Path(__file__).with_name("train_state_1.json").read_text())}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (path / "state.json").write_text(json.dumps({"format": 1, "sha256": digest, "body": body}))
    checkpoint = read_checkpoint(path)
    checkpoint.restore(stepped(0))
    assert checkpoint.state == state(
        10,
        seconds=0.0,
        best_validation_loss=2.5,
        best_iteration=10,
        data_fingerprint="abc",
        recent_losses=(3.0, 2.5),
        candidate=replace(
            CANDIDATE,
            evaluation=Evaluation(eval_interval=7),
            checkpointing=Checkpointing(always_save_checkpoint=False, init_from="gpt2"),
            tracking=Tracking(log_interval=3, wandb_log=True),
        ),
    )

"""Checkpoints: all that a training needs to continue exactly where it stopped.

    checkpoints/
      step_00000100/            written under another name and renamed, so that it is never there in part
        model.safetensors       weights by nanoGPT's names
        optimizer.safetensors   `<weight>.<state>`, such as AdamW's step, exp_avg and exp_avg_sq
        state.json              format, TrainState, random and scaler states, sha256 of the other files and of itself
      step_00000200/
      best -> step_00000100     lowest validation loss

The last two and the best are kept. Reading a checkpoint executes nothing in it.
"""

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from autotune.config.candidate import Candidate
from autotune.config.tables import read_json, read_table
from autotune.errors import CheckpointError, ConfigError, one_line, shown
from autotune.files import sha256, sync
from autotune.model.step import TrainStep

FORMAT = 2
_READABLE = (1, FORMAT)
"""Format 1 kept evaluation, checkpoint and tracker settings inside the recipe; `Candidate.upgrade` reads it."""
BEST = "best"
KEPT = 2
_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The progress of a training, apart from its tensors."""

    iteration: int
    """Optimizer steps done."""
    tokens: int
    candidate: Candidate
    seconds: float = 0.0
    """Wall clock spent so far, over all resumptions."""
    schedule: float = 0.0
    """Fraction of the schedule done, for a training of given time; else it follows from the iteration."""
    raced_iterations: int = 0
    """Optimizer steps that were done in the race from which the training continues."""
    best_validation_loss: float | None = None
    best_iteration: int | None = None
    data_fingerprint: str = ""
    skipped_batches: int = 0
    """Batches skipped by rollbacks so far: the next batch is number `iteration + skipped_batches`."""
    recent_losses: tuple[float, ...] = ()
    """Losses of the last steps, oldest first, for the detection of loss spikes."""


@dataclass(frozen=True, kw_only=True)
class _Body:
    """The content of state.json that its sha256 covers."""

    train: TrainState
    random: Mapping[str, str]
    scaler: Mapping[str, Any]
    files: Mapping[str, str]


class _DamagedError(CheckpointError):
    """A checkpoint with other content than was written. A newer format, for example, is not damage."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint with verified hashes; `read_checkpoint` makes it."""

    path: Path
    state: TrainState
    random: dict[str, str]
    """torch's generator states by device type, base64."""
    scaler: dict[str, Any]

    def load_weights(self, step: TrainStep) -> None:
        """Copy the weights into the model. Raises CheckpointError if their shapes differ or they are not finite."""
        weights = _load(self.path / _MODEL)
        check_finite(weights, self.path / _MODEL)
        try:
            step.load_weights(weights)
        except (RuntimeError, SafetensorError) as error:
            difference = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"{self.path / _MODEL} belongs to another model: {difference}") from None

    def restore(self, step: TrainStep) -> None:
        """Restore weights, optimizer, scaler and random states in `step`, bit for bit."""
        self.load_weights(step)
        try:
            step.load_moments(_by_weight(_load(self.path / _OPTIMIZER)))
            if step.scaler.is_enabled() and self.scaler:
                step.scaler.load_state_dict(self.scaler)
            torch.set_rng_state(_tensor(self.random["cpu"]))
            if step.device.type == "cuda" and "cuda" in self.random:
                torch.cuda.set_rng_state(_tensor(self.random["cuda"]), step.device)
        except (KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{self.path} does not fit this training: {one_line(str(error))}") from None


@dataclass(frozen=True, kw_only=True)
class Held:
    """Whole weights and optimizer state, in the main process; views of the training's own where it has them whole."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor | int]


def gather(step: TrainStep) -> Held:
    """What a checkpoint holds; all processes must call it."""
    return Held(weights=step.weights(), moments=step.moments())


def save_checkpoint(directory: Path, step: TrainStep, state: TrainState, held: Held | None = None) -> Path:
    """Write `directory/step_%08d`, point `best` at it if it is, and remove checkpoints older than the last two.
    `held`: what the processes have gathered; None: there is one process.

    Raises CheckpointError if it cannot be written (on a full disk, for example), with earlier checkpoints intact and
    no partial one left.
    """
    path = directory / f"step_{state.iteration:08d}"
    temporary = directory / f".{path.name}.tmp"
    try:
        temporary.mkdir(parents=True)
        _write(temporary, step, state, held or gather(step))
        if path.exists():  # a rename cannot replace a directory, so the old one is moved first
            path.rename(directory / f".{path.name}.old.tmp")
        temporary.rename(path)
        sync(directory)
        best = directory / BEST
        if state.best_iteration == state.iteration:
            link = directory / f".{BEST}.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            link.replace(best)
        for old in checkpoints(directory)[:-KEPT]:
            if old.resolve() != best.resolve() and not old.is_symlink():
                shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"checkpoint {path} cannot be written: {reason}; earlier ones are kept; free space, then use --resume"
        ) from error
    finally:
        clean(directory)
    return path


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises CheckpointError for one that is missing, damaged or newer."""
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give a directory step_… of a training")
    try:
        content = read_json(path / _STATE)
        written_as, body, digest = content.get("format"), content.get("body"), content.get("sha256")
    except ConfigError as error:
        raise _DamagedError(f"{path / _STATE} is damaged: {error}") from None
    if not isinstance(written_as, int) or isinstance(written_as, bool):
        raise _DamagedError(f"{path / _STATE} is damaged: format = {shown(written_as)} is not a number")
    if written_as not in _READABLE:
        raise CheckpointError(
            f"{path} has checkpoint format {shown(written_as)}, this version reads up to {FORMAT}; "
            "use the autotune that wrote it, or a newer one"
        )
    if digest != _digest(body):
        raise _DamagedError(f"{path / _STATE} is damaged: its content does not match its sha256")
    try:
        read = read_table(_Body, body, _STATE)
    except ConfigError as error:
        raise CheckpointError(f"{path / _STATE} cannot be read: {error}") from None
    for name in (_MODEL, _OPTIMIZER):
        if not (path / name).is_file() or sha256(path / name) != read.files.get(name):
            raise _DamagedError(f"{path / name} is damaged or missing: its sha256 is not the one in {_STATE}")
    return Checkpoint(path=path, state=read.train, random=dict(read.random), scaler=dict(read.scaler))


def latest_good(directory: Path) -> tuple[Checkpoint, tuple[str, ...]]:
    """The newest undamaged checkpoint of `directory`, and a note for each newer, damaged one.

    Raises CheckpointError if there is none.
    """
    notes: list[str] = []
    for path in reversed(checkpoints(directory)):
        try:
            return read_checkpoint(path), tuple(notes)
        except _DamagedError as error:
            notes.append(str(error))
    if notes:
        raise CheckpointError(
            f"all checkpoints in {directory} are damaged: {notes[-1]}; start over with another --out"
        )
    raise CheckpointError(f"{directory} holds no checkpoint; give the directory of a training")


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a directory, damaged or not, oldest first; empty if it does not exist."""
    named = [path for path in directory.glob("step_*") if re.fullmatch(r"step_[0-9]+", path.name)]
    return sorted((path for path in named if path.is_dir()), key=_iteration)


def _iteration(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def set_aside(directory: Path, iteration: int) -> None:
    """Rename checkpoints newer than `iteration`, which are damaged, to `damaged_*`; remove `best` if it was one."""
    for path in checkpoints(directory):
        if _iteration(path) > iteration:
            aside = directory / f"damaged_{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    best = directory / BEST
    if best.is_symlink() and not best.exists():
        best.unlink()


def clean(directory: Path) -> None:
    """Remove partial checkpoints of a process that was killed while writing."""
    for path in directory.glob(".step_*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _write(directory: Path, step: TrainStep, state: TrainState, held: Held) -> None:
    save_tensors(held.weights, directory / _MODEL)
    save_tensors({name: _storable(name, value) for name, value in held.moments.items()}, directory / _OPTIMIZER)
    random = {"cpu": _text(torch.get_rng_state())}
    if step.device.type == "cuda":
        random["cuda"] = _text(torch.cuda.get_rng_state(step.device))
    body = {
        "train": asdict(state),
        "random": random,
        "scaler": step.scaler.state_dict(),
        "files": {name: sha256(directory / name) for name in (_MODEL, _OPTIMIZER)},
    }
    content = {"format": FORMAT, "sha256": _digest(body), "body": body}
    (directory / _STATE).write_text(json.dumps(content, indent=1, allow_nan=False))
    for name in (_MODEL, _OPTIMIZER, _STATE, "."):
        sync(directory / name)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the default mode of new files; `save_file` alone makes it private."""
    path.touch()
    mode = path.stat().st_mode & 0o666
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def check_finite(weights: Mapping[str, Tensor], where: Path) -> None:
    """Raise CheckpointError, naming the tensor, for weights with NaN or infinity."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{where}: {name} holds NaN or infinity ({bad:,} of {tensor.numel():,} values); use earlier weights"
            )


def _storable(name: str, value: Tensor | int) -> Tensor:
    """An optimizer state as safetensors accepts it: bitsandbytes has int steps, and one map shared by all weights."""
    if isinstance(value, int):
        return torch.tensor(value)
    return value.clone() if name.rpartition(".")[2].startswith("qmap") else value


def _by_weight(moments: dict[str, Tensor]) -> dict[str, dict[str, Tensor | int]]:
    held: dict[str, dict[str, Tensor | int]] = {}
    for key, value in moments.items():
        name, _, part = key.rpartition(".")
        # `step` is a float tensor in torch's optimizers, an int in bitsandbytes
        held.setdefault(name, {})[part] = int(value) if value.dtype == torch.int64 else value
    return held


def _load(path: Path) -> dict[str, Tensor]:
    # Clones, as safetensors returns views of the mapped file, which may be unaligned or change later.
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _digest(body: object) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

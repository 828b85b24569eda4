"""The settings of one search, as in search.toml."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w

from autotune.config.candidate import (
    Candidate,
    Checkpointing,
    Evaluation,
    Plan,
    Recipe,
    Tracking,
    between,
    one_of,
    plain_texts,
    split_training,
)  # fmt: skip
from autotune.config.storage import without_password
from autotune.config.tables import parse_toml, read_table
from autotune.config.toml import without_none
from autotune.errors import ConfigError, shown
from autotune.files import read_text, write_atomically
from autotune.kernels.registry import device_kind
from autotune.terminal import visible

Objective = Literal["throughput", "loss"]
Race = Literal["off", "on"]
Target = Literal["autotune", "nanogpt"]

SAMPLERS = ("additive", "tpe", "gp", "random")
"""Ours, and three of Optuna's."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The settings of a search, with every default resolved."""

    name: str
    """Name of the run, and of its directory under results/."""
    device: str
    """`cpu` or `cuda:0`."""
    budget_seconds: float
    """Hard limit of the wall clock, everything included."""
    objective: Objective
    memory_limit_bytes: int
    """Device memory that a training process may use."""
    train_seconds: float | None = None
    """Length of the training that `loss` predicts for, in time..."""
    train_tokens: int | None = None
    """...or in tokens. `loss` needs one of the two."""
    recipe: Recipe
    """The recipe; if shapes are searched, its shape is only the first."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpointing: Checkpointing = field(default_factory=Checkpointing)
    tracking: Tracking = field(default_factory=Tracking)
    """How the final training is evaluated, saved and tracked."""
    search_shape: bool
    """Shapes are searched too."""
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The only values to try, by dimension of the space; other dimensions are searched in full."""
    baseline: Plan
    """Plan of trial 0."""
    baseline_source: str = "plain nanoGPT"
    """Origin of trial 0: `plain nanoGPT`, or the file given with --from."""
    dataset: str = ""
    """nanoGPT's key `dataset` in the file given with --from; written into best_nanogpt.py."""
    out_dir: str = ""
    """nanoGPT's key `out_dir` in that file."""
    notes: tuple[str, ...] = ()
    """Notes on that file, such as keys that were skipped."""
    keep_schedule: bool = False
    """Keep the recipe's iterations and learning rate; otherwise they are derived from model size and tokens."""
    own_rate: bool = False
    """The recipe's learning rate is the user's, which takes part in a race beside the rule's."""
    law: str = "lingle"
    """The scaling law of `loss`: a row of `autotune.runs.law.LAWS`."""
    race: Race = "off"
    """`loss`: the most plausible candidates are trained on the data and compete by their validation loss."""
    race_share: float = 0.4
    """Fraction of the budget for the race."""
    target: Target = "autotune"
    """Who trains the winner; `nanogpt` leaves out of the race what its train.py cannot run."""
    workers: int = 1
    """Trials at the same time."""
    devices: tuple[str, ...] = ()
    """All cards, where there are several; `device` is the first."""
    joined: bool = False
    """Another process began the study: a race is left to it."""
    storage: str = ""
    """An Optuna storage URL, kept without its password; empty: study.db in the run directory."""
    seed: int = 0
    sampler: str = "additive"
    """One of SAMPLERS, or `package.module:Class`."""
    command: str = ""
    """Command that began the search, without passwords; empty if it was none."""

    @property
    def device_kind(self) -> str:
        """`cpu` or `cuda`."""
        return device_kind(self.device)

    def __post_init__(self) -> None:
        one_of("--objective", self.objective, get_args(Objective))
        one_of("--race", self.race, get_args(Race))
        one_of("--for", self.target, get_args(Target))
        plain_texts("--", {"name": self.name})
        plain_texts("search.", {key: value for key, value in vars(self).items() if key != "storage"})
        if visible(self.storage) != self.storage:  # not shown, as it may contain a password
            raise ConfigError("--storage holds a control character; leave it out")
        if not _is_plain(self.name):
            raise ConfigError(
                f"--name {shown(self.name)} is not the plain name of a directory; give for example my-run, "
                f"up to {_LONGEST_NAME} bytes long"
            )
        object.__setattr__(self, "storage", without_password(self.storage))
        if ":" not in self.sampler:
            one_of("--sampler", self.sampler, (*SAMPLERS, "package.module:Class"))
        between("--workers", self.workers, 1, 10**6)
        between("--seed", self.seed, 0, 2**32 - 1)
        if self.budget_seconds <= 0:
            raise ConfigError(f"--budget {self.budget_seconds:g} leaves no time; give for example 15m or 1h")
        if self.memory_limit_bytes <= 0:
            raise ConfigError(f"--memory-limit {self.memory_limit_bytes} leaves no memory; give for example 24GiB")
        if self.train_seconds is not None and self.train_tokens is not None:
            raise ConfigError("--train-time and --train-tokens exclude each other; give one")
        if self.objective == "loss" and self.train_seconds is None and self.train_tokens is None:
            raise ConfigError("--objective loss needs the length of the training; give --train-time or --train-tokens")

        if not 0.0 < self.race_share < 1.0:
            raise ConfigError(f"search.race_share = {self.race_share} must lie between 0 and 1")

    @staticmethod
    def upgrade(table: Mapping[str, Any]) -> Mapping[str, Any]:
        """A table in today's form: earlier versions could shift the law by pilots."""
        kept = {key: value for key, value in table.items() if key not in ("law_offset", "law_band")}
        return split_training(kept)

    def completed(self, candidate: Candidate) -> Candidate:
        """The candidate with the evaluation, checkpoints and trackers of its training."""
        return replace(candidate, evaluation=self.evaluation, checkpointing=self.checkpointing, tracking=self.tracking)


_LONGEST_NAME = 200
"""Bytes of a name. File systems allow 255, and names of temporary files are longer."""


def _is_plain(name: str) -> bool:
    """Whether the name suits a directory, and is neither hidden nor taken for a command-line option."""
    forbidden = name.startswith((".", "-")) or name != name.strip() or set(name) & {"/", "\\"}
    return 0 < len(name.encode()) <= _LONGEST_NAME and not forbidden


_OWN = {
    "device", "devices", "workers", "budget_seconds", "storage", "notes", "baseline_source", "out_dir", "joined",
}  # fmt: skip
"""Settings in which the processes of one study may differ."""


def refuse_other_search(there: SearchSettings, here: SearchSettings, name: str) -> None:
    """Raise ConfigError, naming the differences, unless both settings are of one search."""
    ours, theirs = _told(here), _told(there)
    if changes := [f"{key} {shown(theirs.get(key))} there, {shown(value)} here" for key, value in ours.items()
                   if theirs.get(key) != value]:  # fmt: skip
        raise ConfigError(
            f"{name} is another search ({', '.join(changes[:4])}); give the same options to join it, or another --name"
        )


def _told(settings: SearchSettings) -> dict[str, object]:
    """What processes of one study have in common, by dotted names."""
    flat: dict[str, object] = {}

    def add(prefix: str, table: Mapping[str, Any]) -> None:
        for key, value in table.items():
            if isinstance(value, Mapping):
                add(f"{prefix}{key}.", value)
            else:
                flat[prefix + key] = list(value) if isinstance(value, tuple | list) else value

    add("", {key: value for key, value in asdict(settings).items() if key not in _OWN})
    del flat["recipe.data"]  # its content is compared
    return flat


def write_settings(path: Path, settings: SearchSettings) -> None:
    """Replace search.toml atomically."""
    write_atomically(path, tomli_w.dumps(without_none(asdict(settings))))


def read_settings(path: Path) -> SearchSettings:
    """Read search.toml. Raises ConfigError."""
    return read_table(SearchSettings, parse_toml(read_text(path, "give the directory of a run"), str(path)), "search")

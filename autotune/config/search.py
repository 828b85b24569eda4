"""The settings of one search, as `search.toml` keeps them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

import tomli_w

from autotune.config.candidate import Plan, Recipe, between, one_of, plain_texts
from autotune.config.storage import without_password
from autotune.config.tables import parse_toml, read_table
from autotune.config.toml import without_none
from autotune.errors import ConfigError, shown
from autotune.files import read_text, write_atomically
from autotune.terminal import visible

Objective = Literal["throughput", "loss"]


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What a search was asked to do, with every default resolved."""

    name: str
    """Of the run, and of its directory under results/."""
    device: str
    """`cpu` or `cuda:0`."""
    budget_seconds: float
    """Hard wall clock, everything included."""
    objective: Objective
    memory_limit_bytes: int
    """What the process may take of the device."""
    train_seconds: float | None = None
    """The training that `loss` predicts for lasts this long..."""
    train_tokens: int | None = None
    """...or sees this many tokens. One of the two for `loss`."""
    recipe: Recipe
    """What is learned. For `loss`, its shape is only the first of those tried."""
    search_shape: bool
    """Shapes are searched too."""
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Dimensions of the space, by name, of which only these values are tried; all of what is not named."""
    baseline: Plan
    """How trial 0 runs the recipe."""
    baseline_source: str = "plain nanoGPT"
    """Where trial 0 comes from: `plain nanoGPT`, or the file given with --from."""
    dataset: str = ""
    """nanoGPT's name of the data, from the file given with --from; written into best_nanogpt.py."""
    out_dir: str = ""
    """Where nanoGPT's own training goes, from that file too."""
    notes: tuple[str, ...] = ()
    """What was found, or passed over, in that file."""
    keep_schedule: bool = False
    """The recipe's iterations and learning rate are the user's own; otherwise they follow from size and tokens."""
    law: str = "lingle"
    """The scaling law of `loss`: a row of `autotune.runs.objective.LAWS`."""
    law_offset: float = 0.0
    """Nats to add to the law's constant term, from --calibrate-loss."""
    law_band: float | None = None
    """Of the law when it is moved so; None: its own."""
    workers: int = 1
    storage: str = ""
    """An Optuna storage URL, of which no password is kept; empty: study.db in the run directory."""
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("--objective", self.objective, get_args(Objective))
        plain_texts("--", {"name": self.name})
        plain_texts("search.", {key: value for key, value in vars(self).items() if key != "storage"})
        if visible(self.storage) != self.storage:  # not shown: it may hold a password
            raise ConfigError("--storage holds a control character; leave it out")
        if not _is_plain(self.name):
            raise ConfigError(
                f"--name {shown(self.name)} is not the plain name of a directory; give for example my-run, "
                f"up to {_LONGEST_NAME} bytes long"
            )
        object.__setattr__(self, "storage", without_password(self.storage))
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


_LONGEST_NAME = 200
"""In bytes. File systems allow 255, and names of temporary files are longer."""


def _is_plain(name: str) -> bool:
    """Whether a directory can be called so, and a command be given it without quotes around its first letter."""
    forbidden = name.startswith((".", "-")) or name != name.strip() or set(name) & {"/", "\\"}
    return 0 < len(name.encode()) <= _LONGEST_NAME and not forbidden


def write_settings(path: Path, settings: SearchSettings) -> None:
    """Replace search.toml as a whole."""
    write_atomically(path, tomli_w.dumps(without_none(asdict(settings))))


def read_settings(path: Path) -> SearchSettings:
    """Read search.toml. Raises ConfigError."""
    return read_table(SearchSettings, parse_toml(read_text(path, "give the directory of a run"), str(path)), "search")

"""verdict.json: what a search concludes from its trials, and where its time went."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist

from autotune.config.tables import read_json, read_table
from autotune.files import write_atomically
from autotune.runs.records import TrialRecord

Z95 = NormalDist().inv_cdf(0.975)

STEPPING = ("compile", "warmup", "measure")
"""What a budget is for; the rest is overhead."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens/s of one candidate, from all its measurements."""

    tokens_per_second: float
    ci95: float
    """Half width of the 95 % interval of `tokens_per_second`, in tokens/s."""
    process_sd: float
    """Standard deviation between processes as a fraction: a training is one more process."""
    measurements: int

    @property
    def relative_ci95(self) -> float:
        return self.ci95 / self.tokens_per_second

    @property
    def next_process_ci95(self) -> float:
        """Half width of the interval in which one more process lies, in tokens/s."""
        return math.hypot(self.ci95, Z95 * self.process_sd * self.tokens_per_second)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of a search; the state so far while it runs."""

    winner: TrialRecord
    """The measurement that counts: the last confirmation where there is one, else the search trial."""
    speed: Speed
    """What the winner is expected to reach now, from all its measurements."""
    baseline: Speed | None
    """The same for the baseline; None where it did not run to its end."""
    confirmed: bool
    """The winner was run again in a fresh process, evaluation and checkpoint included."""
    unsettled: str = ""
    """Why the winner's figure is not settled although it was confirmed; empty where it is."""
    tied_with: tuple[int, ...] = ()
    """Trials that cannot be told from the winner; the winner needs the least memory of them."""
    fell_through: tuple[int, ...] = ()
    """Better trials that did not survive their confirmation."""
    drift: float | None = None
    """Speed of the machine at the end over that at the start, by the baseline's confirmation and its trial; None where
    that was not measured twice, or the two agree within their intervals."""
    notes: tuple[str, ...] = ()
    """What could not be done, and which measurements contradict each other; one line each."""

    @property
    def status(self) -> str:
        """As best.toml and the study have it."""
        return "not confirmed" if not self.confirmed else "not settled" if self.unsettled else "confirmed"


@dataclass(frozen=True, kw_only=True)
class Step:
    """A measured candidate that differs from the winner in one choice."""

    knob: str
    value: str
    """The winner has another one."""
    winner: str
    trial: int
    objective: float
    """Relative to the winner's for `throughput`, where less is worse; nats above it for `loss`."""
    peak: float | None
    """Peak memory over the winner's."""


@dataclass(frozen=True, kw_only=True)
class Review:
    """The search as a whole."""

    confirmed: bool = False
    unsettled: str = ""
    """Why the winner's figure is not settled although it was confirmed; empty where it is."""
    speed: Speed | None = None
    """The winner's, from all its measurements; None where nothing is feasible."""
    baseline: Speed | None = None
    """The baseline's; None where it did not run to its end."""
    tied_with: tuple[int, ...] = ()
    fell_through: tuple[int, ...] = ()
    drift: float | None = None
    """As in the verdict."""
    at_first_speed: Mapping[str, float] = field(default_factory=dict)
    """Objective by trial, with the machine's drift taken out; empty unless it is more than 5 %."""
    law: str = ""
    """By which losses are predicted, with its band and source; empty for `throughput`."""
    notes: tuple[str, ...] = ()
    """What could not be done."""
    budget_wanted: str = ""
    """Where nothing is feasible and more time would help: the --budget to go on with."""
    remedy: str = ""
    """Where nothing is feasible and more time would not help: what else to do."""
    spent_seconds: float = 0.0
    """Wall clock of the search, all its parts."""
    trials: int = 0
    """That ran in a process."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Of `spent_seconds`, by phase of the trials; `idle`: between them."""
    steps: tuple[Step, ...] = ()
    """What one step from the winner costs, as far as it was measured."""
    importance: Mapping[str, float] = field(default_factory=dict)
    """Share of each choice in being among the best trials (PED-ANOVA, Watanabe et al. 2023, arXiv:2304.10255);
    empty where too few ran to say so."""

    @property
    def overhead(self) -> float | None:
        """Part of the time that was spent neither compiling nor stepping."""
        if not self.spent_seconds:
            return None
        return 1.0 - sum(self.seconds.get(phase, 0.0) for phase in STEPPING) / self.spent_seconds

    @property
    def trials_per_hour(self) -> float | None:
        return 3600.0 * self.trials / self.spent_seconds if self.spent_seconds else None


def write_review(path: Path, review: Review) -> None:
    """Replace verdict.json as a whole."""
    write_atomically(path, json.dumps(asdict(review), indent=2, allow_nan=False) + "\n")


def read_review(path: Path) -> Review:
    """Read verdict.json. Raises ConfigError."""
    return read_table(Review, read_json(path), "verdict")

"""verdict.json: what a search has concluded from its trials. It is replaced after every trial and only rendered."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from autotune.config.tables import read_json, read_table
from autotune.files import write_atomically
from autotune.measure.types import Z95
from autotune.runs.races import RaceVerdict
from autotune.runs.records import TrialRecord

RACING = "race"
"""Key of the time of a race's steps, beside the phases of trials."""
STEPPING = ("compile", "warmup", "measure", RACING)
"""Phases that a budget is for; all others are overhead."""
IDLE = "idle"
"""Key of the time between trials, beside the phases of trials."""

VerdictStatus = Literal["nothing feasible", "not confirmed", "not settled", "confirmed", "stand-in"]
"""`stand-in`: the device computes nothing, so only peak memory was measured."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens/s of one candidate, estimated from all its measurements."""

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
        """Half width of the 95 % prediction interval for one more process, in tokens/s."""
        return math.hypot(self.ci95, Z95 * self.process_sd * self.tokens_per_second)


@dataclass(frozen=True, kw_only=True)
class Gain:
    """The winner relative to the baseline. None: unknown."""

    speed: float
    """Ratio of tokens/s."""
    speed_ci95: float
    """Half width of the 95 % interval of `speed`, from both intervals."""
    memory: float | None
    """Ratio of peak memory, both in the widest view known for both."""
    loss: float | None
    """Difference of predicted loss, in nats; None too where a race measured losses."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Trials that failed with one status and one message, numbers in the message aside."""

    status: str
    reason: str
    """Message of the first of them."""
    trials: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A measured candidate that differs from the winner in one choice."""

    knob: str
    value: str
    winner: str
    """The winner's value."""
    trial: int
    objective: float
    """`throughput`: relative difference from the winner (negative is slower). `loss`: nats above the winner."""
    peak: float | None
    """Ratio of peak memory to the winner's."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Outcome of a search, or its state so far while it runs."""

    status: VerdictStatus = "nothing feasible"
    ended: bool = False
    """The search came to its end; False while it runs and after it was killed."""
    winner: TrialRecord | None = None
    """Measurement of the best candidate: its last confirmation if there is one, else its search trial. None: nothing
    is feasible."""
    speed: Speed | None = None
    """Estimate for the winner, at the machine's speed at the end of the search."""
    baseline: TrialRecord | None = None
    """Measurement of the baseline, chosen like the winner's; the failed trial if it never succeeded."""
    baseline_speed: Speed | None = None
    gain: Gain | None = None
    unsettled: str = ""
    """Reason of the status `not settled`."""
    tied_with: tuple[int, ...] = ()
    """Trials that cannot be distinguished from the winner; the winner needs the least memory of them."""
    fell_through: tuple[int, ...] = ()
    """Better trials whose confirmation failed."""
    drift: float | None = None
    """Speed of the machine at the end relative to the start: the baseline's confirmation over its trial. None: not
    measured twice, or no difference beyond the two intervals."""
    drift_corrected: Mapping[str, float] = field(default_factory=dict)
    """Objective by trial number without the machine's drift; empty unless the drift is large enough to matter."""
    ranking: tuple[int, ...] = ()
    """Feasible trials: the winner, then by (drift-corrected) objective, best first."""
    trade_offs: tuple[int, ...] = ()
    """Pareto front of the objective against peak memory, least memory first; one trial per candidate."""
    failures: tuple[Failure, ...] = ()
    """Most frequent first."""
    neighbours: tuple[Neighbour, ...] = ()
    importance: Mapping[str, float] = field(default_factory=dict)
    """Share of each choice in being among the best trials (PED-ANOVA, Watanabe et al. 2023, arXiv:2304.10255); empty
    with too few trials, and before the end."""
    race: RaceVerdict | None = None
    """The race, which elects the winner if any rival came to its end; None: there was none."""
    law: str = ""
    """Scaling law of the predicted losses, with band and source; empty for `throughput`."""
    trials: int = 0
    """Trials that ran in a process."""
    spent_seconds: float = 0.0
    """Wall clock of the search, including earlier parts of a resumed one."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """`spent_seconds` by phase of the trials, and IDLE; of several devices, the mean."""
    notes: tuple[str, ...] = ()
    """Work that could not be done, and measurements that contradict each other; one line each."""
    budget_wanted: str = ""
    """Nothing is feasible and more time would help: the --budget to resume with."""
    remedy: str = ""
    """Nothing is feasible and more time would not help: the command or change that would."""

    @property
    def confirmed(self) -> bool:
        """The winner was measured again in a fresh process, evaluation and checkpoint included."""
        return self.status in ("confirmed", "not settled")

    @property
    def raced(self) -> bool:
        """A race elected the winner; False where all its rivals failed."""
        return self.race is not None and bool(self.race.order)

    @property
    def overhead(self) -> float | None:
        """Fraction of the time spent neither compiling nor stepping."""
        if not self.spent_seconds:
            return None
        return 1.0 - sum(self.seconds.get(phase, 0.0) for phase in STEPPING) / self.spent_seconds

    @property
    def trials_per_hour(self) -> float | None:
        return 3600.0 * self.trials / self.spent_seconds if self.spent_seconds else None


def write_verdict(path: Path, verdict: Verdict) -> None:
    """Replace verdict.json atomically."""
    write_atomically(path, json.dumps(asdict(verdict), indent=1, allow_nan=False) + "\n", durable=False)


def read_verdict(path: Path) -> Verdict:
    """Read verdict.json. Raises ConfigError."""
    return read_table(Verdict, read_json(path), "verdict")

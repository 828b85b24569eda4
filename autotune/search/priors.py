"""What the speed model expects of a candidate before anything is measured: `priors.json`, with its provenance."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from autotune.config.candidate import Candidate, Plan
from autotune.config.tables import read_json, read_table
from autotune.errors import ConfigError, shown, suggest


@dataclass(frozen=True, kw_only=True)
class Effect:
    """Differences that a value of the plan makes."""

    log_speed: float
    """Logarithm of tokens/s."""
    log_seconds: float
    """Logarithm of the trial's seconds."""


@dataclass(frozen=True, kw_only=True)
class Priors:
    """Prior means of the speed model."""

    effects: Mapping[str, Effect]
    """Effects by `name=value` of a plan."""
    half_speed_tokens: Mapping[str, float]
    """Tokens of the micro batch that reaches half the speed of a large one, by device kind."""
    provenance: str

    def expected(self, candidate: Candidate, kind: str) -> tuple[float, float]:
        """Log speed and log seconds of the trial on a device of that kind (`cpu` or `cuda`), up to a constant each."""
        tokens = candidate.plan.micro_batch_size * candidate.shape.block_size
        busy = math.log(tokens / (tokens + self.half_speed_tokens.get(kind, 0.0)))
        effects = [self.effects.get(f"{name}={value}") for name, value in vars(candidate.plan).items()]
        known = [effect for effect in effects if effect is not None]
        speed = busy - math.log(candidate.shape.flops_per_token) + sum(effect.log_speed for effect in known)
        return speed, sum(effect.log_seconds for effect in known)


def read(path: Path) -> Priors:
    """Raises ConfigError for a file that is missing or damaged, and for an unknown or missing key."""
    priors = read_table(Priors, read_json(path), path.name)
    names = [field.name for field in fields(Plan)]
    for key in priors.effects:
        name, _, value = key.partition("=")
        if name not in names:
            raise ConfigError(
                f"{path.name}.effects has {shown(key)}, but a plan has no {name!r}; {suggest(name, names)}"
            )
        read_table(Plan, {name: value}, f"{path.name}.effects")  # raises ConfigError for a value that it cannot have
    for kind in ("cpu", "cuda"):
        if not priors.half_speed_tokens.get(kind, 0.0) > 0:
            raise ConfigError(
                f"{path.name}.half_speed_tokens.{kind} is missing or not above 0; give a number of tokens"
            )
    if unknown := priors.half_speed_tokens.keys() - {"cpu", "cuda"}:
        raise ConfigError(f"{path.name}.half_speed_tokens has {shown(min(unknown))}; allowed: cpu, cuda")
    return priors


@functools.cache
def default() -> Priors:
    """The priors that the package brings."""
    return read(Path(__file__).with_name("priors.json"))


def expected(candidate: Candidate, kind: str) -> tuple[float, float]:
    """What the package's priors expect: see `Priors.expected`."""
    return default().expected(candidate, kind)

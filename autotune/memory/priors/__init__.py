"""Memory coefficients before any trial: `cpu.json` and `cuda.json`, written by `scripts/fit_priors`."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from autotune.config.candidate import one_of
from autotune.config.tables import read_json, read_table
from autotune.errors import ConfigError, shown, suggest
from autotune.memory.regression import Normal
from autotune.memory.structure import Array, keys


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where the numbers of a file come from."""

    records: str
    """Files of the repository, and how many rows they have."""
    machine: str
    torch: str
    command: str
    """What writes the file again from the records."""

    def __str__(self) -> str:
        return f"{self.records}; {self.machine}; torch {self.torch}; written by {self.command}"


@dataclass(frozen=True, kw_only=True)
class Coefficient:
    """A normal prior."""

    mean: float
    """Bytes per element, or a ratio."""
    sd: float
    """Standard deviation on another machine or version of torch; wide where `trials` is 0."""
    trials: int
    """Records with the coefficient at a peak; 0: the mean is that of related coefficients."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Standard deviations around the structure's sums."""

    peak: float
    """Noise of the allocated peak, as a fraction of it."""
    unsettled: float
    """The same for plans that the structure does not describe well (`structure.settled`)."""
    overhead_bytes: float
    """Noise of the device memory beyond the allocated bytes."""
    overhead_share: float
    """Additional part: of the allocated bytes on the CPU, of the logits on CUDA."""


@dataclass(frozen=True, kw_only=True)
class Priors:
    """One file."""

    device: str
    provenance: Provenance
    noise: Noise
    coefficients: Mapping[str, Coefficient]
    """By `str(key)`, in the order of `keys`."""
    correlations: tuple[tuple[float, ...], ...]
    """Correlations of each coefficient with those before it: a peak tells a sum, not its parts."""


def read(path: Path) -> Priors:
    """Raises ConfigError for a file that is missing or damaged, and for an unknown or missing key."""
    advice = "write it again with scripts/fit_priors"
    priors = read_table(Priors, read_json(path, advice), path.name)
    one_of(f"{path.name}.device", priors.device, ("cpu", "cuda"))
    names, found = [str(key) for key in keys(priors.device)], priors.coefficients
    check_names(f"{path.name}.coefficients", found, names)
    if missing := [name for name in names if name not in found]:
        raise ConfigError(f"{path.name}.coefficients lacks {shown(missing[0])} ({len(missing)} in all); {advice}")
    for name, coefficient in found.items():
        if not coefficient.sd > 0:
            raise ConfigError(f"{path.name}.coefficients.{name}.sd = {coefficient.sd} must be above 0; {advice}")
    if [len(row) for row in priors.correlations] != list(range(len(names))):
        raise ConfigError(f"{path.name}.correlations needs {len(names)} rows of 0, 1, 2, ... numbers; {advice}")
    priors = replace(priors, coefficients={name: found[name] for name in names})
    if np.linalg.eigvalsh(_correlation(priors))[0] <= 0:
        raise ConfigError(f"{path.name}.correlations is not positive definite; {advice}")
    return priors


def _correlation(known: Priors) -> Array:
    """(k, k)."""
    lower = np.eye(len(known.correlations))
    for i, row in enumerate(known.correlations):
        lower[i, :i] = row
    return np.tril(lower) + np.tril(lower, -1).T


def check_names(where: str, found: Iterable[str], known: Sequence[str]) -> None:
    """Raise ConfigError for a name that is not known."""
    for name in found:
        if name not in known:
            raise ConfigError(f"{where} has {shown(name)}, which is not a known coefficient; {suggest(name, known)}")


@functools.cache
def of(device: str) -> Priors:
    """The priors that the package brings for `cpu` or `cuda`."""
    return read(Path(__file__).with_name(f"{device}.json"))


@functools.cache
def normal(device: str) -> Normal:
    """The coefficients of those priors, in the order of `keys`."""
    known = of(device)
    means, sds = np.array([(c.mean, c.sd) for c in known.coefficients.values()]).T
    return Normal(means=means, covariance=_correlation(known) * np.outer(sds, sds))

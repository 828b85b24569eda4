"""The candidates to choose from: those whose answer does not follow from the trials so far.

The whole space where it is small; of a large one random candidates, and all that differ from the best few in one value.
"""

import functools
import random
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from autotune.config.candidate import Candidate
from autotune.config.search_settings import SearchSettings
from autotune.memory.model import MemoryModel, predictions
from autotune.runs.objective import best_first, maximised, score
from autotune.runs.records import TrialRecord
from autotune.search import acquisition
from autotune.search.acquisition import Choices, Fitted, Observed, Pending
from autotune.search.features import Features, categorical, encode
from autotune.search.gp import Array
from autotune.search.space import Space, candidate_at, every_candidate, parameters_of, values_of

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

WHOLE = 4096
"""Largest number of combinations for which the whole space is listed."""
_DRAWN, _BATCHES, _LEADERS = 32, 12, 4
"""Random candidates that join the pool before each trial, for how many trials they stay, and the best whose
neighbours are in it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """n different candidates."""

    candidates: Sequence[Candidate]
    features: Features
    kernels: Sequence[tuple[object, ...]]
    """By candidate: what must be equal for memory to be comparable."""
    amounts: NDArray[np.int64]
    """(n, amounts): a candidate that exceeds another in none of these needs no more memory."""

    def rows(self, kept: NDArray[np.intp]) -> "Pool":
        """The candidates at these indices."""
        return Pool(
            candidates=[self.candidates[i] for i in kept],
            features=Features(parameters=self.features.parameters[kept], prior=self.features.prior[kept]),
            kernels=[self.kernels[i] for i in kept],
            amounts=self.amounts[kept],
        )


def pool(space: Space, known: Mapping[str, TrialRecord], settings: SearchSettings) -> Pool:
    """All candidates to choose from, known ones included."""
    kind = settings.device_kind
    if space.size <= WHOLE:
        return _whole(space, kind)
    parts = [_drawn(space, kind, f"{settings.seed} {len(known) + batch}") for batch in range(_BATCHES)]
    for record in best_first(list(known.values()), maximised(settings))[:_LEADERS]:
        parts.append(_neighbours(space, kind, record.candidate))
    candidates = [candidate for part in parts for candidate in part.candidates]
    once = {candidate.id: i for i, candidate in enumerate(candidates)}
    joined = Pool(
        candidates=candidates,
        features=Features(
            parameters=np.concatenate([part.features.parameters for part in parts]),
            prior=np.concatenate([part.features.prior for part in parts]),
        ),
        kernels=[key for part in parts for key in part.kernels],
        amounts=np.concatenate([part.amounts for part in parts]),
    )
    return joined.rows(np.array(list(once.values()), dtype=np.intp))


def _pool_of(candidates: Sequence[Candidate], space: Space, device_kind: str) -> Pool:
    return Pool(
        candidates=candidates,
        features=encode(candidates, tuple(space.choices), device_kind),
        kernels=[_kernels(candidate) for candidate in candidates],
        amounts=np.array([_amounts(candidate) for candidate in candidates], dtype=np.int64),
    )


@functools.lru_cache(maxsize=1)
def _whole(space: Space, device_kind: str) -> Pool:
    return _pool_of(list(every_candidate(space).values()), space, device_kind)


@functools.lru_cache(maxsize=2 * _BATCHES)
def _drawn(space: Space, device_kind: str, seed: str) -> Pool:
    rng = random.Random(seed)
    values = [{name: rng.choice(choices) for name, choices in space.choices.items()} for _ in range(_DRAWN)]
    return _pool_of([candidate_at(space, v) for v in values], space, device_kind)


@functools.lru_cache(maxsize=2 * _LEADERS)
def _neighbours(space: Space, device_kind: str, candidate: Candidate) -> Pool:
    """The candidate itself, and what differs from it in one value."""
    here = values_of(space, candidate)
    changed = [{**here, name: choice} for name, choices in space.choices.items() for choice in choices]
    return _pool_of([candidate_at(space, values) for values in changed], space, device_kind)


def by_candidate(records: Iterable[TrialRecord]) -> dict[str, TrialRecord]:
    """Searched candidates by id. Interrupted trials have no answer yet; confirmations are always run again, and a race
    changes the recipe."""
    searched = (record for record in records if record.role not in ("race", "final"))
    return {record.candidate.id: record for record in searched if record.result.status != "interrupted"}


def unanswered(everything: Pool, known: Mapping[str, TrialRecord], pending: Container[str] = ()) -> Pool:
    """The candidates whose answer does not follow from the known ones, without those that are `pending`, by id."""
    answered = np.array([c.id in known or c.id in pending for c in everything.candidates], dtype=bool)
    rows = defaultdict[tuple[object, ...], list[int]](list)
    for row, kernels in enumerate(everything.kernels):
        rows[kernels].append(row)
    for kernels, records in _out_of_memory(known.values()).items():
        if same := rows.get(kernels):
            full = np.array([_amounts(record.candidate) for record in records])
            answered[same] |= np.any(np.all(everything.amounts[same][:, None] >= full, axis=2), axis=1)
    return everything.rows(np.flatnonzero(~answered)) if answered.any() else everything


def dominated_by_oom(candidate: Candidate, known: Mapping[str, TrialRecord]) -> TrialRecord | None:
    """The record of a trial that ran out of memory although it needs no more of it in any respect."""
    full = _out_of_memory(known.values()).get(_kernels(candidate), ())
    amounts = _amounts(candidate)
    return next((r for r in full if all(a <= b for a, b in zip(_amounts(r.candidate), amounts, strict=True))), None)


def _out_of_memory(records: Iterable[TrialRecord]) -> Mapping[tuple[object, ...], list[TrialRecord]]:
    """Trials that ran out of memory, by the kernels of the candidates that they answer for: their own, and for one
    that recomputes whole blocks also those that keep all activations."""
    found: dict[tuple[object, ...], list[TrialRecord]] = defaultdict(list)
    for record in records:
        if record.result.status in ("oom", "over_limit"):
            kernels = _kernels(record.candidate)
            found[kernels].append(record)
            if record.candidate.plan.recomputed_every is not None:
                found[(*kernels[:-1], "none")].append(record)
    return found


def _kernels(candidate: Candidate) -> tuple[object, ...]:
    """Choices of the plan that have no order in memory, recomputation last."""
    plan = vars(candidate.plan)
    amounts = ("micro_batch_size", "loss_chunk_tokens", "activation_checkpointing")
    return (*(value for name, value in plan.items() if name not in amounts), plan["activation_checkpointing"])


def _amounts(candidate: Candidate) -> tuple[int, ...]:
    shape, plan = candidate.shape, candidate.plan
    return (
        plan.micro_batch_size * shape.block_size, plan.loss_chunk_tokens, shape.n_layer, shape.n_head, shape.n_embd,
        shape.block_size, shape.vocab_size,
    )  # fmt: skip


class CandidateProblem:
    """What a proposal is computed from, in a search over candidates: see `autotune.search.sampler.Problem`."""

    def __init__(
        self, space: Space, settings: SearchSettings, distributions: "Mapping[str, BaseDistribution]",
        *, priors: bool = True,
    ) -> None:  # fmt: skip
        self.space, self.settings, self.distributions = space, settings, distributions
        self._priors = priors
        self.known: dict[str, TrialRecord] = {}
        self._everything = pool(space, self.known, settings)
        self._fitted: Fitted | None = None
        self.update([], None)

    def update(
        self, records: Iterable[TrialRecord], model: MemoryModel | None, pending: Sequence[Candidate] = ()
    ) -> None:
        """The trials so far, the memory model that they calibrate (None: memory is not considered), and candidates that
        are being measured."""
        before, self.known, self._model = self.known, by_candidate(records), model
        if [*map(id, before.values())] != [*map(id, self.known.values())]:  # often slots wait for proposals together
            self._everything, self._fitted = pool(self.space, self.known, self.settings), None
        self._pending = {c.id: c for c in pending if c.id not in self.known}
        self.left = unanswered(self._everything, self.known, self._pending)

    def fitted(self) -> Fitted:
        if self._fitted is None:
            words = categorical(self.space.choices, self._everything.candidates[0])
            self._fitted = acquisition.fit(self._observed(), words)
        return self._fitted

    def pending(self) -> Pending | None:
        candidates = list(self._pending.values())
        if not candidates:
            return None
        objective = functools.partial(self._objective, candidates)
        choices = self._as_choices(self._features(candidates))
        return Pending(choices=choices, fits=self._p_fits(candidates), objective=objective)

    def _observed(self) -> Observed:
        records = list(self.known.values())
        place = {id(record): i for i, record in enumerate(records)}
        ranked = [place[id(record)] for record in best_first(records, maximised(self.settings))]
        rows = [records[i] for i in acquisition.subset(ranked, len(records))]
        features = self._features([record.candidate for record in rows])
        results = [record.result for record in rows]
        return Observed(
            parameters=features.parameters,
            answers=np.log([result.tokens_per_second or np.nan for result in results]),
            log_seconds=np.log([result.trial_seconds or np.nan for result in results]),
            failed=np.array([record.objective is None for record in rows], dtype=bool),
            prior=features.prior * self._priors,
        )

    def _features(self, candidates: Sequence[Candidate]) -> Features:
        return encode(candidates, tuple(self.space.choices), self.settings.device_kind)

    def choices(self) -> Choices:
        return self._as_choices(self.left.features)

    def _as_choices(self, features: Features) -> Choices:
        return Choices(parameters=features.parameters, prior=features.prior * self._priors)

    def objective(self, answers: Array) -> Array:
        """The objective at log speeds (n,), larger is better."""
        return self._objective(self.left.candidates, answers)

    def _objective(self, candidates: Sequence[Candidate], answers: Array) -> Array:
        if maximised(self.settings):
            return np.exp(answers)
        speeds = zip(candidates, np.exp(answers).tolist(), strict=True)
        return np.array([-score(self.settings, candidate, speed) for candidate, speed in speeds])

    def best(self) -> float | None:
        sign = 1.0 if maximised(self.settings) else -1.0
        return max((sign * r.objective for r in self.known.values() if r.objective is not None), default=None)

    def p_fits(self, rows: list[int]) -> Array:
        return self._p_fits([self.left.candidates[i] for i in rows])

    def _p_fits(self, candidates: Sequence[Candidate]) -> Array:
        if self._model is None or not candidates:
            return np.ones(len(candidates))
        found = predictions(self._model, candidates)
        return np.array([prediction.p_within(self.settings.memory_limit_bytes) for prediction in found])

    def parameters(self, row: int) -> dict[str, Any]:
        return parameters_of(self.space, self.left.candidates[row], self.distributions)

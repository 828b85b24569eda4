"""Which candidate to measure next: a Gaussian process over what was measured, numpy only.

Trials are dear and few, knobs many: `autotune.search.gp` adds up what single knobs and pairs of them do. It is fitted
to three answers: how fast, how long the trial took, and whether it worked at all; how much memory a candidate needs is
the memory model's matter. Next is the candidate with the largest expected improvement a second (Snoek, Larochelle and
Adams, Practical Bayesian Optimization of Machine Learning Algorithms, NeurIPS 2012), times its chance to work and to
fit. Before anything is measured, the expectation is that of somebody who knows nanoGPT: `autotune.search.priors`.

The same records give the same candidate. A proposal takes about as long after a thousand trials as after a hundred:
the process is fitted to `FITTED` of them, whatever their number.
"""

import functools
import math
import random
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.config.candidate import Candidate, Plan
from autotune.config.search_settings import SearchSettings
from autotune.measure.types import Z95
from autotune.memory.model import MemoryModel, calibrate, predictions
from autotune.runs.objective import best_first, maximised, score
from autotune.runs.records import TrialRecord
from autotune.search import gp
from autotune.search.priors import expected
from autotune.search.space import Space, candidate_at, every_candidate, reads_chunks, values_of

Array = NDArray[np.floating[Any]]

_KNOBS = (*(field.name for field in fields(Plan)), "n_layer", "n_embd", "head_size", "block_size")
"""All that a search can vary."""

FITTED = 96
"""Trials that the process is fitted to; the time that it takes grows with the cube of this."""

_DOUBT = 0.01
"""Improvement, in standard deviations, that is expected of every candidate: where the model sees none, what surely
fails must not look better than what surely works."""

_POOL = 4096
"""Spaces up to this size are looked through whole; of larger ones..."""
_DRAWN, _LEADERS = 256, 4
"""...so many candidates by chance, and all neighbours of the best few."""

_BLOCK = 64
"""Candidates whose memory is predicted at once."""

_SURPRISE = 2.0
"""A trial so many standard deviations slower than all others say may have been disturbed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Encoded:
    """Candidates as the process sees them."""

    knobs: Array
    """(n, knobs): octaves, or a word's code."""
    expected: Array
    """(n, 2): log speed and log seconds before anything is measured."""


def propose(
    space: Space, known: Mapping[str, TrialRecord], settings: SearchSettings, model: MemoryModel | None = None
) -> Candidate | None:
    """The candidate to measure next: of those whose answer does not follow from the `known` ones (by candidate id);
    None when none is left. `model`: the memory model, calibrated by the known records; None: it is made here."""
    kind, records = settings.device_kind, list(known.values())
    everything, encoded = _pool(space, known, settings, kind)
    left = _unanswered(everything, known)
    if not left.size:
        return None
    pool: list[Candidate] = [everything[i] for i in left]
    knobs, expected = encoded.knobs[left], encoded.expected[left]
    words = _words(space.choices, pool[0])
    at, told = gp.pool(knobs), [records[i] for i in _telling(records, settings)]
    measured = _encode([record.candidate for record in told], tuple(space.choices), kind)
    speed = _answers(measured, 0, [r.result.tokens_per_second for r in told], words, at, expected)
    seconds, _ = _answers(measured, 1, [r.result.trial_seconds for r in told], words, at, expected)
    value = _improvement(pool, *speed, records, settings) * _works(measured.knobs, told, words, at) / np.exp(seconds)
    model = model or calibrate(kind, [(record.candidate, record.result) for record in records])
    return pool[_most_valuable(value, pool, model, settings.memory_limit_bytes)]


def _most_valuable(value: Array, pool: Sequence[Candidate], model: MemoryModel, limit_bytes: int) -> int:
    """The place of the largest value (n,) times the chance to stay within the limit, by the memory model."""
    best, chosen = -1.0, 0
    order = np.argsort(-value, kind="stable")
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        if value[block[0]] <= best:  # nothing further down can be better, however little memory it takes
            break
        found = predictions(model, [pool[i] for i in block])
        peaks = np.array([f.peak_device_bytes for f in found], dtype=float)
        sd = np.array([f.high_device_bytes - f.low_device_bytes for f in found]) / (2 * Z95)
        worth = value[block] * gp.normal((limit_bytes - peaks) / sd)
        if worth.max() > best:
            best, chosen = float(worth.max()), int(block[worth.argmax()])
    return chosen


def _telling(records: Sequence[TrialRecord], settings: SearchSettings) -> list[int]:
    """Where at most FITTED of the records stand: half of them the best ones, a quarter the latest of the others, which
    lie where the search looks now, and a quarter from all the time before, whose failures warn."""
    if len(records) <= FITTED:
        return list(range(len(records)))
    place = {id(record): i for i, record in enumerate(records)}
    best = [place[id(record)] for record in best_first(records, maximised(settings))[: FITTED // 2]]
    others = sorted(set(range(len(records))) - set(best))
    before, latest = others[: -FITTED // 4], others[-FITTED // 4 :]
    wanted = min(len(before), FITTED - len(best) - len(latest))
    return sorted([*best, *latest, *(before[i * len(before) // wanted] for i in range(wanted))])


def unknown(space: Space, known: Mapping[str, TrialRecord], settings: SearchSettings) -> list[Candidate]:
    """Candidates whose answer is not known: all in a small space; in a large one some by chance, and what differs
    from the best in one knob."""
    everything, _ = _pool(space, known, settings, settings.device_kind)
    return [everything[i] for i in _unanswered(everything, known)]


def _pool(
    space: Space, known: Mapping[str, TrialRecord], settings: SearchSettings, kind: str
) -> tuple[Sequence[Candidate], _Encoded]:
    """What to choose from, known or not."""
    if space.size <= _POOL:
        return _whole(space, kind)
    rng = random.Random(settings.seed + len(known))
    drawn = [{name: rng.choice(choices) for name, choices in space.choices.items()} for _ in range(_DRAWN)]
    pool = [candidate_at(space, values) for values in drawn]
    for record in best_first(list(known.values()), maximised(settings))[:_LEADERS]:
        pool += _neighbours(space, record.candidate)
    found = list({candidate.id: candidate for candidate in pool}.values())
    return found, _encode(found, tuple(space.choices), kind)


@functools.lru_cache(maxsize=2 * _LEADERS)
def _neighbours(space: Space, candidate: Candidate) -> list[Candidate]:
    """What differs from it in one knob, and itself."""
    here = values_of(space, candidate)
    return [candidate_at(space, {**here, name: c}) for name, choices in space.choices.items() for c in choices]


@functools.lru_cache(maxsize=1)
def _whole(space: Space, kind: str) -> tuple[Sequence[Candidate], _Encoded]:
    """All of a small space."""
    found = list(every_candidate(space).values())
    return found, _encode(found, tuple(space.choices), kind)


def _unanswered(pool: Sequence[Candidate], known: Mapping[str, TrialRecord]) -> NDArray[np.intp]:
    """Where in the pool the candidates stand whose answer does not follow from the known ones."""
    full = _out_of_memory(known.values())
    tables = {kernels: np.array([_amounts(record.candidate) for record in own]) for kernels, own in full.items()}

    def answered(candidate: Candidate) -> bool:
        if not tables or candidate.id in known:
            return candidate.id in known
        table = tables.get(_kernels(candidate))
        return table is not None and bool((table <= _amounts(candidate)).all(1).any())

    return np.array([i for i, candidate in enumerate(pool) if not answered(candidate)], dtype=np.intp)


def implied(candidate: Candidate, known: Mapping[str, TrialRecord]) -> TrialRecord | None:
    """The record that answers for `candidate`: its own, or that of one which ran out of memory although it
    needs no more of it in any respect."""
    if candidate.id in known:
        return known[candidate.id]
    full = _out_of_memory(known.values()).get(_kernels(candidate), ())
    wanted = _amounts(candidate)
    return next((r for r in full if all(a <= b for a, b in zip(_amounts(r.candidate), wanted, strict=True))), None)


def _out_of_memory(records: Iterable[TrialRecord]) -> Mapping[tuple[str, ...], list[TrialRecord]]:
    """Those that did, by the kernels of the candidates that they can answer for: their own, and for one that computes
    whole blocks again also that which keeps all."""
    found: dict[tuple[str, ...], list[TrialRecord]] = defaultdict(list)
    for record in records:
        if record.result.status in ("oom", "over_limit"):
            own = _kernels(record.candidate)
            found[own].append(record)
            if record.candidate.plan.recomputed_every is not None:
                found[(*own[:-1], "none")].append(record)
    return found


@functools.lru_cache(maxsize=2 * _POOL)
def _kernels(candidate: Candidate) -> tuple[str, ...]:
    """What must be the same for two candidates' memory to be compared: only what is certain counts."""
    plan = candidate.plan
    return plan.attention, plan.loss, plan.compile, plan.dtype, plan.allocator, plan.activation_checkpointing


@functools.lru_cache(maxsize=2 * _POOL)
def _amounts(candidate: Candidate) -> tuple[int, ...]:
    """Of which more surely needs no less memory."""
    shape, plan = candidate.shape, candidate.plan
    return (
        plan.micro_batch_size * shape.block_size, plan.loss_chunk_tokens, shape.n_layer, shape.n_head, shape.n_embd,
        shape.block_size, shape.vocab_size,
    )  # fmt: skip


def doubted(names: Iterable[str], known: Sequence[TrialRecord], settings: SearchSettings) -> list[TrialRecord]:
    """Trials that would be the best of all had they been as fast as all others say, the likeliest first. Another
    program that takes the device for as long as a trial is timed leaves no other trace."""
    timed = [record for record in known if record.objective is not None and record.result.tokens_per_second]
    if not timed:
        return []
    sign = 1.0 if maximised(settings) else -1.0
    others, sd = _left_out(tuple(names), timed, settings)
    answers = _log_speeds(timed)
    above = answers - others
    at_best = np.exp(answers - above + sd).tolist()
    best = max(sign * (record.objective or 0.0) for record in timed)
    slow = np.flatnonzero(above < -_SURPRISE * sd)
    worth = {i: sign * score(settings, timed[i].candidate, at_best[i]) for i in slow}
    return [timed[i] for i in sorted(worth, key=lambda i: -worth[i]) if worth[i] > best]


def expected_speeds(records: Sequence[TrialRecord], settings: SearchSettings) -> list[tuple[float, float]]:
    """What all other records make the model expect of each one's log speed: mean and standard deviation. Where nothing
    differs between them there is nothing to learn from: the speed itself, with an infinite deviation."""
    candidates = [record.candidate for record in records]
    names = tuple(name for name in _KNOBS if len({_knob(candidate, name) for candidate in candidates}) > 1)
    if len(records) < 3 or not names:
        return [(value, math.inf) for value in _log_speeds(records).tolist()]
    mean, sd = _left_out(names, records, settings)
    return list(zip(mean.tolist(), sd.tolist(), strict=True))


def _left_out(names: tuple[str, ...], timed: Sequence[TrialRecord], settings: SearchSettings) -> tuple[Array, Array]:
    """Mean (n,) and standard deviation (n,) of each log speed given all others. Trials that are fitted are left out in
    turn (Rasmussen and Williams, Gaussian Processes for Machine Learning, 5.4.2); the others are predicted."""
    encoded = _encode([record.candidate for record in timed], names, settings.device_kind)
    words, answers = _words(names, timed[0].candidate), _log_speeds(timed)
    fitted = np.zeros(len(timed), dtype=bool)
    fitted[_telling(timed, settings)] = True
    rest = answers - encoded.expected[:, 0]
    rest -= np.median(rest[fitted])
    process = gp.fit(encoded.knobs[fitted], words, rest[fitted])
    above, sd = np.empty(len(timed)), np.empty(len(timed))
    precision = (process.whitened**2).sum(0)
    above[fitted] = process.whitened.T @ process.half / precision
    sd[fitted] = np.sqrt(process.scale / precision)
    if not fitted.all():
        mean, deviation = gp.predict(process, words, gp.pool(encoded.knobs[~fitted]))
        noise = process.kernel.noise / gp.PRIOR_SCALE * math.sqrt(process.scale)
        above[~fitted], sd[~fitted] = rest[~fitted] - mean, np.hypot(deviation, noise)
    return answers - above, sd


def _log_speeds(records: Sequence[TrialRecord]) -> Array:
    return np.log([record.result.tokens_per_second or 1.0 for record in records])


def _words(names: Iterable[str], candidate: Candidate) -> NDArray[np.bool_]:
    """(knobs,): which of them are words."""
    return np.array([isinstance(_knob(candidate, name), str) for name in names])


def _encode(candidates: Sequence[Candidate], names: tuple[str, ...], kind: str) -> _Encoded:
    rows = [_features(candidate, names, kind) for candidate in candidates]
    table = np.array(rows).reshape(len(rows), len(names) + 2)
    return _Encoded(knobs=table[:, :-2], expected=table[:, -2:])


@functools.lru_cache(maxsize=2 * _POOL)
def _features(candidate: Candidate, names: tuple[str, ...], kind: str) -> tuple[float, ...]:
    """The knobs, a word as a number that no other word has, and what is expected."""
    knobs = (_knob(candidate, name) for name in names)
    coded = (zlib.crc32(value.encode()) if isinstance(value, str) else value for value in knobs)
    return (*coded, *expected(candidate, kind))


def _knob(candidate: Candidate, name: str) -> float | str:
    """Numbers count by their octaves. The micro batch and the loss's chunk are measured in the tokens that a
    kernel sees: a loss without chunks is one whose chunk is the whole micro batch."""
    shape, plan = candidate.shape, candidate.plan
    tokens = plan.micro_batch_size * shape.block_size
    value: int | str = getattr(plan if hasattr(plan, name) else shape, name)
    if name == "micro_batch_size":
        value = tokens
    elif name == "loss_chunk_tokens":
        value = min(plan.loss_chunk_tokens, tokens) if reads_chunks(plan) else tokens
    return value if isinstance(value, str) else math.log2(value)


def _answers(
    measured: _Encoded,
    which: int,
    values: Sequence[float | None],
    words: NDArray[np.bool_],
    at: gp.Pool,
    expected: Array,
) -> tuple[Array, Array]:
    """Mean and standard deviation of the pool's answers, (n,) each, given the measured `values`, of which some are
    unknown. `which` is their column in what is expected; a constant on top of that is the answers' own."""
    rows = [i for i, value in enumerate(values) if value]
    if not rows:
        return expected[:, which], np.full(len(expected), gp.PRIOR_SCALE)
    rest = np.log([value for value in values if value]) - measured.expected[rows, which]
    constant = float(np.median(rest))
    mean, sd = gp.predict(gp.fit(measured.knobs[rows], words, rest - constant), words, at)
    return expected[:, which] + constant + mean, sd


def _improvement(
    pool: Sequence[Candidate], speed: Array, sd: Array, known: Sequence[TrialRecord], settings: SearchSettings
) -> Array:
    """Expected improvement over the best so far; over the worst of the pool while nothing is feasible. `speed` and
    `sd`: logarithms."""
    sign = 1.0 if maximised(settings) else -1.0

    def objective(log_speeds: Array) -> Array:
        speeds = zip(pool, np.exp(log_speeds).tolist(), strict=True)
        return sign * np.array([score(settings, candidate, speed) for candidate, speed in speeds])

    mean = objective(speed)
    sd = np.maximum((objective(speed + sd) - objective(speed - sd)) / 2, 1e-12)
    feasible = [sign * record.objective for record in known if record.objective is not None]
    z = (mean - max(feasible, default=float(mean.min()))) / sd
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return np.asarray(sd * (z * gp.normal(z) + density + _DOUBT))


def _works(measured: Array, told: Sequence[TrialRecord], words: NDArray[np.bool_], at: gp.Pool) -> Array:
    """The chance that a candidate is feasible, by those that were and were not, for whatever reason."""
    failed = np.array([0.0 if record.objective is not None else 1.0 for record in told])
    if not failed.any():
        return np.ones(at.has.shape[1])
    mean, sd = gp.predict(gp.fit(measured, words, failed), words, at)
    return gp.normal((0.5 - mean) / np.hypot(sd, 0.1))

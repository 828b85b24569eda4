"""`autotune race`: candidates of the user, each trained for equal time or equal tokens, over several seeds.

Each is trained with its own recipe, whose schedule is scaled to end with the race. race.json holds everything, the
other files follow from it, and the same command continues from it.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from autotune import files
from autotune.config.candidate import Candidate
from autotune.config.nanogpt import dataset_dir, read_nanogpt
from autotune.config.tables import read_json, read_table
from autotune.config.toml import BEST_TOML, read_candidate
from autotune.data.batches import open_batches
from autotune.data.sources import how_to_prepare
from autotune.data.vocabulary import check_ids
from autotune.environment import Environment
from autotune.errors import ConfigError, DataError, InterruptedByUser
from autotune.measure.runner import Measure, TrainRung, until_ended
from autotune.measure.types import TrialRequest, TrialResult
from autotune.runs.directory import LOGS, RACES_CSV
from autotune.runs.races import Lineup, Reading, Rival, write_races
from autotune.search.halving import Step
from autotune.search.race import make_lineup, overhead, patience, reading_of, rung_request
from autotune.units import format_duration

RACE_JSON = "race.json"
EVALUATIONS = 8
"""Points of each curve."""
_TRIAL_SECONDS = 600.0
_CLOSING_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class RaceSettings:
    """What is raced, and for how long."""

    candidates: Mapping[str, Candidate]
    """By name; all with the same data."""
    device: str
    seconds: float | None = None
    """Seconds of steps that each training lasts..."""
    tokens: int | None = None
    """...or its tokens."""

    def __post_init__(self) -> None:
        if not (self.seconds or self.tokens):
            raise ConfigError("--time and --tokens of 0 leave nothing to train; give for example --time 3m")


@dataclass(frozen=True, kw_only=True)
class UserRace:
    """A race so far: the content of race.json."""

    settings: RaceSettings
    trials: Mapping[str, TrialResult] = field(default_factory=dict)
    """Speed and memory of each candidate, by name."""
    readings: tuple[Reading, ...] = ()
    seeds: int = 1
    chunk_tokens: int = 1
    chunks: int = 1
    notes: tuple[str, ...] = ()

    @property
    def told(self) -> tuple[str, ...]:
        """Candidates that could not be measured, and what the budget left out; one line each."""
        failed = {name: r for name, r in self.trials.items() if not r.tokens_per_second}
        return (*(f"{name} was not raced: {r.status} ({r.message})" for name, r in failed.items()), *self.notes)

    @property
    def rivals(self) -> tuple[Rival, ...]:
        """One for each seed of each candidate whose speed is known; all candidates of a seed before the next seed."""
        names = list(self.settings.candidates)
        return tuple(
            _rival(seed * len(names) + place, name, seed, self)
            for seed in range(self.seeds)
            for place, name in enumerate(names)
            if self.trials.get(name) is not None and self.trials[name].tokens_per_second
        )


def _rival(number: int, name: str, seed: int, race: UserRace) -> Rival:
    candidate, speed = race.settings.candidates[name], race.trials[name].tokens_per_second or 1.0
    tokens = race.settings.tokens or (race.settings.seconds or 0.0) * speed
    recipe = candidate.recipe
    steps = max(1, round(tokens / recipe.tokens_per_step))
    recipe = replace(recipe, seed=recipe.seed + seed, max_iters=steps, lr_decay_iters=steps)
    return Rival(rival=number, name=name, candidate=replace(candidate, recipe=recipe), seconds=tokens / speed)


def read_candidates(paths: Sequence[Path], data: Path | None, environment: Environment) -> dict[str, Candidate]:
    """Candidates by name, from run directories, TOML files and nanoGPT's config files, all with the same data.
    Raises ConfigError or DataError for what cannot be raced."""
    found: dict[str, Candidate] = {}
    for path in paths:
        if path.suffix == ".py":
            read = read_nanogpt(path, environment.device, environment.capability)
            candidate, own = read.candidate, dataset_dir(read.dataset, path)
        else:
            candidate = read_candidate(path).candidate
            own = Path(candidate.recipe.data) if candidate.recipe.data else None
        run = path.resolve() if path.is_dir() else path.resolve().parent
        name = run.name if path.is_dir() or path.name == BEST_TOML else path.stem
        if name in found:
            raise ConfigError(f"two candidates are called {name}; give each file another name")
        place = data or own
        if place is None:
            raise ConfigError(f"{path} names no data, and a race trains on text; give --data DIR")
        if not place.is_dir():
            raise ConfigError(f"{place} is not a directory of tokens; {how_to_prepare(place)}")
        found[name] = replace(candidate, recipe=replace(candidate.recipe, data=str(place.resolve())))
    places = {candidate.recipe.data for candidate in found.values()}
    if len(places) > 1:
        raise ConfigError(f"the candidates have different data ({', '.join(sorted(places))}); give one with --data")
    for name, candidate in found.items():
        recipe = candidate.recipe
        check_ids(Path(recipe.data), recipe.shape.vocab_size)
        try:
            open_batches(
                Path(recipe.data), seed=recipe.seed, global_batch_size=recipe.global_batch_size,
                block_size=recipe.shape.block_size, vocab_size=recipe.shape.vocab_size,
            )  # fmt: skip
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
    return found


def run_race(
    settings: RaceSettings,
    out: Path,
    *,
    seeds: int,
    budget_seconds: float | None,
    memory_limit_bytes: int,
    measure: Measure,
    train_rung: TrainRung,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    started: float | None = None,
) -> UserRace:
    """Race, or continue the race in `out`. Raises ConfigError if that is another one, InterruptedByUser after Ctrl-C,
    with everything so far kept."""
    begun = clock() if started is None else started
    ends = math.inf if budget_seconds is None else begun + budget_seconds - _CLOSING_SECONDS
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made: {error.strerror}; give another directory") from None
    with files.locked(out / ".lock", ConfigError(f"another race runs in {out}; wait for it, or give another --out")):
        race = replace(_so_far(settings, out), seeds=seeds, notes=())
        try:
            race = _trials(race, out, memory_limit_bytes, measure, say, clock, ends)
            race = _rungs(race, out, memory_limit_bytes, train_rung, say, clock, ends)
        except KeyboardInterrupt:
            kept = len(_so_far(settings, out).readings)
            message = f"interrupted; {kept} trainings are kept in {out}, the same command goes on"
            raise InterruptedByUser(message) from None
    return race


def _so_far(settings: RaceSettings, out: Path) -> UserRace:
    file = out / RACE_JSON
    if not file.exists():
        return UserRace(settings=settings)
    race = read_table(UserRace, read_json(file, "delete it to start again"), RACE_JSON)
    if race.settings != settings:
        raise ConfigError(f"{out} holds another race; give another --out, or the same candidates and length")
    return race


def _keep(race: UserRace, out: Path) -> UserRace:
    files.write_atomically(out / RACE_JSON, json.dumps(asdict(race), allow_nan=False) + "\n")
    write_races(out / RACES_CSV, race.rivals, race.readings)
    return race


def _trials(
    race: UserRace, out: Path, limit: int, measure: Measure, say: Callable[[str], None], clock: Callable[[], float],
    ends: float,
) -> UserRace:  # fmt: skip
    """Speed and memory of the candidates that have none yet: equal time needs them, and so does the memory limit."""
    for name, candidate in race.settings.candidates.items():
        known = race.trials.get(name)
        if known is not None and known.status not in ("interrupted", "timeout"):
            continue
        left = min(_TRIAL_SECONDS, ends - clock())
        if left <= 0:
            return _out_of_time(race, out, f"{name} was not measured")
        request = TrialRequest(
            candidate=candidate, device=race.settings.device, result_path="", memory_limit_bytes=limit,
            timeout_seconds=left,
        )  # fmt: skip
        result = until_ended(measure(request, out / LOGS / f"trial-{name}.log"))
        race = _keep(replace(race, trials={**race.trials, name: result}), out)
        speed = result.tokens_per_second
        say(f"{name}: " + (f"{speed:,.0f} tokens/s" if speed else f"{result.status} ({result.message})"))
    if race.readings or not race.rivals:
        return race
    speed = max(race.trials[rival.name].tokens_per_second or 0.0 for rival in race.rivals)
    data = Path(race.rivals[0].candidate.recipe.data)
    lineup = make_lineup(race.rivals, data, speed, overhead_seconds=min(rival.seconds for rival in race.rivals))
    return _keep(replace(race, chunk_tokens=lineup.chunk_tokens, chunks=lineup.chunks), out)


def _rungs(
    race: UserRace, out: Path, limit: int, train_rung: TrainRung, say: Callable[[str], None],
    clock: Callable[[], float], ends: float,
) -> UserRace:  # fmt: skip
    """Train the rivals that have no reading yet."""
    lineup = Lineup(rivals=race.rivals, chunk_tokens=race.chunk_tokens, chunks=race.chunks)
    for rival in lineup.rivals:
        if any(reading.rival == rival.rival and reading.status != "interrupted" for reading in race.readings):
            continue
        expected = rival.seconds + overhead(lineup.rivals, race.readings, race.trials[rival.name].trial_seconds or 0.0)
        left, number = ends - clock(), len(race.readings)
        if left < expected:
            missing = len(lineup.rivals) - len({reading.rival for reading in race.readings})
            return _out_of_time(race, out, f"{missing} trainings of about {format_duration(expected)} are missing")
        step = Step(rival=rival.rival, fraction=1.0)
        request = rung_request(
            rival, step, lineup, device=race.settings.device, memory_limit_bytes=limit, checkpoints=None,
            result_path=out / LOGS / f"rung-{number:04d}.json", timeout_seconds=min(left, patience(expected)),
            train_seconds=None, evaluations=EVALUATIONS,
        )  # fmt: skip
        result = until_ended(train_rung(request, Path(request.result_path).with_suffix(".log")))
        if result.status == "timeout" and clock() >= ends:
            result = replace(result, status="interrupted", message="the budget ended during this training")
        reading = reading_of(number, step, result, rival)
        race = _keep(replace(race, readings=(*race.readings, reading)), out)
        seed = rival.candidate.recipe.seed
        outcome = f"loss {reading.loss:.4f}" if reading.loss is not None else f"{reading.status} ({reading.message})"
        say(f"{rival.name}, seed {seed}: {outcome}")
    return race


def _out_of_time(race: UserRace, out: Path, what: str) -> UserRace:
    note = f"the budget ended: {what}; the same command goes on"
    return _keep(replace(race, notes=(*race.notes, note)), out)

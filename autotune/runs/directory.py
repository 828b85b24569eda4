"""Run directory: names of its files, how they are written, and who may write them.

Every file is replaced atomically and can be written again from the study.
"""

import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from autotune import files
from autotune.config.nanogpt import format_nanogpt
from autotune.config.search_settings import SearchSettings, read_settings, refuse_other_search, write_settings
from autotune.config.storage import is_server
from autotune.config.tables import read_json
from autotune.config.toml import BEST_TOML, CandidateFile, format_candidate
from autotune.environment import Environment, differences
from autotune.errors import ConfigError, InterruptedByUser
from autotune.files import write_atomically
from autotune.measure.runner import STANDBY_LOG
from autotune.measure.scratch import alive
from autotune.measure.types import PEAK_VIEWS
from autotune.runs.objective import loss_at, plan_training
from autotune.runs.records import TrialRecord, write_csv
from autotune.runs.verdict import Speed, Verdict, read_verdict, write_verdict

SEARCH_TOML, ENVIRONMENT_JSON = "search.toml", "environment.json"
"""Inputs: the search's settings, and the machine."""
STUDY_DB, LOGS = "study.db", "logs"
"""Optuna's database; folder of the trials' requests and output."""
TRIALS_CSV, VERDICT_JSON, MEMORY_MODEL_JSON = "trials.csv", "verdict.json", "memory_model.json"
RACES_CSV, RACE = "races.csv", "race"
"""One row for each rung of the race; folder of its level phases' checkpoints."""
BEST_NANOGPT = "best_nanogpt.py"
"""Beside BEST_TOML: the same as a configuration file of nanoGPT."""
REPORT_HTML, COMPARISON_HTML = "report.html", "comparison.html"
"""Page of a run, and of several, beside the first of them."""
_LOCK = ".lock"
SPENT = ".spent."
"""Prefix of the files in which each process of a search writes, twice a second, how long it has lasted."""
UNKNOWN_SPENT = "-"
"""In such a file: the process has not yet read how long earlier ones lasted."""
_BEAT_MISSED = 5.0
"""Age in seconds of such a file from which on its process no longer counts as running."""


def rival_checkpoints(run_dir: Path, rival: int) -> Path:
    """Where the level phase of a rival of the race is saved."""
    return run_dir / RACE / f"rival-{rival:02d}"


def winner_checkpoints(run_dir: Path) -> Path | None:
    """Checkpoints of the race's winner, from which its training can continue; None where no race elected the winner, or
    its verdict cannot be read."""
    try:
        verdict = read_verdict(run_dir / VERDICT_JSON)
    except ConfigError:
        return None
    found = rival_checkpoints(run_dir, verdict.race.winner.rival) if verdict.raced and verdict.race else None
    return found if found and found.is_dir() else None


def publish(
    run_dir: Path,
    settings: SearchSettings,
    environment: Environment,
    records: Sequence[TrialRecord],
    verdict: Verdict,
) -> None:
    """Replace trials.csv and verdict.json, and as soon as there is a winner best.toml and best_nanogpt.py."""
    write_csv(run_dir / TRIALS_CSV, records)
    write_verdict(run_dir / VERDICT_JSON, verdict)  # after the rows that it names
    if verdict.winner is None or verdict.speed is None:
        return
    best = _best(verdict, verdict.winner, verdict.speed, settings, environment)
    _write_if_changed(run_dir / BEST_TOML, format_candidate(best))
    heading = f"Found by autotune: trial {verdict.winner.trial} of {settings.name}, on {environment.device_name}."
    text = format_nanogpt(best.candidate, heading, settings.device, dataset=settings.dataset, out_dir=settings.out_dir)
    _write_if_changed(run_dir / BEST_NANOGPT, text)


def _write_if_changed(path: Path, text: str) -> None:
    """Most trials do not change the winner."""
    if not path.exists() or path.read_bytes() != text.encode():
        write_atomically(path, text, durable=False)


def _best(
    verdict: Verdict, winner: TrialRecord, speed: Speed, settings: SearchSettings, environment: Environment
) -> CandidateFile:
    result, candidate = winner.result, winner.candidate
    rival = verdict.race.rival_of(candidate.id) if verdict.race else None
    candidate = settings.completed(rival.candidate if rival else candidate)
    if not settings.keep_schedule:
        factor = rival.rate_factor if rival else 1.0
        candidate = plan_training(settings, candidate, speed.tokens_per_second, result, factor)
    measured = {
        "trial": winner.trial,
        "status": verdict.status,
        "objective": settings.objective,
        "tokens_per_second": speed.tokens_per_second,
        "tokens_per_second_ci95": speed.ci95,
        "training_tokens_per_second_ci95": speed.next_process_ci95,
        "measurements": speed.measurements,
        "step_seconds_p50": result.step_seconds_p50,
        "steps": result.steps,
        "mfu": result.mfu,
        **{f"peak_{view}": result.peak(view) for view in reversed(PEAK_VIEWS)},
        "predicted_loss": None if rival else loss_at(settings, winner.candidate, speed.tokens_per_second),
        "raced_loss": verdict.race.best.loss if rival and verdict.race and rival == verdict.race.winner else None,
        "compile_cache_hits": result.compile_cache_hits,
        "compile_cache_misses": result.compile_cache_misses,
    }
    if environment.stand_in:  # speeds and losses of a device that computes nothing are written nowhere as measured
        peaks = {name: value for name, value in measured.items() if name.startswith("peak_")}
        measured = {name: measured[name] for name in ("trial", "status", "objective")} | peaks
    return CandidateFile(candidate=candidate, measured=measured, environment=_with_fingerprint(environment))


def _with_fingerprint(environment: Environment) -> dict[str, Any]:
    return {**asdict(environment), "fingerprint": environment.fingerprint}


def write_inputs(run_dir: Path, settings: SearchSettings, environment: Environment) -> None:
    """Write search.toml and environment.json."""
    write_settings(run_dir / SEARCH_TOML, settings)
    write_atomically(run_dir / ENVIRONMENT_JSON, json.dumps(_with_fingerprint(environment), indent=2) + "\n")


def refuse_another_machine(run_dir: Path, environment: Environment) -> None:
    """Raise ConfigError, naming the differences, unless the run was measured on `environment`."""
    then = read_json(run_dir / ENVIRONMENT_JSON, f"repair it with `autotune report --rebuild {run_dir}`")
    if then.get("fingerprint") != environment.fingerprint:
        changes = differences(then, environment)
        if unknown := [field.name for field in fields(environment) if field.name not in then]:
            changes.append(f"{', '.join(unknown)} not recorded there")
        raise ConfigError(
            f"{run_dir} was measured elsewhere ({', '.join(changes)}), its numbers do not compare; start a new search, "
            "or mix them with --other-machine"
        )


@contextlib.contextmanager
def new_directory(run_dir: Path) -> Iterator[None]:
    """Create `run_dir`, locked during the block; remove it again, with the parents created for it, if the block raises:
    the search could not start. Raises ConfigError."""
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    with contextlib.ExitStack() as held:
        try:
            _clear_abandoned(run_dir)
            if run_dir.exists() and any(run_dir.iterdir()):
                raise FileExistsError
            run_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(files.locked(run_dir / _LOCK, FileExistsError()))
            (run_dir / LOGS).mkdir()  # succeeds for one of two searches that start here at the same time
        except FileExistsError:
            advice = f"go on with `--resume {run_dir}` or give another --name"
            raise ConfigError(f"{run_dir} is not empty; {advice}") from None
        except OSError as error:
            raise ConfigError(f"{run_dir} cannot be made: {error.strerror}; choose another place") from None
        with _removed_if_raising(run_dir, made):
            yield


@contextlib.contextmanager
def _removed_if_raising(run_dir: Path, made: Sequence[Path]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        shutil.rmtree(run_dir, ignore_errors=True)
        with contextlib.suppress(OSError):  # another search may have started in one of them
            for folder in made[1:]:
                folder.rmdir()
        if not isinstance(error, KeyboardInterrupt):
            raise
        raise InterruptedByUser("interrupted before the first trial; nothing is kept, start the search again") from None


def _clear_abandoned(run_dir: Path) -> None:
    """Remove the directory of a search that was killed before it wrote its settings: it cannot be resumed. One that is
    just starting holds the lock."""
    if (run_dir / SEARCH_TOML).exists() or not (run_dir / _LOCK).exists():
        return
    started = {LOGS, _LOCK, *(STUDY_DB + suffix for suffix in ("", "-wal", "-shm", "-journal"))}
    inside = [*run_dir.iterdir(), *(run_dir / LOGS).glob("*")]
    if all(entry.name in started or entry.name.startswith(f".{SEARCH_TOML}.") for entry in inside):
        with files.locked(run_dir / _LOCK, FileExistsError()):
            shutil.rmtree(run_dir)


def claim_name(parent: Path, name: str) -> str:
    """The first of `name`, `name-2`, `name-3`, ... that does not exist in `parent`; creates it, empty, so that no
    other search takes it. Raises ConfigError."""
    for number in itertools.count(1):
        free = name if number == 1 else f"{name}-{number}"
        try:
            (parent / free).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"{parent / free} cannot be made: {error.strerror}; choose another place") from None
        return free
    raise AssertionError("unreachable: count() is infinite")


def own_directory(parent: Path, settings: SearchSettings) -> tuple[Path, bool]:
    """The directory of a search, and whether it continues there. Processes that share a study on a server, and maybe
    a file system, have one each: the first of NAME, NAME-2, ... that is free, or whose search of this study has ended
    or was killed. Raises ConfigError for another search of this name."""
    first = parent / settings.name
    if not is_server(settings.storage):
        return first, False
    for number in itertools.count(1):
        directory = first if number == 1 else parent / f"{settings.name}-{number}"
        if not (directory / SEARCH_TOML).exists():
            if directory.exists() and any(directory.iterdir()):  # being made
                continue
            return directory, False
        there = read_settings(directory / SEARCH_TOML)
        if (there.name, there.storage) != (settings.name, settings.storage):
            raise ConfigError(f"{directory} is of another study; give another --name")
        refuse_other_search(there, settings, str(directory))
        with contextlib.suppress(ConfigError), locked(directory):
            return directory, True
    raise AssertionError("unreachable: count() is infinite")


def remove_leftovers(run_dir: Path) -> None:
    """Remove temporary files of a killed search; the caller holds the run's lock. Their names contain the process
    id: those of live processes, a report or a training, stay."""
    for folder in (run_dir, run_dir / LOGS):
        for file in folder.glob(".*.tmp"):
            number = file.name.split(".")[-2]
            if not (number.isdecimal() and alive(int(number))):
                file.unlink(missing_ok=True)
    for log in (run_dir / LOGS).glob(STANDBY_LOG.format("*")):
        log.unlink()


def read_spent(file: Path) -> tuple[float | None, float] | None:
    """Seconds of the parts before it, as far as it knew, and of its own; None where it had not yet written that."""
    try:
        before, lasted = file.read_text().split()
        return None if before == UNKNOWN_SPENT else float(before), float(lasted)
    except (OSError, ValueError):
        return None


def searching_seconds(run_dir: Path) -> float | None:
    """Seconds of the search that runs at this moment, earlier parts included; None: none runs."""
    with contextlib.suppress(OSError):  # it may end just now
        running = [file for file in run_dir.glob(f"{SPENT}*") if time.time() - file.stat().st_mtime < _BEAT_MISSED]
        return max((sum(filter(None, spent)) for file in running if (spent := read_spent(file))), default=None)
    return None


def trial_log(run_dir: Path, trial: int) -> Path:
    """Output of a trial's process."""
    return run_dir / LOGS / f"trial-{trial:04d}.log"


def trial_in_flight(run_dir: Path, rows: Collection[int]) -> int | None:
    """The trial whose log is there, but whose row is not; None if there is none."""
    numbers = [int(log.stem[6:]) for log in (run_dir / LOGS).glob("trial-*.log") if log.stem[6:].isdecimal()]
    return max((number for number in numbers if number not in rows), default=None)


def locked(run_dir: Path) -> contextlib.AbstractContextManager[None]:
    """Lock of the one search that may write to the run. Raises ConfigError if another process holds it."""
    taken = ConfigError(f"the search of {run_dir} is still running; wait for it, or end it first")
    return files.locked(run_dir / _LOCK, taken)

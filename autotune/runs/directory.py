"""The files of a run. Each is replaced as a whole and can be written anew from the study."""

import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from autotune import files
from autotune.config.nanogpt import format_nanogpt
from autotune.config.search import SearchSettings, write_settings
from autotune.config.tables import read_json
from autotune.config.toml import CandidateFile, format_candidate
from autotune.environment import Environment, differences
from autotune.errors import ConfigError, InterruptedByUser
from autotune.files import write_atomically
from autotune.measure.scratch import alive
from autotune.runs.objective import finish_candidate, loss_at, training_tokens
from autotune.runs.records import TrialRecord, write_csv
from autotune.runs.verdict import Verdict

ABANDONED_SECONDS = 5.0


def publish(
    directory: Path,
    settings: SearchSettings,
    environment: Environment,
    records: Sequence[TrialRecord],
    state: Verdict | None,
) -> None:
    """Replace trials.csv, and from the first feasible trial on best.toml and best_nanogpt.py."""
    write_csv(directory / "trials.csv", records)
    if state is None:
        return
    best = _best(state, settings, environment)
    _write_if_new(directory / "best.toml", format_candidate(best))
    heading = f"Found by autotune: trial {state.winner.trial} of {settings.name}, on {environment.device_name}."
    text = format_nanogpt(best.candidate, heading, settings.device, dataset=settings.dataset, out_dir=settings.out_dir)
    _write_if_new(directory / "best_nanogpt.py", text)


def _write_if_new(path: Path, text: str) -> None:
    """Most trials change nothing here, and waiting for the disk takes longer than reading."""
    if not path.exists() or path.read_bytes() != text.encode():
        write_atomically(path, text)


def _best(state: Verdict, settings: SearchSettings, environment: Environment) -> CandidateFile:
    winner, result = state.winner, state.winner.result
    candidate = settings.completed(winner.candidate)
    if not settings.keep_schedule:
        candidate = finish_candidate(candidate, training_tokens(settings, state.speed.tokens_per_second))
    measured = {
        "trial": winner.trial,
        "status": state.status,
        "objective": settings.objective,
        "tokens_per_second": state.speed.tokens_per_second,
        "tokens_per_second_ci95": state.speed.ci95,
        "training_tokens_per_second_ci95": state.speed.next_process_ci95,
        "measurements": state.speed.measurements,
        "step_seconds_p50": result.step_seconds_p50,
        "steps": result.steps,
        "mfu": result.mfu,
        "peak_allocated_bytes": result.peak("allocated_bytes"),
        "peak_reserved_bytes": result.peak("reserved_bytes"),
        "peak_device_bytes": result.peak("device_bytes"),
        "predicted_loss": loss_at(settings, winner.candidate, state.speed.tokens_per_second),
        "compile_cache_hits": result.compile_cache_hits,
        "compile_cache_misses": result.compile_cache_misses,
    }
    return CandidateFile(candidate=candidate, measured=measured, environment=_facts(environment))


def _facts(environment: Environment) -> dict[str, Any]:
    return {**asdict(environment), "fingerprint": environment.fingerprint}


def write_inputs(directory: Path, settings: SearchSettings, environment: Environment) -> None:
    """search.toml and environment.json: what was asked, and of which machine."""
    write_settings(directory / "search.toml", settings)
    write_atomically(directory / "environment.json", json.dumps(_facts(environment), indent=2) + "\n")


def refuse_another_machine(run_dir: Path, environment: Environment) -> None:
    """Raise ConfigError, saying what differs, unless the run was measured on `environment`."""
    then = read_json(run_dir / "environment.json", f"mend it with `autotune report --rebuild {run_dir}`")
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
    """Make `run_dir`; take it away again, with the folders made for it, if the search cannot even start."""
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        _clear_abandoned(run_dir)
        if run_dir.exists() and any(run_dir.iterdir()):
            raise FileExistsError
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "logs").mkdir()  # of two searches that come here at once, only one makes it
    except FileExistsError:
        raise ConfigError(
            f"{run_dir} is not empty; go on with `--resume {run_dir}` or give another --name"
        ) from None
    except OSError as error:
        raise ConfigError(f"{run_dir} cannot be made: {error.strerror}; choose another place") from None
    try:
        yield
    except BaseException as error:
        shutil.rmtree(run_dir, ignore_errors=True)
        with contextlib.suppress(OSError):  # another search may have begun in one of them
            for folder in made[1:]:
                folder.rmdir()
        if not isinstance(error, KeyboardInterrupt):  # only pilots take so long that somebody would
            raise
        raise InterruptedByUser("interrupted before the first trial; nothing is kept, start the search again") from None


def _clear_abandoned(run_dir: Path) -> None:
    """Empty the directory of a search that was killed before it had written its settings: nothing can be resumed from
    it, and its name is free again. One that begins just now takes less than ABANDONED_SECONDS to write them."""
    if (run_dir / "search.toml").exists() or not (run_dir / "logs").is_dir():
        return
    begun = {"logs", "study.db", "study.db-wal", "study.db-shm", "study.db-journal", ".lock"}
    inside = [*run_dir.iterdir(), *(run_dir / "logs").iterdir()]
    known = all(entry.name in begun or entry.name.startswith(".search.toml.") for entry in inside)
    if known and time.time() - (run_dir / "logs").stat().st_mtime > ABANDONED_SECONDS:
        shutil.rmtree(run_dir)


def claim_name(parent: Path, name: str) -> str:
    """`name`, or the first of `name-2`, `name-3`, ... of which `parent` has no directory; makes an empty one, so that
    no other search takes it."""
    for number in itertools.count(1):
        free = name if number == 1 else f"{name}-{number}"
        try:
            (parent / free).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"{parent / free} cannot be made: {error.strerror}; choose another place") from None
        return free
    raise AssertionError("a number is always free")


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a killed search has left half-written: for the holder of the run's lock. Temporary files have the
    number of their process in their names, and one of those may be a report or a training at work."""
    for folder in (run_dir, run_dir / "logs", run_dir / "plots"):
        for file in folder.glob(".*.tmp"):
            number = file.name.split(".")[-2]
            if not (number.isdecimal() and alive(int(number))):
                file.unlink(missing_ok=True)
    (run_dir / "logs" / ".standby.log").unlink(missing_ok=True)


def locked(run_dir: Path) -> contextlib.AbstractContextManager[None]:
    """Only one search at a time. Raises ConfigError."""
    taken = ConfigError(f"the search of {run_dir} is still running; wait for it, or end it first")
    return files.locked(run_dir / ".lock", taken)

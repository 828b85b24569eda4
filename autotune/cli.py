"""The command line: parse, call, print. Heavy modules are imported inside the command that needs them.

Results go to stdout, progress to stderr. Exit codes are listed in `autotune.errors`; 2 is wrong usage.
"""

import atexit
import importlib
import inspect
import json as json_module
import math
import os
import shlex
import signal
import sys
import time
import traceback
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer
from typer.core import TyperGroup

import autotune
from autotune import files, places, terminal
from autotune.config.storage import scrub, secrets_in
from autotune.errors import LONGEST, AutotuneError, ConfigError, InterruptedByUser, NoFeasibleError, one_line
from autotune.units import parse_bytes, parse_count, parse_duration

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typer._click.core import Context
    from typer._click.formatting import HelpFormatter

    from autotune.config.search_settings import SearchSettings
    from autotune.data.manifest import Format
    from autotune.environment import Environment, Slot
    from autotune.measure.types import TrialRequest, TrialResult


T = TypeVar("T")
_PANELS = ("Search", "Train", "Understand", "Data", "This machine")


class _Grouped(TyperGroup):
    """Lists commands under their `rich_help_panel`, which typer's plain help ignores."""

    def format_commands(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        del ctx
        for panel in _PANELS:
            rows = [
                (f"{name:<8}", command.get_short_help_str(limit=66))
                for name, command in self.commands.items()
                if getattr(command, "rich_help_panel", "") == panel
            ]
            with formatter.section(panel):
                formatter.write_dl(rows)


def _command(register: "Callable[..., Any]", panel: str | None = None) -> "Callable[[T], T]":
    """Register a function; the section `Examples:` of its docstring follows the options in its help."""

    def add(function: T) -> T:
        help_text, _, examples = inspect.getdoc(function).partition("\n\nExamples:\n")  # type: ignore[union-attr]
        register(help=help_text, epilog=f"\b\nExamples:\n{examples}", rich_help_panel=panel)(function)
        return function

    return add


# Plain help: typer's rich help takes three times as long to come up.
app = typer.Typer(name="autotune", cls=_Grouped, rich_markup_mode=None, no_args_is_help=False)
data = typer.Typer(rich_markup_mode=None, help="Prepare and inspect data directories.")

CandidateArgument = Annotated[Path, typer.Argument(metavar="RUN|TOML", help="Run directory or candidate file.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value, e.g. plan.loss=chunked.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
VocabSize = Annotated[
    int | None, typer.Option(metavar="N", help="Vocabulary size. [default: from the config or data, else 50304]")
]
Device = Annotated[
    str, typer.Option(metavar="DEVICE", help="cpu, cuda:0, or auto: the first CUDA device, else the CPU.")
]


def main() -> None:
    """Entry point of the console script."""
    from autotune.environment import start_again_as_worker
    from autotune.search.timekeeping import process_started

    if next((word for word in sys.argv[1:] if not word.startswith("-")), "") == "train":
        start_again_as_worker()
    codes: list[int] = []
    atexit.register(_leave, codes)  # the first to be registered, so the last to run
    terminal.open_streams()
    interrupt = _Interrupt()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # set by nohup, and by shells for background jobs
            signal.signal(number, interrupt)
    codes.append(run(sys.argv[1:], process_started()))
    sys.exit(codes[0])


def _leave(codes: list[int]) -> None:
    """End the process, once its exit code is known. The interpreter takes seconds to free what torch has loaded, the
    system does it at once."""
    if codes:
        terminal.flush(sys.stdout)
        terminal.flush(sys.stderr)
        os._exit(codes[0])


class _Interrupt:
    """Raises KeyboardInterrupt at a signal. Signals that follow within SECONDS are ignored, so that saving is not
    interrupted: an impatient Ctrl-C, the second SIGHUP of a closed ssh, a service manager's SIGHUP after SIGTERM."""

    SECONDS = 5.0

    def __init__(self) -> None:
        self._last = -math.inf

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() - self._last > self.SECONDS:
            self._last = time.monotonic()
            raise KeyboardInterrupt


_OLD_SPELLINGS = {"--from-python-docs": "python-docs"}
"""Flags of earlier versions that are an argument now."""


def run(arguments: list[str], started: float | None = None) -> int:
    """Run one command and return its exit code. An error is one line on stderr; --debug adds a traceback.

    started: start of the process by `time.monotonic`; None: now."""
    started = time.monotonic() if started is None else started
    try:
        words = [_OLD_SPELLINGS.get(a, a) for a in arguments if a != "--debug"]  # --debug may stand anywhere
        code = app(words, prog_name="autotune", standalone_mode=False, obj=started)
        sys.stdout.flush()
        if code == InterruptedByUser.exit_code:  # typer reports Ctrl-C so, without a message
            raise KeyboardInterrupt
        return int(code or 0)
    except (BrokenPipeError, SystemExit):  # the reader closed the pipe (`| head`); typer turns that into an exit
        terminal.silence(sys.stdout)
        return 0
    except BaseException as error:
        secrets = secrets_in(arguments)
        if "--debug" in arguments:
            print(scrub(traceback.format_exc(), secrets), end="", file=sys.stderr)
        message, code = _explained(error)
        terminal.say(f"error: {one_line(scrub(message, secrets), LONGEST)}")
        if isinstance(error, OSError):  # the stream that failed may be stdout
            terminal.flush(sys.stdout)
        return code


def _explained(error: BaseException) -> tuple[str, int]:
    """Message and exit code of an error."""
    if isinstance(error, AutotuneError):
        return str(error), error.exit_code
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "autotune"
        return f"{error.format_message().rstrip('.')} (see `{command} --help`)", error.exit_code
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "interrupted", InterruptedByUser.exit_code
    if isinstance(error, OSError):
        return f"{error}; run it again with --debug for a traceback", 1
    return f"internal error: {type(error).__name__}: {error}; please report it with the output of --debug", 1


def _version(wanted: bool) -> None:
    if wanted:
        terminal.write(f"autotune {autotune.__version__}")
        raise typer.Exit


@_command(app.callback)
def autotune_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print a traceback with an error.")] = False,
) -> None:
    """Measure, do not guess: memory profiling and autotuning for nanoGPT-style training.

    Examples:
      autotune search --from config/train_gpt2.py --budget 1h
      autotune report results/NAME
      autotune train results/NAME
    """
    del version, debug
    if (note := places.settle(os.environ)) and not os.environ.get("AUTOTUNE_CACHE_DIR"):
        terminal.say(f"note: {note}")


@_command(app.command, "Search")
def search(
    context: typer.Context,
    budget: Annotated[str, typer.Option(metavar="TIME", help="Wall clock of the whole search. [default: 1h]")] = "",
    objective: Annotated[
        str, typer.Option(metavar="loss|throughput", help="[default: loss, or throughput where the shape is fixed]")
    ] = "",
    memory_limit: Annotated[str, typer.Option(metavar="SIZE", help="24GiB. [default: the device's memory]")] = "",
    train_time: Annotated[str, typer.Option(metavar="TIME", help="Length of the training that is planned: 24h.")] = "",
    train_tokens: Annotated[
        str, typer.Option(metavar="COUNT", help="Tokens of the training that is planned: 10B.")
    ] = "",
    model: Annotated[str, typer.Option(metavar="LxHxW", help="Fix the shape: 12x12x768, layers x heads x width.")] = "",
    from_file: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="FILE", help="Start from a nanoGPT config or a candidate's .toml; keep its shape."
        ),
    ] = None,
    guide: Annotated[
        str, typer.Option(metavar="ROW", help="Start from a row of the memory guide, with its limit: 24GB.")
    ] = "",
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Data directory. [default: synthetic tokens]")
    ] = None,
    vocab_size: VocabSize = None,
    choices: Annotated[
        list[str] | None, typer.Option(metavar="NAME=A,B", help="Restrict what is tried; repeatable. See --dry-run.")
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="cpu, cuda:0, several cards cuda:0,cuda:1, or auto: the first card.")
    ] = "auto",
    workers: Annotated[
        int, typer.Option(metavar="N", help="On the CPU: trials at the same time, which divide the cores.")
    ] = 1,
    nproc: Annotated[
        int, typer.Option(metavar="N", help="Processes of a trial (torchrun): a card each, or parts of the cores.")
    ] = 1,
    storage: Annotated[
        str,
        typer.Option(
            metavar="URL", help="Optuna storage; on a server, machines join. [default: sqlite in RUN/study.db]"
        ),
    ] = "",
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Resume a search; --budget may extend it.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the sampler.")] = 0,
    sampler: Annotated[
        str, typer.Option(metavar="NAME", help="additive, tpe, gp, random, or package.module:Class.")
    ] = "additive",
    name: Annotated[str, typer.Option(metavar="NAME", help="The run is results/NAME. [default: date and time]")] = "",
    law: Annotated[str, typer.Option(metavar="NAME", help="Scaling law that predicts the loss.")] = "lingle",
    race: Annotated[
        str, typer.Option(metavar="off|on", help="Train the best few on --data. [default: on for loss with data]")
    ] = "",
    keep: Annotated[str, typer.Option(metavar="learning", help="Change speed and memory only.")] = "",
    target: Annotated[
        str, typer.Option("--for", metavar="nanogpt", help="Race only what nanoGPT's train.py can run.")
    ] = "autotune",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the settings and the search space, then stop.")
    ] = False,
    other_machine: Annotated[
        bool, typer.Option("--other-machine", help="Resume or join on another machine or version of torch.")
    ] = False,
    json: Json = False,
) -> None:
    """Measure candidates on this device within a time budget.

    Writes results/NAME: trials.csv to review, best.toml to train, report.html.

    Examples:
      autotune search --from config/train_gpt2.py --budget 1h
      autotune search --model 12x12x768 --memory-limit 16GiB
      autotune search --data data/fineweb --train-time 24h
      autotune search --resume results/NAME --budget 2h
    """
    started: float = context.obj  # the budget includes start-up
    _load_numpy()
    from autotune.config.presets import preset
    from autotune.environment import busy_machine, probe_slots
    from autotune.runs import directory as run_directory
    from autotune.search import loop, resolve
    from autotune.train.output import tracker_notes

    remarks = (busy,) if (busy := busy_machine()) else ()
    if resume is not None:
        _refuse_beside_resume(context)
        seconds = parse_duration(budget) if budget else None
        go_on = partial(_resume, resume, device, seconds=seconds, other_machine=other_machine)
        _watch(resume, partial(go_on, started=started, remarks=remarks), remarks, json)
        return
    if other_machine and not storage:
        raise ConfigError(
            "--other-machine is for a search that goes on or is joined; give --resume RUN or --storage URL"
        )
    found, slots = probe_slots(device, workers, nproc)
    asked = resolve.resolve(
        found,
        budget=budget or "1h",
        objective=objective,
        memory_limit=memory_limit,
        train_time=train_time,
        train_tokens=train_tokens,
        model=model,
        from_file=from_file,
        guide=preset(guide) if guide else None,
        data=data,
        vocab_size=vocab_size,
        choices=choices or (),
        slots=slots,
        storage=storage,
        seed=seed,
        sampler=sampler,
        name=name,
        law=law,
        race=race,
        keep=keep,
        target=target,
    )
    asked = replace(asked, command=_command_line(context))
    for note in (*asked.notes, *tracker_notes(asked.tracking)):
        terminal.say(f"note: {note}")
    if dry_run:
        terminal.write_lines(resolve.describe_settings(asked, found))
        return
    if not name:
        asked = replace(asked, name=run_directory.claim_name(Path("results"), asked.name))
    directory, again = run_directory.own_directory(Path("results"), asked)
    if asked.objective == "loss" and not (asked.recipe.data or race):
        remarks = (*remarks, resolve.NO_TEXT)
    if asked.objective == "loss" and asked.recipe.data and nproc > 1 and not race:
        remarks = (*remarks, resolve.ONE_PROCESS)
    if again:  # the same command, after a kill
        go_on = partial(_resume, directory, device, seconds=None, other_machine=other_machine)
        _watch(directory, partial(go_on, started=started, remarks=remarks), remarks, json)
        return
    begin = partial(loop.search, asked, directory, found, slots=slots, started=started)
    begin = partial(begin, same_machine=not other_machine, storage_url=storage, remarks=remarks)
    _watch(directory, begin, remarks, json)


def _resume(run: Path, device: str, *, seconds: float | None, other_machine: bool, **more: Any) -> None:
    from autotune.environment import probe_slots
    from autotune.search import loop

    def here(
        settings: "SearchSettings",
    ) -> "tuple[Environment, tuple[Slot, ...]]":  # probed when its seconds are recorded
        own = ",".join(settings.devices) or settings.device
        devices = own if device == "auto" else device
        return probe_slots(devices, 1 if settings.devices else settings.workers, settings.baseline.processes)

    loop.resume(run, here, budget_seconds=seconds, same_machine=not other_machine, **more)


def _load_numpy() -> None:
    """Load NumPy with one OpenBLAS thread, unless the user has set a number: the matrices of the sampler are small, and
    on a busy machine a second thread is only waited for. The variable must not reach child processes."""
    if "OPENBLAS_NUM_THREADS" not in os.environ:
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        importlib.import_module("numpy")
        del os.environ["OPENBLAS_NUM_THREADS"]


def _command_line(context: typer.Context) -> str:
    """The options that were given, as a command to copy; passwords are replaced by ***."""
    words = ["autotune", context.info_name or ""]
    for option in context.command.params:
        source, value = context.get_parameter_source(str(option.name)), context.params.get(str(option.name))
        if source is None or source.name != "COMMANDLINE":
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            words += [option.opts[0]] if one is True else [option.opts[0], str(one)]
    secrets = secrets_in(words)
    return terminal.visible(shlex.join(scrub(word, secrets) for word in words))


_OF_RESUME = ("resume", "budget", "device", "other_machine", "json")


def _refuse_beside_resume(context: typer.Context) -> None:
    options = [option for option in context.command.params if option.name not in _OF_RESUME]
    sources = {option.opts[0]: context.get_parameter_source(str(option.name)) for option in options}
    if given := [flag for flag, source in sources.items() if source and source.name == "COMMANDLINE"]:
        raise ConfigError(f"--resume goes on with the run's own settings; leave out {', '.join(given)}")


def _watch(directory: Path, go: "Callable[..., object]", remarks: tuple[str, ...], json: bool) -> None:
    """Run a search with live progress, then print its report, even if no candidate was feasible."""
    from autotune.measure.runner import trials_in_a_row
    from autotune.model.compile_cache import compile_cache_dir, make_cache
    from autotune.search import progress

    make_cache(compile_cache_dir())
    show = partial(_report, [directory], html=True, json=json, top=10)
    try:
        with progress.show_progress(remarks) as notify, trials_in_a_row() as (measure, train_rung):
            go(notify=notify, measure=measure, train_rung=train_rung)
    except NoFeasibleError:
        show()
        raise
    show()


@_command(app.command, "Search")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    html: Annotated[bool, typer.Option("--html", help="Write report.html, or comparison.html.")] = False,
    json: Json = False,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="How many of the best trials to show.")] = 10,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="First rebuild the run's files from study.db.")] = False,
) -> None:
    """Print what searches measured, beside what training reached.

    One run is shown in full, several side by side. A training directory shows that training.

    Examples:
      autotune report results/NAME --html
      autotune report results/A results/B
      autotune report results/NAME --json | jq .runs[0].best
    """
    from autotune.search.loop import rebuild as write_again

    for path in runs if rebuild else []:
        write_again(path)
    _report(runs, html, json, top)


def _write_json(content: "Mapping[str, object]") -> None:
    """Write one JSON object to stdout."""
    terminal.write(json_module.dumps(content, allow_nan=False))


def _report(runs: list[Path], html: bool, json: bool, top: int) -> None:
    from autotune.report import compare, table, training
    from autotune.report import run as record
    from autotune.runs import read

    loaded = [read.load_run(path) for path in runs if not training.is_training(path)]
    trained, damaged = training.trainings_of(runs)
    written: list[Path] = []
    if html:
        from autotune.report import html as page

        written = [page.write_html(one) for one in loaded]
        written += [page.write_comparison(loaded)] if len(loaded) > 1 else []
    if json:
        parts = {"runs": [record.as_json(one) for one in loaded], "trainings": [training.as_json(t) for t in trained]}
        several = {"comparison": compare.as_json(loaded)} if len(loaded) > 1 else {}
        _write_json({**parts, **several})
    else:
        if loaded:
            table.print_text(record.run_report(loaded[0], top) if len(loaded) == 1 else compare.comparison(loaded))
        if trained:
            terminal.write("Training, measured or predicted -> reached:")
            table.print_text(training.training_table(trained))
    for file in written:
        terminal.say(f"wrote {file}")
    damaged += [f"{one.path}: {one.damage[0]}; {read.advice(one)}" for one in loaded if one.damage]
    if damaged:
        raise ConfigError("; ".join(damaged))


@_command(app.command, "Search")
def race(
    context: typer.Context,
    candidates: Annotated[
        list[Path], typer.Argument(metavar="RUN|FILE...", help="Runs, candidate files, nanoGPT config files.")
    ],
    seconds: Annotated[str, typer.Option("--time", metavar="TIME", help="Training time of each. [default: 3m]")] = "",
    tokens: Annotated[str, typer.Option(metavar="COUNT", help="Tokens of each training instead: 10M.")] = "",
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Trainings of each, for an interval.")] = 1,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Data directory. [default: the candidates']")] = None,
    budget: Annotated[
        str, typer.Option(metavar="TIME", help="Wall clock of it all. [default: as long as needed]")
    ] = "",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output directory.")] = Path("results/race"),
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train candidates for equal time or tokens: which learns most?

    Each keeps its recipe, with the schedule scaled to the length. After an interruption, the same command continues.

    Examples:
      autotune race results/A results/B --time 3m --seeds 3
      autotune race mine.py results/A --tokens 10M --data data/fineweb
    """
    from autotune.environment import probe
    from autotune.measure.runner import trials_in_a_row
    from autotune.model.compile_cache import compile_cache_dir, make_cache
    from autotune.report import race as pages
    from autotune.report import table
    from autotune.runs.directory import LOGS
    from autotune.search import user_race
    from autotune.search.resolve import memory_limit_of

    if seconds and tokens:
        raise ConfigError("--time and --tokens exclude each other; give one")
    lasts, count = None if tokens else parse_duration(seconds or "3m"), parse_count(tokens) if tokens else None
    most, here = parse_duration(budget) if budget else None, probe(device)
    found = user_race.read_candidates(candidates, data, here)
    settings = user_race.RaceSettings(candidates=found, device=here.device, seconds=lasts, tokens=count)
    make_cache(compile_cache_dir())
    with trials_in_a_row() as (measure, train_rung):
        raced = user_race.run_race(
            settings, out, seeds=seeds, budget_seconds=most,
            memory_limit_bytes=memory_limit_of(here), measure=measure, train_rung=train_rung, say=terminal.say,
            started=context.obj,
        )  # fmt: skip
    pages.write_curves(out / pages.CURVES_PNG, raced.rivals, raced.readings)
    if json:
        _write_json(pages.as_json(raced.rivals, raced.readings, raced.told))
    else:
        table.print_text(pages.race_report(raced.rivals, raced.readings, raced.told))
    if not any(reading.loss is not None for reading in raced.readings):
        raise NoFeasibleError(f"no training came to its end; see {out / LOGS}")


@_command(app.command, "Understand")
def trial(
    toml: CandidateArgument,
    assignments: Assignments = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure one candidate.

    Reproduces a row of trials.csv. The exit code is 1 unless its status is ok.

    Examples:
      autotune trial results/NAME
      autotune trial best.toml --set plan.loss=chunked --set plan.dtype=float32
      autotune trial best.toml --json
    """
    from autotune.config.toml import read_candidate
    from autotune.environment import probe
    from autotune.measure.runner import run_trial
    from autotune.measure.scratch import log_folder
    from autotune.measure.types import TrialRequest, to_json
    from autotune.model.compile_cache import compile_cache_dir, make_cache

    candidate = read_candidate(toml, tuple(assignments or ())).candidate
    request = TrialRequest(candidate=candidate, device=probe(device).device, result_path="")
    if candidate.plan.compile != "off":
        make_cache(compile_cache_dir())
    log = log_folder() / "trial.log"
    terminal.say(f"measuring on {request.device}, the worker's output goes to {log}")
    result = run_trial(request, log)
    if json:
        terminal.write(to_json(result))
    else:
        from autotune.report import facts, table

        table.print_text(facts.trial_facts(result, candidate.shape))
    raise typer.Exit(0 if result.status == "ok" else 1)


@_command(app.command, "Understand")
def profile(
    tomls: Annotated[list[Path], typer.Argument(metavar="TOML...", help="Candidate file or run; two are compared.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output directory.")] = Path("results/profile"),
    assignments: Assignments = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Show where the memory of one step goes.

    Bytes by category at the peak, and a timeline as CSV and PNG.

    Examples:
      autotune profile results/NAME
      autotune profile best.toml --set plan.loss=full --out results/profile-full
      autotune profile a.toml b.toml
    """
    from autotune.environment import probe
    from autotune.model.compile_cache import compile_cache_dir, make_cache
    from autotune.report import profile as pages
    from autotune.report import table

    if len(tomls) > 2:
        raise typer.BadParameter(f"{len(tomls)} candidates; give one, or two to compare")
    named = pages.read_named(tomls, tuple(assignments or ()))
    make_cache(compile_cache_dir())
    where = probe(device).device
    terminal.say(f"recording one step on {where}; everything goes to {out}")
    profiled = pages.profile_candidates(named, out=out, device=where)
    if json:
        _write_json({"profiles": [pages.as_json(one) for one in profiled]})
        return
    for one in profiled:
        table.print_text(pages.profile_report(one))
    if len(profiled) == 2:
        table.print_text(pages.comparison(*profiled))


@_command(app.command, "Understand")
def estimate(
    gpu: Annotated[str, typer.Option(metavar="NAME", help="Card by name: 4090, A100 80GB. Adds plan and speed.")] = "",
    memory_limit: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory of the card. [default: that of --gpu, else 24GiB]")
    ] = "",
    model: Annotated[
        list[str] | None, typer.Option(metavar="LxHxW", help="12x12x768; repeatable. [default: five common shapes]")
    ] = None,
    vocab_size: VocabSize = None,
    assignments: Assignments = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="RUN", help="A search on such a card. [default: none, wide intervals]")
    ] = None,
    tokens: Annotated[
        str, typer.Option(metavar="COUNT", help="With --gpu: length of the training. [default: 20 a parameter]")
    ] = "",
    toml: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --gpu: write the plan, for `search --from FILE`.")
    ] = None,
    json: Json = False,
) -> None:
    """Predict peak memory, and on a named card plan and speed; needs no device.

    GiB by micro batch. -: beyond the limit. ?: within the error of the model, measure it.

    Examples:
      autotune estimate --gpu "RTX 4090"
      autotune estimate --gpu 3090 --model 12x12x768 --toml start.toml
      autotune estimate --memory-limit 24GiB --set plan.loss=chunked
      autotune estimate --calibration results/NAME
    """
    from autotune.config import cards
    from autotune.config.candidate import at_least
    from autotune.memory import estimate as estimates
    from autotune.memory import model as memory_model
    from autotune.report import table
    from autotune.runs.directory import MEMORY_MODEL_JSON
    from autotune.search import predictions

    known = memory_model.MemoryModel(device="cuda")
    if calibration is not None:
        known = memory_model.load(calibration / MEMORY_MODEL_JSON if calibration.is_dir() else calibration)
    changed = tuple(assignments or ())
    candidates = estimates.candidates(model or [], changed, vocab_size)
    if not gpu:
        if tokens or toml:
            raise ConfigError("--tokens and --toml belong to --gpu; add for example --gpu 4090")
        limit = parse_bytes(memory_limit or "24GiB")
        if json:
            _write_json(estimates.as_json(known, candidates, limit))
            return
        rows, certainty = estimates.estimate(known, candidates, limit)
        table.print_text(table.make_table(rows))
        terminal.write_lines(certainty)
        return
    card, length = cards.find(gpu), parse_count(tokens) if tokens else None
    if length is not None:
        at_least("--tokens", length, 1)
    found, limit = predictions.predict(card, candidates, estimates.fixed(changed), memory_limit, length, known)
    if toml is not None:
        predictions.write_toml(toml, card, found)
    if json:
        _write_json(predictions.as_json(card, found, limit, known))
    else:
        terminal.write_lines(predictions.text(card, found, limit, known))


@_command(app.command, "Understand")
def guide(
    rows: Annotated[
        list[str] | None, typer.Argument(metavar="[ROW...]", help="Rows such as 24GB. [default: all]")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure on this card, under each row's memory limit.")
    ] = False,
    device: Device = "auto",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the rows as CSV, or a table as Markdown (.md).")
    ] = None,
    json: Json = False,
) -> None:
    """Check the memory guide that circulates among nanoGPT users.

    Claimed against true: parameters, memory, speed, length, learning rate and batch of each row. Memory and speed are
    predicted for the row's card unless they are measured.

    Examples:
      autotune guide
      autotune guide 24GB --measure
      autotune guide --out guide.csv
    """
    from autotune.config.presets import PRESETS, preset
    from autotune.memory.model import MemoryModel
    from autotune.search import guide as guides

    asked = [preset(name) for name in rows or []] or PRESETS
    here, run = _this_card(device) if measure else (None, None)
    checked = [guides.check(row, MemoryModel(device="cuda"), here, run) for row in asked]
    if out is not None:
        files.write_atomically(out, guides.as_text(out, checked))
        terminal.say(f"wrote {out}")
    if json:
        _write_json({"rows": guides.as_rows(checked)})
    else:
        terminal.write_lines("\n".join([*guides.lines(checked), "", *guides.provenance(measure)]))


def _this_card(device: str) -> "tuple[Environment, Callable[[TrialRequest], TrialResult]]":
    """This machine, and how a candidate is measured on it. Raises ConfigError without a card."""
    from autotune.environment import probe
    from autotune.measure.runner import run_trial
    from autotune.measure.scratch import log_folder
    from autotune.model.compile_cache import compile_cache_dir, make_cache

    here = probe(device)
    if here.device == "cpu":
        raise ConfigError("--measure needs a CUDA card, there is none here; leave it out for predictions")
    make_cache(compile_cache_dir())
    folder = log_folder()
    terminal.say(f"measuring on {here.device_name}; the workers' output goes to {folder}")
    return here, lambda request: run_trial(request, folder / f"{request.candidate.id}.log")


@_command(app.command, "Train")
def train(
    context: typer.Context,
    candidate: CandidateArgument,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest good checkpoint.")] = False,
    max_tokens: Annotated[
        str | None, typer.Option(metavar="COUNT", help="Stop after this many tokens: 300M. [default: the recipe's]")
    ] = None,
    train_time: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Train for this wall-clock time; the schedule ends with it: 24h."),
    ] = None,
    max_time: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Pause after this wall-clock time, wherever the schedule is: 24h."),
    ] = None,
    from_start: Annotated[
        bool, typer.Option("--from-start", help="Train again what the search's race has trained of the winner.")
    ] = False,
    init_from: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Initial weights: nanoGPT's ckpt.pt, a GPT-2 directory, a run."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Output directory. [default: RUN/train]")] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train a candidate to completion with the step that was measured.

    The winner of a race continues from what the race has trained of it.
    The summary compares speed and memory with the measurement.

    Examples:
      autotune train results/NAME
      autotune train results/NAME --train-time 8h
      autotune train results/NAME --resume --max-time 24h
      torchrun --nproc-per-node 2 -m autotune train results/NAME
    """
    from autotune.config.toml import BEST_TOML, read_candidate
    from autotune.config.train_settings import TrainSettings, locate
    from autotune.runs.directory import winner_checkpoints
    from autotune.train.output import summary_text
    from autotune.train.trainer import train as run_training

    file, default_out = locate(candidate)
    raced = file.name == BEST_TOML and not from_start and init_from is None
    asked = TrainSettings(
        file=read_candidate(file),
        out=out or default_out,
        device=device,
        resume=resume,
        init_from=init_from,
        race=winner_checkpoints(file.parent) if raced else None,
        train_seconds=None if train_time is None else parse_duration(train_time),
        max_tokens=None if max_tokens is None else parse_count(max_tokens),
        max_seconds=None if max_time is None else parse_duration(max_time),
        started=context.obj,
    )
    if summary := run_training(asked):
        _write_json(asdict(summary)) if json else terminal.write_lines(summary_text(summary))


@_command(app.command, "Train")
def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="Run, training directory or checkpoint.")
    ],
    to: Annotated[str, typer.Option(metavar="hf|nanogpt", help="Format: transformers or nanoGPT.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new directory.")],
    cut_vocab: Annotated[
        bool, typer.Option("--cut-vocab", help="hf: drop the padding of the vocabulary beyond GPT-2's 50257.")
    ] = False,
    json: Json = False,
) -> None:
    """Write a trained model for other tools.

    hf: a directory for GPT2LMHeadModel.from_pretrained. nanogpt: a ckpt.pt for sample.py and train.py.

    Examples:
      autotune export results/NAME --to hf --out my-model
      autotune export results/NAME --to nanogpt --out out-mine
    """
    from autotune.train import exchange

    if note := exchange.export(checkpoint, to, out, cut_vocab=cut_vocab):
        terminal.say(f"note: {note}")
    _write_json({"out": str(out), "note": note}) if json else terminal.write(str(out))


@_command(app.command, "Train")
def sample(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Run, training directory or checkpoint.")],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Beginning of the text.")] = "",
    tokens: Annotated[int, typer.Option(metavar="N", help="Maximum length.")] = 200,
    temperature: Annotated[float, typer.Option(metavar="X", help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(metavar="N", help="Sample among this many likeliest tokens; 0: all.")] = 200,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed; equal seeds give equal text.")] = 1337,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Generate text with a trained model.

    Examples:
      autotune sample results/NAME --prompt "This function returns"
      autotune sample results/NAME --temperature 0 --tokens 50
    """
    from autotune.environment import describe
    from autotune.train.sample import sample as draw

    place = describe(device).device
    text = draw(checkpoint, prompt=prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed, device=place)
    if json:
        _write_json({"text": text, "seed": seed})
        return
    terminal.write(terminal.visible(text, keep="\n\t") if sys.stdout.isatty() else text)


@_command(data.command)
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A dataset on the hub (HuggingFaceFW/fineweb), a parquet, jsonl, csv or text file, a folder, or "
            "python-docs: the documentation inside Python, no download.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output directory.")],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Subset of a dataset on the hub: sample-10BT.")
    ] = None,
    max_tokens: Annotated[str | None, typer.Option(metavar="COUNT", help="Stop after this many tokens: 300M.")] = None,
    shard_tokens: Annotated[str, typer.Option(metavar="COUNT", help="Tokens of a full shard.")] = "100M",
    file_format: Annotated[
        str, typer.Option("--format", metavar="shards|nanogpt", help="nanogpt: train.bin and val.bin, without headers.")
    ] = "shards",
    workers: Annotated[int | None, typer.Option(metavar="N", help="Threads. [default: one per core]")] = None,
    json: Json = False,
) -> None:
    """Convert text to shards of GPT-2 tokens.

    After an interruption, the same command continues.

    Examples:
      autotune data prepare python-docs --out data/python-docs
      autotune data prepare corpus/ --out data/corpus --format nanogpt
      autotune data prepare HuggingFaceFW/fineweb --name sample-10BT \\
        --max-tokens 2B --out data/fineweb
    """
    from autotune.data import info as data_info
    from autotune.data import prepare as data_prepare
    from autotune.report import facts, table

    settings = data_prepare.PrepareSettings(
        source=source,
        out=out,
        name=name,
        max_tokens=None if max_tokens is None else parse_count(max_tokens),
        shard_tokens=parse_count(shard_tokens),
        format=cast("Format", file_format),
        workers=workers,
    )
    terminal.say(f"{out}: {data_prepare.prepare(settings).outcome}")
    found = data_info.info(out)
    _write_json(found) if json else table.print_text(facts.facts_table(found))


@data.command()
def info(directory: Annotated[Path, typer.Argument(metavar="DIR", help="Data directory.")], json: Json = False) -> None:
    """Describe a data directory."""
    from autotune.data import info as data_info
    from autotune.report import facts, table

    found = data_info.info(directory)
    _write_json(found) if json else table.print_text(facts.facts_table(found))


app.add_typer(data, name="data", rich_help_panel="Data")


@app.command(rich_help_panel="This machine")
def kernels(json: Json = False) -> None:
    """List the kernels, and why some cannot run here."""
    from autotune.environment import probe
    from autotune.report import doctor, table

    found = doctor.kernel_table(probe())
    _write_json({"kernels": [dict(line) for line in found.lines]}) if json else table.print_text(found)


@app.command(name="doctor", rich_help_panel="This machine")
def doctor_command(json: Json = False) -> None:
    """Check the installation and the device.

    The exit code is 1 where no search is possible."""
    from autotune.report import doctor, table

    checks = doctor.examine()
    if json:
        _write_json({"can_search": doctor.can_search(checks), "checks": [vars(check) for check in checks]})
    else:
        table.print_text(doctor.check_table(checks))
    raise typer.Exit(0 if doctor.can_search(checks) else 1)

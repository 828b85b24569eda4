"""The command line: parse, call, print. No logic; whatever is heavy is imported inside its command.

Results go to stdout, progress to stderr. Exit codes stand in `autotune.errors`; 2 is wrong usage.
"""

import importlib
import json as json_module
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, cast

import typer

import autotune
from autotune import places, terminal
from autotune.config.storage import scrub, secrets_in
from autotune.errors import LONGEST, AutotuneError, ConfigError, InterruptedByUser, NoFeasibleError, one_line
from autotune.units import parse_bytes, parse_count, parse_duration

if TYPE_CHECKING:
    from collections.abc import Callable

    from autotune.data.manifest import Format

# Plain help: typer's rich help takes three times as long to come up.
app = typer.Typer(name="autotune", rich_markup_mode=None, add_completion=False, no_args_is_help=False)
data = typer.Typer(rich_markup_mode=None, help="Make and inspect data directories.")
app.add_typer(data, name="data")

CandidateArgument = Annotated[Path, typer.Argument(metavar="RUN|TOML", help="Run directory or candidate file.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value, e.g. plan.loss=chunked.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
VocabSize = Annotated[
    int | None, typer.Option(metavar="N", help="Words of the model. [default: as the config or data say, or 50304]")
]
Device = Annotated[str, typer.Option(help="cpu, cuda:0, or auto: the first CUDA device, else the CPU.")]


def main() -> None:
    """Entry of the console script."""
    from autotune.environment import start_again_as_worker
    from autotune.search.timekeeping import process_started

    if next((word for word in sys.argv[1:] if not word.startswith("-")), "") == "train":
        start_again_as_worker()
    terminal.open_streams()
    interrupt = _Interrupt()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks, and a shell for what runs in its background
            signal.signal(number, interrupt)
    sys.exit(run(sys.argv[1:], process_started()))


class _Interrupt:
    """KeyboardInterrupt at a signal. Those that follow at once belong to it and must not disturb the saving: an
    impatient Ctrl-C, the second SIGHUP of a closed ssh, a service manager's SIGHUP after its SIGTERM."""

    SECONDS = 5.0

    def __init__(self) -> None:
        self._last = -math.inf

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() - self._last > self.SECONDS:
            self._last = time.monotonic()
            raise KeyboardInterrupt


def run(arguments: list[str], started: float | None = None) -> int:
    """Run one command; its exit code. What goes wrong is one line on stderr, with --debug a traceback too. `started`:
    when the process began, by `time.monotonic`; None: now."""
    started = time.monotonic() if started is None else started
    try:
        # --debug is understood wherever it stands: it is added after the fact.
        words = [a for a in arguments if a != "--debug"]
        code = app(words, prog_name="autotune", standalone_mode=False, obj=started)
        sys.stdout.flush()
        if code == InterruptedByUser.exit_code:  # typer's silent answer to Ctrl-C
            raise KeyboardInterrupt
        return int(code or 0)
    except (BrokenPipeError, SystemExit):  # the reader, `head` for example, has seen enough; typer makes it an exit
        terminal.silence(sys.stdout)
        return 0
    except BaseException as error:
        secrets = secrets_in(arguments)
        if "--debug" in arguments:
            print(scrub(traceback.format_exc(), secrets), end="", file=sys.stderr)
        message, code = _explained(error)
        terminal.say(f"error: {one_line(scrub(message, secrets), LONGEST)}")
        if isinstance(error, OSError):  # it may be stdout's own
            terminal.flush(sys.stdout)
        return code


def _explained(error: BaseException) -> tuple[str, int]:
    """What to tell, and the exit code."""
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
    return f"a defect in autotune: {type(error).__name__}: {error}; please report it with the output of --debug", 1


def _version(wanted: bool) -> None:
    if wanted:
        terminal.write(f"autotune {autotune.__version__}")
        raise typer.Exit


@app.callback()
def autotune_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print a traceback with an error.")] = False,
) -> None:
    """Measure, do not guess: memory profiling and autotuning for nanoGPT-style training.

    autotune search --budget 1h, then autotune report RUN, then autotune train RUN."""
    del version, debug
    if (note := places.settle(os.environ)) and not os.environ.get("AUTOTUNE_CACHE_DIR"):
        terminal.say(f"note: {note}")


@app.command()
def search(
    context: typer.Context,
    budget: Annotated[
        str, typer.Option(metavar="TIME", help="Hard wall clock, everything included. [default: 1h]")
    ] = "",
    objective: Annotated[
        str, typer.Option(metavar="loss|throughput", help="[default: loss, or throughput where the shape is fixed]")
    ] = "",
    memory_limit: Annotated[str, typer.Option(metavar="SIZE", help="24GiB. [default: what the device has]")] = "",
    train_time: Annotated[
        str, typer.Option(metavar="TIME", help="The training to predict for lasts so long: 24h.")
    ] = "",
    train_tokens: Annotated[str, typer.Option(metavar="COUNT", help="The training sees so many tokens: 10B.")] = "",
    model: Annotated[str, typer.Option(metavar="LxHxW", help="Fix the shape: 12x12x768, layers x heads x width.")] = "",
    from_file: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Start from a nanoGPT config file and keep its shape.")
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Shards. [default: synthetic tokens]")] = None,
    vocab_size: VocabSize = None,
    choices: Annotated[
        list[str] | None, typer.Option(metavar="NAME=A,B", help="Try only these; can be repeated. See --dry-run.")
    ] = None,
    device: Device = "auto",
    workers: Annotated[int, typer.Option(help="Trials at the same time.")] = 1,
    storage: Annotated[str, typer.Option(metavar="URL", help="Of an Optuna storage. [default: RUN/study.db]")] = "",
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with a search; only with --budget.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
    name: Annotated[str, typer.Option(help="Of results/NAME. [default: the time]")] = "",
    law: Annotated[str, typer.Option(help="Scaling law of the objective loss.")] = "lingle",
    calibrate_loss: Annotated[
        bool, typer.Option("--calibrate-loss", help="First move the law by two pilots, in 1/5 of the budget.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print settings and space; measure nothing.")] = False,
    other_machine: Annotated[
        bool, typer.Option("--other-machine", help="Resume although this is not the run's machine or torch.")
    ] = False,
) -> None:
    """Try real candidates within a budget.

    Everything lands in results/NAME: trials.csv to review, best.toml to train, report.html."""
    started: float = context.obj  # the budget holds everything, also what the next lines take
    _load_numpy()
    from autotune.environment import busy_machine, probe
    from autotune.runs import directory as run_directory
    from autotune.search import loop, resolve
    from autotune.train.output import tracker_notes

    remarks = (busy,) if (busy := busy_machine()) else ()
    if resume is not None:
        _refuse_beside_resume(context)
        seconds = parse_duration(budget) if budget else None
        here = partial(probe, device)  # once the time is being written down
        go_on = partial(loop.resume, resume, here, budget_seconds=seconds, same_machine=not other_machine)
        _watch(resume, partial(go_on, started=started, remarks=remarks), remarks)
        return
    if other_machine:
        raise ConfigError("--other-machine is for a search that goes on; give --resume RUN with it")
    found = probe(device)
    asked = resolve.resolve(
        found,
        budget=budget or "1h",
        objective=objective,
        memory_limit=memory_limit,
        train_time=train_time,
        train_tokens=train_tokens,
        model=model,
        from_file=from_file,
        data=data,
        vocab_size=vocab_size,
        choices=choices or (),
        workers=workers,
        storage=storage,
        seed=seed,
        name=name,
        law=law,
        calibrate_loss=calibrate_loss,
    )
    for note in (*asked.notes, *tracker_notes(asked.tracking)):
        terminal.say(f"note: {note}")
    if dry_run:
        terminal.write_lines(resolve.describe_settings(asked, found))
        return
    if not name:
        asked = replace(asked, name=run_directory.claim_name(Path("results"), asked.name))
    directory = Path("results", asked.name)
    begin = partial(loop.search, asked, directory, found, started=started, calibrate_loss=calibrate_loss)
    _watch(directory, partial(begin, storage_url=storage, remarks=remarks), remarks)


def _load_numpy() -> None:
    """With one thread, unless the user has chosen: between two trials a second one would only be waited for, long where
    the machine is busy. Only OpenBLAS reads it, as it loads; children must not inherit it."""
    if "OPENBLAS_NUM_THREADS" not in os.environ:
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        importlib.import_module("numpy")
        del os.environ["OPENBLAS_NUM_THREADS"]


_OF_RESUME = ("resume", "budget", "device", "other_machine")


def _refuse_beside_resume(context: typer.Context) -> None:
    options = [option for option in context.command.params if option.name not in _OF_RESUME]
    sources = {option.opts[0]: context.get_parameter_source(str(option.name)) for option in options}
    if given := [flag for flag, source in sources.items() if source and source.name == "COMMANDLINE"]:
        raise ConfigError(f"--resume goes on with the run's own settings; leave out {', '.join(given)}")


def _watch(directory: Path, go: "Callable[..., object]", remarks: tuple[str, ...]) -> None:
    """Run a search under the eyes of the user, then show its report, also of one in which nothing fits."""
    from autotune.measure.runner import trials_in_a_row
    from autotune.model.compile_cache import compile_cache_dir, make_cache
    from autotune.search import progress

    make_cache(compile_cache_dir())
    show = partial(_report, [directory], html=True, json=False, top=10)
    try:
        with progress.show_progress(remarks) as notify, trials_in_a_row() as measure:
            go(notify=notify, measure=measure)
    except NoFeasibleError:
        show()
        raise
    show()


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    html: Annotated[bool, typer.Option("--html", help="Write report.html and plots/ into each run.")] = False,
    json: Json = False,
    top: Annotated[int, typer.Option(min=1, help="How many of the best trials to show.")] = 10,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="First write the run's files again from study.db.")
    ] = False,
) -> None:
    """Show what searches measured, and what became of it in training.

    One run in full, several side by side; a training's directory alone shows the training."""
    from autotune.search.loop import rebuild as write_again

    for path in runs if rebuild else []:
        write_again(path)
    _report(runs, html, json, top)


def _report(runs: list[Path], html: bool, json: bool, top: int) -> None:
    from autotune.report import html as page
    from autotune.report import run as record
    from autotune.report import table, training
    from autotune.runs import read

    loaded = [read.load_run(path) for path in runs if not training.is_training(path)]
    trained = training.trainings_of(runs)
    pages = [page.write_html(one) for one in loaded] if html else []
    if json:
        parts = {"runs": [record.as_json(one) for one in loaded], "trainings": [training.as_json(t) for t in trained]}
        terminal.write(json_module.dumps(parts, allow_nan=False))
    else:
        if loaded:
            table.print_text(record.run_report(loaded[0], top) if len(loaded) == 1 else record.comparison(loaded))
        if trained:
            terminal.write("Trained, as measured or predicted -> as it came:")
            table.print_text(training.training_table(trained))
    for written in pages:
        terminal.say(f"wrote {written}")


@app.command()
def trial(
    toml: CandidateArgument,
    assignments: Assignments = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure one candidate in the foreground.

    The way to reproduce a row of trials.csv. Exit code 1 where the candidate is not ok."""
    from autotune.config.toml import read_candidate
    from autotune.environment import probe
    from autotune.measure.runner import run_trial
    from autotune.measure.types import TrialRequest, to_json
    from autotune.model.compile_cache import compile_cache_dir, make_cache

    candidate = read_candidate(toml, tuple(assignments or ())).candidate
    request = TrialRequest(candidate=candidate, device=probe(device).device, result_path="")
    if candidate.plan.compile != "off":
        make_cache(compile_cache_dir())
    log = Path(tempfile.mkdtemp(prefix="autotune-log-"), "trial.log")
    terminal.say(f"measuring on {request.device}, the worker's output goes to {log}")
    result = run_trial(request, log)
    if json:
        terminal.write(to_json(result))
    else:
        from autotune.report import facts, table

        table.print_text(facts.trial_facts(result, candidate.shape))
    raise typer.Exit(0 if result.status == "ok" else 1)


@app.command()
def profile(
    tomls: Annotated[list[Path], typer.Argument(metavar="TOML...", help="Candidate file or run; two are compared.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where timeline and snapshot go.")] = Path("results/profile"),
    assignments: Assignments = None,
    device: Device = "auto",
) -> None:
    """Show where the memory of one step goes: by category at the peak, and over time."""
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
    found = pages.profile_candidates(named, out=out, device=where)
    for one in found:
        table.print_text(pages.profile_report(one))
    if len(found) == 2:
        table.print_text(pages.comparison(*found))


@app.command()
def estimate(
    memory_limit: Annotated[str, typer.Option(metavar="SIZE", help="Of the card.")] = "24GiB",
    model: Annotated[
        list[str] | None, typer.Option(metavar="LxHxW", help="12x12x768; may be repeated. [default: the guide's rows]")
    ] = None,
    vocab_size: VocabSize = None,
    assignments: Assignments = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Of a search on such a card. [default: none, wide intervals]")
    ] = None,
) -> None:
    """Predict the peak memory of shapes and micro batches on a card; needs no device.

    GiB by micro batch: - lies beyond the limit, ? only a trial can tell."""
    from autotune.memory import estimate as estimates
    from autotune.memory import model as memory_model
    from autotune.report import table
    from autotune.runs.directory import MEMORY_MODEL_JSON

    limit = parse_bytes(memory_limit)
    known = memory_model.MemoryModel(device="cuda")
    if calibration is not None:
        known = memory_model.load(calibration / MEMORY_MODEL_JSON if calibration.is_dir() else calibration)
    rows, certainty = estimates.estimate(
        known, estimates.candidates(model or [], tuple(assignments or ()), vocab_size), limit
    )
    table.print_text(table.make_table(rows))
    terminal.write_lines(certainty)


@app.command()
def train(
    candidate: CandidateArgument,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest good checkpoint.")] = False,
    max_tokens: Annotated[
        str | None, typer.Option(metavar="COUNT", help="Stop after so many tokens: 300M. [default: as the recipe says]")
    ] = None,
    max_time: Annotated[str | None, typer.Option(metavar="TIME", help="Stop after this wall clock: 24h.")] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Begin with these weights: nanoGPT's ckpt.pt, a GPT-2 directory, a run."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Of the training. [default: RUN/train]")] = None,
    device: Device = "auto",
) -> None:
    """Train a candidate to completion.

    By the very step that was measured; the summary says whether speed and memory are as measured.
    On several cards: torchrun --nproc-per-node 2 -m autotune train RUN."""
    from autotune.config.toml import read_candidate
    from autotune.config.train_settings import TrainSettings, locate
    from autotune.train.output import summary_text
    from autotune.train.trainer import train as run_training

    file, default_out = locate(candidate)
    asked = TrainSettings(
        file=read_candidate(file),
        out=out or default_out,
        device=device,
        resume=resume,
        init_from=init_from,
        max_tokens=None if max_tokens is None else parse_count(max_tokens),
        max_seconds=None if max_time is None else parse_duration(max_time),
    )
    if summary := run_training(asked):
        terminal.write_lines(summary_text(summary))


@app.command()
def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="Run, training directory or checkpoint.")
    ],
    to: Annotated[str, typer.Option(metavar="hf|nanogpt", help="For transformers, or for nanoGPT's own scripts.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new directory.")],
    cut_vocab: Annotated[
        bool, typer.Option("--cut-vocab", help="hf: without the rows that pad the vocabulary beyond GPT-2's 50257.")
    ] = False,
) -> None:
    """Write a trained model for other tools.

    hf: a directory for GPT2LMHeadModel.from_pretrained. nanogpt: a ckpt.pt for sample.py and train.py."""
    from autotune.train import exchange

    if note := exchange.export(checkpoint, to, out, cut_vocab=cut_vocab):
        terminal.say(f"note: {note}")
    terminal.write(str(out))


@app.command()
def sample(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Run, training directory or checkpoint.")],
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "",
    tokens: Annotated[int, typer.Option(help="Length at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw among so many likeliest tokens; 0: among all.")] = 200,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal text.")] = 1337,
    device: Device = "auto",
) -> None:
    """Print text from a trained model."""
    from autotune.environment import describe
    from autotune.train.sample import sample as draw

    place = describe(device).device
    text = draw(checkpoint, prompt=prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed, device=place)
    terminal.write(terminal.visible(text, keep="\n\t") if sys.stdout.isatty() else text)


@data.command()
def prepare(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the shards go.")],
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[SOURCE]", help="HuggingFaceFW/fineweb, a parquet, jsonl, csv or text file, or a folder."
        ),
    ] = None,
    from_python_docs: Annotated[
        bool, typer.Option("--from-python-docs", help="The documentation inside Python: real English, no download.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="Subset of a dataset on the hub: sample-10BT.")] = None,
    max_tokens: Annotated[str | None, typer.Option(metavar="COUNT", help="Stop after so many tokens: 300M.")] = None,
    shard_tokens: Annotated[str, typer.Option(metavar="COUNT", help="Tokens of a full shard.")] = "100M",
    file_format: Annotated[
        str, typer.Option("--format", metavar="shards|nanogpt", help="nanogpt: train.bin and val.bin, no headers.")
    ] = "shards",
    workers: Annotated[int | None, typer.Option(help="Threads. [default: one a core]")] = None,
) -> None:
    """Turn text into shards of GPT-2 tokens.

    After an interruption the same command goes on."""
    from autotune.data import info as look
    from autotune.data import prepare as making
    from autotune.data.sources import PYTHON_DOCS
    from autotune.report import facts, table

    if (source is None) != from_python_docs:
        raise typer.BadParameter("give either SOURCE or --from-python-docs")
    settings = making.PrepareSettings(
        source=source or PYTHON_DOCS,
        out=out,
        name=name,
        max_tokens=None if max_tokens is None else parse_count(max_tokens),
        shard_tokens=parse_count(shard_tokens),
        format=cast("Format", file_format),
        workers=workers,
    )
    terminal.say(f"{out}: {making.prepare(settings).outcome}")
    table.print_text(facts.facts_table(look.info(out)))


@data.command()
def info(directory: Annotated[Path, typer.Argument(metavar="DIR", help="Data directory.")]) -> None:
    """Say what a data directory holds."""
    from autotune.data import info as look
    from autotune.report import facts, table

    table.print_text(facts.facts_table(look.info(directory)))


@app.command()
def kernels() -> None:
    """List the kernels and why some are absent."""
    from autotune.environment import probe
    from autotune.report import doctor, table

    table.print_text(doctor.kernel_table(probe()))


@app.command(name="doctor")
def doctor_command() -> None:
    """Say what is here and what is missing, and why.

    Exit code 1 where no search is possible."""
    from autotune.report import doctor, table

    checks = doctor.examine()
    table.print_text(doctor.check_table(checks))
    raise typer.Exit(0 if doctor.can_search(checks) else 1)

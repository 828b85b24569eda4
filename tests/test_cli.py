"""The command line: frozen commands and options, instant help, one line for a mistake, the right exit code."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import typer
from background import heed_signals
from recorded_run import candidate, write_run

import autotune
from autotune import cli
from autotune.config.search_settings import SearchSettings
from autotune.data.shards import write_shard
from autotune.errors import CheckpointError, NoFeasibleError

ROOT = Path(autotune.__file__).parent.parent
OPTIONS = {
    "": ["--version", "--debug", "--install-completion", "--show-completion"],
    "search": [
        "--budget", "--objective", "--memory-limit", "--train-time", "--train-tokens", "--model", "--from", "--guide",
        "--data", "--vocab-size", "--choices", "--device", "--workers", "--nproc", "--storage", "--resume", "--seed",
        "--sampler", "--name", "--law", "--race", "--keep", "--for", "--dry-run", "--other-machine", "--json",
    ],
    "report": ["RUN...", "--html", "--json", "--top", "--rebuild"],
    "race": ["RUN|FILE...", "--time", "--tokens", "--seeds", "--data", "--budget", "--out", "--device", "--json"],
    "trial": ["RUN|TOML", "--set", "--device", "--json"],
    "profile": ["TOML...", "--out", "--set", "--device", "--json"],
    "estimate": [
        "--gpu", "--memory-limit", "--model", "--vocab-size", "--set", "--calibration", "--tokens", "--toml", "--json",
    ],
    "guide": ["[ROW...]", "--measure", "--device", "--out", "--json"],
    "train": [
        "RUN|TOML", "--resume", "--max-tokens", "--train-time", "--max-time", "--from-start", "--init-from", "--out",
        "--device", "--json",
    ],
    "export": ["RUN|CHECKPOINT", "--to", "--out", "--cut-vocab", "--json"],
    "sample": ["CHECKPOINT", "--prompt", "--tokens", "--temperature", "--top-k", "--seed", "--device", "--json"],
    "kernels": ["--json"],
    "doctor": ["--json"],
    "data prepare": ["SOURCE", "--out", "--name", "--max-tokens", "--shard-tokens", "--format", "--workers", "--json"],
    "data info": ["DIR", "--json"],
}  # fmt: skip


def named(command: object) -> list[str]:
    """Options by their flag, arguments by their metavar."""
    parameters = [p for p in command.params if p.name != "help"]  # type: ignore[attr-defined]
    return [p.opts[0] if p.param_type_name == "option" else p.metavar for p in parameters]


def test_commands_and_options_are_frozen() -> None:
    root = typer.main.get_command(cli.app)
    found = {"": named(root)}
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        inside = getattr(command, "commands", None)
        below = {f"{name} {sub}": named(one) for sub, one in inside.items()} if inside else {name: named(command)}
        found |= below
    assert found == OPTIONS


def start(*arguments: str, cwd: Path = ROOT, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-m", "autotune", *arguments]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=variables, check=False)


def test_help_is_instant() -> None:
    """By processor time, which other programs do not change."""
    seconds = []
    for _ in range(3):
        before = os.times()
        assert start("--help").returncode == 0
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))  # user and system time of children
    assert min(seconds) < 0.5


@pytest.mark.parametrize("arguments", [["--help"], ["search", "--help"], ["data", "prepare", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    done = start(*arguments, flags=("-X", "importtime"))
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0
    assert "autotune.cli" in loaded
    assert not loaded & {"torch", "pandas", "optuna", "matplotlib", "numpy", "rich.console", "tiktoken", "datasets"}


def test_help_fits_80_columns_groups_commands_and_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for command in OPTIONS:
        assert cli.run([*command.split(), "--help"]) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 80
        assert "Examples:\n" in text or command in ("data info", "kernels", "doctor")
        if not command:
            assert [line for line in text.splitlines() if line in map("{}:".format, cli._PANELS)] == [
                "Search:", "Train:", "Understand:", "Data:", "This machine:",
            ]  # fmt: skip
            assert all(f"\n  {name.partition(' ')[0]} " in text for name in OPTIONS if name)


@pytest.mark.parametrize(("typed", "completed"), [("autotune tr", {"trial", "train"}), ("autotune data i", {"info"})])
def test_the_shell_completes_commands(typed: str, completed: set[str]) -> None:
    asked = {"_AUTOTUNE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'autotune'; from autotune.cli import main; main()"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | asked, cwd=ROOT, check=False)
    assert (done.returncode, set(done.stdout.split()), done.stderr) == (0, completed, "")
    command += ["--show-completion", "bash"]
    named = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # tests may have no shell for a parent
    script = subprocess.run(command, capture_output=True, text=True, env=named, cwd=ROOT, check=False).stdout
    assert "_AUTOTUNE_COMPLETE=complete_bash" in script


def told_by(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and the single line on stderr; nothing is on stdout."""
    code = cli.run(list(arguments))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return code, err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Missing command (see `autotune --help`)"),
        (["data"], "Missing command (see `autotune data --help`)"),
        (["serach"], "Did you mean 'search', 'race'?"),
        (["search", "--budegt", "1h"], "--budget"),
        (["search", "--seed", "x"], "'--seed'"),
        (["search", "--budget"], "'--budget' requires an argument"),
        (["report"], "Missing argument 'RUN...'"),
        (["report", "x", "--top", "0"], "'--top'"),
        (["train", "a", "b"], "unexpected extra argument"),
        (["export", "x", "--to", "hf"], "Missing option '--out'"),
        (["data", "prepare", "x"], "Missing option '--out'"),
        (["data", "prepare", "--out", "x"], "Missing argument 'SOURCE'"),
        (["data", "prepare", "--out", "x", "y", "--from-python-docs"], "unexpected extra argument"),
    ],
)
def test_wrong_usage_is_two(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    code, text = told_by(capsys, *arguments)
    assert code == 2
    assert said in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report", "nowhere"], "nowhere is not a directory; give a run"),
        (["report", "."], "search.toml does not exist"),
        (["report", "--rebuild", "."], "study.db"),
        (["train", "nowhere"], "nowhere does not exist; give a run directory or a TOML file"),
        (["train", "."], "best.toml does not exist; the run has no feasible trial yet"),
        (["train", "x.toml", "--max-tokens", "many"], "x.toml does not exist"),
        (["trial", "x.toml"], "x.toml does not exist"),
        (["trial", "best.toml", "--set", "plan.los=full"], "did you mean 'loss'?"),
        (["profile", "x.toml"], "x.toml does not exist"),
        (["profile", "best.toml", "--set", "plan.los=full"], "did you mean 'loss'?"),
        (["train", "best.toml", "--max-time", "soon"], "duration 'soon' is not understood"),
        (["train", "best.toml", "--max-time", "1h", "--max-tokens", "1M"], "exclude each other"),
        (["train", "best.toml", "--train-time", "1h", "--max-tokens", "1M"], "exclude each other"),
        (["export", "nowhere", "--to", "hf", "--out", "x"], "nowhere holds no checkpoint"),
        (["export", "nowhere", "--to", "gguf", "--out", "x"], "--to = 'gguf' is not known; allowed: hf, nanogpt"),
        (["data", "info", "nowhere"], "nowhere does not exist; make it: `autotune data prepare SOURCE --out nowhere`"),
        (["data", "info", "some/text"], "`autotune data prepare some/text --out data/text`"),
        (["data", "prepare", "--from-python-docs", "--out", "x", "--format", "npy"], "--format 'npy' is not known"),
        (["estimate", "--vocab-size", "0"], "--vocab-size = 0 is not allowed"),
        (["data", "prepare", "nowhere.txt", "--out", "x"], "nowhere.txt"),
        (["data", "prepare", "--from-python-docs", "--out", "x", "--max-tokens", "lots"], "count 'lots'"),
    ],
)
def test_a_users_mistake_exits_with_1(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "best.toml" in arguments:
        (write_run(tmp_path, best=candidate(8)) / "best.toml").rename("best.toml")
    before = sorted(tmp_path.iterdir())
    code, text = told_by(capsys, *arguments)
    assert code == 1
    assert said in text
    assert sorted(tmp_path.iterdir()) == before  # nothing half-written


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (CheckpointError("damaged"), 1),
        (NoFeasibleError("none"), 3),
        (KeyboardInterrupt(), 130),
        (OSError(28, "full"), 1),
        (ZeroDivisionError("x"), 1),
    ],
)
def test_every_error_has_its_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr("autotune.runs.read.load_run", fail)
    assert told_by(capsys, "report", "x")[0] == code
    assert cli.run(["report", "x", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_report_on_stdout_json_as_one_object_and_files_named_on_stderr(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = write_run(tmp_path, best=candidate(24))
    assert cli.run(["report", str(run)]) == 0
    assert f"next: autotune train {run}" in capsys.readouterr().out
    assert cli.run(["report", str(run), str(run), "--json", "--html"]) == 0
    out, err = capsys.readouterr()
    assert [one["best"]["trial"] for one in json.loads(out)["runs"]] == [6, 6]
    assert f"wrote {run / 'report.html'}" in err


def test_an_unwritable_run_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = write_run(tmp_path, best=candidate(24))
    (run / "report.html").mkdir()
    code, text = told_by(capsys, "report", str(run), "--html")
    assert (code, "report.html cannot be written" in text) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["estimate", "--model", "2x2x64"], "models"),
        (["doctor"], "checks"),
        (["kernels"], "kernels"),
        (["data", "prepare", "text.txt", "--out", "made"], "training"),
        (["data", "info", "made"], "vocabulary"),
    ],
)
def test_json_is_one_object(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("words and words\n\n" * 2000)
    if "info" in arguments:
        assert cli.run(["data", "prepare", "text.txt", "--out", "made"]) == 0
        capsys.readouterr()
    cli.run([*arguments, "--json"])
    assert json.loads(capsys.readouterr().out)[key]


def test_every_command_has_json() -> None:
    assert not [name for name, options in OPTIONS.items() if name and "--json" not in options]


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path, flags: list[str]) -> None:
    run = write_run(tmp_path, best=candidate(24))
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "autotune", "report", str(run), *flags]
    told = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    os.close(writing)
    assert (told.returncode, told.stderr) == (0, b"")


INTERRUPTED = """
import os, signal, sys, time
from autotune import cli
import autotune.runs.read

def slow(*_):
    try:
        os.kill(os.getpid(), {first})
        time.sleep(10)
    except KeyboardInterrupt:
        for number in {others}:
            os.kill(os.getpid(), number)
        time.sleep(0.05)
        open({saved!r}, "w").close()
        raise

autotune.runs.read.load_run = slow
sys.argv = ["autotune", "report", "x"]
cli.main()
"""


@pytest.mark.parametrize(
    ("first", "others"),
    [
        (signal.SIGTERM, []),
        (signal.SIGHUP, [signal.SIGHUP]),
        (signal.SIGTERM, [signal.SIGHUP, signal.SIGTERM]),
        (signal.SIGINT, [signal.SIGINT, signal.SIGINT]),
    ],
)
def test_a_signal_is_an_interruption_and_more_of_them_do_not_disturb_the_saving(
    tmp_path: Path, first: int, others: list[int]
) -> None:
    """main() turns it into KeyboardInterrupt, so that workers are killed and what is measured is kept."""
    code = INTERRUPTED.format(first=int(first), others=[int(n) for n in others], saved=str(tmp_path / "saved"))
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False, timeout=30,
        preexec_fn=heed_signals,
    )  # fmt: skip
    assert told.returncode == 130
    assert told.stderr == "error: interrupted\n"
    assert (tmp_path / "saved").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # importing the command line changes nothing


def test_nohup_holds(tmp_path: Path) -> None:
    code = INTERRUPTED.format(first=int(signal.SIGHUP), others=[], saved=str(tmp_path / "saved"))
    code = code.replace("time.sleep(10)", "os.kill(os.getpid(), signal.SIGTERM)")
    command = ["nohup", sys.executable, "-c", code]
    told = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=30)
    assert told.returncode == 130  # by SIGTERM: the SIGHUP before it changed nothing
    assert (tmp_path / "saved").exists()


CLOSED = """
import os, sys, time
from autotune import cli
import autotune.runs.read

def slow(*_):
    try:
        print("begun", flush=True)
        time.sleep(20)
    except KeyboardInterrupt:
        print("a note of progress", file=sys.stderr, flush=True)
        open(sys.argv[2] + "/saved", "w").close()
        raise

autotune.runs.read.load_run = slow
cli.main()
"""


def test_a_closed_terminal_saves(tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and writing to the terminal fails from then on."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CLOSED, "report", str(tmp_path)],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, start_new_session=True,
        preexec_fn=lambda: (heed_signals(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
    )  # fmt: skip
    os.close(theirs)
    assert os.read(ours, 5) == b"begun"
    os.close(ours)
    assert process.wait(timeout=30) == 130
    assert (tmp_path / "saved").exists()


class TestSearch:
    """`search` up to the point where a device is needed: the machine is given, no torch is started."""

    @pytest.fixture(autouse=True)
    def here(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from recorded_run import ENVIRONMENT

        monkeypatch.setattr("autotune.environment.probe", lambda device: ENVIRONMENT)
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--budget", "0"], "--budget 0 leaves no time"),
            (["--budget", "soon"], "duration 'soon' is not understood"),
            (["--objective", "los"], "did you mean 'loss'?"),
            (["--memory-limit", "1TiB"], "--memory-limit"),
            (["--memory-limit", "0"], "--memory-limit"),
            (["--memory-limit", "24"], "did you mean 24GiB?"),
            (["--train-tokens", "10"], "less than one optimizer step (524,288 tokens); did you mean 10B?"),
            (["--model", f"{10**25}x12x768"], "--model"),
            (["--model", "99999999999x12x768"], "the largest value is 10,000"),
            (["--model", "12x12"], "--model '12x12' is not understood"),
            (["--model", "12x12x768", "--from", "x.py"], "--from"),
            (["--train-time", "1h", "--train-tokens", "1B"], "exclude each other"),
            (["--from", "x.py"], "x.py"),
            (["--name", "../x"], "--name '../x' is not the plain name of a directory"),
            (["--data", "nowhere"], "--data nowhere is not a directory"),
            (["--data", "some/text"], "`autotune data prepare some/text --out data/text`"),
            (["--vocab-size", "0"], "--vocab-size = 0 is not allowed"),
            (["--law", "hofmann"], "scaling law 'hofmann' is not known; did you mean 'hoffmann'?"),
            (["--race", "on"], "--race on trains on your text; add --data DIR, or use --race off"),
            (["--keep", "learning", "--objective", "loss"], "--keep learning does not; leave one out"),
            (["--for", "nanochat"], "--for = 'nanochat' is not known; did you mean 'nanogpt'?"),
            (["--resume", "nowhere"], "nowhere/search.toml does not exist"),
            (["--resume", "x", "--seed", "3", "--name", "y"], "leave out --seed, --name"),
            (["--resume", "x", "--choices", "compile=off"], "leave out --choices"),
            (["--resume", "x", "--vocab-size", "65"], "leave out --vocab-size"),
            (["--other-machine"], "give --resume RUN or --storage URL"),
        ],
    )
    def test_mistakes_exit_with_1(self, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
        code, text = told_by(capsys, "search", *arguments)
        assert code == 1
        assert said in text
        assert list(Path().iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["nowhere.toml"], "nowhere.toml does not exist"),
            (["nowhere"], "nowhere does not exist"),
            (["mine.py"], "mine.py names no data, and a race trains on text; give --data DIR"),
            (["mine.py", "--data", "nowhere"], "nowhere is not a directory of tokens"),
            (["mine.py", "--time", "3m", "--tokens", "1M"], "--time and --tokens exclude each other"),
            (["mine.py", "--time", "soon"], "soon"),
            (["mine.py", "mine.py", "--data", "text"], "two candidates are called mine"),
            (["mine.py", "--data", "text"], "mine: 100 training tokens give 1 sequences of 64, 4 are needed"),
            (["mine.py", "--data", "text", "--time", "0s"], "leave nothing to train"),
        ],
    )
    def test_mistakes_of_a_race_exit_with_1(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
    ) -> None:
        rows = 4 if "0s" not in arguments else 1
        Path("mine.py").write_text(f"batch_size = {rows}\ngradient_accumulation_steps = 1\nblock_size = 64\n")
        Path("text").mkdir()
        for split in ("train", "val"):
            write_shard(Path("text", f"a_{split}_000000.bin"), range(100))
        code, text = told_by(capsys, "race", *arguments)
        assert code == 1
        assert said in text
        assert not Path("results").exists()

    def test_a_dry_run_prints_and_leaves_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.run(["search", "--dry-run", "--name", "x"]) == 0
        assert "budget        1h00m" in capsys.readouterr().out
        assert list(Path().iterdir()) == []

    def test_results_that_cannot_be_made_are_an_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("results").write_text("a file where a folder belongs")
        code, text = told_by(capsys, "search", "--name", "x", "--model", "12x12x768")
        assert (code, "results/x cannot be made" in text) == (1, True)

    @pytest.mark.parametrize("words", [("search", "--name", "x"), ("search", "--resume", "results/x")])
    def test_a_cache_that_cannot_be_written_is_an_error_before_anything_is_made(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
    ) -> None:
        monkeypatch.setenv("AUTOTUNE_CACHE_DIR", "/dev/null/cache")
        code, text = told_by(capsys, *words)
        assert code == 1
        assert "the compile cache /dev/null/cache cannot be written" in text
        assert "set AUTOTUNE_CACHE_DIR" in text
        assert list(Path().iterdir()) == []

    def test_two_searches_of_one_second_have_names_of_their_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("autotune.search.resolve.time.strftime", lambda form: "20250101-120000-")
        made: list[tuple[str, Path]] = []

        def search(asked: SearchSettings, directory: Path, here: object, **watched: object) -> None:
            made.append((asked.name, directory))
            raise NoFeasibleError("stop")

        monkeypatch.setattr("autotune.search.loop.search", search)
        monkeypatch.setattr(cli, "_report", lambda *_, **__: None)
        for _ in range(3):
            cli.run(["search", "--model", "12x12x768"])
        assert [name for name, _ in made] == [f"20250101-120000-throughput{end}" for end in ("", "-2", "-3")]
        assert all(directory == Path("results", name) and directory.is_dir() for name, directory in made)

    def test_the_command_is_recorded_without_passwords(self, monkeypatch: pytest.MonkeyPatch) -> None:
        recorded = []

        def search(asked: SearchSettings, directory: Path, here: object, **watched: object) -> None:
            recorded.append(asked.command)
            raise NoFeasibleError("stop")

        monkeypatch.setattr("autotune.search.loop.search", search)
        monkeypatch.setattr(cli, "_report", lambda *_, **__: None)
        choices = ["--choices", "compile=off", "--choices", "loss=full,chunked"]
        cli.run(["search", "--model", "2x2x64", *choices, "--storage", "postgresql://me:hidden@host/db", "--json"])
        cli.run(["search", "--model", "2x2x64", "--name", "my run", "--seed", "7"])
        assert recorded == [
            "autotune search --model 2x2x64 --choices compile=off --choices loss=full,chunked "
            "--storage 'postgresql://me:***@host/db' --json",
            "autotune search --model 2x2x64 --seed 7 --name 'my run'",
        ]

    def test_nothing_feasible_shows_the_report_and_is_three(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        from recorded_run import records

        def fails(settings: object, directory: Path, here: object, **watched: object) -> None:
            directory.parent.mkdir()
            write_run(directory.parent, [r for r in records() if r.result.status != "ok"], name=directory.name)
            raise NoFeasibleError("no feasible candidate among 3")

        monkeypatch.setattr("autotune.search.loop.search", fails)
        assert cli.run(["search", "--name", "x", "--model", "12x12x768"]) == 3
        out, err = capsys.readouterr()
        assert "wanted 12.00 GiB" in out
        assert err.splitlines()[-1] == "error: no feasible candidate among 3"
        assert (tmp_path / "results" / "x" / "report.html").exists()

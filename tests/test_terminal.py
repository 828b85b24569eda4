"""What reaches a terminal: visible, encodable, within its width; and streams that are closed, full or gone."""

import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest
from recorded_run import candidate, records, write_run

import autotune
from autotune import terminal
from autotune.report.run import run_report
from autotune.runs.read import load_run

ROOT = Path(autotune.__file__).parent.parent
HOSTILE = "a\x1b[31m\x07\x9b2J\u202eb\u2028c\x00\udcff\x7f"


def test_nothing_acts_on_the_terminal() -> None:
    assert terminal.visible(HOSTILE) == r"a\x1b[31m\x07\x9b2J\u202eb\u2028c\x00\udcff\x7f"
    assert terminal.visible("a\tb\nc\rd", keep="\n\t") == "a\tb\nc\\rd"


@pytest.mark.parametrize(
    "text", ["plain", "Größe ± 3 → 4", "日本語", "می\N{ZERO WIDTH NON-JOINER}خواهم", "a\u00a0b", "👩\u200d🔬"]
)
def test_languages_stay_as_they_are(text: str) -> None:
    assert terminal.visible(text) == text


def test_lines_break_between_words_and_values_stay_below_each_other() -> None:
    text = "name      one two three\n/a/path/that/is/longer/than/the/line next"
    assert terminal.wrapped(text, 20) == (
        "name      one two\n          three\n/a/path/that/is/longer/than/the/line\nnext"
    )
    assert terminal.wrapped(text, None) == text


def autotune_with(shell: str, run: Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """`autotune WORDS REDIRECTIONS` in a shell."""
    return subprocess.run(
        ["sh", "-c", f'"$0" -m autotune {shell}', sys.executable], capture_output=True, cwd=run.parent, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path, best=candidate(24))


@pytest.mark.parametrize(
    ("shell", "code", "stderr"),
    [
        ("report run >&-", 0, b""),
        pytest.param("report run --json >&-", 0, b"", marks=pytest.mark.slow),
        ("report run 2>&-", 0, b""),
        ("report run <&- >&- 2>&-", 0, b""),
        ("report nowhere 2>&-", 1, b""),
        ("report nowhere 2>/dev/full", 1, b""),
        ("report run --html 2>/dev/full", 0, b""),
        ("report run >/dev/full", 1, b"error: stdout cannot be written: No space left on device; "),
        ("report run --json >/dev/full", 1, b"error: stdout cannot be written: No space left on device; "),
        ("--help >/dev/full", 1, b"error: [Errno 28] No space left on device"),
        ("--version >/dev/full", 1, b"error: stdout cannot be written: No space left on device; "),
        ("search --model 12x12 2>/dev/full", 1, b""),
    ],
)
def test_streams_that_take_nothing(run: Path, shell: str, code: int, stderr: bytes) -> None:
    told = autotune_with(shell, run)
    assert told.returncode == code
    assert told.stderr.startswith(stderr)
    assert told.stderr.count(b"\n") == bool(stderr)  # one line, and none from Python at its exit


def test_a_file_does_not_get_the_number_of_a_closed_stream(run: Path) -> None:
    """Otherwise what is printed later would be written into it."""
    code = (
        "import os; from autotune import terminal; terminal.open_streams(); file = open('mine', 'w');"
        "print('a result'); os.write(1, b'of a library'); os.write(2, b'another'); print(file.fileno(), file=file)"
    )
    shell = f'"$0" -c "{code}" <&- >&- 2>&-'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(["sh", "-c", shell, sys.executable], cwd=run.parent, env=environment, check=True)
    assert int((run.parent / "mine").read_text()) > 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "ascii:strict"])
def test_an_encoding_that_lacks_characters(run: Path, encoding: str) -> None:
    told = autotune_with("report run", run, PYTHONIOENCODING=encoding)
    assert (told.returncode, told.stderr) == (0, b"")
    text = told.stdout.decode(encoding.partition(":")[0])
    assert ("15,049 +- 113 tokens/s" in text) == encoding.startswith("ascii")
    head, rule, *rows = text.partition("   trial")[2].splitlines()
    assert set(rule) == {"-"}
    assert len(rule) == max(len(row) for row in [f"   trial{head}", *rows[:4]])  # laid out as it is written


def on_terminal(columns: int, *words: str, cwd: Path) -> str:
    """What `autotune WORDS` shows on a terminal of that width, without colours."""
    child, number = pty.fork()
    if child == 0:
        ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        os.chdir(cwd)
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "TERM": "xterm"}
        variables.pop("COLUMNS", None)
        os.execve(sys.executable, [sys.executable, "-m", "autotune", *words], variables)
    content = b""
    while True:
        try:
            part = os.read(number, 1 << 16)
        except OSError:  # the terminal's other side is closed
            break
        content += part
    os.waitpid(child, 0)
    return re.sub(r"\x1b\[[0-9;]*m", "", content.decode()).replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [80, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "words",
    [("report", "run"), ("report", "run", "run"), ("kernels",), ("estimate",), ("search", "--dry-run", "--name", "x"),
     ("search", "--name", "../x"), ("trial", "nowhere.toml")],
)  # fmt: skip
def test_every_command_fits_a_narrow_terminal(run: Path, columns: int, words: tuple[str, ...]) -> None:
    text = on_terminal(columns, *words, cwd=run.parent)
    wide = [line for line in text.splitlines() if len(line.rstrip()) > columns and " " in line.strip()]
    assert text.strip()
    assert not [line for line in wide if not line.startswith("next: ")]  # a command is left whole
    assert "\N{HORIZONTAL ELLIPSIS}" not in text


def test_a_narrow_report_says_all_that_a_wide_one_says(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from autotune.report.table import print_text

    print_text(run_report(load_run(run), top=10))
    wide = set(capsys.readouterr().out.split())
    for columns in (80, 60):
        narrow = set(on_terminal(columns, "report", str(run), cwd=run.parent).split())
        assert not {word for word in wide - narrow if set(word) != {"-"}}


def test_a_message_cannot_forge_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import replace

    from autotune.report.table import print_text

    trials = records()
    trials[5] = replace(trials[5], result=replace(trials[5].result, message="\x1b[2J\x1b[1;32mall is well\u202e"))
    print_text(run_report(load_run(write_run(tmp_path, trials)), top=10))
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert r"\x1b[2J\x1b[1;32mall is well\u202e" in text

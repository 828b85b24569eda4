"""Files changed by hand or by a failing disk are read, or refused in one line."""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_machine import CUDA, Machine, settings

from autotune.config.search_settings import read_settings
from autotune.config.toml import parse_candidate, read_candidate
from autotune.data.manifest import read_manifest
from autotune.errors import AutotuneError, ConfigError, DataError, one_line, shown
from autotune.measure.types import TrialResult, from_json
from autotune.memory import model as memory_model
from autotune.report.run import as_json, run_report
from autotune.runs.directory import refuse_another_machine
from autotune.runs.read import load_run
from autotune.search import study as studies
from autotune.search.loop import rebuild, resume, search

VALUES = (
    '""', '"x"', "-1", "0", "1e308", "1e999", "NaN", "nan", "inf", "[]", "{}", "[[1]]", '{"a":1}', "true", "null",
    "9" * 5000, "0x" + "F" * 5000, "[" * 5000, '"' + "A" * 100_000 + '"', '"\\u001b[31m"', "10" + "0" * 25,
    "9223372036854775807", "-9223372036854775808", "1.5", '"=cmd"', "1979-05-27", "'''a\nb'''", '"\\u0000"', "0.0",
)  # fmt: skip
"""Values of other types and absurd sizes, and texts that are no values."""
_SPOTS = re.compile(r'(?<=[:=] )("[^"\n]*"|[-\w.]+|\[[^\]]*\]|\{\})|(?<=,)[^,\n]*(?=,)')


def mutations(text: str, count: int) -> list[str]:
    """Copies of the text with a replaced value, a replaced character, a missing end or a missing line."""
    rng, found = random.Random(0), list[str]()
    spots = [match.span() for match in _SPOTS.finditer(text)]
    for _ in range(count):
        kind, at = rng.random(), rng.randrange(len(text))
        if kind < 0.8:
            begin, end = rng.choice(spots)
            found.append(text[:begin] + rng.choice(VALUES) + text[end:])
        elif kind < 0.9:
            found.append(text[:at] + rng.choice('\0{}[\n,"\x1b=:\u00e9') + text[at + 1 :])
        elif kind < 0.95:
            found.append(text[:at])
        else:
            lines = text.splitlines(keepends=True)
            del lines[rng.randrange(len(lines))]
            found.append("".join(lines))
    return found


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, machine = tmp_path_factory.mktemp("damaged") / "run", Machine()
    search(settings(budget="60s"), path, CUDA, measure=machine.measure, clock=machine.clock)
    return path


def report(run: Path) -> None:
    loaded = load_run(run)
    run_report(loaded, 10)
    as_json(loaded)
    if loaded.damage:  # the rest is shown, and then it is an error
        raise ConfigError(loaded.damage[0])


def predicted(run: Path) -> None:
    memory_model.predict(memory_model.load(run / "memory_model.json"), read_candidate(run).candidate)


READERS: dict[str, Callable[[Path], object]] = {
    "best.toml": read_candidate,
    "search.toml": report,
    "environment.json": lambda run: (refuse_another_machine(run, CUDA), report(run)),
    "verdict.json": report,
    "memory_model.json": predicted,
    "trials.csv": report,
}


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_is_read_or_refused_in_one_line(name: str, run_dir: Path) -> None:
    file = run_dir / name
    original, refused = file.read_text(), 0
    try:
        for text in mutations(original, 100):
            file.write_text(text)
            said = ""
            try:
                READERS[name](run_dir)
            except AutotuneError as error:
                said = str(error)
            refused += bool(said)
            assert len(said) < 400
            assert said.isprintable()
    finally:
        file.write_text(original)
    assert refused > 30


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = " + "[" * 5000 + "]" * 5000, "best.toml is not valid TOML: it is nested too deeply"),
        ("x = " + "9" * 5000, "best.toml is not valid TOML: a number has too many digits"),
        ("[model]\nn_layer = 1" + "0" * 25 + "\n[plan]", "the largest number is 9223372036854775807"),
        ("[model]\nn_layer = 20000\n[plan]", "model.n_layer = 20000 is not allowed; the largest value is 10,000"),
        ("[model]\nn_layer = 0x" + "F" * 5000 + "\n[plan]", "model.n_layer = a number of 20000 bits is not allowed"),
        ("[model]\narch = '" + "x" * 10**6 + "'\n[plan]", "model.arch = 'xxx"),
        ("[model]\n" + "x" * 10**6 + " = 1\n[plan]", "is not a known key"),
        ("[model]\n[plan]\n[measured]\ntokens_per_second = 'fast'", "measured.tokens_per_second = 'fast' is not"),
        ("[model]\n[plan]\n[measured]\nday = 1979-05-27", "measured.day = datetime.date(1979, 5, 27) is neither"),
    ],
)
def test_absurd_values_are_refused_at_once(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_candidate(text, "best.toml")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf[model]\r\nn_layer = 2\r\n[plan]\r\n")
    assert read_candidate(tmp_path / "a.toml").candidate.shape.n_layer == 2


def test_values_are_shown_on_a_part_of_a_line() -> None:
    deep: list[object] = []
    for _ in range(10_000):
        deep = [deep]
    for value in ("x" * 10**6, "\x1b[31m\n", deep, 10**5000, {"a": "b" * 1000}, float("nan"), [1] * 10**6):
        assert len(shown(value)) <= 80
        assert shown(value).isprintable()
    assert shown("plain") == "'plain'"
    assert one_line("a\n b\x1b\t c") == "a b c"


@pytest.mark.parametrize("content", [None, b"", b"= x", b"\xff\xfe", b"name = 3"])
def test_a_lost_or_spoiled_search_toml_does_not_stop_the_rebuild(content: bytes | None, tmp_path: Path) -> None:
    path, machine = tmp_path / "run", Machine()
    search(settings(budget="30s"), path, CUDA, measure=machine.measure, clock=machine.clock)
    before = {name: (path / name).read_bytes() for name in ("search.toml", "trials.csv", "best.toml", "verdict.json")}
    (path / "search.toml").unlink()
    if content is not None:
        (path / "search.toml").write_bytes(content)
    rebuild(path)
    assert {name: (path / name).read_bytes() for name in before} == before
    assert read_settings(path / "search.toml") == settings(budget="30s")


@pytest.mark.parametrize("value", [3, "x", None, [], {}, {"name": 3}, [[1]]])
@pytest.mark.parametrize("name", [studies.SETTINGS, studies.ENVIRONMENT, studies.SPENT, studies.NOTES])
def test_a_study_whose_attributes_are_of_another_kind(name: str, value: object, run_dir: Path, tmp_path: Path) -> None:
    path = shutil.copytree(run_dir, tmp_path / "run")
    studies.load_study(path, None).set_user_attr(name, value)
    if (name, value) in [(studies.SPENT, 3), (studies.NOTES, [])]:  # those are well
        rebuild(path)
        return
    with pytest.raises(ConfigError, match="the study") as caught:
        rebuild(path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", ["", "[]", "5", "{", '{"trial": 0}', "[" * 100_000, 7, None])
def test_a_study_whose_trials_hold_something_else(content: object, run_dir: Path, tmp_path: Path) -> None:
    path = shutil.copytree(run_dir, tmp_path / "run")
    trial = studies.load_study(path, None).ask()
    trial.set_user_attr("record", content)
    for go in (lambda: rebuild(path), lambda: resume(path, CUDA, budget_seconds=9.0)):
        with pytest.raises(ConfigError, match="the study's trial") as caught:
            go()
        assert len(str(caught.value)) < 400


def test_what_was_in_flight_is_in_the_table_as_soon_as_the_search_goes_on(tmp_path: Path) -> None:
    path, machine = tmp_path / "run", Machine()

    class Killed(BaseException):
        """As SIGKILL: nothing is tidied up."""

    def measure(request: object, log: Path) -> object:
        if len(machine.requests) == 2:
            raise Killed
        return machine.measure(request, log)  # type: ignore[arg-type]

    with pytest.raises(Killed):
        search(settings(budget="60s"), path, CUDA, measure=measure, clock=machine.clock)  # type: ignore[arg-type]
    assert (path / "trials.csv").read_text().count("\n") == 3
    with pytest.raises(ConfigError, match="is used up"):
        resume(path, CUDA, budget_seconds=0.0)
    last = (path / "trials.csv").read_text().splitlines()[-1]
    assert last.startswith("2,search,interrupted")


@pytest.mark.parametrize(
    "content", ["", "[]", "5", "{}", "[" * 100_000, "9" * 5000, '{"version": 1}', '{"version": [[1]]}', "\0"]
)
def test_a_manifest_of_any_content_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json") as caught:
        read_manifest(tmp_path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"status": "great"}', "[" * 100_000, '{"status": ["ok"], "phase": 1}']
)
def test_a_workers_result_of_any_content_is_one_line(content: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(TrialResult, content)
    assert len(str(caught.value)) < 400

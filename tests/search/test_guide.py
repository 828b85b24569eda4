import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from fake_machine import CPU, CUDA, answer

from autotune import cli
from autotune.config.candidate import Shape
from autotune.config.presets import GUIDE
from autotune.environment import describe
from autotune.measure.runner import run_trial
from autotune.measure.types import TrialRequest, TrialResult
from autotune.memory.model import MemoryModel
from autotune.search import guide
from autotune.search.resolve import resolve
from autotune.units import GIB

MODEL = MemoryModel(device="cuda")
TINY = replace(
    GUIDE[0], shape=Shape(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=512), micro_batch_size=4,
    gradient_accumulation_steps=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def row_24gb() -> guide.Checked:
    return guide.check(GUIDE[2], MODEL)


def test_a_row_is_checked_without_a_card(row_24gb: guide.Checked) -> None:
    one = row_24gb
    assert (one.device, one.parameters) == ("RTX 4090", 82_015_360)
    assert one.tokens == 50_000 * 512 * 1024  # 26.2 billion, where the guide says 83
    for way in (one.plain, one.best):
        assert way is not None
        assert way.status == "predicted"
        assert way.tokens_per_second is not None
        assert way.hours == pytest.approx(50e9 / way.tokens_per_second.value / 3600)
    assert one.best is not None
    assert one.best.peak_device_bytes is not None
    assert one.best.peak_device_bytes.high <= one.limit_bytes
    assert guide._speed(one.best) >= guide._speed(one.plain)
    assert one.preferred is not None
    assert one.preferred.loss <= one.preferred.guide_loss


def test_lines_fit_80_columns_and_say_predicted(row_24gb: guide.Checked) -> None:
    lines = guide.lines([row_24gb])
    assert max(map(len, lines)) <= 80
    assert "26.21B tokens in 50,000 iterations, claimed ~83B" in " ".join(" ".join(lines).split())
    assert "predicted, not measured" in guide.provenance(measured=False)[0]


def test_a_row_that_does_not_fit_its_card_says_so() -> None:
    eager = replace(GUIDE[2], micro_batch_size=128, gradient_accumulation_steps=4)
    one = guide.check(eager, MODEL)
    assert not one.fits
    assert "does not fit in 23.15 GiB" in " ".join(" ".join(guide.lines([one])).split())


def test_measured_rows_have_what_the_trials_had(tmp_path: Path) -> None:
    asked: list[TrialRequest] = []

    def measure(request: TrialRequest) -> TrialResult:
        asked.append(request)
        return answer(request)

    one = guide.check(GUIDE[3], MODEL, CUDA, measure)
    assert one.device == CUDA.device_name
    assert {request.memory_limit_bytes for request in asked} == {one.limit_bytes}
    assert one.limit_bytes <= 16 * GIB  # the row's, on a larger card
    assert one.best is not None
    speeds = [result.tokens_per_second or 0.0 for result in map(answer, asked[1:]) if result.status == "ok"]
    assert one.best.tokens_per_second is not None
    assert one.best.tokens_per_second.value == max(speeds)


def test_a_row_whose_ways_all_fail_says_so() -> None:
    one = guide.check(GUIDE[0], MODEL, CUDA, lambda request: TrialResult(status="oom", phase="warmup"))
    assert one.best is None
    assert not one.fits
    assert any("unknown (oom)" in line for line in guide.lines([one]))
    assert any("no way of running it fits" in line for line in guide.lines([one]))


@pytest.mark.slow
def test_a_scaled_down_row_is_measured_on_this_machine(tmp_path: Path) -> None:
    here = describe("cpu")
    one = guide.check(
        TINY, MemoryModel(device="cpu"), here, lambda request: run_trial(request, tmp_path / "log"), ways=1
    )
    assert one.plain.status == "ok"
    assert one.best is not None
    assert one.best.tokens_per_second is not None
    assert one.preferred is None  # a CPU's speeds are not predicted


def test_csv_markdown_and_json_hold_the_same_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["guide", "24GB", "--json", "--out", str(tmp_path / "guide.csv")]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    written = list(csv.DictReader(io.StringIO((tmp_path / "guide.csv").read_text())))
    assert [row["row"] for row in rows] == [row["row"] for row in written] == ["24GB"]
    assert int(written[0]["parameters"]) == rows[0]["parameters"] == 82_015_360
    assert cli.run(["guide", "24GB", "--out", str(tmp_path / "guide.md")]) == 0
    assert "| 24GB: 10x10x640 | ~160-200M | 82.0M |" in (tmp_path / "guide.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["guide", "32GB"], "is not a row of the guide"),
        (["guide", "24GB", "--measure", "--device", "cpu"], "--measure needs a CUDA card"),
        (["guide", "24GB", "--out", "guide.txt"], "must end in .csv or .md"),
        (["search", "--guide", "24GB", "--model", "4x4x128"], "both fix the shape"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(words) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_a_search_starts_from_a_row_with_its_limit() -> None:
    settings = resolve(CUDA, guide=GUIDE[3])
    assert settings.recipe.shape == GUIDE[3].shape
    assert settings.recipe.global_batch_size == 32 * 12
    assert settings.baseline.micro_batch_size == 32
    assert settings.objective == "throughput"
    assert settings.keep_schedule
    assert settings.memory_limit_bytes <= 16 * GIB
    assert settings.baseline_source == "the guide's row 16GB"
    assert resolve(CPU, guide=GUIDE[0]).memory_limit_bytes <= 0.8 * CPU.device_memory_bytes


def test_a_limit_of_the_users_own_wins() -> None:
    assert resolve(CUDA, guide=GUIDE[3], memory_limit="10GiB").memory_limit_bytes == 10 * GIB

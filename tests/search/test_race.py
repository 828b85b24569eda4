"""Races of a search, on a machine made of formulas: who takes part, who wins, the budget, kills and resumption."""

import csv
import html
import json
import math
import re
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_machine import CPU, CUDA, Beside, settings, tokens_per_second
from fake_race import SideBySide, Slow, Track, final_loss

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.config.search_settings import SearchSettings, read_settings
from autotune.config.toml import read_candidate
from autotune.data.shards import write_shard
from autotune.environment import Slot
from autotune.errors import ConfigError, InterruptedByUser
from autotune.measure.types import RungRequest, RungResult
from autotune.report.html import write_html
from autotune.report.run import as_json, race_lines, run_report
from autotune.report.table import print_text
from autotune.runs.races import COLUMNS, Reading, Rival, difference
from autotune.runs.read import load_run
from autotune.runs.verdict import Verdict, read_verdict
from autotune.search import study as studies
from autotune.search import study_trials
from autotune.search.halving import cost, expected, full_tokens, next_rung, order_of, tied
from autotune.search.loop import rebuild, resume, search
from autotune.search.progress import reading_line
from autotune.search.race import candidates_for_race, conclude_race, is_baseline


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text")
    write_shard(directory / "a_val_000000.bin", np.arange(200_000) % 50_000)
    write_shard(directory / "a_train_000001.bin", np.arange(700_000) % 50_000)
    return directory


def asked(text: Path, **words: object) -> SearchSettings:
    usual = {"model": "", "data": text, "budget": "20m", "train_time": "2m", "sampler": "random"}
    return settings(CPU, **{**usual, **words})


def go(run_dir: Path, track: Track, wanted: SearchSettings, **more: object) -> Verdict:
    machine = track.machine
    words = {"measure": machine.measure, "clock": machine.clock, "train_rung": track.train, **more}
    return search(wanted, run_dir, CPU, **words)  # type: ignore[arg-type]


def rows(run_dir: Path, name: str = "races.csv") -> list[dict[str, str]]:
    with (run_dir / name).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Path, Track, Verdict]:
    """A search of twenty minutes with its race."""
    run_dir, track = tmp_path_factory.mktemp("raced") / "run", Track(Slow())
    return run_dir, track, go(run_dir, track, asked(text))


def test_a_race_elects_what_learns_most(raced: tuple[Path, Track, Verdict]) -> None:
    run_dir, track, verdict = raced
    assert verdict.race is not None
    recipe, raced = verdict.race.winner.candidate.recipe, {reading.rival for reading in verdict.race.readings}
    recipes = [rival.candidate.recipe for rival in verdict.race.rivals if rival.rival in raced]
    assert recipe == min(recipes, key=lambda one: final_loss(one, one.max_tokens))
    assert (recipe.optimizer, recipe.schedule) == ("muon", "wsd")
    assert verdict.status == "confirmed"
    assert verdict.winner is not None
    assert verdict.winner.role == "final"
    assert verdict.winner.candidate.id == verdict.race.winner.candidate.id
    assert track.machine.now <= 1200
    seconds = sum(reading.seconds for reading in verdict.race.readings)
    assert 0.25 * 1200 < seconds < 0.6 * 1200
    assert verdict.race.seconds == pytest.approx(seconds)
    best = read_candidate(run_dir)
    assert (best.candidate.recipe.optimizer, best.candidate.recipe.schedule) == ("muon", "wsd")
    assert best.candidate.recipe.learning_rate == pytest.approx(recipe.learning_rate, rel=0.1)
    assert best.candidate.recipe.global_batch_size == recipe.global_batch_size
    assert "predicted_loss" not in best.measured
    comment = (run_dir / "best_nanogpt.py").read_text()
    assert "nanoGPT has no muon" in comment
    assert "nanoGPT has no schedule wsd" in comment
    assert read_verdict(run_dir / "verdict.json") == verdict


@pytest.mark.parametrize("width", [80, 200])
def test_the_report_says_what_was_raced_and_what_each_change_gained(
    raced: tuple[Path, Track, Verdict], capsys: pytest.CaptureFixture[str], width: int
) -> None:
    run_dir, _, verdict = raced
    run = load_run(run_dir)
    print_text(run_report(run, top=3), width)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= max(width, len(f"next: autotune train {run_dir}"))
    whole = " ".join(text.split())
    assert verdict.race is not None
    assert "lowest loss, raced within" in whole
    assert f"race: {len(verdict.race.rivals)} rivals in {len(verdict.race.readings)} trainings of" in whole
    assert f"first: rival {verdict.race.order[0]}," in whole
    assert f"validation loss {verdict.race.best.loss:.3f} after" in whole
    assert "against the baseline's recipe: -" in whole
    assert "racing " in whole
    for change in ("optimizer", "learning rate", "schedule"):
        assert any(line.startswith(change) for line in text.splitlines())
    assert "not raced" in text  # the schedule
    assert "predicted loss" not in whole
    json.dumps(as_json(run), allow_nan=False)


def test_the_page_shows_what_was_raced_and_no_loss_by_the_law(raced: tuple[Path, Track, Verdict]) -> None:
    run_dir, _, verdict = raced
    race = verdict.race
    assert race is not None
    page = write_html(load_run(run_dir)).read_text()
    words = re.sub(r"(?s)<script.*?</script>|<style.*?</style>", " ", page)
    words = " ".join(html.unescape(re.sub("<[^>]*>", " ", words)).split())
    assert f"validation loss {race.best.loss:.3f} after" in words
    assert "below the baseline's recipe after equal training" in words
    assert f"Rival {race.order[1]} of the race" in words
    assert "What each change gained alone" in words
    for number in race.order:
        rival = next(rival for rival in race.rivals if rival.rival == number)
        assert str(rival.candidate.recipe) in words
    assert words[: words.index("What was measured")].count("predicted loss") == 0


def test_a_race_leaves_time_to_confirm_its_winner(tmp_path: Path, text: Path) -> None:
    """Confirming takes as long as a trial, which takes far longer here than a rung's start."""
    machine = Slow()
    machine.trial_seconds = 45.0
    verdict = go(tmp_path / "run", Track(machine), asked(text, budget="15m"))
    assert verdict.status == "confirmed"
    assert machine.now <= 900


def test_progress_has_a_line_for_each_rung(raced: tuple[Path, Track, Verdict]) -> None:
    race = raced[2].race
    assert race is not None
    rivals = {rival.rival: rival.candidate for rival in race.rivals}
    line = reading_line(race.readings[0], rivals[0])
    assert line.startswith("rung    0 rival  0 ")
    assert f"loss {race.readings[0].loss:.3f} after" in line
    failed = replace(race.readings[0], loss=None, status="incorrect", message="diverged")
    assert "incorrect (diverged)" in reading_line(failed, rivals[0])


def test_every_rung_is_a_row_and_every_candidate_a_trial(raced: tuple[Path, Track, Verdict]) -> None:
    run_dir, track, verdict = raced
    found = rows(run_dir)
    assert list(found[0]) == list(COLUMNS)
    assert len(found) == len(track.requests) == len(verdict.race.readings)  # type: ignore[union-attr]
    assert all(row["loss"] and row["loss_ci95"] for row in found)
    trials = [row for row in rows(run_dir, "trials.csv") if row["role"] == "race"]
    assert {row["candidate_id"] for row in trials} == {row["candidate_id"] for row in found}
    assert len({row["candidate_id"] for row in trials}) == len(trials)


def test_the_gain_of_each_change_is_measured_by_a_pair_or_expected(raced: tuple[Path, Track, Verdict]) -> None:
    race = raced[2].race
    assert race is not None
    rivals = {rival.rival: rival for rival in race.rivals}
    changes = {change.what: change for change in race.changes}
    assert changes["optimizer"].nats == pytest.approx(-0.4, abs=0.35)
    rate = changes["learning rate"]
    # where no pair tells, the law does, which the formula of this track does not follow
    assert rate.nats == pytest.approx(-0.1, abs=0.05 if rate.rivals else 1.5 * (rate.ci95 or 0.0))
    assert changes["schedule"].nats is None
    for change in changes.values():
        pair = [rivals[number].candidate.recipe for number in change.rivals]
        assert (change.fraction is None) == (not pair)
        if pair and change.what in ("optimizer", "learning rate"):
            assert pair[0].shape == pair[1].shape
            assert pair[0].tokens_per_step == pair[1].tokens_per_step
        if not pair and change.what != "schedule":
            assert change.ci95 is not None
    assert race.against_baseline is not None
    assert race.against_baseline.nats < -0.4  # type: ignore[operator]


def test_equal_time_is_asked_of_all_or_equal_tokens(
    raced: tuple[Path, Track, Verdict], tmp_path: Path, text: Path
) -> None:
    track = raced[1]
    whole, seen = asked(text).train_seconds, dict[tuple[str, float], set[int]]()
    assert whole
    assert track.requests[0].target_seconds
    assert raced[2].race is not None
    for request, reading in zip(track.requests, raced[2].race.readings, strict=True):
        if request.target_seconds is not None:  # whose speed is not known yet: the worker's own decides
            assert request.target_seconds == pytest.approx(reading.fraction * whole)
            continue
        lasts = request.target_tokens / (tokens_per_second(request.candidate) / 2e3)
        assert lasts == pytest.approx(reading.fraction * whole, rel=0.15)  # whole steps
        steps = round(request.target_tokens / request.candidate.recipe.tokens_per_step)
        seen.setdefault((request.candidate.id, reading.fraction), set()).add(steps)
    assert {len(steps) for steps in seen.values()} == {1}
    assert {request.chunk_tokens % request.candidate.shape.block_size for request in track.requests} == {0}
    assert len({(request.chunk_tokens, request.chunks) for request in track.requests}) == 1
    track = Track(Slow())
    go(tmp_path / "tokens", track, asked(text, train_time="", train_tokens="1M", budget="16m"))
    assert {request.target_seconds for request in track.requests} == {None}
    assert len({round(request.target_tokens, -4) for request in track.requests}) < 5


def test_memory_and_time_of_a_rung_are_limited(raced: tuple[Path, Track, Verdict]) -> None:
    _, track, _ = raced
    assert {request.memory_limit_bytes for request in track.requests} == {asked_limit()}
    assert max(track.ends) < 1200


def asked_limit() -> int:
    return settings(CPU, model="").memory_limit_bytes


def test_rivals_that_fail_cost_their_own_time_only(tmp_path: Path, text: Path) -> None:
    track = Track(Slow())
    track.fails = {
        0: RungResult(status="incorrect", phase="measure", message="diverged: the training loss is nan"),
        1: RungResult(status="oom", phase="compile", message="out of memory"),
        2: RungResult(status="crashed", phase="measure", message="boom"),
    }
    verdict = go(tmp_path / "run", track, asked(text, budget="8m"))
    assert verdict.status == "confirmed"
    assert verdict.race is not None
    assert [reading.loss for reading in verdict.race.readings[:3]] == [None, None, None]
    assert not {0, 1, 2} & set(verdict.race.order)
    assert [row["status"] for row in rows(tmp_path / "run")][:3] == ["incorrect", "oom", "crashed"]


def test_a_race_in_which_all_fail_leaves_the_law(tmp_path: Path, text: Path) -> None:
    track = Track(Slow())
    track.fails = dict.fromkeys(range(100), RungResult(status="crashed", phase="start", message="boom"))
    verdict = go(tmp_path / "run", track, asked(text, budget="8m"))
    assert verdict.status == "confirmed"
    assert "the winner is by the law, not raced" in verdict.notes[0]


def test_a_budget_too_short_for_a_race_is_named(tmp_path: Path, text: Path) -> None:
    track = Track(Slow())
    verdict = go(tmp_path / "run", track, asked(text, budget="45s"))
    assert track.requests == []
    assert any("too short for a race" in note and "not raced; give --budget" in note for note in verdict.notes)
    assert verdict.winner is not None


@pytest.mark.slow
def test_a_killed_race_goes_on_where_it_was(raced: tuple[Path, Track, Verdict], tmp_path: Path, text: Path) -> None:
    whole = raced[1]
    track = Track(Slow())

    def killed(request: RungRequest, log: Path) -> RungResult:
        if len(track.requests) == 5:
            raise SystemError("as if the process had died here")
        return track.train(request, log)

    with pytest.raises(SystemError):
        go(tmp_path / "run", track, asked(text), train_rung=killed)
    assert len(rows(tmp_path / "run")) == 5
    machine = track.machine
    verdict = resume(
        tmp_path / "run", CPU, measure=machine.measure, clock=machine.clock, train_rung=track.train,
        started=machine.now,
    )  # fmt: skip
    asked_of = [(r.candidate.recipe, r.target_seconds, r.target_tokens) for r in track.requests]
    assert len(asked_of) == len(set(asked_of))  # no rung twice
    assert asked_of[:8] == [(r.candidate.recipe, r.target_seconds, r.target_tokens) for r in whole.requests][:8]
    assert verdict.race is not None
    assert len(verdict.race.readings) == len(track.requests)
    roles = [row["role"] for row in rows(tmp_path / "run", "trials.csv")]
    assert "search" not in roles[roles.index("race") :]


def test_ctrl_c_in_a_rung_keeps_the_race(tmp_path: Path, text: Path) -> None:
    track = Track(Slow())

    def interrupted(request: RungRequest, log: Path) -> RungResult:
        if len(track.requests) == 3:
            raise KeyboardInterrupt
        return track.train(request, log)

    with pytest.raises(InterruptedByUser, match="--resume"):
        go(tmp_path / "run", track, asked(text, budget="8m"), train_rung=interrupted)
    for name in ("races.csv", "verdict.json"):
        before = (tmp_path / "run" / name).read_text()
        (tmp_path / "run" / name).unlink()
        rebuild(tmp_path / "run")
        assert (tmp_path / "run" / name).read_text() == before
    assert json.loads((tmp_path / "run" / "verdict.json").read_text())["race"]["order"]


def test_a_small_validation_split_is_named_with_its_noise(tmp_path: Path) -> None:
    write_shard(tmp_path / "a_val_000000.bin", np.arange(500) % 50_000)
    write_shard(tmp_path / "a_train_000001.bin", np.arange(700_000) % 50_000)
    verdict = go(tmp_path / "run", Track(Slow()), asked(tmp_path, budget="8m"))
    assert any("the validation split is small" in note and "the noise of a difference is ±" in note
               for note in verdict.notes)  # fmt: skip


def test_a_text_that_the_training_repeats_is_said(tmp_path: Path, raced: tuple[Path, Track, Verdict]) -> None:
    write_shard(tmp_path / "a_val_000000.bin", np.arange(200_000) % 50_000)
    write_shard(tmp_path / "a_train_000001.bin", np.arange(20_000) % 50_000)
    verdict = go(tmp_path / "run", Track(Slow()), asked(tmp_path, budget="8m"))
    (note,) = (note for note in verdict.notes if "repeats its text" in note)
    assert float(note.split()[5]) > 4
    assert not any("repeats its text" in note for note in raced[2].notes)


def test_for_nanogpt_only_what_it_can_run_is_raced(tmp_path: Path, text: Path) -> None:
    track = Track(Slow())
    go(tmp_path / "run", track, asked(text, target="nanogpt", budget="8m"))
    assert {(r.candidate.recipe.optimizer, r.candidate.recipe.schedule) for r in track.requests} == {
        ("adamw", "cosine")
    }
    assert {request.checkpoints for request in track.requests} == {""}
    assert "this trains with its AdamW" not in (tmp_path / "run" / "best_nanogpt.py").read_text()


def test_recipes_for_the_users_shape_are_raced_and_the_users_own_is_one_of_them(tmp_path: Path, text: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "n_layer = n_head = 2\nn_embd = 64\nblock_size = 128\nbatch_size = 8\ngradient_accumulation_steps = 4\n"
        "learning_rate = 2e-3\nmax_iters = 500\n"
    )
    wanted, track = asked(text, from_file=file, objective="loss", train_time="", budget="9m"), Track(Slow())
    assert wanted.train_tokens == 500 * 8 * 4 * 128
    verdict = go(tmp_path / "run", track, wanted)
    assert verdict.race is not None
    assert {rival.candidate.shape for rival in verdict.race.rivals} == {wanted.recipe.shape}
    (own,) = (rival for rival in verdict.race.rivals if is_baseline(rival, wanted))
    assert own.candidate.recipe.learning_rate == 2e-3
    assert (own.candidate.recipe.global_batch_size, own.candidate.recipe.max_iters) == (32, 500)
    assert verdict.race.winner.candidate.recipe.optimizer == "muon"
    assert verdict.race.against_baseline is not None
    assert verdict.race.against_baseline.nats < 0
    assert {change.what for change in verdict.race.changes} >= {"optimizer", "learning rate"}
    best = read_candidate(tmp_path / "run").candidate
    assert best.shape == wanted.recipe.shape
    assert best.recipe.max_tokens == pytest.approx(wanted.train_tokens, rel=0.01)


def test_without_a_race_nothing_is_trained(tmp_path: Path, text: Path) -> None:
    track = Track(Slow())
    verdict = go(tmp_path / "run", track, asked(text, race="off", budget="3m"))
    assert track.requests == []
    assert verdict.race is None
    assert not (tmp_path / "run" / "races.csv").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"race": "on"}, "--race on trains on your text; add --data DIR"),
        ({"race": "maybe"}, "--race = 'maybe' is not known"),
        ({"model": "2x2x64", "race": "on"}, "--race on seeks the lowest loss"),
        ({"keep": "all"}, "--keep = 'all' is not known"),
        ({"keep": "learning", "objective": "loss"}, "--keep learning does not; leave one out"),
        ({"keep": "learning"}, "needs a shape"),
        ({"target": "llama.cpp"}, "--for = 'llama.cpp' is not known"),
    ],
)
def test_contradictions_are_refused(words: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(CPU, **{"model": "", **words})


def test_the_default_is_a_race_where_the_loss_is_sought_and_there_is_text(text: Path) -> None:
    assert asked(text).race == "on"
    without = settings(CPU, model="")
    assert (without.race, without.objective) == ("off", "loss")
    kept = settings(CPU, keep="learning", data=text)
    assert (kept.race, kept.objective, kept.notes) == ("off", "throughput", ())


def test_settings_of_earlier_versions_are_read(tmp_path: Path, text: Path) -> None:
    go(tmp_path / "run", Track(Slow()), asked(text, race="off", budget="2m"))
    file = tmp_path / "run" / "search.toml"
    file.write_text("law_offset = 0.3\nlaw_band = 0.05\n" + file.read_text())
    assert read_settings(file).race == "off"


def rivals(count: int, seconds: float = 100.0) -> list[Rival]:
    recipe = Recipe(shape=Shape(n_layer=2, n_head=2, n_embd=64), schedule="wsd", max_iters=1000)
    return [
        Rival(rival=number, candidate=Candidate(recipe=recipe, plan=Plan()), seconds=seconds) for number in range(count)
    ]


def play(count: int, seconds: float, losses: list[float], overhead: float = 5.0) -> tuple[list[Reading], float]:
    """Readings of a race by the rule, and the time it took."""
    field, readings, spent = rivals(count), list[Reading](), 0.0
    rng = np.random.default_rng(1)
    while (step := next_rung(field, readings, seconds - spent, overhead)) is not None:
        spent += cost(field[step.rival], step.fraction, readings, overhead)
        chunks = losses[step.rival] - step.fraction + rng.normal(0, 0.01, 16)
        reading = Reading(
            reading=len(readings), rival=step.rival, fraction=step.fraction, status="ok",
            loss=float(chunks.mean()), chunk_losses=tuple(chunks.tolist()),
        )  # fmt: skip
        readings.append(reading)
        assert len(readings) < 100
    return readings, spent


@pytest.mark.parametrize("seconds", [60.0, 200.0, 500.0, 1500.0, 5000.0])
@pytest.mark.parametrize("count", [2, 5, 9, 27])
def test_the_rule_keeps_to_its_time_and_uses_it(seconds: float, count: int) -> None:
    losses = [5.0 + 0.1 * ((number + 1) % count) for number in range(count)]
    readings, spent = play(count, seconds, losses)
    assert spent <= seconds + 1e-6
    assert len({reading.rival for reading in readings}) >= 2
    fractions = [reading.fraction for reading in readings]
    assert fractions == sorted(fractions)
    best = min((losses[rival], rival) for rival in {reading.rival for reading in readings})[1]
    assert order_of(rivals(count), readings)[0] == best
    assert spent > 0.4 * seconds or max(fractions) == 1.0 or len(set(order_of(rivals(count), readings))) == count


def test_all_rivals_are_trained_in_full_where_there_is_time_for_it() -> None:
    readings, _ = play(4, 1e4, [5.0, 5.1, 5.2, 5.3])
    assert [(reading.rival, reading.fraction) for reading in readings] == [(n, 1.0) for n in range(4)]


def test_too_little_time_is_no_race() -> None:
    assert next_rung(rivals(5), [], 15.0, 10.0) is None
    assert next_rung(rivals(1), [], 1e6, 10.0) is None


def test_differences_are_paired_and_ties_named() -> None:
    def reading(rival: int, losses: np.ndarray) -> Reading:  # type: ignore[type-arg]
        return Reading(reading=rival, rival=rival, fraction=0.5, status="ok", loss=float(losses.mean()),
                       chunk_losses=tuple(losses.tolist()))  # fmt: skip

    rng = np.random.default_rng(0)
    text = rng.normal(5.0, 1.0, 32)
    close, far = text + rng.normal(0.0, 0.1, 32), text + 0.2 + rng.normal(0.0, 0.1, 32)
    readings = [reading(0, text), reading(1, close), reading(2, far)]
    apart = difference(readings[2], readings[0])
    assert apart is not None
    assert apart.significant
    assert apart.ci95 == pytest.approx(1.96 * 0.1 / math.sqrt(32), rel=0.4)  # far less than the text's own spread
    assert set(tied(rivals(3), readings)) | set(order_of(rivals(3), readings)[:1]) == {0, 1}
    assert difference(readings[0], replace(readings[1], chunk_losses=(1.0,))) is None


def test_where_the_baseline_was_not_raced_the_difference_is_expected(
    raced: tuple[Path, Track, Verdict], text: Path
) -> None:
    wanted = asked(text)
    study = studies.load_study(raced[0], wanted)
    lineup, readings = studies.lineup_of(study), studies.readings_of(study)
    assert lineup is not None
    own = next(rival.rival for rival in lineup.rivals if is_baseline(rival, wanted))
    race = conclude_race(lineup, [reading for reading in readings if reading.rival != own], wanted)
    assert race is not None
    against, rivals = race.against_baseline, {rival.rival: rival for rival in lineup.rivals}
    assert against is not None
    assert against.ci95 is not None
    assert (against.rivals, against.fraction) == ((), None)
    winner, baseline = (
        final_loss(rival.candidate.recipe, full_tokens(rival, readings)) for rival in (race.winner, rivals[own])
    )
    assert against.nats == pytest.approx(winner - baseline, abs=against.ci95)
    assert f"{against.nats:+.3f} ± {against.ci95:.3f} nats, expected" in " ".join(race_lines(race))


def on_cards(
    run_dir: Path, text: Path, count: int, fails: str = "", budget: str = "12m"
) -> tuple[SideBySide, Verdict]:
    """A race on so many cards, of which one can fail in its second rung."""
    machine = Beside(20.0)
    track = SideBySide(machine)

    def start(request: RungRequest, log: Path) -> Generator[None, None, RungResult]:
        if request.device == fails and [one.device for one in track.requests].count(fails) == 1:
            yield
            return RungResult(status="crashed", phase="build", trial_seconds=0.0, remedy=f"{fails} fell off the bus")
        return (yield from track.start(request, log))

    wanted = settings(CUDA, model="", data=text, budget=budget, train_time="2m", sampler="random")
    slots = tuple(Slot(device=f"cuda:{number}") for number in range(count))
    verdict = search(
        wanted, run_dir, CUDA, measure=machine.start, train_rung=start, clock=machine.clock, pause=machine.pause,
        slots=slots,
    )  # fmt: skip
    return track, verdict


@pytest.mark.slow
def test_on_several_cards_rivals_are_trained_side_by_side(tmp_path: Path, text: Path) -> None:
    _, alone = on_cards(tmp_path / "alone", text, 1)
    track, verdict = on_cards(tmp_path / "run", text, 3)
    assert alone.race is not None
    assert verdict.race is not None
    assert verdict.confirmed
    assert track.machine.now <= 720
    assert {request.device for request in track.requests} == {"cuda:0", "cuda:1", "cuda:2"}
    assert len(verdict.race.readings) > 1.5 * len(alone.race.readings)
    trained = [(reading.rival, reading.fraction) for reading in verdict.race.readings]
    assert len(trained) == len(set(trained))
    assert sorted(reading.reading for reading in verdict.race.readings) == list(range(len(trained)))
    shortest = min(reading.fraction for reading in verdict.race.readings)
    kept = {rival for rival, fraction in trained if fraction > shortest}
    assert kept < {rival for rival, fraction in trained if fraction == shortest}


@pytest.mark.slow
def test_a_card_that_fails_in_the_race_leaves_and_its_rung_runs_elsewhere(tmp_path: Path, text: Path) -> None:
    track, verdict = on_cards(tmp_path / "run", text, 2, fails="cuda:1", budget="16m")
    assert verdict.race is not None
    assert "cuda:1 left the search: cuda:1 fell off the bus" in verdict.notes
    lost = next(reading for reading in verdict.race.readings if reading.status == "interrupted")
    again = [r for r in verdict.race.readings if (r.rival, r.fraction) == (lost.rival, lost.fraction)]
    assert [reading.loss is None for reading in again] == [True, False]
    assert {request.device for request in track.requests[-3:]} == {"cuda:0"}


def test_rivals_are_ordered_by_plausibility(tmp_path: Path, text: Path) -> None:
    wanted = asked(text, race="off", budget="6m")
    go(tmp_path / "run", Track(Slow()), wanted)
    records = study_trials.records(studies.load_study(tmp_path / "run", wanted))
    found = candidates_for_race(records, wanted)
    assert [rival.rival for rival in found] == list(range(len(found)))
    assert found[0].candidate.recipe.optimizer == "muon"
    assert found[0].rate_factor == 4.0
    assert sum(is_baseline(rival, wanted) for rival in found[:5]) == 1
    keys = [(r.candidate.id, r.candidate.recipe.learning_rate) for r in found]
    assert len(keys) == len(set(keys))
    before = expected(found, [])
    draws = np.random.default_rng(1).multivariate_normal(before.means, before.covariance, 2000)
    others = [rival.rival for rival in found if not is_baseline(rival, wanted)]
    most_likely = sorted(others, key=lambda rival: before.means[rival])
    assert others[0] == most_likely[0]
    assert draws[:, others[:4]].min(1).mean() < draws[:, most_likely[:4]].min(1).mean()  # not four that are alike
    assert len({rival.candidate.shape for rival in found}) >= 3
    assert all(r.candidate.plan.micro_batch_size <= r.candidate.recipe.global_batch_size for r in found)

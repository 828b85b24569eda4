"""A search of fifteen minutes against every plan of its space."""

import random
from dataclasses import asdict

import pytest
from gpu.bench import BENCH, DRY_MINUTES, EXHAUSTIVE, Bench, in_words

from autotune.config.candidate import Candidate
from autotune.config.toml import parse_candidate
from autotune.search.resolve import resolve
from autotune.search.space import build_space, every_candidate

pytestmark = [pytest.mark.gpu, pytest.mark.long]
DRY_CHOICES = ("micro_batch_size=1,8", "compile=off", "loss=full", "dtype=bfloat16", "attention=sdpa",
               "activation_checkpointing=none", "allocator=default")  # fmt: skip
SIZE = (12, 12, 768)


def choices(bench: Bench) -> tuple[str, ...]:
    return bench.runnable(DRY_CHOICES if bench.dry else EXHAUSTIVE)


def candidates(bench: Bench) -> list[Candidate]:
    """Every plan of the space, in random order."""
    settings = resolve(bench.environment, model=in_words(bench.shape(*SIZE)), choices=choices(bench))
    found = list(every_candidate(build_space(settings, bench.environment)).values())
    return random.Random(0).sample(found, len(found))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "candidate" in metafunc.fixturenames:
        bench = metafunc.config.stash[BENCH]
        found = candidates(bench) if bench else [Candidate()]
        metafunc.parametrize("candidate", found, ids=lambda candidate: candidate.id)


def test_exhaustive(candidate: Candidate, bench: Bench) -> None:
    result = bench.trial(candidate, measure_seconds=2.0)
    bench.row.update({"candidate": asdict(candidate), "result": asdict(result)})
    answers = ("ok",) if bench.dry else ("ok", "oom", "over_limit", "unsupported")
    assert result.status in answers, result.message


@pytest.mark.seconds(910)
def test_regret(bench: Bench) -> None:
    """The winner's tokens/s in the table are at most 2 % below the best of it."""
    rows = {name[len("test_exhaustive[") : -1]: row for name, row in bench.rows("search").items() if "[" in name}
    assert rows, "no table is recorded; run scripts/gpu_acceptance --long -k exhaustive"
    minutes = DRY_MINUTES if bench.dry else 15.0
    run, trials = bench.search(bench.shape(*SIZE), minutes, choices(bench))
    best = parse_candidate((run / "best.toml").read_text(), "the winner")
    speeds = {name: row["tokens_per_second"] or 0.0 for name, row in rows.items()}
    regret = 1 - speeds[best.candidate.id] / max(speeds.values())
    bench.row.update({"trials": trials, "trials_an_hour": trials * 60 / minutes, "regret": regret, **best.measured})
    assert regret <= 0.02

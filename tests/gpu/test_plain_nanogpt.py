"""Tokens/s of plain nanoGPT, eager and compiled, and of a short search's winner, at half a million tokens a step."""

import tomllib
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from gpu.bench import DRY_MINUTES, LIKELY, PLANS, Bench

from autotune.data.batches import synthetic_batch
from autotune.data.shards import write_shard

AIM_TOKENS_PER_SECOND = 550_000
"""Aim for 124M on one H200; the public mark of this class there is 489k (modded-nanogpt, track 3)."""
SIZES = {"124M": (12, 12, 768), "354M": (24, 16, 1024)}
MINUTES = 6.0
"""Budget of the search."""
DRY_CHOICES = ("micro_batch_size=2,8", "compile=off,block", "loss=full", "dtype=bfloat16", "attention=sdpa",
               "activation_checkpointing=none", "allocator=default")  # fmt: skip

pytestmark = [pytest.mark.gpu, pytest.mark.seconds(75)]
each_model = pytest.mark.parametrize("model", ["124M", pytest.param("354M", marks=pytest.mark.card_only)])


@each_model
@pytest.mark.parametrize("micro_batch_size", [pytest.param(64, marks=pytest.mark.card_only), 16])
@pytest.mark.parametrize("plan", ["eager", "compiled"])
def test_plain(plan: str, micro_batch_size: int, model: str, bench: Bench) -> None:
    candidate = bench.candidate(bench.shape(*SIZES[model]), replace(PLANS[plan], micro_batch_size=micro_batch_size))
    result = bench.trial(candidate)
    bench.row.update({"candidate": asdict(candidate)})
    too_small_is_an_answer = plan == "eager" and not bench.dry
    assert result.status in ("ok", "oom") if too_small_is_an_answer else result.status == "ok", result.message


@each_model
@pytest.mark.seconds(60 * MINUTES + 20)
def test_search(model: str, bench: Bench) -> None:
    minutes, choices = (DRY_MINUTES, DRY_CHOICES) if bench.dry else (MINUTES, LIKELY)
    run, trials = bench.search(bench.shape(*SIZES[model]), minutes, choices, "--data", synthetic_data(bench))
    toml = (run / "best.toml").read_text().replace(f"{bench.scratch}/", "")  # the record names no path of this machine
    best = tomllib.loads(toml)
    bench.row.update(
        {"model": model, "trials": trials, **best["measured"], **best["plan"], "run": run.name, "toml": toml}
    )
    compiled = [row for name, row in bench.rows("plain_nanogpt").items() if "[compiled-" in name and model in name]
    if plain := max((row["tokens_per_second"] or 0.0 for row in compiled), default=0.0):
        bench.row.update({"against_plain_compiled": best["measured"]["tokens_per_second"] / plain})
    bench.row.update({"aim_tokens_per_second": AIM_TOKENS_PER_SECOND} if model == "124M" else {})
    assert best["measured"]["tokens_per_second"] > 0
    assert best["plan"]["compile"] in ("block", "off", "full")


@each_model
@pytest.mark.parametrize("recompute", ["none", "selective", pytest.param("budget_0.5", marks=pytest.mark.card_only)])
def test_winner_at_micro_batch_64(recompute: str, model: str, bench: Bench) -> None:
    """Its peak against that of the compiled plain plan."""
    candidate = bench.winner(model).candidate
    micro = min(64, candidate.recipe.global_batch_size)
    plan = replace(candidate.plan, micro_batch_size=micro, activation_checkpointing=recompute)  # type: ignore[arg-type]
    result = bench.trial(replace(candidate, plan=plan))
    bench.row.update({"model": model, "candidate": asdict(replace(candidate, plan=plan))})
    plain = bench.rows("plain_nanogpt").get(f"test_plain[compiled-64-{model}]")
    if plain and (peak := result.peak("allocated_bytes")):
        bench.row.update({"peak_against_plain": peak / plain["peak_allocated_bytes"]})
    assert result.status in ("ok", "oom") if plan.compile == "off" else result.status == "ok", result.message


def synthetic_data(bench: Bench) -> Path:
    """Shards of Zipf's law, enough for a hundred steps of half a million tokens; made once."""
    directory = bench.scratch / "data"
    directory.mkdir(exist_ok=True)
    block, words, rows = (64, 512, (100, 1000)) if bench.dry else (1024, 50257, (2_000, 50_000))
    for name, sequences in zip(("fineweb_val_000000.bin", "fineweb_train_000001.bin"), rows, strict=True):
        if not (directory / name).exists():
            tokens, _ = synthetic_batch(
                seed=len(name), step=0, global_batch_size=sequences, block_size=block, vocab_size=words
            )
            write_shard(directory / name, tokens.ravel())
    return directory

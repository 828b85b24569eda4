"""Tokenising and batching speed: `pytest tests/benchmarks/test_data.py --benchmark-enable -s`."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.data.batches import open_batches, synthetic_batch
from autotune.data.shards import write_shard
from autotune.data.sources import documents, find_source
from autotune.data.tokenizer import encode_documents, encoder

SAMPLE = "AUTOTUNE_FINEWEB_SAMPLE"
BAR = 3_000_000  # tokens per second and core


def test_tokens_per_second_of_one_core(benchmark: Any) -> None:
    if SAMPLE not in os.environ:
        pytest.skip(f"set {SAMPLE} to a parquet file of 2,800 FineWeb documents")
    texts = list(documents(find_source(os.environ[SAMPLE])))
    encoder()
    # CPU time: what one core does, whoever else is using the machine.
    began = time.process_time()
    tokens = sum(len(encoder().encode_ordinary(text)) for text in texts)
    plain = tokens / (time.process_time() - began)
    seconds = []

    def tokenise() -> None:
        start = time.process_time()
        assert sum(len(document) - 1 for document in encode_documents(texts)) == tokens
        seconds.append(time.process_time() - start)

    benchmark.pedantic(tokenise, rounds=3)
    speed = tokens / min(seconds)
    benchmark.extra_info |= {
        "tokens_per_second": round(speed),
        "bar_tokens_per_second": BAR,
        "encode_ordinary_tokens_per_second": round(plain),
        "ratio_to_encode_ordinary": round(speed / plain, 3),
    }
    print(f"{speed:,.0f} tokens/s a core (the bar is {BAR:,}), {speed / plain:.2f} x encode_ordinary")


def test_training_batches(benchmark: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("x_val_000000.bin", "x_train_000001.bin"):
        write_shard(tmp_path / name, rng.integers(0, 50257, 5_000_000, dtype=np.uint16))
    source = open_batches(tmp_path, seed=1, global_batch_size=512, block_size=1024, vocab_size=50304)
    steps = iter(range(1_000_000))
    benchmark(lambda: source.train_batch(next(steps)))


def test_synthetic_batches(benchmark: Any) -> None:
    steps = iter(range(1_000_000))
    benchmark(
        lambda: synthetic_batch(seed=1, step=next(steps), global_batch_size=64, block_size=1024, vocab_size=50304)
    )

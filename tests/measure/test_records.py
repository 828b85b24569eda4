"""trials.csv: its columns are frozen, unknown values are empty, numbers are plain."""

import csv
from pathlib import Path

from autotune.config.candidate import Candidate
from autotune.measure.records import TrialRecord, write_csv
from autotune.measure.types import MemoryView, TrialResult

HEADER = (
    "trial,role,status,phase,objective,tokens_per_second,tokens_per_second_ci95,mfu,step_seconds_p50,"
    "peak_allocated_bytes,peak_reserved_bytes,peak_device_bytes,predicted_peak_bytes,num_alloc_retries,predicted_loss,"
    "parameters,n_layer,n_head,n_embd,block_size,vocab_size,micro_batch_size,gradient_accumulation_steps,global_batch_size,"
    "attention,loss,activation_checkpointing,compile,dtype,optimizer,loss_chunk_tokens,allocator,"
    "compile_seconds,trial_seconds,first_loss,started_at,candidate_id,message"
)


def test_the_columns_are_frozen(tmp_path: Path) -> None:
    write_csv(tmp_path / "trials.csv", [])
    assert (tmp_path / "trials.csv").read_text() == HEADER + "\n"


def test_a_row_holds_the_largest_peaks_and_leaves_the_unknown_empty(tmp_path: Path) -> None:
    views = {"steady": MemoryView(allocated_bytes=10**11), "evaluation": MemoryView(allocated_bytes=7)}
    result = TrialResult(status="ok", phase="done", tokens_per_second=1234.5678, memory=views, message='a "b", c')
    record = TrialRecord(trial=3, role="search", candidate=Candidate(), result=result, objective=1234.5678)
    write_csv(tmp_path / "trials.csv", [record])
    with (tmp_path / "trials.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["peak_allocated_bytes"] == "100000000000"
    assert row["tokens_per_second"] == "1234.57"
    assert (row["mfu"], row["peak_device_bytes"], row["num_alloc_retries"]) == ("", "", "")
    assert (row["parameters"], row["gradient_accumulation_steps"]) == ("124373760", "64")
    assert row["message"] == 'a "b", c'

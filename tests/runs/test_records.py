"""trials.csv: its columns are frozen, unknown values are empty, numbers are plain."""

import csv
from dataclasses import fields
from pathlib import Path

import pytest

from autotune.config.candidate import Candidate, Plan
from autotune.measure.types import MemoryView, TrialResult
from autotune.runs.records import COLUMNS, TrialRecord, read_text, write_csv

HEADER = (
    "trial,role,status,phase,objective,tokens_per_second,tokens_per_second_ci95,mfu,step_seconds_p50,"
    "peak_allocated_bytes,peak_reserved_bytes,peak_device_bytes,predicted_peak_bytes,num_alloc_retries,predicted_loss,"
    "parameters,n_layer,n_head,n_embd,block_size,vocab_size,micro_batch_size,gradient_accumulation_steps,global_batch_size,"
    "attention,loss,activation_checkpointing,compile,dtype,optimizer,loss_chunk_tokens,allocator,"
    "compile_seconds,trial_seconds,first_loss,started_at,candidate_id,message"
)


def test_the_columns_are_frozen_but_for_new_fields_of_the_plan(tmp_path: Path) -> None:
    write_csv(tmp_path / "trials.csv", [])
    header = (tmp_path / "trials.csv").read_text().removesuffix("\n").split(",")
    new = {field.name for field in fields(Plan)} - set(HEADER.split(","))
    assert [name for name in header if name not in new] == HEADER.split(",")
    assert set(header) == {*HEADER.split(","), *new}


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


def test_every_field_of_the_plan_has_a_column() -> None:
    assert {field.name for field in fields(Plan)} <= set(COLUMNS)
    assert len(set(COLUMNS)) == len(COLUMNS)


def cell_of(tmp_path: Path, message: str) -> str:
    result = TrialResult(status="crashed", phase="done", message=message, tokens_per_second=-1.5)
    write_csv(tmp_path / "trials.csv", [TrialRecord(trial=0, role="search", candidate=Candidate(), result=result)])
    with (tmp_path / "trials.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["tokens_per_second"] == "-1.5"  # a number stays one
    return row["message"]


@pytest.mark.parametrize(
    "message",
    ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "'=1", "''-", "\uff1d1", "-", "=HYPERLINK(1,2)"],
)
def test_no_spreadsheet_runs_a_cell(tmp_path: Path, message: str) -> None:
    cell = cell_of(tmp_path, message)
    assert cell == f"'{message}"
    assert read_text(cell) == message


@pytest.mark.parametrize("message", ["it's", "'quoted'", "'", "", "1=1", "a -1", "a\rb", 'a "b", c\nd'])
def test_other_cells_are_as_they_were(tmp_path: Path, message: str) -> None:
    assert cell_of(tmp_path, message) == message
    assert read_text(message) == message


def test_no_terminal_obeys_a_cell(tmp_path: Path) -> None:
    assert cell_of(tmp_path, "a\x1b[2Jb\u202ec") == r"a\x1b[2Jb\u202ec"

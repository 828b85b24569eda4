"""train_log.csv: whole rows stay, invalid lines go."""

from pathlib import Path

import pytest

from autotune.train.output import LogRow, append_row, keep_rows, read_rows


def row(iteration: int) -> LogRow:
    return LogRow(
        iteration=iteration, tokens=64 * iteration, train_loss=5.0, validation_loss=None, lr=1e-3, grad_norm=1.0,
        tokens_per_second=100.0, mfu=None, data_wait_seconds=0.0, peak_allocated_bytes=1, peak_device_bytes=None,
        seconds=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("garbage", ["garbage", "1,2", "x" + "," * 11, "\0\0\0", "," * 11, "\ufffd", "9" * 6000])
def test_invalid_lines_are_dropped_and_counted(garbage: str, tmp_path: Path) -> None:
    log = tmp_path / "train_log.csv"
    assert keep_rows(log, 0) == 0
    for iteration in (1, 2):
        append_row(log, row(iteration))
    with log.open("a") as file:
        file.write(garbage + "\n")
    append_row(log, row(3))
    with log.open("a") as file:
        file.write("4,25")  # what a killed process leaves is no garbage
    assert [one["iteration"] for one in read_rows(log)] == [1, 2, 3]
    assert keep_rows(log, 2) == 1
    assert [one["iteration"] for one in read_rows(log)] == [1, 2]
    assert keep_rows(log, 2) == 0

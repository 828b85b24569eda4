"""The comparison of a training with its measurement."""

from dataclasses import asdict, replace

import pytest

from autotune.environment import Environment, differences
from autotune.train.output import compare

MEASURED = {
    "tokens_per_second": 1000.0, "tokens_per_second_ci95": 3.0, "training_tokens_per_second_ci95": 40.0,
    "peak_allocated_bytes": 1 << 30,
}  # fmt: skip


@pytest.mark.parametrize(
    ("speed", "promised", "within"),
    [
        (981.0, 3.0, True),
        (979.0, 3.0, False),
        (1021.0, 3.0, False),
        (960.0, 40.0, True),
        (957.0, 40.0, False),
    ],
)
def test_speed(speed: float, promised: float, within: bool) -> None:
    """2 %, or the combined interval of one more process and the training where that is wider."""
    measured = MEASURED | {"training_tokens_per_second_ci95": promised}
    (found,) = compare(measured, {"tokens_per_second": speed, "tokens_per_second_ci95": 10.0}, "cpu")
    assert found[1] == within


def test_peak() -> None:
    figures = {"tokens_per_second": None, "peak_allocated_bytes": round(1.02 * (1 << 30)), "peak_device_bytes": 1}
    (found,) = compare(MEASURED, figures, "cuda")  # the verdict does not know the device's view
    said = "peak memory, allocated: 1.00 GiB measured, 1.02 GiB in training (+2.0%, expected within ±1%)"
    assert found == (said, False)
    both = [text for text, _ in compare(MEASURED | {"peak_device_bytes": 1}, figures, "cuda")]
    assert both == [said, "peak memory, device: 0.0 MiB measured, 0.0 MiB in training (+0.0%, expected within ±1%)"]
    assert list(compare(MEASURED | {"peak_device_bytes": 1}, figures, "cpu")) == [found]


def test_what_is_not_known_is_not_compared() -> None:
    nothing = {"tokens_per_second": None, "tokens_per_second_ci95": None, "peak_allocated_bytes": None}
    assert list(compare({}, {"tokens_per_second": 1.0, "peak_allocated_bytes": 1}, "cpu")) == []
    assert list(compare(MEASURED, nothing, "cpu")) == []


def test_machines() -> None:
    here = Environment(
        device="cpu", device_name="A", device_memory_bytes=1, capability=(9, 0), torch="2.13", python="3.11",
        autotune="0.1", cpu_count=2, platform="Linux",
    )  # fmt: skip
    assert differences({}, here) == []
    assert differences({"device_name": "A", "capability": [9, 0]}, here) == []
    assert differences({"device_name": "B", "torch": "2.12"}, here) == [
        "device_name 'B' there, 'A' here", "torch '2.12' there, '2.13' here"
    ]  # fmt: skip
    recorded = {**asdict(here), "capability": [9, 0], "threads": 2, "variables": {"OMP_NUM_THREADS": "2"}}
    assert differences(recorded, replace(here, threads=1)) == [
        "threads 2 there, 1 here", "OMP_NUM_THREADS '2' there, not set here"
    ]  # fmt: skip

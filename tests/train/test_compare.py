"""When a difference is worth a warning."""

import pytest

from autotune.environment import Environment
from autotune.train.compare import compare_peak, compare_speed, other_machine

MEASURED = {"tokens_per_second": 1000.0, "tokens_per_second_ci95": 30.0, "peak_allocated_bytes": 1 << 30}


@pytest.mark.parametrize(
    ("speed", "device", "within"),
    [
        (981.0, "cuda", True),
        (979.0, "cuda", False),
        (1021.0, "cuda", False),
        (961.0, "cpu", True),
        (959.0, "cpu", False),
    ],
)
def test_speed(speed: float, device: str, within: bool) -> None:
    found = compare_speed(MEASURED, speed, 10.0, device)
    assert found is not None
    assert found.within == within


def test_peak() -> None:
    found = compare_peak(MEASURED, "peak_allocated_bytes", round(1.02 * (1 << 30)))
    assert found is not None
    assert not found.within
    assert found.text == "peak memory, allocated: 1.00 GiB measured, 1.02 GiB in training (+2.0%, expected within ±1%)"


def test_what_is_not_known_is_not_compared() -> None:
    assert compare_speed({}, 1.0, None, "cpu") is None
    assert compare_speed(MEASURED, None, None, "cpu") is None
    assert compare_peak(MEASURED, "peak_device_bytes", 1) is None
    assert compare_peak(MEASURED, "peak_allocated_bytes", None) is None


def test_machines() -> None:
    here = Environment(
        device="cpu", device_name="A", device_memory_bytes=1, capability=(9, 0), torch="2.13", python="3.11",
        autotune="0.1", cpu_count=2, platform="Linux",
    )  # fmt: skip
    assert other_machine({}, here) == ""
    assert other_machine({"device_name": "A", "capability": [9, 0]}, here) == ""
    assert other_machine({"device_name": "B", "torch": "2.12"}, here) == (
        "device_name 'B' there, 'A' here; torch '2.12' there, '2.13' here"
    )

"""The dtype for tests that train or measure on the CPU, where no other is what they are about."""

from autotune.config.candidate import DType
from autotune.environment import describe

FAST: DType = "float32" if describe("cpu").emulated else "bfloat16"
"""A processor without bfloat16 takes fifteen times as long for it."""

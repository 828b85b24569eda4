"""Measure, do not guess: memory profiling and autotuning for nanoGPT-style training."""

__version__ = "0.1.0"

"""The trainer: the measured step, run to completion."""

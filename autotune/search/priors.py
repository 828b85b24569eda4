"""What the speed model expects of a candidate before anything is measured."""

import math

from autotune.config.candidate import Candidate

EFFECTS: dict[tuple[str, str], tuple[float, float]] = {
    ("compile", "off"): (-0.30, -0.7),
    ("compile", "full"): (0.0, 0.3),
    ("activation_checkpointing", "none"): (0.25, 0.0),
    ("dtype", "float32"): (-0.20, 0.0),
    ("dtype", "bfloat16_residual"): (0.02, 0.0),
    ("attention", "sdpa_math"): (-0.20, 0.0),
    ("loss", "chunked"): (-0.02, 0.0),
}
"""Of a value, before any trial: the difference in log speed, and in the log of the trial's seconds."""

HALF_SPEED_TOKENS = {"cpu": 64.0, "cuda": 2048.0}
"""A micro batch of so many tokens reaches half the speed of a large one."""


def expected(candidate: Candidate, kind: str) -> tuple[float, float]:
    """Log speed and log seconds of the trial before anything is measured, up to a constant each."""
    tokens = candidate.plan.micro_batch_size * candidate.shape.block_size
    busy = math.log(tokens / (tokens + HALF_SPEED_TOKENS[kind])) - math.log(candidate.shape.flops_per_token)
    effects = [effect for (name, value), effect in EFFECTS.items() if getattr(candidate.plan, name) == value]
    return busy + sum(speed for speed, _ in effects), sum(seconds for _, seconds in effects)

"""Is a training still learning? Told from the losses of its steps."""

import math
import statistics
from collections import deque

WINDOW = 32
"""Steps whose losses are what is usual."""
SUSTAINED = 4
"""Steps that must be high together: one odd batch is no spike."""
SPIKE_NATS = 1.0
SPIKE_DEVIATIONS = 5
"""Above the usual loss by so many nats, and by so many times its median absolute deviation."""


def complaint_of(recent: deque[float], loss: float, gradient_norm: float) -> str:
    """What is wrong after a step of this loss; empty for nothing.

    recent: the losses of the last WINDOW steps, oldest first; this one joins them, unless it is no number.
    """
    if not math.isfinite(loss):
        return f"the training loss is {loss}"
    if not math.isfinite(gradient_norm):
        return f"the gradient's norm is {gradient_norm}"
    recent.append(loss)
    usual, last = list(recent)[:-SUSTAINED], list(recent)[-SUSTAINED:]
    if len(usual) < WINDOW // 2:
        return ""
    median = statistics.median(usual)
    deviation = statistics.median(abs(value - median) for value in usual)
    if min(last) <= median + max(SPIKE_NATS, SPIKE_DEVIATIONS * deviation):
        return ""
    return f"the training loss has jumped from {median:.2f} to {loss:.2f}"

"""The learning rate as a function of the step."""

import math

__all__ = ["learning_rate"]


def learning_rate(peak: float, schedule: str, *, step: int, steps: int, warmup: int) -> float:
    """The learning rate of one step.

    Args:
        peak: the highest rate.
        schedule: after the warm-up: `constant`; `cosine` or `linear` down to 0 after the last step.
        step: counted from 0.
        steps: in the whole run.
        warmup: steps over which the rate rises linearly; the first one is not 0.

    Raises:
        ValueError: an unknown schedule.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    raise ValueError(f"schedule {schedule!r}: expected constant, cosine or linear")

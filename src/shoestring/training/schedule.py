"""The learning rate of a step: warm-up, then cosine, warm-up-stable-decay or constant.

A pure function of the step, so nothing has to be saved or restored. Warm-up climbs linearly and
its first step is already above 0; the last step of a run ends at `final_share` of the peak.
Sources: cosine, arXiv 1608.03983; WSD (stable, then a linear decay), arXiv 2404.06395.
"""

import math

from .config import ScheduleConfig


def learning_rate(config: ScheduleConfig, step: int, *, peak: float, steps: int) -> float:
    """Learning rate of update `step` (1 to `steps`), with `peak` at the top."""
    warmup = round(config.warmup_share * steps)
    if step <= warmup:
        return peak * step / warmup
    if config.kind == "constant":
        return peak
    stable = warmup if config.kind == "cosine" else steps - round(config.decay_share * steps)
    if step <= stable:
        return peak
    done = min(1.0, (step - stable) / (steps - stable))
    if config.kind == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return peak * (1 - (1 - config.final_share) * done)

"""The learning rate as a function of the step alone."""

from __future__ import annotations

import math

from gptlab.config import Schedule


def learning_rate(step: int, peak: float, schedule: Schedule) -> float:
    """The learning rate of an update.

    Warm-up is linear, lr = peak (step + 1) / warmup_steps, so its last step is at the peak. Then the shape falls to
    min_lr at decay_steps, and stays there (cosine: Loshchilov and Hutter 2017, arXiv 1608.03983; wsd: Hu et al. 2024,
    arXiv 2404.06395, with a linear decay; wsd-sqrt: Hägele et al. 2024, arXiv 2405.18392, with 1 - sqrt).

    Args:
        step: updates done before this one.
        peak: optim.lr.
        schedule: with decay_steps resolved, unless the shape is constant.
    """
    warmup, end, floor = schedule.warmup_steps, schedule.decay_steps, schedule.min_lr
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.shape == "constant":
        return peak
    begin = schedule.decay_begin(end)
    if step < begin:
        return peak
    if step >= end:
        return floor
    done = (step - begin) / (end - begin)  # in [0, 1)
    falls = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "wsd-sqrt": 1 - math.sqrt(done)}
    share = falls.get(schedule.shape, 1 - done)
    return floor + (peak - floor) * share

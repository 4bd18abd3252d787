"""How sparse a run is at a step, and at which steps its masks change."""

from __future__ import annotations

import math

from gptlab.config import Sparsity


def ramp(sparsity: Sparsity, decay_steps: int) -> tuple[int, int]:
    """The steps where the ramp begins and ends; it ends at 1 at the earliest, as step 0 has not trained anything."""
    return round(sparsity.begin * decay_steps), max(1, round(sparsity.end * decay_steps))


def sparsity_at(step: int, sparsity: Sparsity, decay_steps: int) -> float:
    """The share of weights to be zero after `step` updates: 0 until the ramp begins, exactly `target` from its end on.

    cubic rises fast and then slowly, 1 - (1 - p)^3 (Zhu and Gupta 2017, arXiv 1710.01878, equation 1, from 0); late,
    p^3, is its opposite; p is the fraction of the ramp that is done.
    """
    begin, end = ramp(sparsity, decay_steps)
    if step >= end:
        return sparsity.target
    if step <= begin:
        return 0.0
    p = (step - begin) / (end - begin)
    left = 1 - p
    shapes = {"cubic": 1 - left * left * left, "linear": p, "late": p * p * p}
    return sparsity.target * shapes[sparsity.schedule]


def is_change(step: int, sparsity: Sparsity, decay_steps: int) -> bool:
    """Whether masks change after `step` updates: every `every` steps inside the ramp, and at its end whatever."""
    begin, end = ramp(sparsity, decay_steps)
    return step == end or (begin < step < end and step % sparsity.every == 0)


def rigl_fraction(step: int, sparsity: Sparsity, decay_steps: int) -> float:
    """The share of the active weights that RigL moves after `step` updates (arXiv 1911.11134, section 3); 0 is none.

    alpha / 2 (1 + cos(pi t / T_end)) every `every` steps, before T_end. Not at step 0: masks are fresh.
    """
    _, end = ramp(sparsity, decay_steps)
    if not 0 < step < end or step % sparsity.every:
        return 0.0
    return sparsity.rigl_alpha / 2 * (1 + math.cos(math.pi * step / end))

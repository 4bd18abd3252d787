"""The sparsity of a run at a step, and the steps at which its masks change."""

from __future__ import annotations

import math

from gptlab.config import Sparsity


def ramp(sparsity: Sparsity, decay_steps: int) -> tuple[int, int]:
    """The steps at which the ramp begins and ends. It ends at step 1 or later, as nothing is trained at step 0."""
    return round(sparsity.begin * decay_steps), max(1, round(sparsity.end * decay_steps))


def sparsity_at(step: int, sparsity: Sparsity, decay_steps: int) -> float:
    """The share of weights that are zero after `step` updates: 0 until the ramp begins, `target` from its end on.

    With p the completed fraction of the ramp, cubic is 1 - (1 - p)^3 (Zhu and Gupta 2017, arXiv 1710.01878, equation
    1, from 0), which rises early; late is p^3, which rises late.
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
    """Whether masks change after `step` updates: every `every` steps inside the ramp, and always at its end."""
    begin, end = ramp(sparsity, decay_steps)
    return step == end or (begin < step < end and step % sparsity.every == 0)


def rigl_fraction(step: int, sparsity: Sparsity, decay_steps: int) -> float:
    """The share of the active weights that RigL moves after `step` updates (arXiv 1911.11134, section 3).

    It is alpha / 2 (1 + cos(pi t / T_end)) every `every` steps before T_end, and 0 at other steps and at step 0.
    """
    _, end = ramp(sparsity, decay_steps)
    if not 0 < step < end or step % sparsity.every:
        return 0.0
    return sparsity.rigl_alpha / 2 * (1 + math.cos(math.pi * step / end))

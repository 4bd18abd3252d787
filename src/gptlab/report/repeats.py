"""Curves that are the same run, the steps in which numbers were printed, and how much a curve wobbles.

Two runs that differ in anything do not agree in every evaluation. How soon agreement is a proof depends on how finely
the values were printed, and how much they wobble: of a value with wobble w (the sd about its trend), printed in steps
of g, another run agrees with chance 0.28 g / w at most, if the wobbles are independent; runs that read the same data
share some. Here up to 96% of its variance may be common.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from gptlab.report.reading import Array

CERTAIN = 1e-6  # chance that a family of honest runs shows one agreement that counts
COMMON = 5.0  # wobble over its part that is the run's own: 96% of the variance is common
AGREE = 0.2821  # 1 / (2 sqrt(pi)): the density at 0 of a difference of two normal values, in units of its sd
FINEST = 9  # decimals; more are floats as they are
SAMPLE = 256  # values of a curve that are looked at for decimals
LEAST = 3  # values that agree
WOBBLE_POINTS = 14
NORMAL = 0.6745  # median of |x| over the sd
SIXTEEN_BITS = {"bfloat16": 7, "float16": 10}  # bits of the fraction


@dataclass(frozen=True)
class Agreement:
    """Two curves that agree in a stretch of values."""

    first: int
    second: int
    """Indices of the curves, first < second."""
    points: int
    whole: bool
    """In all values of both."""
    start: bool
    """It is the beginning of the two that agrees, not the end."""
    contained: bool
    """In all values of one of them."""


def decimals(values: Array) -> int:
    """Decimals with which values were printed; FINEST + 1: more than that, floats as they are."""
    if len(values) > SAMPLE:
        values = values[np.linspace(0, len(values) - 1, SAMPLE).astype(int)]
    slack = 4 * np.finfo(np.float64).eps * np.abs(values)

    def printed(digits: int) -> bool:
        return bool((np.abs(np.round(values, digits) - values) <= slack).all())

    return next(filter(printed, range(FINEST + 1))) if printed(FINEST) else FINEST + 1


def printed_step(values: Array) -> float:
    """The last decimal of values; of floats that were not rounded that of float32, the least that losses have."""
    digits = decimals(values)
    return 10.0**-digits if digits <= FINEST else float(np.abs(values).max()) * 2.0**-23


def sixteen_bits(values: Array, rare: float) -> tuple[str, float] | None:
    """The 16-bit number that all values are, and its step at the middle one; None if they are not for certain.

    A value that was printed in steps of g is one by chance with g over the steps of such numbers.

    Args:
        rare: the chance that counts as certain.
    """
    values = np.unique(np.abs(values))
    values = values[values > 0]
    printed = printed_step(values) if len(values) else 0.0
    for form, bits in SIXTEEN_BITS.items():
        steps = 2.0 ** (np.floor(np.log2(values)) - bits)
        exact = np.abs(values - np.round(values / steps) * steps) <= printed * (0.5 + 1e-6)
        if exact.all() and float(np.log(np.maximum(steps / printed, 1.0)).sum()) > -math.log(rare):
            return form, float(steps[len(steps) // 2])
    return None


def grid(values: Array) -> float:
    """The steps in which values lie: of their decimals, of a 16-bit number, or of a count, as 1/872 is of an accuracy.

    Args:
        values: finite.
    """
    values = np.unique(values)
    if not len(values):
        return 0.0
    step = printed_step(values)
    if found := sixteen_bits(values, 0.01):
        return max(step, found[1])
    gaps = np.diff(values)
    gaps = gaps[gaps > step / 2]
    for parts in range(1, 7) if len(gaps) > 1 else ():
        coarse = float(gaps.min()) / parts
        slack = 0.02 * coarse + step
        if coarse < 4 * step or (2 * slack / coarse) ** len(gaps) > 0.01:  # as many would lie there by chance
            break
        for small in (gaps[gaps < 2.5 * gaps.min()], gaps):  # a single gap is too rough for long distances
            counts = np.cumsum(np.round(small / coarse))
            coarse = float(small.sum() / counts[-1])
        if (np.abs(np.cumsum(gaps) - counts * coarse) <= slack).all():
            return coarse
    return step


def wobble(values: Array) -> float:
    """The sd of a curve's values about its trend, by how far each is from the middle of its neighbours."""
    if len(values) < LEAST:
        return 0.0
    off = np.abs(values[1:-1] - (values[:-2] + values[2:]) / 2)
    return float(np.median(off)) / NORMAL / math.sqrt(1.5)


def late_wobble(steps: Array, values: Array) -> float:
    """The same of the last 14 points, without any trend that a cubic follows; NaN of fewer than 8.

    Fourth divided differences, each in units in which white noise has its own sd.
    """
    x, y = steps[-WOBBLE_POINTS:], values[-WOBBLE_POINTS:]
    if len(x) < 8:
        return math.nan
    x, y = (np.lib.stride_tricks.sliding_window_view(z, 5) for z in (x, y))
    apart = x[:, :, None] - x[:, None, :]
    weights = 1 / np.where(np.eye(5, dtype=bool), 1.0, apart).prod(axis=2)
    off = (weights * y).sum(axis=1) / np.linalg.norm(weights, axis=1)
    return float(np.median(np.abs(off))) / NORMAL


def agreements(curves: Sequence[Array]) -> list[Agreement]:
    """Which curves agree in so many values, at their beginning or at their end, that they are of one run.

    Curves that were printed with different decimals are compared in the fewer. Each curve is compared with its
    neighbours in the order of their values, read from the end and from the beginning: n log n, not n squared.

    Of honest runs whose values wobble as the module says, less than one set in a million has an agreement. Whole curves
    of 4 decimals agree for certain from 6 evaluations on, the last evaluations of a cooldown from about 10.

    Args:
        curves: the values of each, finite. Those of fewer than 3 values agree with none.
    """
    digits = [decimals(values) for values in curves]
    pairs = max(1, len(curves) * (len(curves) - 1) // 2)
    found: dict[tuple[int, int], Agreement] = {}
    for level in sorted(set(digits)):
        rows = {
            i: np.round(values, level) + 0.0 if level <= FINEST else values
            for i, values in enumerate(curves)
            if digits[i] >= level and len(values) >= LEAST
        }
        for start in (False, True):
            keys = {i: row if start else row[::-1] for i, row in rows.items()}
            order = sorted(keys, key=lambda i: keys[i].tobytes())
            for i, j in pairwise(order):
                pair = (min(i, j), max(i, j))
                points = _in_common(keys[i], keys[j])
                if pair not in found and points >= LEAST and _evidence(keys[i][:points]) > math.log(pairs / CERTAIN):
                    sizes = {len(keys[i]), len(keys[j])}
                    found[pair] = Agreement(*pair, points, sizes == {points}, start, points in sizes)
    return list(found.values())


def _in_common(one: Array, other: Array) -> int:
    n = min(len(one), len(other))
    if n < LEAST or (one[:LEAST] != other[:LEAST]).any():
        return 0
    differs = one[:n] != other[:n]
    return int(differs.argmax()) if differs.any() else n


def _evidence(values: Array) -> float:
    """Minus the logarithm of the chance that another run agrees with these values."""
    step, own = grid(values), wobble(values)
    if own < 2 * step or not step:
        return 0.0
    return len(values) * max(0.0, math.log(own / COMMON / (AGREE * step)))

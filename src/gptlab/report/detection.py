"""What a number of seeds can show: power, the detectable difference, and the seeds needed.

A verdict of better or worse needs p < 5% and a mean difference beyond the margin, so power is the chance of both.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from gptlab.report.reading import Array

ALPHA = 0.05  # two-sided; for a family of comparisons, and for each test of equivalence
POWER = 0.8
MOST_SEEDS = 10_000  # larger numbers of seeds are not reported
NODES = 400  # of the integral over the observed mean, which spans 8 standard errors on each side


def power(effect: ArrayLike, n: ArrayLike, alpha: float = ALPHA, margin: ArrayLike = 0.0) -> Array:
    """Probability of a paired t test below alpha and a mean difference beyond the margin, over n seeds.

    The mean and the sd are independent: for each mean beyond the margin, chi-squared gives the chance of an sd that is
    small enough for significance.

    Args:
        effect, margin: true difference and margin, in sds of the paired difference; broadcast with n.
    """
    size, n, margin = np.abs(effect)[..., None], np.asarray(n)[..., None], np.asarray(margin)[..., None]
    critical, reach = special.stdtrit(n - 1, 1 - alpha / 2), 8 / np.sqrt(n)
    total = np.zeros(())
    for centre in (size, -size):
        low, high = np.maximum(margin, centre - reach), np.maximum(margin, centre + reach)
        step = (high - low) / NODES
        mean = low + step * (np.arange(NODES) + 0.5)
        density = np.exp(-n * (mean - centre) ** 2 / 2) * np.sqrt(n / (2 * np.pi))
        total = total + (density * step * special.chdtr(n - 1, n * (n - 1) * (mean / critical) ** 2)).sum(axis=-1)
    return total


def power_of_tost(margin: float, n: int, effect: float = 0.0, alpha: float = ALPHA) -> float:
    """Probability that TOST over n seeds passes; margin and true difference in sds of the paired difference."""
    chi2 = special.chdtri(n - 1, (np.arange(200) + 0.5) / 200)  # quantiles, to integrate over the observed sd
    room = margin - special.stdtrit(n - 1, 1 - alpha) * np.sqrt(chi2 / (n - 1) / n)
    passes = special.ndtr((room - effect) * np.sqrt(n)) - special.ndtr((-room - effect) * np.sqrt(n))
    return float(np.where(room > 0, passes, 0).mean())


def minimum_detectable(n: int, sd: float, family: int = 1, margin: float = 0.0) -> float:
    """True difference that n seeds call better or worse with 80% power: without a margin 3.26 sd at n = 3.

    Args:
        sd: of the paired difference; of independent runs, sqrt(2) times the sd of one arm.
        family: number of comparisons; Holm's first step is at 5% / family.
        margin: that a difference must be beyond; 0 if none is set.
    """
    from scipy.optimize import brentq

    if n < 2 or not sd > 0:
        return float("nan")
    alpha, least, top = ALPHA / family, margin / sd, margin / sd + 1.0
    while power(top, n, alpha, least) < POWER:
        top = least + 2 * (top - least)
    return sd * float(brentq(lambda effect: power(effect, n, alpha, least) - POWER, least, top))


def seeds_needed(effect: float, sd: float, family: int = 1, margin: float = 0.0) -> int | None:
    """Fewest seeds that call a true difference better or worse with 80% power. See `minimum_detectable`.

    None: over 10,000. That is so for every difference up to the margin, which at most half of all studies find.
    """
    if not sd > 0:
        raise ValueError(f"sd = {sd}: must be greater than 0")
    if abs(effect) <= margin:
        return None
    return _fewest(lambda n: float(power(abs(effect) / sd, n, ALPHA / family, margin / sd)))


def seeds_for_equivalence(margin: float, sd: float, effect: float = 0.0, tests: int = 1) -> int | None:
    """Fewest seeds with which TOST passes with 80% power where `effect` is the true difference; None: over 10,000.

    Args:
        tests: number of tests that share the 5%: more than one for the best of a grid.
    """
    if not sd > 0:
        raise ValueError(f"sd = {sd}: must be greater than 0")
    return _fewest(lambda n: power_of_tost(margin / sd, n, effect / sd, ALPHA / tests))


def _fewest(power_of: Callable[[int], float]) -> int | None:
    low, high = 1, MOST_SEEDS
    if not power_of(high) >= POWER:
        return None
    while high - low > 1:  # power grows with n
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(middle) >= POWER else (middle, high)
    return high

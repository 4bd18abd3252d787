"""What a number of seeds can show: power, the detectable difference, and the seeds needed.

A verdict of better or worse needs p < 5% and a mean difference beyond the margin, so power is the chance of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from gptlab.report.reading import Array

ALPHA = 0.05  # two-sided; for a family of comparisons, and for each test of equivalence
POWER = 0.8
MOST_SEEDS = 10_000  # larger numbers of seeds are not reported
# Nodes of the integral over the observed mean, which spans 8 standard errors on each side: with few seeds 100 are exact
# to 1e-4; with many, the chance of significance is nearly a step at one mean.
NODES, FEW_SEEDS, FEW_NODES = 400, 50, 100
# Variances that the study's other arms have a share in (gptlab.report.noise):
PRIOR_DF, PRIOR_QUANTILE = 6.0, 0.9  # degrees of freedom of the prior, and which of the others' variances it is
OWN_SHARE = 1 / 3  # of alpha, for the test by the own variance where it is below the prior; the shrunk one has the rest
LEAST_OTHERS, LEAST_SEEDS = 4, 3  # arms beside the two compared, and seeds; fewer add nothing
ENOUGH_SEEDS = 6  # from which on the own variance finds more than the shrunk one, so that nothing is shrunk
MOST_OTHERS = 250  # arms whose prior is drawn; that of more differs little: the detectable difference by 0.2%
GUARD = 0.2  # chance that arms of equal noise are found unequal, so that variances are shrunk and not shared


@dataclass(frozen=True)
class Rule:
    """How the variance of a comparison is estimated: by its own seeds, and by what the study adds."""

    variances: Literal["own", "shrunk", "shared"] = "own"
    arms: int = 2
    """Number of arms of the study."""
    typical: float = 1.0
    """Sd of a paired difference of the study's other arms, in sds of this one."""

    def borrows(self, n: int) -> bool:
        """Whether the study adds anything to the variance over n seeds."""
        most = ENOUGH_SEEDS if self.variances == "shrunk" else n + 1
        return self.variances != "own" and self.arms - 2 >= LEAST_OTHERS and LEAST_SEEDS <= n < most


OWN = Rule()


@lru_cache
def priors(others: int, df: int) -> Array:
    """Eight quantiles of the prior that arms of equal noise give, in variances of a paired difference."""
    if df > 50:
        return np.asarray(special.chdtri(df, 1 - PRIOR_QUANTILE) / df).reshape(1)
    if others > MOST_OTHERS:
        return priors(MOST_OTHERS, df)
    draws = np.random.default_rng(0).normal(size=(1000, others, df)) / np.sqrt(2 * df)
    i, j = np.triu_indices(others, 1)
    rank, highest = math.ceil(PRIOR_QUANTILE * len(i)) - 1, np.empty(len(draws))
    for k, draw in enumerate(draws):  # one at a time: all would take gigabytes
        products = draw @ draw.T
        own = np.diagonal(products)
        between = (own[:, None] + own - 2 * products)[i, j]
        between.partition(rank)
        highest[k] = between[rank]
    return np.asarray(np.quantile(highest, (np.arange(8) + 0.5) / 8))


def chance_below(t2: Array, n: Array, alpha: float, rule: Rule) -> Array:
    """Probability of a variance so small that a mean is significant; t2 is n times the squared mean over the true one.

    The variance of its own seeds and that of other arms are taken as independent.
    """
    df = n - 1.0
    own = df * t2 / special.stdtrit(df, 1 - alpha / 2) ** 2  # chi-squared below which the own variance suffices
    if not rule.borrows(int(n.min())):
        return np.asarray(special.chdtr(df, own))
    if rule.variances == "shared":
        all_df = df * (rule.arms - 1)
        shared = special.chdtr(all_df, all_df * t2 / special.stdtrit(all_df, 1 - alpha / 2) ** 2)
        return np.asarray((1 - GUARD) * shared + GUARD * chance_below(t2, n, alpha, replace(rule, variances="shrunk")))
    total, part = df + PRIOR_DF, alpha * (1 - OWN_SHARE)
    quiet = df * t2 / special.stdtrit(df, 1 - alpha * OWN_SHARE / 2) ** 2
    prior = priors(rule.arms - 2, int(n.min()) - 1) * rule.typical**2
    own, prior = own[..., None], prior * df[..., None]
    shrunk = (total * t2 / special.stdtrit(total, 1 - part / 2) ** 2)[..., None] - PRIOR_DF * prior / df[..., None]
    shrunk = special.chdtr(df[..., None], np.clip(np.maximum(shrunk, quiet[..., None]), 0, prior))
    above = special.chdtr(df[..., None], own) - special.chdtr(df[..., None], prior)
    return np.asarray((shrunk + np.maximum(0, above)).mean(axis=-1))


def power(effect: ArrayLike, n: ArrayLike, alpha: float = ALPHA, margin: ArrayLike = 0.0, rule: Rule = OWN) -> Array:
    """Probability of a paired t test below alpha and a mean difference beyond the margin, over n seeds.

    The mean and the sd are independent: for each mean beyond the margin, chi-squared gives the chance of an sd that is
    small enough for significance.

    Args:
        effect, margin: true difference and margin, in sds of the paired difference; broadcast with n.
        n: for variances that are not "own" a single number.
        rule: how the variance is estimated. The arms' noise is taken as equal, but for the rule's `typical`.
    """
    size, n, margin = np.abs(effect)[..., None], np.asarray(n)[..., None], np.asarray(margin)[..., None]
    reach, nodes = 8 / np.sqrt(n), FEW_NODES if n.max() <= FEW_SEEDS else NODES
    total = np.zeros(np.broadcast_shapes(size.shape, n.shape, margin.shape)[:-1])
    for centre in (size, -size):
        low, high = np.maximum(margin, centre - reach), np.maximum(margin, centre + reach)
        if not (high > low).any():
            continue
        step = (high - low) / nodes
        mean = low + step * (np.arange(nodes) + 0.5)
        density = np.exp(-n * (mean - centre) ** 2 / 2) * np.sqrt(n / (2 * np.pi))
        total = total + (density * step * chance_below(n * mean**2, n, alpha, rule)).sum(axis=-1)
    return total


def power_of_tost(margin: float, n: int, effect: float = 0.0, alpha: float = ALPHA) -> float:
    """Probability that TOST over n seeds passes; margin and true difference in sds of the paired difference."""
    chi2 = special.chdtri(n - 1, (np.arange(200) + 0.5) / 200)  # quantiles, to integrate over the observed sd
    room = margin - special.stdtrit(n - 1, 1 - alpha) * np.sqrt(chi2 / (n - 1) / n)
    passes = special.ndtr((room - effect) * np.sqrt(n)) - special.ndtr((-room - effect) * np.sqrt(n))
    return float(np.where(room > 0, passes, 0).mean())


def minimum_detectable(n: int, sd: float, family: int = 1, margin: float = 0.0, rule: Rule = OWN) -> float:
    """True difference that n seeds call better or worse with 80% power: without a margin 3.26 sd at n = 3.

    Args:
        sd: of the paired difference; of independent runs, sqrt(2) times the sd of one arm.
        family: number of comparisons; Holm's first step is at 5% / family.
        margin: that a difference must be beyond; 0 if none is set.
        rule: how the variance is estimated.
    """
    from scipy.optimize import brentq

    if n < 2 or not sd > 0:
        return float("nan")
    alpha, least, top = ALPHA / family, margin / sd, margin / sd + 1.0
    while power(top, n, alpha, least, rule) < POWER:
        top = least + 2 * (top - least)
    return sd * float(brentq(lambda effect: power(effect, n, alpha, least, rule) - POWER, least, top))


def seeds_needed(effect: float, sd: float, family: int = 1, margin: float = 0.0, rule: Rule = OWN) -> int | None:
    """Fewest seeds that call a true difference better or worse with 80% power. See `minimum_detectable`.

    None: over 10,000. That is so for every difference up to the margin, which at most half of all studies find.
    """
    if not sd > 0:
        raise ValueError(f"sd = {sd}: must be greater than 0")
    if abs(effect) <= margin:
        return None
    return _fewest(lambda n: float(power(abs(effect) / sd, n, ALPHA / family, margin / sd, rule)))


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

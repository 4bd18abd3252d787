"""The statistics of runs, over plain data: numbers in, numbers out, no folder is read.

The same seed means the same initialisation and data order in every arm of a study, so arms are compared seed by seed.

Each interval is a 95% interval on its own: one in twenty misses on average. Seeds are never bootstrapped (the
percentile interval of three covers 67.5%); documents within a seed are. NaN stands for an unknown value, such as the
interval of one seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from gptlab.report import detection
from gptlab.report.reading import Array

# scipy.stats and scipy.optimize take seconds to import, so the functions that need them import them.

ALPHA = detection.ALPHA
RESAMPLES = 2000  # of the bootstrap over documents
ROUNDING = 2**-20  # relative, 8 units in the last place of float32: a smaller spread is rounding, not noise

Better = Literal["lower", "higher"]
NAN = float("nan")


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval."""

    value: float
    low: float
    high: float
    n: int
    """Number of `of` (below) in the estimate."""
    of: str
    """seeds, runs, steps, documents or arms."""
    p: float = NAN
    """Two-sided, not adjusted; NaN if nothing is tested."""


@dataclass(frozen=True)
class Difference:
    """Arm minus reference over their common seeds, in the metric's units."""

    n: int
    """Pairs."""
    mean: float
    sd: float
    """Of the differences, with n - 1."""
    low: float
    """95% interval of the mean, by t."""
    high: float
    p: float
    """Paired t, two-sided, not adjusted; 1 if nothing differs. NaN below two seeds, and if every seed shows the same
    difference: without spread (a coarse metric, or a copied run) there is no noise to test against."""
    spread: float = NAN
    """Sd of a difference that p and the interval rest on: `sd`, or one that other arms have a share in."""
    df: float = NAN
    """Its degrees of freedom."""

    @property
    def identical(self) -> bool:
        """Bit-identical in every seed, as two arms with the same settings must be (a check of the harness)."""
        return self.mean == 0 and (self.n == 1 or self.sd == 0)


# -- textbook tests, for numbers and arrays


def t_interval(mean: ArrayLike, se: ArrayLike, df: ArrayLike, level: float = 0.95) -> tuple[Array, Array]:
    half = special.stdtrit(df, (1 + level) / 2) * np.asarray(se)
    return mean - half, mean + half


def t_test(mean: ArrayLike, se: ArrayLike, df: ArrayLike) -> Array:
    """Two-sided p of a true mean of 0."""
    return 2 * special.stdtr(df, -np.abs(np.divide(mean, se)))


def tost(n: ArrayLike, mean: ArrayLike, sd: ArrayLike, margin: ArrayLike) -> Array:
    """p of a true difference of `margin` or more: the larger of two one-sided t tests (Schuirmann 1987).

    At 5% it passes where the 90% interval lies within the margin.
    """
    return special.stdtr(np.subtract(n, 1), np.subtract(np.abs(mean), margin) * np.sqrt(n) / sd)


def holm(p: ArrayLike) -> Array:
    """p, (comparisons,), adjusted over the family (Holm 1979).

    NaN counts as p = 1: a planned comparison counts even if it could not be made.
    """
    # statsmodels' multipletests gives the same, but collects garbage at every call: 0.2 s with torch loaded.
    p = np.nan_to_num(np.asarray(p, dtype=np.float64), nan=1.0)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def rate(k: int, n: int) -> Estimate:
    """k of n runs, by Clopper and Pearson (1934): covers at least 95% at any n, unlike Wilson's interval."""
    if n == 0:
        return Estimate(NAN, NAN, NAN, 0, "runs")
    low, high = 1 - largest_rate(n - k, n, ALPHA / 2), largest_rate(k, n, ALPHA / 2)
    return Estimate(k / n, low, high, n, "runs")


def largest_rate(k: int, n: int, alpha: float) -> float:
    """Upper end of the one-sided interval of a rate of which k of n were seen, at 1 - alpha (Clopper and Pearson)."""
    return 1.0 if k == n else float(special.betaincinv(k + 1, n - k, 1 - alpha))


# -- two arms


def difference(n: int, mean: float, sd: float, rounding: float = 0.0) -> Difference:
    """A paired difference from its summary; a spread up to `rounding` counts as none."""
    if n < 2:
        return Difference(n, mean if n else NAN, NAN, NAN, NAN, NAN)
    if sd <= rounding:
        return Difference(n, mean, sd, *((mean, mean, 1.0) if abs(mean) <= rounding else (NAN, NAN, NAN)))
    se = sd / np.sqrt(n)
    low, high = t_interval(mean, se, n - 1)
    return Difference(n, mean, sd, float(low), float(high), float(t_test(mean, se, n - 1)), sd, n - 1)


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Difference:
    """a - b over their common seeds; a and b map seed to value."""
    a, b = finite(a), finite(b)
    pairs = np.array([(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]).reshape(-1, 2)
    delta = pairs[:, 0] - pairs[:, 1]
    if len(delta) > 1 and np.ptp(pairs) == 0:  # one number everywhere measures nothing
        return Difference(len(delta), 0.0, 0.0, NAN, NAN, NAN)
    if len(delta) < 2:
        return difference(len(delta), float(delta.sum()), NAN)
    return difference(len(delta), float(delta.mean()), float(delta.std(ddof=1)), ROUNDING * np.abs(pairs).max())


def welch(a: Mapping[int, float], b: Mapping[int, float]) -> Estimate:
    """a - b without pairing, over all seeds of each (Welch 1947)."""
    x, y = (np.array([*finite(values).values()]) for values in (a, b))
    if min(len(x), len(y)) < 2:
        return Estimate(float(x.mean() - y.mean()) if len(x) and len(y) else NAN, NAN, NAN, len(x) + len(y), "runs")
    return welch_of(x.mean() - y.mean(), x.var(ddof=1) / len(x), y.var(ddof=1) / len(y), len(x), len(y), "runs")


def welch_of(delta: float, var_x: float, var_y: float, n_x: int, n_y: int, of: str) -> Estimate:
    """From the squared standard errors of both sides; degrees of freedom by Satterthwaite (1946)."""
    n, var = n_x + n_y, var_x + var_y
    if not var > 0:  # nothing to test against
        return Estimate(float(delta), NAN, NAN, n, of)
    df = var**2 / (var_x**2 / (n_x - 1) + var_y**2 / (n_y - 1))
    low, high = t_interval(delta, np.sqrt(var), df)
    return Estimate(float(delta), float(low), float(high), n, of, float(t_test(delta, np.sqrt(var), df)))


def finite(values: Mapping[int, float]) -> dict[int, float]:
    return {seed: value for seed, value in values.items() if np.isfinite(value)}


def bootstrap(a: ArrayLike, b: ArrayLike, seed: int = 0, resamples: int = RESAMPLES, alpha: float = ALPHA) -> Estimate:
    """Mean difference of two runs' scores over documents (or windows), by BCa (Efron 1987).

    The interval holds for other documents and these weights; it says nothing about other seeds. Windows of one document
    are not independent: average them first.

    p is that of the paired t. Where a few documents differ much, the interval is too short (it misses in up to 11% with
    50 documents) and t is not; where the differences are skewed it is the other way round. Call a difference shown
    where both agree, which errs in 4 to 7% from 50 documents on.

    Args:
        a, b: a score for each document, (documents,), in the same order.
        seed: of the resampling.
        alpha: error of the interval.
    """
    delta = np.subtract(a, b, dtype=np.float64)
    n = len(delta)
    mean = float(delta.mean()) if n else NAN
    if n < 2 or np.ptp(delta) == 0:
        return Estimate(mean, *((mean, mean) if n > 1 else (NAN, NAN)), n, "documents")
    generator = np.random.default_rng(seed)
    means = np.array([delta[generator.integers(n, size=n)].mean() for _ in range(resamples)])
    below = (np.mean(means < mean) + np.mean(means <= mean)) / 2
    bias = special.ndtri(np.clip(below, 1 / resamples, 1 - 1 / resamples))
    centred = delta - mean
    acceleration = (centred**3).sum() / (6 * (centred**2).sum() ** 1.5)  # of a mean, what the jackknife gives
    z = bias + special.ndtri([alpha / 2, 1 - alpha / 2])
    low, high = np.quantile(means, special.ndtr(bias + z / (1 - acceleration * z)))
    p = float(t_test(mean, delta.std(ddof=1) / np.sqrt(n), n - 1))
    return Estimate(mean, float(low), float(high), n, "documents", p)

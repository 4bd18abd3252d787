"""Many arms at once: rankings of two studies, and Pareto frontiers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray

from gptlab.report import statistics as st
from gptlab.report.divergence import more_often
from gptlab.report.reading import Array
from gptlab.report.verdicts import Runs

DRAWS = 4000  # of the frontier's simulation


def centred_block(arms: Mapping[str, Mapping[int, float]]) -> tuple[list[str], Array]:
    """Names and values (arms, seeds) over the seeds that all arms have, without the common effect of each seed.

    An arm with a single run is left out if others have more.
    """
    known = {name: st.finite(values) for name, values in arms.items()}
    least = max(1, min(2, max((len(values) for values in known.values()), default=0)))
    known = {name: values for name, values in known.items() if len(values) >= least}
    seeds = sorted(set.intersection(*(set(values) for values in known.values()))) if known else []
    block = np.array([[values[seed] for seed in seeds] for values in known.values()]).reshape(len(known), len(seeds))
    return list(known), block - block.mean(axis=0) + block.mean() if block.size else block


def ranking(a: Mapping[str, Runs], b: Mapping[str, Runs], better: tuple[st.Better, st.Better]) -> st.Estimate:
    """Kendall's tau-b between two studies' rankings of the arms they share.

    Of arms with a diverged run, those that `diverging` calls last are, tied, and taken as known to be; the others are
    left out.

    The interval is a projection: every tau that agrees with a joint 95% confidence set of both rankings (as Klein,
    Wright and Wieczorek 2020), which is Tukey's of all pairs with seeds as blocks. A pair whose order is unknown in
    one of the studies agrees for the upper end and disagrees for the lower. It covers 95% or more (in simulations
    even where one arm is ten times as noisy as the others) and is wide until orders are known. Redrawing the means
    gives shorter intervals that miss: noise pulls tau to 0, and where two studies rank twelve close arms alike, not
    one covers 1.

    p is for no association of the observed orders, exact without ties: at best 0.083 with 4 arms, 0.0028 with 6.
    """
    from scipy import stats

    shared = sorted(a.keys() & b.keys())
    orders = [_mean_and_gap({name: s[name] for name in shared}, way) for s, way in zip((a, b), better, strict=True)]
    names = [name for name in shared if all(name in places for places, _ in orders)]
    if len(names) < 2:
        return st.Estimate(st.NAN, st.NAN, st.NAN, len(names), "arms")
    tau = stats.kendalltau(*(stats.rankdata([places[name] for name in names]) for places, _ in orders))
    x, y = (_signs(np.array([places[name] for name in names]), least) for places, least in orders)
    product = np.where((x == 0) | (y == 0), 0, x * y)
    agree, unknown = np.nansum(product), np.isnan(product).sum()
    untied = np.sqrt(float((x != 0).sum() * (y != 0).sum())) or st.NAN
    low, high = np.clip([(agree - unknown) / untied, (agree + unknown) / untied], -1, 1)
    return st.Estimate(float(tau.statistic), float(low), float(high), len(names), "arms", float(tau.pvalue))


def diverging(study: Mapping[str, Runs]) -> dict[str, bool]:
    """The arms with a diverged run, and whether they rank last.

    Last are arms without a completed run, and those that are shown to diverge more often than the others. Another arm
    of which one run diverged has no rank: nothing says that it is the worst, and the runs that survived are no fair
    sample of it.
    """
    runs = {name: (of.diverged, len(st.finite(of.values)) + of.diverged) for name, of in study.items()}
    return {arm: one.shown or one.diverged == one.runs for arm, one in more_often(runs).items() if one.diverged}


@cache
def _studentized_range(arms: int, df: int) -> float:
    from scipy import stats

    return float(stats.studentized_range.ppf(1 - st.ALPHA / 2, arms, df))  # each of two studies gets half of the 5%


def _mean_and_gap(study: Mapping[str, Runs], better: st.Better) -> tuple[dict[str, float], float]:
    """Arm to its mean (low is good, infinite if it ranks last), and the gap above which an order is known."""
    places = {name: np.inf for name, last in diverging(study).items() if last}
    names, block = centred_block({name: runs.values for name, runs in study.items() if not runs.diverged})
    if not block.size:
        return places, np.inf
    means, (m, n) = block.mean(axis=1), block.shape
    places |= zip(names, (means if better == "lower" else -means).tolist(), strict=True)
    df = (m - 1) * (n - 1)
    noise = np.sqrt(((block - means[:, None]) ** 2).sum() / max(1, df))
    if noise <= st.ROUNDING * np.abs(block).max():  # one arm, one seed, or nothing to test against
        return places, np.inf
    return places, float(_studentized_range(m, df) * noise / np.sqrt(n))


def _signs(places: Array, least: float) -> Array:
    """Order of each pair of arms, (pairs,): -1 or 1 if it is known, 0 if both are last, else NaN."""
    i, j = np.triu_indices(len(places), 1)
    last, gap = np.isinf(places), np.nan_to_num(places[i]) - np.nan_to_num(places[j])
    known = (np.abs(gap) > least) | (last[i] != last[j])
    return np.where(last[i] & last[j], 0, np.where(known, np.sign(gap), np.nan))


def drawn_means(block: Array, draws: int, generator: np.random.Generator, rounding: float) -> Array:
    """Simulated means of arms, (draws, arms): each arm's mean plus t times its standard error.

    Args:
        block: values (arms, seeds), as `centred_block` gives them.
        rounding: standard errors up to it count as none. Memory, for example, is equal in every seed: a tie stays one.
    """
    m, n = block.shape
    se = block.std(axis=1, ddof=1) * np.sqrt(m / max(1, m - 1) / n)  # centring took a part 1 / m of the variance
    se[se <= rounding] = 0
    return np.asarray(block.mean(axis=1) + se * generator.standard_t(n - 1, size=(draws, m)))


Axis = tuple[Mapping[str, Mapping[int, float]], st.Better]
"""Arm to seed to value, and which way is better."""


def frontier(axes: tuple[Axis, Axis], seed: int = 0, draws: int = DRAWS) -> dict[str, float]:
    """Share of simulated draws with an arm on the Pareto frontier: no other is as good on both axes and better on one.

    A draw is each arm's mean on each axis plus t times its standard error, without the common effect of each seed.
    The share is no error rate: if k arms tie in quality, the slowest is on the frontier in 1 / k of the draws. But in
    at most 1% of simulated pairs of equal studies, an arm was on it in over 97.5% of one study's draws and in under
    2.5% of the other's. Arms with fewer than two runs, or without a value on an axis, are left out; leave out arms with
    diverged runs too. Dividing an axis by the baseline changes nothing.

    Args:
        seed: of the simulation.
    """
    names = [name for name in axes[0][0] if all(len(st.finite(arms.get(name, {}))) > 1 for arms, _ in axes)]
    generator = np.random.default_rng(seed)
    good = np.empty((len(axes), draws, len(names)))
    for k, (arms, better) in enumerate(axes):
        _, block = centred_block({name: arms[name] for name in names})
        if block.shape[1] < 2:  # fewer than two common seeds
            return dict.fromkeys(names, st.NAN)
        drawn = drawn_means(block, draws, generator, st.ROUNDING * float(np.abs(block).max()))
        good[k] = drawn if better == "higher" else -drawn
    return dict(zip(names, (1 - beaten(*good).mean(axis=0)).tolist(), strict=True))


def beaten(x: Array, y: Array) -> NDArray[np.bool_]:
    """Which points, (..., points), another one beats: as good on both axes and better on one; higher is better."""
    order = np.lexsort((-y, -x))  # from the best x on, and of equal ones from the best y on
    x, y = (np.take_along_axis(axis, order, -1) for axis in (x, y))
    new = np.diff(x, axis=-1, prepend=np.inf) != 0
    first = np.maximum.accumulate(np.where(new, np.arange(x.shape[-1]), 0), axis=-1)  # of those with the same x
    best = np.maximum.accumulate(y, axis=-1)
    further = np.take_along_axis(np.insert(best, 0, -np.inf, axis=-1), first, -1)  # the best y of all with a better x
    lost = (further >= y) | (np.take_along_axis(y, first, -1) > y)
    found = np.empty(lost.shape, dtype=bool)
    np.put_along_axis(found, order, lost, -1)
    return found

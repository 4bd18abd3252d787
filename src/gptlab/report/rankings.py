"""Many arms at once: rankings of two studies, and Pareto frontiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from gptlab.report import statistics as st
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
    """Kendall's tau-b between two studies' rankings of the arms they share. Arms with a diverged run rank last, tied.

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


@cache
def _studentized_range(arms: int, df: int) -> float:
    from scipy import stats

    return float(stats.studentized_range.ppf(1 - st.ALPHA / 2, arms, df))  # each of two studies gets half of the 5%


def _mean_and_gap(study: Mapping[str, Runs], better: st.Better) -> tuple[dict[str, float], float]:
    """Arm to its mean (low is good, infinite if a run diverged), and the gap above which an order is known."""
    places = {name: np.inf for name, runs in study.items() if runs.diverged}
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


def frontier(
    axes: Sequence[tuple[Mapping[str, Mapping[int, float]], st.Better]], seed: int = 0, draws: int = DRAWS
) -> dict[str, float]:
    """Share of simulated draws with an arm on the Pareto frontier: no other is as good on all axes and better on one.

    A draw is each arm's mean on each axis plus t times its standard error, without the common effect of each seed.
    The share is no error rate: if k arms tie in quality, the slowest is on the frontier in 1 / k of the draws. But in
    at most 1% of simulated pairs of equal studies, an arm was on it in over 97.5% of one study's draws and in under
    2.5% of the other's. Arms with fewer than two runs, or without a value on an axis, are left out; leave out arms with
    diverged runs too. Dividing an axis by the baseline changes nothing.

    Args:
        axes: for each, arm to seed to value, and which way is better.
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
    dominated = [
        np.any((good >= own[..., None]).all(axis=0) & (good > own[..., None]).any(axis=0), axis=1)
        for own in np.moveaxis(good, 2, 0)
    ]
    return {name: float(1 - np.mean(lost)) for name, lost in zip(names, dominated, strict=True)}

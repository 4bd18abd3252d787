"""Throughput of runs and its ratio between arms, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from gptlab.report import statistics as st

BATCHES = 10  # of a run's step times; more batches gain little and are too short (Schmeiser 1982)


@dataclass(frozen=True)
class Pace:
    """The speed of one run, from its samples."""

    median: float
    """Of all samples."""
    log: float
    """Logarithm of the median of those above 0."""
    se: float
    """Its standard error."""
    n: int
    """Their number."""


Paces = Mapping[int, Pace | ArrayLike]
"""Seed to a run's steady-state samples in order of time (tokens per second, or seconds), or to what `pace` made of
them."""


def throughput(runs: Paces) -> st.Estimate:
    """Median rate (or time) of a step, with an interval.

    Over two runs or more: the geometric mean of their medians, and t over runs. For one run: how well its median is
    known; it says nothing about another day or machine.
    """
    paces = _known(runs)
    if len(paces) == 1:
        (one,) = paces.values()
        return _exp_interval(one.log, one.se, BATCHES - 1, one.n, "steps")
    return _over_seeds([one.log for one in paces.values()], "runs")


def speedup(a: Paces, b: Paces) -> st.Estimate:
    """throughput(a) / throughput(b), and p of equal ones: t over the logarithms of the ratios, seed by seed.

    For a single seed by the delta method from the steps of both runs, without a p.
    """
    x, y = _known(a), _known(b)
    seeds = sorted(x.keys() & y.keys())
    if len(seeds) != 1:
        logs = np.array([x[seed].log - y[seed].log for seed in seeds])
        p = st.NAN
        if len(logs) > 1 and logs.std() > 0:
            p = float(st.t_test(logs.mean(), logs.std(ddof=1) / np.sqrt(len(logs)), len(logs) - 1))
        return replace(_over_seeds(logs.tolist(), "seeds"), p=p)
    one, other = x[seeds[0]], y[seeds[0]]
    log = st.welch_of(one.log - other.log, one.se**2, other.se**2, BATCHES, BATCHES, "steps")
    value, low, high = np.exp([log.value, log.low, log.high]).tolist()
    return st.Estimate(value, low, high, min(one.n, other.n), "steps")


def pace(samples: ArrayLike) -> Pace:
    """The log median of a run's samples, with its standard error.

    Steps are correlated, so their spread over sqrt(n) is far too small. Sectioning (Asmussen and Glynn 2007, III.5)
    takes the spread of ten batches' medians around the median of all. A batch must be several correlation times long:
    in simulations it covers 93% or more with 200 steps where neighbours correlate by 0.7, with 1,000 where by 0.9.
    """
    values = np.asarray(samples, dtype=np.float64)
    log = np.log(values[np.isfinite(values) & (values > 0)])
    median, centre = (float(np.median(x)) if len(x) else st.NAN for x in (values, log))
    length, se = len(log) // BATCHES, st.NAN
    if length > 1:
        medians = np.median(log[-BATCHES * length :].reshape(BATCHES, length), axis=1)
        se = np.sqrt(((medians - centre) ** 2).sum() / (BATCHES - 1) / BATCHES)
    return Pace(median, centre, float(se), len(log))


def _known(runs: Paces) -> dict[int, Pace]:
    paces = {seed: one if isinstance(one, Pace) else pace(one) for seed, one in runs.items()}
    return {seed: one for seed, one in paces.items() if one.n}


def _over_seeds(logs: Sequence[float], of: str) -> st.Estimate:
    n = len(logs)
    if n < 2:
        return st.Estimate(st.NAN, st.NAN, st.NAN, n, of)
    return _exp_interval(float(np.mean(logs)), float(np.std(logs, ddof=1)) / np.sqrt(n), n - 1, n, of)


def _exp_interval(centre: float, se: float, df: int, n: int, of: str) -> st.Estimate:
    low, high = st.t_interval(centre, se, df)
    return st.Estimate(float(np.exp(centre)), float(np.exp(low)), float(np.exp(high)), n, of)

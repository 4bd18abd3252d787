"""Throughput of runs and its ratio between arms, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from gptlab.report import statistics as st

BATCHES = 10  # of a run's step times; more batches gain little and are too short (Schmeiser 1982)


def throughput(runs: Mapping[int, ArrayLike]) -> st.Estimate:
    """Median st.rate (or time) of a step, with an interval.

    Over two runs or more: the geometric mean of their medians, and t over runs. For one run: how well its median is
    known; it says nothing about another day or machine.

    Args:
        runs: seed to the run's steady-state samples in order of time: tokens per second, or seconds.
    """
    medians = _log_medians(runs)
    if len(medians) == 1:
        ((centre, se, n),) = medians.values()
        return _exp_interval(centre, se, BATCHES - 1, n, "steps")
    return _over_seeds([centre for centre, _, _ in medians.values()], "runs")


def speedup(a: Mapping[int, ArrayLike], b: Mapping[int, ArrayLike]) -> st.Estimate:
    """throughput(a) / throughput(b), and p of equal ones: t over the logarithms of the ratios, seed by seed.

    For a single seed by the delta method from the steps of both runs, without a p.
    """
    x, y = _log_medians(a), _log_medians(b)
    seeds = sorted(x.keys() & y.keys())
    if len(seeds) != 1:
        logs = np.array([x[seed][0] - y[seed][0] for seed in seeds])
        p = st.NAN
        if len(logs) > 1 and logs.std() > 0:
            p = float(st.t_test(logs.mean(), logs.std(ddof=1) / np.sqrt(len(logs)), len(logs) - 1))
        return replace(_over_seeds(logs.tolist(), "seeds"), p=p)
    (centre_x, se_x, n_x), (centre_y, se_y, n_y) = x[seeds[0]], y[seeds[0]]
    log = st.welch_of(centre_x - centre_y, se_x**2, se_y**2, BATCHES, BATCHES, "steps")
    value, low, high = np.exp([log.value, log.low, log.high]).tolist()
    return st.Estimate(value, low, high, min(n_x, n_y), "steps")


def _log_medians(runs: Mapping[int, ArrayLike]) -> dict[int, tuple[float, float, int]]:
    """Seed to the log median of its samples, its standard error, and their number.

    Steps are correlated, so their spread over sqrt(n) is far too small. Sectioning (Asmussen and Glynn 2007, III.5)
    takes the spread of ten batches' medians around the median of all. A batch must be several correlation times long:
    in simulations it covers 93% or more with 200 steps where neighbours correlate by 0.7, with 1,000 where by 0.9.
    """
    result = {}
    for seed, samples in runs.items():
        values = np.asarray(samples, dtype=np.float64)
        log = np.log(values[np.isfinite(values) & (values > 0)])
        if not len(log):
            continue
        centre, length, se = np.median(log), len(log) // BATCHES, st.NAN
        if length > 1:
            medians = np.median(log[-BATCHES * length :].reshape(BATCHES, length), axis=1)
            se = np.sqrt(((medians - centre) ** 2).sum() / (BATCHES - 1) / BATCHES)
        result[seed] = float(centre), float(se), len(log)
    return result


def _over_seeds(logs: Sequence[float], of: str) -> st.Estimate:
    n = len(logs)
    if n < 2:
        return st.Estimate(st.NAN, st.NAN, st.NAN, n, of)
    return _exp_interval(float(np.mean(logs)), float(np.std(logs, ddof=1)) / np.sqrt(n), n - 1, n, of)


def _exp_interval(centre: float, se: float, df: int, n: int, of: str) -> st.Estimate:
    low, high = st.t_interval(centre, se, df)
    return st.Estimate(float(np.exp(centre)), float(np.exp(low)), float(np.exp(high)), n, of)

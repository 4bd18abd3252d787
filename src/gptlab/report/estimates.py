"""Means, spreads, margins and comparisons of a study's arms, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptlab.config import Metric
from gptlab.report import rankings, verdicts
from gptlab.report import statistics as st
from gptlab.report.grids import best_of
from gptlab.report.studies import ReadStudy

Plain = dict[str, Any]


def contrast_of(read: ReadStudy, arm: str, reference: str, metric: Metric) -> verdicts.Contrast:
    """Two arms of a study, or grids of them, compared in a metric."""
    if "*" in arm + reference:
        return best_of(read, (arm, reference), metric)
    ours, theirs = (read.values(name, metric.name) for name in (arm, reference))
    return verdicts.contrast(ours, theirs, metric.better, metric.margin)


def mean_and_spread(values: Sequence[float]) -> Plain | None:
    """Mean and standard deviation over runs, with the 95% interval of the mean; None without a value."""
    known = np.array([value for value in values if math.isfinite(value)])
    n = len(known)
    if not n:
        return None
    mean, sd = float(known.mean()), float(known.std(ddof=1)) if n > 1 else math.nan
    low, high = st.t_interval(mean, sd / math.sqrt(n), n - 1) if n > 1 else (math.nan, math.nan)
    return {"n": n, "mean": mean, "sd": sd, "low": float(low), "high": float(high)}


def as_plain(e: st.Estimate) -> Plain | None:
    return {"value": e.value, "low": e.low, "high": e.high, "n": e.n, "of": e.of} if math.isfinite(e.value) else None


def memory_of(read: ReadStudy, arm: str) -> Plain | None:
    values = [run.value("peak_memory_gb") for run in read.of(arm)]
    return mean_and_spread([value for value in values if value > 0])


def frontier_shares(read: ReadStudy, against: str, among: Sequence[str] | None = None) -> dict[str, float]:
    """For each arm the share of draws in which it is on the frontier of speed and `quality`, or of speed and `memory`.

    Arms with a diverged run, and arms with fewer than two runs, are left out.
    """
    arms = [arm for arm in among or read.study.arms if not any(run.status == "diverged" for run in read.of(arm))]
    speeds = {arm: {seed: float(np.median(s)) for seed, s in read.speeds(arm).items()} for arm in arms}
    metric = read.study.metric
    key, better = ("peak_memory_gb", "lower") if against == "memory" else (metric.name, metric.better)
    values = {arm: dict(read.values(arm, key).values) for arm in arms}
    shares = rankings.frontier([(speeds, "higher"), (values, better)])  # type: ignore[list-item]
    return {arm: share for arm, share in shares.items() if math.isfinite(share)}


def judgement_data(judged: verdicts.Judgement) -> Plain:
    d, welch = judged.contrast.difference, judged.contrast.welch
    return {
        "verdict": judged.verdict,
        **{key: getattr(d, key) for key in ("n", "mean", "sd", "low", "high", "p")},
        **{key: getattr(judged, key) for key in ("p_holm", "p_equivalent", "mde", "mde_family", "more_seeds", "why")},
        "welch": {"value": welch.value, "low": welch.low, "high": welch.high, "p": welch.p} if welch else None,
    }


def clean(value: Any) -> Any:
    """The same as JSON can hold it: NaN and infinity become null, NumPy's numbers become Python's."""
    if isinstance(value, Mapping):
        return {str(key): clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [clean(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Means, spreads, margins and comparisons of a study's arms, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gptlab.config import Metric
from gptlab.report import noise, rankings, timing, unpaired, verdicts, words
from gptlab.report import statistics as st
from gptlab.report.grids import BestOf, best_of, edges_of
from gptlab.report.studies import ReadStudy, look_at

Plain = dict[str, Any]


def contrast_of(
    read: ReadStudy, arm: str, reference: str, metric: Metric, others: noise.Others | None = None
) -> verdicts.Contrast:
    """Two arms of a study, or grids of them, compared in a metric.

    Where the family is all that was asked so far, a comparison that is not in the ledger shows nothing.

    Args:
        others: of this study and metric, if they are at hand.
    """
    found = _contrast_of(read, arm, reference, metric, others)
    if read.ledger is None:
        return found
    question = {"study": read.study.name, "metric": metric.name, "margin": metric.margin, "a": arm, "b": reference}
    asked = look_at(question), read.digest((arm, reference), metric.name)
    return replace(found, ledger=read.ledger.get(asked, (1.0, len(read.ledger))))


def _contrast_of(
    read: ReadStudy, arm: str, reference: str, metric: Metric, others: noise.Others | None
) -> verdicts.Contrast:
    if not {arm, reference} <= read.study.arms.keys():
        return best_of(read, (arm, reference), metric, others)
    ours, theirs = (read.values(name, metric.name) for name in (arm, reference))
    if not read.paired:
        return unpaired.contrast(ours, theirs, metric.better, metric.margin)
    if read.study.until_decided:  # seeds so far choose how many there are, so that other arms are no help
        alone = verdicts.contrast(ours, theirs, metric.better, metric.margin)
        return verdicts.with_looks(alone, ours, theirs, read.study.most_seeds)
    prior = (others or noise.Others(read, metric.name)).prior(arm, reference)
    return verdicts.contrast(ours, theirs, metric.better, metric.margin, prior)


def judged_against(read: ReadStudy, arms: Iterable[str], reference: str) -> dict[str, verdicts.Judgement]:
    """Arms of a study against one of them in the study's metric, as one family."""
    return judged_pairs(read, dict.fromkeys(arms, reference))


def judged_pairs(read: ReadStudy, references: Mapping[str, str]) -> dict[str, verdicts.Judgement]:
    """Arms of a study, each against its reference, in the study's metric, as one family."""
    metric = read.study.metric
    others = noise.Others(read, metric.name)
    compared = references.items()
    return verdicts.judge({arm: contrast_of(read, arm, reference, metric, others) for arm, reference in compared})


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


def memory_ratio(read: ReadStudy, arm: str, reference: str) -> float:
    """Mean peak memory of an arm's completed runs over that of a reference's; NaN if unknown."""
    ours, theirs = memory_of(read, arm), memory_of(read, reference)
    return float(ours["mean"] / theirs["mean"]) if ours and theirs else math.nan


def steps_ratio(read: ReadStudy, arm: str, reference: str) -> float:
    """Steps of an arm's completed runs over those of a reference's; NaN if unknown."""
    ours, theirs = ([steps for run in read.of(name) if (steps := run.value("steps")) > 0] for name in (arm, reference))
    return float(np.mean(ours) / np.mean(theirs)) if ours and theirs else math.nan


def frontier_shares(read: ReadStudy) -> dict[str, float]:
    """For each arm the share of draws in which it is on the frontier of speed and quality.

    Arms with a diverged run, and arms with fewer than two runs, are left out.
    """
    arms = [arm for arm in read.study.arms if not any(run.status == "diverged" for run in read.of(arm))]
    speeds = {arm: {seed: one.median for seed, one in read.paces(arm).items()} for arm in arms}
    metric = read.study.metric
    values = {arm: dict(read.values(arm, metric.name).values) for arm in arms}
    shares = rankings.frontier(((speeds, "higher"), (values, metric.better)))
    return {arm: share for arm, share in shares.items() if math.isfinite(share)}


def judgement_data(judged: verdicts.Judgement) -> Plain:
    d, welch = judged.contrast.difference, judged.contrast.welch
    return {
        "verdict": judged.verdict,
        **{key: getattr(d, key) for key in ("n", "mean", "sd", "low", "high", "p", "spread", "df")},
        **{key: getattr(judged, key) for key in ("p_holm", "p_equivalent", "mde", "mde_family", "more_seeds", "why")},
        "welch": {"value": welch.value, "low": welch.low, "high": welch.high, "p": welch.p} if welch else None,
    }


def comparison_data(
    read: ReadStudy, judged: verdicts.Judgement, arm: str, reference: str, text: str, metric: Metric | None = None
) -> Plain:
    """A judged comparison of a with b, with what a sentence about it needs.

    Args:
        arm, reference: as they were asked for; a and b are the chosen arms, if those are grids.
        text: what was measured, as `words` puts it.
        metric: default: the study's.
    """
    metric, c = metric or read.study.metric, judged.contrast
    a, b = c.chosen if isinstance(c, BestOf) and all(c.chosen) else (arm, reference)
    ours, theirs = (read.values(name, metric.name).values for name in (a, b))
    sign = 1 if metric.better == "lower" else -1
    refused = [run for name in (arm, reference) for run in read.of(name) if run.status == "not_applicable"]
    found = {
        "study": read.study.name,
        "a": a,
        "b": b,
        "of": [arm, reference],
        "edges": edges_of(read, (arm, reference), (a, b)),
        "metric": metric.name,
        "label": words.metric_label(metric.name, read.unit),
        "better": metric.better,
        "margin": metric.margin or None,
        **judgement_data(judged),
        "family": judged.family,
        "runs": c.runs,
        "wins": None if c.runs else sum(sign * (value - theirs.get(s, math.nan)) < 0 for s, value in ours.items()),
        "holds_from": _smallest_margin(c) if judged.verdict == "equivalent" else None,
        "diverged": c.diverged,
        "reference_diverged": c.reference_diverged,
        "reason": next((str(run.result["reason"]) for run in refused if run.result.get("reason")), None),
        "started": [len(read.values(name, metric.name).values) for name in (arm, reference)],
        "speed": as_plain(timing.speedup(read.paces(a), read.paces(b))),
        "memory_ratio": memory_ratio(read, a, b),
        "steps_ratio": steps_ratio(read, a, b),
        "divergence": None,
        "data": read.digest((arm, reference), metric.name),
        "most_seeds": c.looks.most if c.looks else None,
        "hopeless": judged.hopeless,
        "text": text,
    }
    plain: Plain = clean(found)
    return plain


def _smallest_margin(contrast: verdicts.Contrast) -> float:
    """The smallest margin within which two equivalent arms are equivalent, to 1% of the stated one; 0 if identical."""
    if contrast.difference.low == contrast.difference.high:
        return 0.0
    low, high = 0.0, contrast.margin
    while high - low > contrast.margin / 100:
        middle = (low + high) / 2
        low, high = (low, middle) if replace(contrast, margin=middle).p_within() < st.ALPHA else (middle, high)
    return high


def clean(value: Any) -> Any:
    """The same as JSON can hold it: NaN and infinity become null, NumPy's numbers become Python's."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [clean(inner) for inner in value]
    if isinstance(value, str | int | None):  # quicker to tell than what is a mapping
        return value
    return {str(key): clean(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value

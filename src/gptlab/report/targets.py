"""Targets: whether an arm's mean is at most a number, and the steps, tokens and seconds to a validation loss.

A run reaches a target at its first evaluation at or below it; when, is read linearly between that evaluation and the
one before. Of an arm whose runs all reach it, the geometric mean is given, with a t interval of the logs. A run that
does not reach it is censored at its last evaluation, not dropped: then only the median is given, where the runs that
reach the target determine it, and its interval by order statistics, whose upper end may be infinite. A mean of those
that reach it would be that of a selected sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from gptlab.config import Question
from gptlab.report import sentences, unpaired, words
from gptlab.report import statistics as st
from gptlab.report.estimates import Plain
from gptlab.report.looks import Looks
from gptlab.report.reading import Array, number
from gptlab.report.studies import ReadRun, ReadStudy, look_at

READ_OFF = (
    "The first evaluation at or {side} the target counts, read linearly between it and the one before. Mean: "
    "geometric, with a 95% interval of the logs by t. Where a run does not reach the target: the median, with an "
    "interval by order statistics, which may have no upper end, and from fewer than six runs is unknown."
)


# -- the mean against a number


def one_sided(values: Sequence[float], target: float) -> tuple[float, float]:
    """(p of a true mean of `target` or more, p of `target` or less), by t; NaN below two values or without a spread."""
    x = np.array(values, dtype=np.float64)
    sd = x.std(ddof=1) if len(x) > 1 else 0.0
    if not sd > st.ROUNDING * np.abs(x).max(initial=0):
        return st.NAN, st.NAN
    t = (x.mean() - target) / (sd / np.sqrt(len(x)))
    return float(special.stdtr(len(x) - 1, t)), float(special.stdtr(len(x) - 1, -t))


def answer_targets(read: ReadStudy) -> dict[str, Plain]:
    """The answers to a study's questions with a target, by id.

    Confirmed: the mean is on the right side of the target; rejected: it is on the other; each by a one-sided t over the
    seeds at the question's level, after Holm over the study's questions with a target. Nothing is said of an arm with a
    diverged run: the runs that survived are not a fair sample.
    """
    asked = [question for question in read.study.questions if question.target is not None]
    found = [_tested(read, question) for question in asked]
    looks = [_look(read, question, ps) for question, ps in zip(asked, found, strict=True)]
    confirm, reject = (st.holm([ps[side] for ps in found]) for side in (0, 1))
    over = f", Holm over {len(asked)} targets" if len(asked) > 1 else ""
    if read.ledger is not None:
        held = [read.ledger.get((look_at(look), look["data"]), (1.0, 0))[0] if look else 1.0 for look in looks]
        confirm, reject = (
            np.array([p if ps[side] <= ps[1 - side] else 1.0 for p, ps in zip(held, found, strict=True)])
            for side in (0, 1)
        )
        over = ", over the ledger"
    answers = {q.id: _answer(read, q, float(confirm[i]), float(reject[i]), over) for i, q in enumerate(asked)}
    for look, answer in zip(looks, answers.values(), strict=True):
        answer["look"] = look and look | {"verdict": answer["answer"]}
    return answers


def _look(read: ReadStudy, question: Question, ps: tuple[float, float]) -> Plain | None:
    """What the ledger keeps of a question: a two-sided p of a mean at the target; None without a p."""
    metric, (arm,) = question.metric or read.study.metric, question.contrast
    if not all(map(math.isfinite, ps)):
        return None
    values = np.array([*st.finite(read.values(arm, metric.name).values).values()]) - (question.target or 0.0)
    low, high = st.t_interval(values.mean(), values.std(ddof=1) / np.sqrt(len(values)), len(values) - 1)
    return {
        "study": read.study.name,
        "metric": metric.name,
        "margin": None,
        "a": arm,
        "b": f"target {question.target:.10g}",
        "n": len(values),
        "difference": float(values.mean()),
        "low": float(low),
        "high": float(high),
        "p": min(1.0, 2 * min(ps)),
        "data": read.digest((arm,), metric.name),
        "most_seeds": read.study.most_seeds if read.study.until_decided else None,
    }


def _tested(read: ReadStudy, question: Question) -> tuple[float, float]:
    """(p against confirming, p against rejecting), not adjusted."""
    metric, (arm,) = question.metric or read.study.metric, question.contrast
    runs = read.values(arm, metric.name)
    below, above = one_sided([*st.finite(runs.values).values()], question.target or 0.0)
    if runs.diverged:
        return st.NAN, st.NAN
    if read.study.until_decided and math.isfinite(below):
        looks = looks_at(read, question)
        below, above = looks.p_below(), looks.p_above()
    return (below, above) if metric.better == "lower" else (above, below)


def looks_at(read: ReadStudy, question: Question) -> Looks:
    """An arm's values minus the target, in the order of their seeds, in a study that runs until it is decided."""
    metric, (arm,) = question.metric or read.study.metric, question.contrast
    values = np.array([value for _, value in sorted(st.finite(read.values(arm, metric.name).values).items())])
    rounding = st.ROUNDING * float(np.abs(values).max(initial=0))
    return Looks(values - (question.target or 0.0), read.study.most_seeds, rounding)


def _answer(read: ReadStudy, question: Question, confirm: float, reject: float, over: str) -> Plain:
    metric, (arm,), level = question.metric or read.study.metric, question.contrast, question.level or st.ALPHA
    runs, target = read.values(arm, metric.name), question.target
    values = np.array([*st.finite(runs.values).values()])
    noun = "seed" if read.paired else "run"
    side, other = ("at most", "above") if metric.better == "lower" else ("at least", "below")
    answer = "confirmed" if confirm < level else "rejected" if reject < level else "not resolved"
    sentence = ""
    if not runs.values:
        answer, text = "not run", f"{arm} has no run yet"
        sentence = f"{text}."
    elif not len(values) and not runs.diverged:
        text = f"{arm} has no completed run with a {metric.name}"
    elif runs.diverged:
        text = f"{runs.diverged} of {len(values) + runs.diverged} runs of {arm} diverged"
        text += ", so the mean of the others is no evidence"
    else:
        text = f"{arm}: mean {words.metric_name(metric.name)} {values.mean():.6g}"
        if len(values) < 2 or not np.ptp(values):
            text += f" in {words.counted(len(values), noun)}, without a spread to test against"
        else:
            low, high = st.t_interval(values.mean(), values.std(ddof=1) / np.sqrt(len(values)), len(values) - 1)
            shown, p = (other, reject) if answer == "rejected" else (side, confirm)
            text += f" [{low:.6g}, {high:.6g}] over {words.counted(len(values), noun)}; {shown} {target:g} "
            text += f"with one-sided p = {p:.2g} (level {level:g}{over})"
            ends, name = f"{values.mean():.4g} ({low:.4g} to {high:.4g})", words.metric_name(metric.name)
            sentence = f"It is open whether {arm} is {side} {target:g} in mean {name} here: {ends}"
            sentence += f" over {words.counted(len(values), noun)}"
            if answer != "not resolved":
                extreme = "low" if shown in ("at most", "below") else "high"
                sentence = f"{arm} is {shown} {target:g} in mean {name} here: {ends} over "
                sentence += f"{words.counted(len(values), noun)}; if its true mean were {target:g}, at most "
                sentence += f"{sentences.chance(p)} of such studies would show one as {extreme}"
            sentence += "."
    told: Plain = {"id": question.id, "claim": question.claim, "answer": answer, "text": text}
    told |= {"contrast": question.contrast}
    tabled = read.elsewhere is not None and question.id in read.elsewhere.tabled
    told |= {"target": target, "p": reject if answer == "rejected" else confirm, "tabled": tabled}
    said = {"sentence": sentence or f"{text[:1].upper()}{text[1:]}.", "cost": "", "change": "", "comparisons": []}
    return told | said | {"evidence": list(question.contrast)}


# -- when a loss is reached


@dataclass(frozen=True)
class Reached:
    """When a run reaches a target, in one unit."""

    at: float
    """Of a run that does not reach it: how far it was followed, below which it has not."""
    reached: bool


@dataclass(frozen=True)
class Time:
    """Steps, tokens or seconds to a target over an arm's runs, or a ratio of them. NaN is unknown."""

    value: float
    low: float
    high: float
    """Infinite: there is no upper bound, because a run does not reach the target."""
    of: str
    """geometric mean, or median."""


def crossing(steps: Array, losses: Array, target: float) -> float:
    """The step at which a curve of evaluations first is at or below a loss, linearly between evaluations.

    Args:
        steps, losses: (evaluations,); losses that are not finite are left out.

    Returns:
        NaN if no evaluation is at or below it.
    """
    kept = np.isfinite(losses)
    steps, losses = steps[kept], losses[kept]
    below = np.flatnonzero(losses <= target)
    if not len(below):
        return math.nan
    i = below[0]
    if i == 0:
        return float(steps[0])
    return float(np.interp(-target, -losses[[i - 1, i]], steps[[i - 1, i]]))


def time_to(runs: Sequence[Reached]) -> Time:
    """The time that an arm takes to a target: see the module's docstring."""
    at = np.array([run.at for run in runs])
    if not len(at) or not np.isfinite(at).all():
        return Time(st.NAN, st.NAN, st.NAN, "geometric mean")
    if not all(run.reached for run in runs):
        return _median(at, np.array([run.at if run.reached else math.inf for run in runs]))
    if at.min() <= 0:  # a run that starts below the target has no logarithm
        return Time(st.NAN, st.NAN, st.NAN, "geometric mean")
    logs, n = np.log(at), len(at)
    low, high = st.NAN, st.NAN
    if n > 1:
        low, high = np.exp(st.t_interval(logs.mean(), logs.std(ddof=1) / np.sqrt(n), n - 1))
    return Time(float(np.exp(logs.mean())), float(low), float(high), "geometric mean")


def _median(shortest: Array, longest: Array) -> Time:
    """The median of times of which only bounds are known, with an interval that no distribution is assumed for.

    The k-th smallest of n values lies above the true median with probability P(Binomial(n, 1/2) < k). The interval goes
    from the k-th smallest to the k-th largest, with the largest k for which it covers 95%. Fewer than six runs have
    none.

    Args:
        shortest, longest: (runs,), equal where a run reaches the target; else how far it was followed, and infinity.
    """
    n, low, high = len(shortest), np.sort(shortest), np.sort(longest)
    middle = float(np.median(low))
    value = middle if middle == np.median(high) else st.NAN  # known however long the censored runs would take
    ks = [k for k in range(1, n + 1) if 2 * special.bdtr(k - 1, n, 0.5) <= st.ALPHA]
    if not ks:
        return Time(value, st.NAN, st.NAN, "median")
    return Time(value, float(low[ks[-1] - 1]), float(high[n - ks[-1]]), "median")


def ratio_of(arm: Mapping[int, Reached], reference: Mapping[int, Reached]) -> Time:
    """How many times fewer the arm takes than the reference, paired by seed: above 1, the arm is faster.

    `unpaired_ratio` is of arms whose runs share no seeds.

    Where only runs of the reference do not reach the target, a lower bound may be left. Where a run of the arm does
    not, nothing is.
    """
    seeds = sorted(arm.keys() & reference.keys())
    if len(seeds) < 2 or not all(arm[seed].reached and arm[seed].at > 0 for seed in seeds):
        return Time(st.NAN, st.NAN, st.NAN, "geometric mean")
    pairs = [Reached(reference[seed].at / arm[seed].at, reference[seed].reached) for seed in seeds]
    return time_to(pairs)


def unpaired_ratio(arm: Sequence[Reached], reference: Sequence[Reached]) -> Time:
    """The ratio of the geometric means, with an interval of the logs; unknown unless all runs reach the target."""
    unknown = Time(st.NAN, st.NAN, st.NAN, "geometric mean")
    if not (arm and reference and all(run.reached and run.at > 0 for run in (*arm, *reference))):
        return unknown
    logs = [{i: math.log(run.at) for i, run in enumerate(runs)} for runs in (reference, arm)]
    d, _ = unpaired.difference(*logs)
    return Time(math.exp(d.mean), math.exp(d.low), math.exp(d.high), "geometric mean")


def targets_of(read: ReadStudy) -> list[Plain]:
    """For each target of the study: each arm's steps, tokens and seconds to that validation loss.

    Of runs that were trained elsewhere: the steps to that value of the study's metric.
    """
    study = read.study
    if read.elsewhere and not any(len(run.curves["val_loss"][0]) for run in read.runs.values()):
        return []
    curve = study.metric.name if read.elsewhere else "final_val_loss"
    asked = [q.target for q in study.questions if (q.metric or study.metric).name == curve]
    wanted = dict.fromkeys([*study.targets, *(target for target in asked if target is not None)])
    return [_target(read, target) for target in sorted(wanted, reverse=study.metric.better == "lower")]


def _target(read: ReadStudy, target: float) -> Plain:
    units = ("steps", read.unit, "seconds") if read.unit else ("steps",)
    base = _arm_runs(read, read.study.baseline, target)
    arms = []
    for name in read.study.arms:
        runs = _arm_runs(read, name, target)
        times = {unit: time_to([run[unit] for run in runs.values()]) for unit in units}
        sides = {unit: [{seed: run[unit] for seed, run in of.items()} for of in (runs, base)] for unit in units}
        ratios = {
            unit: ratio_of(*both) if read.paired else unpaired_ratio(*([*side.values()] for side in both))
            for unit, both in sides.items()
        }
        row = {
            "name": name,
            "runs": len(runs),
            "reached": sum(run["steps"].reached for run in runs.values()),
            "each": [
                {"seed": seed, "reached": run["steps"].reached, **{unit: run[unit].at for unit in units}}
                for seed, run in runs.items()
            ],
            **{unit: vars(times[unit]) for unit in units},
            "ratio": {unit: vars(ratios[unit]) for unit in units} if name != read.study.baseline else None,
        }
        arms.append(row | {"text": _time_text(row, target, read.study.baseline)})
    side = "below" if read.study.metric.better == "lower" else "above"
    label = words.metric_name(read.study.metric.name) if read.elsewhere else "validation loss"
    note = READ_OFF.format(side=side)
    return {"target": target, "label": label, "units": list(units), "arms": arms, "note": note}


def _arm_runs(read: ReadStudy, arm: str, target: float) -> dict[int, dict[str, Reached]]:
    """Seed to when the run reaches the target, by unit, of all runs that trained."""
    runs = [run for run in read.of(arm) if run.status != "not_applicable"]
    if read.elsewhere:
        runs = [run for run in runs if len(run.curves["val_loss"][0])]
    sign = 1 if read.study.metric.better == "lower" else -1
    return {run.seed: _run_times(run, read.unit, target, sign if read.elsewhere else 1) for run in runs}


def _run_times(run: ReadRun, unit: str, target: float, sign: int) -> dict[str, Reached]:
    """`sign`: -1 where the curve is of a metric that is better if it is higher."""
    steps, losses = run.curves.get("val_loss", (np.array([]), np.array([])))
    step = crossing(steps, sign * losses, sign * target)
    reached = math.isfinite(step)
    if not reached:
        step = float(max(steps, default=0))
    done = number(run.result.get("steps"))
    of_step = {
        "steps": 1.0,
        unit: number(run.result.get(unit)) / done if done > 0 else math.nan,
        "seconds": number(run.result.get("time_per_iter_ms")) / 1000,
    }
    return {key: Reached(step * per, reached) for key, per in of_step.items()}


# -- words ----------------------------------------------------------------------------------------------------------


def _time_text(row: Mapping[str, Any], target: float, baseline: str) -> str:
    """`muon reaches 3.28 in 5 of 5 runs, after 3,250 steps (3,180 to 3,320); 1.43 (1.31 to 1.56) times fewer ...`."""
    n, k, steps = row["runs"], row["reached"], row["steps"]
    if not n:
        return f"{row['name']} has no run yet"
    text = f"{row['name']} reaches {target:g} in {k} of {words.counted(n, 'run')}"
    if not k:
        text += f", followed for {max(run['steps'] for run in row['each']):,.0f} steps"
    elif math.isfinite(steps["value"]):
        of = "" if k == n else f"a {steps['of']} of "
        text += f", after {of}{steps['value']:,.0f} steps"
        if math.isfinite(steps["high"]):
            text += f" ({steps['low']:,.0f} to {steps['high']:,.0f})"
    if k < n and math.isfinite(steps["low"]) and not math.isfinite(steps["high"]):
        text += f"; the median is at least {steps['low']:,.0f} steps"
    return text + (ratio_text(row["ratio"]["steps"], baseline) if row["ratio"] else "")


def ratio_text(ratio: Mapping[str, Any], reference: str) -> str:
    """`; 1.43 (1.31 to 1.56) times fewer steps than base`, or `times as many` where the arm takes more."""
    value, low, high = ratio["value"], ratio["low"], ratio["high"]
    if not math.isfinite(value):
        return f"; at least {low:.2f} times fewer steps than {reference}" if math.isfinite(low) else ""
    what, least = "fewer steps than", "or more"
    if value < 1:
        value, low, high, what, least = 1 / value, 1 / low, 1 / high, "as many steps as", "or less"
    ends = " ({:.2f} to {:.2f})".format(*sorted((low, high))) if math.isfinite(low + high) else ""
    ends = f" ({low:.2f} {least})" if math.isinf(ratio["high"]) else ends
    return f"; {value:.2f}{ends} times {what} {reference}"

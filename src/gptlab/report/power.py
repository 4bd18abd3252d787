"""How many seeds a study needs: `gptlab study power`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gptlab.config import Study
from gptlab.errors import UserError
from gptlab.report import detection
from gptlab.report import statistics as st
from gptlab.report.estimates import Plain
from gptlab.report.precedents import nearest
from gptlab.report.reading import Array
from gptlab.report.studies import ReadStudy
from gptlab.report.words import counted

RULES = {
    "shrunk": "variances are shrunk toward those of the other arms, whose noise is taken as equal",
    "shared": "all arms share one variance, or, where their noise seems unequal "
    f"({detection.GUARD:.0%} of studies by chance), have variances shrunk toward the others'",
}
SHOWN = (3, 4, 5, 6, 8, 10, 15, 20, 30, 50)  # numbers of seeds in the table


@dataclass(frozen=True)
class Noise:
    """The sd over seeds of the paired difference between two arms, in the metric's units."""

    sd: float
    low: float = math.nan
    """95% interval, by chi-squared; NaN if the sd was given and not measured."""
    high: float = math.nan
    df: float = 0.0
    source: str = ""
    """Where it was measured, if not in this setting: `noise of another setting ...`."""


def pilot_noise(read: ReadStudy, key: str) -> Noise:
    """From a pilot study: the sd of paired differences with the baseline, pooled over arms without diverged runs.

    All differences share the baseline, so they know less than independent ones would: see `effective_df`. Arms that are
    identical to another, or to the baseline, add nothing and are left out.

    Args:
        key: name of the planned study's metric.

    Raises:
        UserError: no arm has two seeds that completed in it and in the baseline.
    """
    from scipy.special import chdtri

    arms = {arm: runs.values for arm in read.study.arms if not (runs := read.values(arm, key)).diverged}
    base = arms.pop(read.study.baseline, {})
    differing = {arm: values for arm, values in arms.items() if (d := st.paired(values, base)).n > 1 and d.sd > 0}
    common = {arm: _known(values) & _known(base) for arm, values in differing.items()}
    # the seeds that leave the most differences, where arms lack runs
    seeds = max(
        common.values(), key=lambda own: len(own) * sum(own <= other for other in common.values()), default=set()
    )
    order = sorted(seeds)
    rows = {tuple(differing[arm][seed] for seed in order) for arm, own in common.items() if seeds <= own}
    if not rows:
        raise UserError(
            f"{read.folder} shows no noise of {key}: two seeds must have completed with a {key}, in "
            f"{read.study.baseline} and in another arm"
        )
    block = np.array([[base[seed] for seed in order], *sorted(rows)])
    variance = float((block[1:] - block[0]).var(axis=1, ddof=1).mean())
    df = effective_df(block)
    low, high = (math.sqrt(variance * df / chdtri(df, tail)) for tail in (0.025, 0.975))
    return Noise(math.sqrt(variance), low, high, df)


def _known(values: Mapping[int, float]) -> set[int]:
    return {seed for seed, value in values.items() if math.isfinite(value)}


def effective_df(block: Array) -> float:
    """Degrees of freedom of the mean variance of the differences from row 0, by Satterthwaite (1946).

    The differences have the covariance diag(v) + v0, so their mean variance has (n - 1) trace^2 / trace of the square:
    with 18 arms and 3 seeds 6.9 if all variances are equal, and not 36. The variances are Grubbs' (1948), from two-way
    residuals; as they are noisy, no more is claimed than equal ones give. The interval covers 95% of simulated
    pilots with equal or uneven arms, and 86% or more if the baseline is three times as noisy as all others.

    Args:
        block: values (1 + arms, seeds), the baseline first.
    """
    m, n = len(block) - 1, block.shape[1]
    equal = (n - 1) * 4 * m / (m + 3)
    if m == 1:
        return equal
    residuals = block - block.mean(axis=0) - block.mean(axis=1, keepdims=True) + block.mean()
    spread = (residuals**2).sum(axis=1) / (n - 1)
    base, *own = np.maximum(0, ((m + 1) * spread - spread.sum() / m) / (m - 1))
    trace, squares = sum(own) + m * base, sum(v * v for v in own) + 2 * base * sum(own) + (m * base) ** 2
    return float(min(equal, (n - 1) * trace**2 / squares))


def power_report(study: Study, effect: float, noise: Noise) -> list[str]:
    """Lines of text: how many seeds detect a difference of `effect`, and what other numbers of seeds detect.

    Args:
        effect: a true difference of the study's metric, in its units.

    Raises:
        UserError: an effect or noise that is not greater than 0, or a study with one arm.
    """
    for name, value in (("effect", effect), ("noise", noise.sd)):
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"{name} = {value:g}: must be greater than 0")
    family = len(study.arms) - 1
    if not family:
        raise UserError(f"{study.name} has one arm: there is nothing to compare")
    margin, rule = study.metric.margin or 0.0, rule_of(study)
    measured = f" (measured; 95% interval {noise.low:.3g} to {noise.high:.3g})" if noise.df else noise.source
    lines = [
        f"{study.name}: {study.metric.name}, {counted(family, 'comparison')} with {study.baseline}; the sd of a paired "
        f"difference over seeds is {noise.sd:.3g}{measured}",
        "",
    ]
    if effect > margin:
        beyond = f" and a mean difference beyond the margin of {margin:g}" if margin else ""
        lines += [
            f"to detect a difference of {effect:g} with 80% power (paired t, two-sided, 5%{beyond}):",
            f"  {'if it is the only comparison':<32}{_seeds(effect, noise, 1, margin, rule)}",
            f"  {f'the first of {family} after Holm':<32}{_seeds(effect, noise, family, margin, rule)}",
        ]
    else:
        lines.append(
            f"a difference of {effect:g} is not beyond the margin of {margin:g}; better and worse need a mean beyond "
            "it, so no number of seeds finds it in more than half of all studies"
        )
    if margin:
        n = detection.seeds_for_equivalence(margin, noise.sd)
        lines.append(f"to show that equal arms are equivalent within {margin:g}: {_seed_count(n)}")
    lines += [RULES[rule.variances]] if rule.variances != "own" else []
    lines += unknown_to_power(study)
    lines += ["", f"{'seeds':>7}  {'detects (alone)':>15}  {f'detects (of {family})':>16}"]
    for n, alone, among in _detected(study, noise):
        mark = "  this study" if n == len(study.seeds) else ""
        lines.append(f"{n:>7}  {alone:>15.3g}  {among:>16.3g}{mark}")
    return lines


def power_data(study: Study, effect: float, noise: Noise) -> Plain:
    """The same as plain data: numbers of seeds (null: over 10,000), and what other numbers of seeds detect.

    Args, Raises: as of `power_report`.
    """
    text, family = power_report(study, effect, noise), len(study.arms) - 1
    margin, rule = study.metric.margin or 0.0, rule_of(study)
    needed = [
        detection.seeds_needed(effect, noise.sd, m, margin, rule) if effect > margin else None for m in (1, family)
    ]
    return {
        "study": study.name,
        "metric": study.metric.name,
        "effect": effect,
        "margin": margin or None,
        "comparisons": family,
        "noise": {"sd": noise.sd, "low": noise.low, "high": noise.high},
        "seeds_alone": needed[0],
        "seeds_family": needed[1],
        "seeds_equivalent": detection.seeds_for_equivalence(margin, noise.sd) if margin else None,
        "detects": [{"seeds": n, "alone": alone, "family": among} for n, alone, among in _detected(study, noise)],
        "text": text,
    }


def _detected(study: Study, noise: Noise) -> list[tuple[int, float, float]]:
    """(seeds, what they detect in one comparison, and in the first of the family)."""
    family, margin, rule = len(study.arms) - 1, study.metric.margin or 0.0, rule_of(study)

    def least(n: int, tests: int) -> float:
        return detection.minimum_detectable(n, noise.sd, tests, margin, rule)

    return [(n, least(n, 1), least(n, family)) for n in sorted({*SHOWN, len(study.seeds)}) if n > 1]


def unknown_to_power(study: Study) -> list[str]:
    """What a study does that these numbers leave out, one sentence each."""
    found = []
    if study.until_decided:
        found.append(
            f"these numbers are of one look at a fixed number of seeds; the study looks after every seed from 2 to "
            f"{study.most_seeds} and pays for it, so {study.most_seeds} seeds find less than this, and often fewer do"
        )
    if study.factors:
        found.append(
            "these numbers are of two arms; the study's factors are compared over all its arms, which finds smaller "
            "differences"
        )
    return found


def rule_of(study: Study) -> detection.Rule:
    """How the comparisons of a study will be judged."""
    own = study.variances == "own" or study.until_decided or len(study.arms) - 2 < detection.LEAST_OTHERS
    return detection.OWN if own else detection.Rule(study.variances, len(study.arms))


def precedent_noise(study: Study, parameters: int | None, tokens: int | None) -> Noise:
    """The noise of the nearest setting in which it was measured: a starting point.

    Raises:
        UserError: the study's metric was measured nowhere.
    """
    found = nearest(study.recipe.get("task", "lm"), study.metric.name, parameters, tokens)
    if found is None:
        raise UserError(
            f"the noise of {study.metric.name} is known from no other setting; pass --noise SD, or --pilot DIR with a "
            "study's folder"
        )
    return Noise(found.sd, source=f": a starting point from another setting, {found.text}")


def plan_line(study: Study, parameters: int | None, tokens: int | None) -> str:
    """What a study's seeds would detect with the noise of the nearest setting, as a sentence."""
    n, family = len(study.seeds), sum(arm != study.reference(arm) for arm in study.arms)
    if n < 2 or not family:
        return ""
    try:
        noise = precedent_noise(study, parameters, tokens)
    except UserError:
        return (
            f"what {counted(n, 'seed')} would detect is unknown, as the noise of {study.metric.name} is; see "
            f"`gptlab study power {study.name}` with --noise or --pilot"
        )
    rule, margin = rule_of(study), study.metric.margin
    alone, among = (detection.minimum_detectable(n, noise.sd, m, margin, rule) for m in (1, family))
    found = f"{alone:.2g}" + (f" in one comparison and {among:.2g} in the first of {family}" if family > 1 else "")
    return (
        f"{counted(n, 'seed')} detect a difference in {study.metric.name} of {found} with 80% power, if the sd of a "
        f"paired difference is {noise.sd:.2g}{noise.source}"
    )


def _seeds(effect: float, noise: Noise, family: int, margin: float, rule: detection.Rule) -> str:
    text = _seed_count(detection.seeds_needed(effect, noise.sd, family, margin, rule))
    if noise.df:
        ends = [detection.seeds_needed(effect, sd, family, margin, rule) for sd in (noise.low, noise.high)]
        text += f" ({_seed_count(ends[0], '')} to {_seed_count(ends[1], '')} from the interval of the sd)"
    return text


def _seed_count(n: int | None, unit: str = " seeds") -> str:
    return f"over {detection.MOST_SEEDS:,}{unit}" if n is None else f"{n:,}{unit}"

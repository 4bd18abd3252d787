"""How many seeds a study needs: `gptlab study power`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gptlab.config import Study
from gptlab.errors import UserError
from gptlab.report import detection
from gptlab.report import statistics as st
from gptlab.report.studies import ReadStudy
from gptlab.report.words import counted

SHOWN = (3, 4, 5, 6, 8, 10, 15, 20, 30, 50)  # numbers of seeds in the table


@dataclass(frozen=True)
class Noise:
    """The sd over seeds of the paired difference between two arms, in the metric's units."""

    sd: float
    low: float = math.nan
    """95% interval, by chi-squared; NaN if the sd was given and not measured."""
    high: float = math.nan
    df: int = 0


def pilot_noise(read: ReadStudy, key: str) -> Noise:
    """From a pilot study: the sd of paired differences with the baseline, pooled over arms without diverged runs.

    Args:
        key: name of the planned study's metric.

    Raises:
        UserError: no arm has two seeds that completed in it and in the baseline.
    """
    from scipy.special import chdtri

    study, squares, df = read.study, 0.0, 0
    base = read.values(study.baseline, key)
    for arm in study.arms:
        runs = read.values(arm, key)
        if arm == study.baseline or runs.diverged or base.diverged:
            continue
        d = st.paired(runs.values, base.values)
        if d.n > 1 and d.sd > 0:
            squares, df = squares + (d.n - 1) * d.sd**2, df + d.n - 1
    if not df:
        raise UserError(
            f"{read.folder} shows no noise of {key}: two seeds must have completed with a {key}, in {study.baseline} "
            "and in another arm"
        )
    return Noise(
        math.sqrt(squares / df), math.sqrt(squares / chdtri(df, 0.025)), math.sqrt(squares / chdtri(df, 0.975)), df
    )


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
    margin = study.metric.margin or 0.0
    measured = f" (measured; 95% interval {noise.low:.3g} to {noise.high:.3g})" if noise.df else ""
    lines = [
        f"{study.name}: {study.metric.name}, {counted(family, 'comparison')} with {study.baseline}; the sd of a paired "
        f"difference over seeds is {noise.sd:.3g}{measured}",
        "",
    ]
    if effect > margin:
        beyond = f" and a mean difference beyond the margin of {margin:g}" if margin else ""
        lines += [
            f"to detect a difference of {effect:g} with 80% power (paired t, two-sided, 5%{beyond}):",
            f"  {'if it is the only comparison':<32}{_seeds(effect, noise, 1, margin)}",
            f"  {f'the first of {family} after Holm':<32}{_seeds(effect, noise, family, margin)}",
        ]
    else:
        lines.append(
            f"a difference of {effect:g} is not beyond the margin of {margin:g}; better and worse need a mean beyond "
            "it, so no number of seeds finds it in more than half of all studies"
        )
    if margin:
        n = detection.seeds_for_equivalence(margin, noise.sd)
        lines.append(f"to show that equal arms are equivalent within {margin:g}: {_seed_count(n)}")
    lines += ["", f"{'seeds':>7}  {'detects (alone)':>15}  {f'detects (of {family})':>16}"]
    for n in sorted({*SHOWN, len(study.seeds)}):
        alone, among = (detection.minimum_detectable(n, noise.sd, m, margin) for m in (1, family))
        mark = "  this study" if n == len(study.seeds) else ""
        if n > 1:
            lines.append(f"{n:>7}  {alone:>15.3g}  {among:>16.3g}{mark}")
    return lines


def _seeds(effect: float, noise: Noise, family: int, margin: float) -> str:
    text = _seed_count(detection.seeds_needed(effect, noise.sd, family, margin))
    if noise.df:
        ends = [detection.seeds_needed(effect, sd, family, margin) for sd in (noise.low, noise.high)]
        text += f" ({_seed_count(ends[0], '')} to {_seed_count(ends[1], '')} from the interval of the sd)"
    return text


def _seed_count(n: int | None, unit: str = " seeds") -> str:
    return f"over {detection.MOST_SEEDS:,}{unit}" if n is None else f"{n:,}{unit}"

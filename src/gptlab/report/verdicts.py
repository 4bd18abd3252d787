"""Verdicts on comparisons of arms, from their runs.

* better, worse: paired t, adjusted by Holm over the family of comparisons, and a difference larger than the margin.
  The probability of any false finding in the family is at most 5%.
* equivalent: two one-sided tests against a margin set beforehand, at 5% per comparison, not per family. Without a
  margin nothing is: one taken from the same runs would call a difference of that size equivalent in up to 37%.
* diverges: a run diverged. One run shows that an arm can diverge; its rate has an exact interval.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np

from gptlab.report import detection
from gptlab.report import statistics as st

NO_MARGIN = "no margin is stated, so nothing is called equivalent"

Verdict = Literal["better", "worse", "equivalent", "not resolved", "diverges", "reference diverges"]
FlipVerdict = Literal["flips", "agrees", "equivalent", "unresolved", "diverges"]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Runs:
    """One arm's runs in one metric."""

    values: Mapping[int, float]
    """Seed to value, for completed runs. Values that are not finite count as missing."""
    diverged: int = 0
    """Number of diverged runs: counted, never averaged."""


@dataclass(frozen=True)
class Contrast:
    """An arm and its reference; `contrast` makes one from their runs."""

    difference: st.Difference
    """If a run diverged: over the surviving runs, and no evidence."""
    better: st.Better
    margin: float
    """Differences up to the margin count as none, in the metric's units. 0: not set; nothing can be equivalent."""
    welch: st.Estimate | None = None
    """The unpaired difference, over all seeds of each; for reference, no verdict rests on it."""
    diverged: tuple[int, int] = (0, 0)
    """(diverged runs, runs that completed or diverged) of the arm."""
    reference_diverged: tuple[int, int] = (0, 0)
    tests: int = 1
    """Number of tests that it is made of, for its power: more than one for the best of a grid."""

    @property
    def any_diverged(self) -> bool:
        return self.diverged[0] + self.reference_diverged[0] > 0

    @property
    def tested(self) -> bool:
        return not self.any_diverged and bool(np.isfinite(self.difference.p))

    @property
    def p(self) -> float:
        """Not adjusted: st.paired t, or Fisher's exact test of the counts if a run diverged."""
        if not self.any_diverged:
            return self.difference.p
        from scipy import stats

        return float(stats.fisher_exact([[k, n - k] for k, n in (self.diverged, self.reference_diverged)]).pvalue)

    def p_within(self) -> float:
        """p of equivalence within the margin, not adjusted."""
        return float(st.tost(self.difference.n, self.difference.mean, self.difference.sd, self.margin))


@dataclass(frozen=True)
class Judgement:
    """The verdict on a contrast, and its evidence."""

    verdict: Verdict
    contrast: Contrast
    p_holm: float
    """The contrast's p adjusted over its family, in which untestable contrasts count with p = 1."""
    p_equivalent: float
    """Two one-sided tests against the margin; not adjusted."""
    divergence: st.Estimate
    """Rate of the arm's diverged runs."""
    why: str
    """Why the verdict is no clearer; may be empty."""
    family: int
    """Number of comparisons that Holm's correction is over."""

    @cached_property
    def mde(self) -> float:
        """True difference that these seeds call better or worse with 80% power at 5% in a single comparison, in the
        metric's units. It is as uncertain as the sd, which three seeds give within a factor of 0.5 to 6."""
        return self._detectable(1)

    @cached_property
    def mde_family(self) -> float:
        """The same at Holm's first step, 5% over the number of comparisons."""
        return self._detectable(self.family)

    def _detectable(self, family: int) -> float:
        c = self.contrast
        if not c.tested:
            return st.NAN
        return detection.minimum_detectable(c.difference.n, c.difference.sd, family * c.tests, c.margin)

    @cached_property
    def more_seeds(self) -> int | None:
        """If not resolved: further seeds for 80% power if the difference and the spread are as seen. With a difference
        beyond the margin: to detect it. Within the margin: to show equivalence, of equal arms (or, if the difference
        is significant, of arms with this difference). None: unknown, or over 10,000. For grids at best: where one arm
        of each stands out."""
        c, d = self.contrast, self.contrast.difference
        if self.verdict != "not resolved" or not c.tested or d.low == d.high:
            return None
        if abs(d.mean) > c.margin:
            needed = detection.seeds_needed(d.mean, d.sd, self.family * c.tests, c.margin)
        else:
            effect = abs(d.mean) if self.p_holm < st.ALPHA else 0.0
            needed = detection.seeds_for_equivalence(c.margin, d.sd, effect, c.tests)
        return max(1, needed - d.n) if needed else None


@dataclass(frozen=True)
class Flip:
    """A pair of arms in two tasks."""

    verdict: FlipVerdict
    """flips: better in one task and worse in the other. agrees: better in both, or worse in both. equivalent: in both.
    diverges: a run diverged in either. unresolved: everything else."""
    first: Judgement
    second: Judgement
    interaction: st.Estimate
    """The first task's difference minus the second's, each in margins and positive if the arm is better than its
    reference; Welch's t."""
    p_holm: float
    """The interaction's p adjusted over the pairs."""


def contrast(arm: Runs, reference: Runs, better: st.Better, margin: float) -> Contrast:
    counts, other = ((runs.diverged, len(st.finite(runs.values)) + runs.diverged) for runs in (arm, reference))
    delta = st.paired(arm.values, reference.values)
    return Contrast(delta, better, margin, st.welch(arm.values, reference.values), counts, other)


def judge(family: Mapping[Name, Contrast]) -> dict[Name, Judgement]:
    """A verdict on each contrast of a family: all the comparisons that were planned together.

    better and worse need p < 5% after Holm and a mean difference beyond the margin, so that many seeds do not turn a
    negligible difference into a finding. equivalent needs TOST at 5%, or identical bits in two seeds or more. If a run
    diverged, the surviving runs decide nothing: they are not a fair sample.
    """
    adjusted = st.holm([contrast.p for contrast in family.values()])
    return {name: _judge(c, float(p), len(family)) for (name, c), p in zip(family.items(), adjusted, strict=True)}


def _judge(contrast: Contrast, p_holm: float, family: int) -> Judgement:
    d, margin = contrast.difference, contrast.margin
    tested = contrast.tested
    significant, beyond = tested and p_holm < st.ALPHA, abs(d.mean) > margin
    nothing = tested and d.low == d.high  # identical bits, or all but for rounding
    p_equivalent = st.NAN
    if tested and margin > 0:
        p_equivalent = 0.0 if nothing else contrast.p_within()

    verdict: Verdict = "not resolved"
    why = ""
    if contrast.any_diverged:
        verdict = "diverges" if contrast.diverged[0] else "reference diverges"
    elif significant and beyond:
        verdict = "better" if (d.mean < 0) == (contrast.better == "lower") else "worse"
    elif p_equivalent < st.ALPHA:
        verdict = "equivalent"
        why = "differs, by less than the margin" if significant else ""
    elif not tested:
        why = ("no seed in common", "one seed has no spread", "every seed shows the same difference")[min(d.n, 2)]
        why = "every run has the same value, which measures nothing" if d.n > 1 and d.mean == 0 else why
    elif not margin:
        why = NO_MARGIN
    elif significant and not beyond:
        why = "differs, perhaps by less than the margin"
    return Judgement(verdict, contrast, p_holm, p_equivalent, st.rate(*contrast.diverged), why, family)


def flips(pairs: Mapping[Name, tuple[Contrast, Contrast]]) -> dict[Name, Flip]:
    """Which pairs of arms change places between two tasks; one family of all differences of all pairs in both tasks."""
    judged = judge({(name, task): pair[task] for name, pair in pairs.items() for task in (0, 1)})
    interactions = {name: _interaction(*pair) for name, pair in pairs.items()}
    adjusted = st.holm([interaction.p for interaction in interactions.values()])
    result = {}
    for name, p_holm in zip(pairs, adjusted, strict=True):
        first, second = judged[name, 0], judged[name, 1]
        verdicts = {first.verdict, second.verdict}
        verdict: FlipVerdict = "unresolved"
        if verdicts & {"diverges", "reference diverges"}:
            verdict = "diverges"
        elif verdicts == {"better", "worse"}:
            verdict = "flips"
        elif verdicts in ({"better"}, {"worse"}):
            verdict = "agrees"
        elif verdicts == {"equivalent"}:
            verdict = "equivalent"
        result[name] = Flip(verdict, first, second, interactions[name], float(p_holm))
    return result


def _interaction(a: Contrast, b: Contrast) -> st.Estimate:
    # Runs of two tasks are independent, even with equal seeds.
    x, y = a.difference, b.difference
    if a.any_diverged or b.any_diverged or min(a.margin, b.margin) == 0 or np.isnan(x.p + y.p):
        return st.Estimate(st.NAN, st.NAN, st.NAN, x.n + y.n, "seeds")
    unit_a, unit_b = (task.margin if task.better == "higher" else -task.margin for task in (a, b))
    var_x, var_y = (x.sd / unit_a) ** 2 / x.n, (y.sd / unit_b) ** 2 / y.n
    return st.welch_of(x.mean / unit_a - y.mean / unit_b, var_x, var_y, x.n, y.n, "seeds")

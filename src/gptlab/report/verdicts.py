"""Verdicts on comparisons of arms, from their runs.

* better, worse: paired t, adjusted by Holm over the family of comparisons, and a difference larger than the margin.
  The probability of any false finding in the family is at most 5%. The variance may lean on the study's other arms, see
  gptlab.report.noise.
* equivalent: two one-sided tests against a margin set beforehand, at 5% per comparison, not per family. Without a
  margin nothing is: one taken from the same runs would call a difference of that size equivalent in up to 37%.
* diverges: a run of the arm diverged, so the surviving runs decide nothing: they are no fair sample. One run shows
  that an arm can diverge; whether it does so more often than other arms is tested in `gptlab.report.divergence`.
* Where only the reference diverged, the seeds in which it did not are compared. Every difference is then one of seeds
  in which both arms survive. The error holds if divergence is independent of what a run's loss would be, and also, as
  both sides of a pair are chosen alike, where both arms have one law of losses and divergence, however they depend.
* Runs that share no seeds are compared unpaired: see gptlab.report.unpaired, whose p takes the place of the paired t's.
* not run: an arm or its reference has no run at all. A comparison that was tried and is open is not resolved.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
from scipy import special

from gptlab.report import detection
from gptlab.report import statistics as st
from gptlab.report.looks import HOPELESS, Looks
from gptlab.report.noise import Prior

NO_MARGIN = "no margin is stated, so nothing is called equivalent"

Verdict = Literal["better", "worse", "equivalent", "not resolved", "diverges", "reference diverges", "not run"]
FlipVerdict = Literal["flips", "agrees", "equivalent", "unresolved", "diverges"]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Runs:
    """One arm's runs in one metric."""

    values: Mapping[int, float]
    """Seed to value, for every run that was started. Values that are not finite count as missing."""
    diverged: int = 0
    """Number of diverged runs: counted, never averaged."""
    lost: Sequence[int] = ()
    """Their seeds, if known."""


@dataclass(frozen=True)
class Contrast:
    """An arm and its reference; `contrast` makes one from their runs."""

    difference: st.Difference
    """Over the seeds in which both completed. If a run of the arm diverged, it is no evidence."""
    better: st.Better
    margin: float
    """Differences up to the margin count as none, in the metric's units. 0: not set; nothing can be equivalent."""
    run: bool = field(default=True, kw_only=True)
    """Whether both sides have a run that was started."""
    welch: st.Estimate | None = None
    """The unpaired difference, over all seeds of each; for reference, no verdict rests on it."""
    diverged: tuple[int, int] = (0, 0)
    """(diverged runs, runs that completed or diverged) of the arm."""
    reference_diverged: tuple[int, int] = (0, 0)
    tests: int = 1
    """Number of tests that it is made of, for its power: more than one for the best of a grid."""
    reference_lost: Sequence[int] = field(default=(), kw_only=True)
    """Seeds in which the reference diverged, if known."""
    prior: Prior | None = field(default=None, kw_only=True)
    """What the study's other arms add to the difference's variance."""
    runs: tuple[int, int] | None = field(default=None, kw_only=True)
    """Where the two share no seeds: how many runs of each have a value."""
    looks: Looks | None = field(default=None, kw_only=True)
    """In a study that runs until it is decided: the difference's p and interval, and `p_within`, hold at every look."""
    ledger: tuple[float, int] | None = field(default=None, kw_only=True)
    """p adjusted over all that was asked so far, which then replaces Holm's over the family; and how many that are."""

    @property
    def any_diverged(self) -> bool:
        """Whether diverged runs leave nothing to compare: one of the arm, or all but one of the reference."""
        lost, runs = self.reference_diverged
        return self.diverged[0] > 0 or (lost > 0 and (runs - lost < 2 or self.difference.n == 0))

    @property
    def tested(self) -> bool:
        return not self.any_diverged and bool(np.isfinite(self.difference.p))

    @property
    def p(self) -> float:
        """Paired t, not adjusted; NaN if diverged runs leave nothing to compare."""
        return st.NAN if self.any_diverged else self.difference.p

    @property
    def repeated(self) -> tuple[float, detection.Rule]:
        """Of a repetition with other seeds: the sd of a difference to expect, and how it would be judged."""
        d = self.difference
        return self.prior.repeated(d) if self.prior and d.sd > 0 else (d.sd, detection.OWN)

    def p_within(self) -> float:
        """p of equivalence within the margin, not adjusted. It has the variance of its own seeds alone."""
        if self.looks is not None:
            return self.looks.p_within(self.margin)
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
    level: float
    """5% over those of them that are not significant yet: what Holm's correction asks of this one now."""

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
        if not c.tested or c.looks is not None:  # with looks, seeds are added until a verdict
            return st.NAN
        sd, rule = c.repeated
        return detection.minimum_detectable(c.difference.n, sd, family * c.tests, c.margin, rule)

    @cached_property
    def hopeless(self) -> bool:
        """In a study that runs until it is decided: whether a verdict within the stated seeds is unlikely."""
        c = self.contrast
        if self.verdict != "not resolved" or c.looks is None or not 1 < len(c.looks.differences) < c.looks.most:
            return False
        return c.looks.chance_to_decide(c.margin, self.level / c.tests) < HOPELESS

    @cached_property
    def more_seeds(self) -> int | None:
        """If not resolved: further seeds for 80% power if the difference and the spread are as seen. With a difference
        beyond the margin: to detect it. Within the margin: to show equivalence, of equal arms (or, if the difference
        is significant, of arms with this difference). None: unknown, or over 10,000. For grids at best: where one arm
        of each stands out."""
        c, d = self.contrast, self.contrast.difference
        if self.verdict != "not resolved" or not c.tested or d.low == d.high or c.looks is not None:
            return None
        if abs(d.mean) > c.margin:
            sd, rule = c.repeated
            needed = detection.seeds_needed(d.mean, sd, self.family * c.tests, c.margin, rule)
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


def contrast(arm: Runs, reference: Runs, better: st.Better, margin: float, prior: Prior | None = None) -> Contrast:
    """Two arms compared.

    Args:
        prior: what other arms tell about the noise.
    """
    counts, other = ((runs.diverged, len(st.finite(runs.values)) + runs.diverged) for runs in (arm, reference))
    delta, lost = st.paired(arm.values, reference.values), reference.lost
    delta = prior.applied(delta) if prior else delta
    welch, run = st.welch(arm.values, reference.values), bool(arm.values and reference.values)
    return Contrast(delta, better, margin, welch, counts, other, reference_lost=lost, prior=prior, run=run)


def with_looks(contrast: Contrast, arm: Runs, reference: Runs, most: int) -> Contrast:
    """The contrast of two arms with a look after every seed, up to `most` seeds."""
    looks = looks_of(arm.values, reference.values, most)
    return replace(contrast, difference=at_every_look(contrast.difference, looks), looks=looks)


def looks_of(a: Mapping[int, float], b: Mapping[int, float], most: int) -> Looks:
    a, b = st.finite(a), st.finite(b)
    pairs = np.array([(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]).reshape(-1, 2)
    return Looks(pairs[:, 0] - pairs[:, 1], most, st.ROUNDING * float(np.abs(pairs).max(initial=0)))


def at_every_look(d: st.Difference, looks: Looks) -> st.Difference:
    """A difference with p and interval that hold at every look; one without noise to test against stays as it is."""
    if not np.isfinite(d.p) or d.low == d.high:
        return d
    low, high = looks.interval()
    return replace(d, low=float(low), high=float(high), p=looks.p)


def judge(family: Mapping[Name, Contrast]) -> dict[Name, Judgement]:
    """A verdict on each contrast of a family: all the comparisons that were planned together.

    better and worse need p < 5% after Holm and a mean difference beyond the margin, so that many seeds do not turn a
    negligible difference into a finding. equivalent needs TOST at 5%, or identical bits in two seeds or more. If a run
    of the arm diverged, the surviving runs decide nothing: they are not a fair sample. See `Contrast.any_diverged`.
    """
    adjusted = st.holm([contrast.p for contrast in family.values()])
    adjusted = np.array([c.ledger[0] if c.ledger else p for c, p in zip(family.values(), adjusted, strict=True)])
    found = adjusted < st.ALPHA
    return {
        name: _judge(c, float(p), len(family), st.ALPHA / (len(family) - int(found.sum()) + int(own)))
        for (name, c), p, own in zip(family.items(), adjusted, found, strict=True)
    }


def _judge(contrast: Contrast, p_holm: float, family: int, level: float) -> Judgement:
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
    elif not contrast.run:
        verdict = "not run"
    elif significant and beyond:
        verdict = "better" if (d.mean < 0) == (contrast.better == "lower") else "worse"
    elif p_equivalent < st.ALPHA:
        verdict = "equivalent"
        why = "differs, by less than the margin" if significant else ""
    elif not tested:
        why = ("no seed in common", "one seed has no spread", "every seed shows the same difference")[min(d.n, 2)]
        if contrast.runs:
            why = ("an arm has no value", "one run has no spread", "neither arm has a spread")[min(d.n, 2)]
        why = "every run has the same value, which measures nothing" if d.n > 1 and d.mean == 0 else why
    elif not margin:
        why = NO_MARGIN
    elif significant and not beyond:
        why = "differs, perhaps by less than the margin"
    return Judgement(verdict, contrast, p_holm, p_equivalent, st.rate(*contrast.diverged), why, family, level)


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


@dataclass(frozen=True)
class ByMore(Contrast):
    """How much better an arm is in one task than in another, in margins; `by_more` makes one."""

    se: float = st.NAN
    df: float = st.NAN

    def p_within(self) -> float:
        return float(special.stdtr(self.df, (abs(self.difference.mean) - self.margin) / self.se))


def by_more(a: Contrast, b: Contrast) -> ByMore:
    """The first task's difference minus the second's, by Welch's t, to be judged in a family with other contrasts.

    `worse` says that the arm loses more in the first task, and by an estimate of more than a margin.
    """
    e, (_, var_x, var_y) = _interaction(a, b), _in_margins(a, b)
    n, d = (a.difference.n, b.difference.n), st.Difference(e.n, e.value, st.NAN, e.low, e.high, e.p)
    if a.any_diverged or b.any_diverged:
        lost, other = (
            (mine[0] + theirs[0], mine[1] + theirs[1])
            for mine, theirs in ((a.diverged, b.diverged), (a.reference_diverged, b.reference_diverged))
        )
        return ByMore(replace(d, n=0), "higher", 1.0, None, lost, other)
    if not np.isfinite(e.p):
        return ByMore(replace(d, n=0), "higher", 1.0)
    df = (var_x + var_y) ** 2 / (var_x**2 / (n[0] - 1) + var_y**2 / (n[1] - 1))
    return ByMore(d, "higher", 1.0, None, se=float(np.sqrt(var_x + var_y)), df=float(df))


def _in_margins(a: Contrast, b: Contrast) -> tuple[float, float, float]:
    """The first task's difference minus the second's, positive if the arm is better, and both squared errors."""
    x, y = a.difference, b.difference
    if a.any_diverged or b.any_diverged or min(a.margin, b.margin) == 0 or np.isnan(x.p + y.p):
        return st.NAN, st.NAN, st.NAN
    unit_a, unit_b = (task.margin if task.better == "higher" else -task.margin for task in (a, b))
    var_x, var_y = (x.sd / unit_a) ** 2 / x.n, (y.sd / unit_b) ** 2 / y.n
    return x.mean / unit_a - y.mean / unit_b, var_x, var_y


def _interaction(a: Contrast, b: Contrast) -> st.Estimate:
    # Runs of two tasks are independent, even with equal seeds.
    delta, var_x, var_y = _in_margins(a, b)
    x, y = a.difference, b.difference
    if np.isnan(delta):
        return st.Estimate(st.NAN, st.NAN, st.NAN, x.n + y.n, "seeds")
    return st.welch_of(delta, var_x, var_y, x.n, y.n, "seeds")

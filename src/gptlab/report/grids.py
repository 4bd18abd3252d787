"""The best arm of a grid against the best of another: settings are chosen and judged on the same runs, honestly.

"Some arm of A beats every arm of B" needs one arm of A whose one-sided p against each arm of B is small: for each arm
of A the largest p over B (intersection-union, Berger 1982), and of these the smallest, times the number of arms of A
(Bonferroni). Each pair has its own paired t test, with a variance as any other comparison of the study
(gptlab.report.noise): one pooled over both grids errs where one arm is noisier than the others, in simulations in up to
31% of studies instead of 5%.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import filter as matching

import numpy as np
from scipy import special

from gptlab.config import Metric
from gptlab.report import noise, verdicts
from gptlab.report import statistics as st
from gptlab.report.looks import Looks
from gptlab.report.reading import Array, number, settings_of
from gptlab.report.studies import ReadStudy


@dataclass(frozen=True, eq=False)
class Pairs:
    """Paired differences of each arm of a grid with each of another, (arms, references); lower is better."""

    n: Array
    mean: Array
    sd: Array
    known: Array
    """1 where t can be taken: two seeds, and a spread that is no rounding."""
    same: Array
    """1 where the two arms are identical in two seeds or more."""
    sizes: tuple[int, int]
    """Number of planned arms of each grid: it counts an arm even if it has no runs."""
    variance: Array
    """Of a difference, with its degrees of freedom and the prior that it is shrunk toward; see `noise.lower_p`."""
    df: Array
    prior: Array

    def p_below(self, shift: float) -> float:
        """One-sided p of "the best arm is below the best reference plus `shift`"."""
        return min(1.0, self.sizes[0] * float(self._p(self.mean - shift, shift).max(axis=1).min()))

    def p_above(self, shift: float) -> float:
        return min(1.0, self.sizes[1] * float(self._p(shift - self.mean, -shift).max(axis=0).min()))

    def _p(self, mean: Array, shift: float) -> Array:
        """With a shift, which is equivalence, by the variance of each pair's own seeds; see `Contrast.p_within`."""
        if shift:
            with np.errstate(divide="ignore", invalid="ignore"):
                p = special.stdtr(self.n - 1, mean * np.sqrt(self.n) / self.sd)
        else:
            p = noise.lower_p(mean, self.n, self.variance, self.df, self.prior)
        same_is_sure = shift > 0
        return np.where(self.known > 0, p, np.where((self.same > 0) & same_is_sure, 0.0, 1.0))

    def interval(self) -> tuple[float, float]:
        """95% interval of the best arm minus the best reference; below 0 exactly where 2 p_below(0) < 5%."""
        ends = []
        for size, sign in zip(self.sizes[::-1], (-1, 1), strict=True):
            with np.errstate(invalid="ignore"):
                reach = noise.reach(self.n, self.variance, self.df, self.prior, st.ALPHA / size)
            reach = np.where(self.known > 0, reach, np.where(self.same > 0, 0.0, np.inf))
            ends.append(self.mean + sign * reach)
        return float(ends[0].min(axis=0).max()), float(ends[1].max(axis=1).min())

    def chosen(self) -> tuple[int, int]:
        """Of each grid the arm with the lowest mean, over the seeds that a pair shares."""
        no_arm, no_reference = (np.where(self.n > 0, self.mean, far) for far in (np.inf, -np.inf))
        return int(no_arm.max(axis=1).argmin()), int(no_reference.min(axis=0).argmax())


@dataclass(frozen=True, eq=False)
class PairsWithLooks(Pairs):
    """The same in a study that runs until it is decided: every p and the interval hold at every look."""

    looks: Sequence[Sequence[Looks]] = ()
    """Of each pair; lower is better."""

    def p_below(self, shift: float) -> float:
        p = [[pair.p_below(shift) for pair in row] for row in self.looks]
        return min(1.0, self.sizes[0] * float(self._or_same(np.array(p), shift > 0).max(axis=1).min()))

    def p_above(self, shift: float) -> float:
        p = [[pair.p_above(shift) for pair in row] for row in self.looks]
        return min(1.0, self.sizes[1] * float(self._or_same(np.array(p), shift < 0).max(axis=0).min()))

    def _or_same(self, p: Array, same_is_sure: bool) -> Array:
        return np.where(self.known > 0, p, np.where((self.same > 0) & same_is_sure, 0.0, 1.0))

    def interval(self) -> tuple[float, float]:
        ends = []
        for size, end, far in zip(self.sizes[::-1], (0, 1), (-np.inf, np.inf), strict=True):
            found = np.array([[pair.interval(st.ALPHA / size)[end] for pair in row] for row in self.looks])
            ends.append(np.where(self.known > 0, found, np.where(self.same > 0, self.mean, far)))
        return float(ends[0].min(axis=0).max()), float(ends[1].max(axis=1).min())


@dataclass(frozen=True)
class BestOf(verdicts.Contrast):
    """The best arm of a grid minus the best of another.

    Its difference has the mean and sd of the two chosen arms, and the p and interval of all pairs. The mean of the arm
    that was best leans to its side, more so in the larger grid; the p and the interval account for that.
    """

    chosen: tuple[str, str] = ("", "")
    left_out: Sequence[str] = ()
    """Arms without a completed run, or with a diverged one, and why."""
    pairs: Pairs | None = field(default=None, repr=False)

    def p_within(self) -> float:
        if self.pairs is None:
            return st.NAN
        return max(self.pairs.p_below(self.margin), self.pairs.p_above(-self.margin))


def best_of(read: ReadStudy, contrast: Sequence[str], metric: Metric, others: noise.Others | None = None) -> BestOf:
    """The contrast of two grids, or of a grid and an arm, each given as a pattern such as `adamw_*`.

    An arm with a diverged run is never the best. If that leaves no arm of a grid, the grid diverges.

    Args:
        others: of this study and metric, if they are at hand.
    """
    sides: list[dict[str, verdicts.Runs]] = []
    counts, left_out = [], []
    names = [matching(read.study.arms, pattern) for pattern in contrast]
    for grid in names:
        runs = {arm: read.values(arm, metric.name) for arm in grid}
        done = {arm: int(np.isfinite([*r.values.values()]).sum()) for arm, r in runs.items()}
        kept = {arm: r for arm, r in runs.items() if done[arm] and not r.diverged}
        for arm in grid:
            lost = runs[arm].diverged
            if arm not in kept:
                why = f"{lost} of {lost + done[arm]} runs diverged" if lost else "no completed run"
                left_out.append(f"{arm} ({why})")
        sides.append(kept)
        lost = sum(runs[arm].diverged for arm in kept or grid)
        counts.append((lost, lost + sum(done[arm] for arm in kept or grid)))
    if not all(sides):
        nothing = st.difference(0, st.NAN, st.NAN)
        run = all(any(read.values(arm, metric.name).values for arm in grid) for grid in names)
        return BestOf(nothing, metric.better, metric.margin, None, counts[0], counts[1], run=run, left_out=left_out)
    arms, references = ([runs.values for runs in side.values()] for side in sides)
    sign = 1.0 if metric.better == "lower" else -1.0
    priors: list[list[noise.Prior | None]] = [[None for _ in sides[1]] for _ in sides[0]]
    if not read.study.until_decided:
        others = others or noise.Others(read, metric.name)
        priors = [[others.prior(arm, reference) for reference in sides[1]] for arm in sides[0]]
    pairs = pairs_of(arms, references, sign, (len(names[0]), len(names[1])), priors)
    if read.study.until_decided:
        pairs = pairs_with_looks(pairs, arms, references, sign, read.study.most_seeds)
    i, j = pairs.chosen()
    prior = priors[i][j]
    delta = st.paired(arms[i], references[j])
    delta = _judged_over(pairs, prior.applied(delta) if prior else delta, sign)
    chosen, tests = ([*sides[0]][i], [*sides[1]][j]), max(pairs.sizes)
    looks = verdicts.looks_of(arms[i], references[j], read.study.most_seeds) if read.study.until_decided else None
    best = BestOf(delta, metric.better, metric.margin, None, counts[0], counts[1], tests, chosen, left_out, pairs)
    return replace(best, prior=prior, looks=looks)


def pairs_of(
    arms: Sequence[Mapping[int, float]],
    references: Sequence[Mapping[int, float]],
    sign: float,
    sizes: tuple[int, int],
    priors: Sequence[Sequence[noise.Prior | None]] | None = None,
) -> Pairs:
    """Each arm with each reference, seed by seed.

    Args:
        sign: -1 if higher is better.
        sizes: number of planned arms of each grid.
        priors: what the study adds to the variance of each pair.
    """
    found = [[st.paired(a, b) for b in references] for a in arms]
    rows = [[(d.n, sign * d.mean, d.sd, d.low < d.high, d.low == d.high) for d in row] for row in found]
    n, mean, sd, known, same = np.moveaxis(np.array(rows, dtype=np.float64), 2, 0)
    bases = [
        [prior.basis(d) if (prior := priors[i][j] if priors else None) else (d.sd**2, d.n - 1, st.NAN) for j, d in row]
        for i, row in ((i, enumerate(row)) for i, row in enumerate(found))
    ]
    variance, df, prior = np.moveaxis(np.array(bases, dtype=np.float64), 2, 0)
    return Pairs(n, mean, sd, known, same, sizes, variance, df, prior)


def pairs_with_looks(
    pairs: Pairs, arms: Sequence[Mapping[int, float]], references: Sequence[Mapping[int, float]], sign: float, most: int
) -> PairsWithLooks:
    def seen(a: Mapping[int, float], b: Mapping[int, float]) -> Looks:
        looks = verdicts.looks_of(a, b, most)
        return replace(looks, differences=sign * looks.differences)

    found = [[seen(a, b) for b in references] for a in arms]
    return PairsWithLooks(**vars(pairs), looks=found)


def _judged_over(pairs: Pairs, chosen: st.Difference, sign: float) -> st.Difference:
    """The difference of the chosen arms, with the p and interval of the best of both grids."""
    if not np.isfinite(chosen.p):
        return chosen
    low, high = (end if np.isfinite(end) else st.NAN for end in pairs.interval())
    low, high = (low, high) if sign > 0 else (-high, -low)
    p = min(1.0, 2 * min(pairs.p_below(0.0), pairs.p_above(0.0)))
    return replace(chosen, low=low, high=high, p=p)


def chosen_text(read: ReadStudy, contrast: Sequence[str], best: BestOf) -> str:
    """Which settings were chosen, and whether one lies at the edge of its grid, as a clause."""
    if not all(best.chosen):
        return ""
    parts = []
    for pattern, arm, edges in zip(contrast, best.chosen, edges_of(read, contrast, best.chosen), strict=True):
        if pattern != arm:
            parts.append(f"the best of {pattern} is {arm}" + (f", at the edge of its grid ({edges})" if edges else ""))
    left_out = f"; left out: {', '.join(best.left_out)}" if best.left_out else ""
    return f"; {'; '.join(parts)}{left_out}"


def edges_of(read: ReadStudy, contrast: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """Where the chosen arm of each side lies at the edge of its grid; empty if it does not, or if it is no grid."""
    return [
        "" if arm == pattern else at_edge(read, matching(read.study.arms, pattern), arm)
        for pattern, arm in zip(contrast, chosen, strict=True)
    ]


def at_edge(read: ReadStudy, arms: Sequence[str], chosen: str) -> str:
    """Settings in which the chosen arm has the smallest or largest number of its grid; empty if there are none."""
    if read.elsewhere:  # without recipes
        return ""
    built = {arm: settings_of(read.study.build(arm, read.study.seeds[0])) for arm in arms}
    found = []
    for name, own in built[chosen].items():
        values = {number(settings[name]) for settings in built.values()}
        if len(values) > 1 and all(np.isfinite([*values])) and own in (min(values), max(values)):
            found.append(f"{name} = {own:g} is the {'smallest' if own == min(values) else 'largest'}")
    return ", ".join(found)

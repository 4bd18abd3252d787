"""What the other arms of a study tell about the noise of a comparison, and what pairing by seed bought.

Three seeds measure the variance of a difference badly, and most of a t test's critical value pays for that. The other
arms know more. `variances` in a study says how far they are believed:

* own: each comparison has the variance of its own seeds, with n - 1 degrees of freedom.
* shrunk (default): with three to five seeds, a variance below the prior is shrunk toward it, with 6 more degrees of
  freedom (Smyth 2004). The prior is the 90% quantile of the variances of differences between *other* arms over the same
  seeds. As it hides what quiet arms show, a third of the 5% stays with the own variance: p is the smaller of 3 p (own)
  and 1.5 p (shrunk), and the interval the shorter of the two. A comparison above the prior has its own variance alone
  (Phipson et al. 2016 have such arms borrow less, by degrees).
* shared: one variance for all arms, from the residuals of arms and seeds, unless the arms' noise differs (`guard`).

No prior is safe for one comparison: of a large difference with a small variance nobody can tell whether the arm is far
away or noisy. It is safe for a family, because few of its arms can be noisier than nine in ten of the others. A prior
from differences that share the baseline with the comparison, or a median, is not: with half of 19 arms ten times as
noisy as the rest, the median of the differences from the baseline and 2 degrees of freedom err in 16% of studies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from gptlab.report import detection
from gptlab.report import statistics as st
from gptlab.report.detection import (
    ENOUGH_SEEDS,
    GUARD,
    LEAST_OTHERS,
    LEAST_SEEDS,
    OWN_SHARE,
    PRIOR_DF,
    PRIOR_QUANTILE,
)
from gptlab.report.reading import Array

if TYPE_CHECKING:
    from gptlab.report.studies import ReadStudy


@dataclass(frozen=True)
class Prior:
    """What the study adds to the variance of a comparison's own seeds."""

    variance: float
    """Of a difference between two runs of one seed, in the metric's units squared."""
    df: float
    arms: int
    """Of the study."""
    shared: bool = False
    """It replaces the comparison's own variance."""

    def basis(self, d: st.Difference) -> tuple[float, float, float]:
        """Variance, degrees of freedom and prior that `lower_p` and `reach` take for a difference."""
        return (self.variance, self.df, st.NAN) if self.shared else (d.sd**2, d.n - 1, self.variance)

    def applied(self, d: st.Difference) -> st.Difference:
        """The difference with the p and interval that follow from this prior."""
        if not (d.n > 1 and np.isfinite(d.p) and d.low < d.high):
            return d
        variance, df, prior = self.basis(d)
        half = float(reach(d.n, variance, df, prior, st.ALPHA))
        p = min(1.0, 2 * float(lower_p(-abs(d.mean), d.n, variance, df, prior)))
        if variance <= prior and half < reach(d.n, variance, df, st.NAN, st.ALPHA * OWN_SHARE):
            variance, df = (PRIOR_DF * prior + df * variance) / (PRIOR_DF + df), df + PRIOR_DF
        return st.Difference(d.n, d.mean, d.sd, d.mean - half, d.mean + half, p, math.sqrt(variance), df)

    def repeated(self, d: st.Difference) -> tuple[float, detection.Rule]:
        """The sd to expect of a repetition of the comparison, and how it would be judged.

        The sd is shrunk toward the mean of the others' variances, as the prior is a high one; not where the comparison
        is so quiet, or so noisy, that its own variance says more.
        """
        if self.shared:
            return d.spread, detection.Rule("shared", self.arms)
        typical = self.variance / float(detection.priors(self.arms - 2, d.n - 1).mean())
        sd = d.sd
        if d.df > d.n - 1:
            sd = math.sqrt((PRIOR_DF * typical + (d.n - 1) * d.sd**2) / (PRIOR_DF + d.n - 1))
        return sd, detection.Rule("shrunk", self.arms, math.sqrt(typical) / sd)


def lower_p(mean: ArrayLike, n: ArrayLike, variance: ArrayLike, df: ArrayLike, prior: ArrayLike) -> Array:
    """One-sided p of a true mean below 0; up to 1.5 where the mean is above it.

    Args:
        n: number of values in the mean.
        variance, df: of one value, and its degrees of freedom.
        prior: toward which a smaller variance is shrunk; NaN: it is not.
    """
    mean, n, variance, df, prior = (np.asarray(x, dtype=np.float64) for x in (mean, n, variance, df, prior))
    with np.errstate(divide="ignore", invalid="ignore"):
        own = special.stdtr(df, mean * np.sqrt(n / variance))
        shrunk = special.stdtr(df + PRIOR_DF, mean * np.sqrt(n * (PRIOR_DF + df) / (PRIOR_DF * prior + df * variance)))
    return np.where(variance <= prior, np.minimum(own / OWN_SHARE, shrunk / (1 - OWN_SHARE)), own)


def reach(n: ArrayLike, variance: ArrayLike, df: ArrayLike, prior: ArrayLike, alpha: float) -> Array:
    """Half the interval of a mean with confidence 1 - alpha: what is beyond it has twice `lower_p` below alpha."""
    n, variance, df, prior = (np.asarray(x, dtype=np.float64) for x in (n, variance, df, prior))

    def half(df: Array, variance: Array, share: float) -> Array:
        return np.asarray(special.stdtrit(df, 1 - alpha * share / 2) * np.sqrt(variance / n))

    shrunk = half(df + PRIOR_DF, (PRIOR_DF * prior + df * variance) / (PRIOR_DF + df), 1 - OWN_SHARE)
    with np.errstate(invalid="ignore"):
        both = np.minimum(half(df, variance, OWN_SHARE), shrunk)
    return np.where(variance <= prior, both, half(df, variance, 1.0))


def prior_variance(block: Array) -> float:
    """The 90% quantile of the variances over seeds of all differences between arms.

    Args:
        block: values (arms, seeds) of the arms that a comparison is not about.

    Returns:
        NaN below 4 arms or 3 seeds, which say too little: simulated studies of 4 or 5 arms err in up to 7%. NaN from 6
        seeds on, which know each variance well enough.
    """
    arms, n = block.shape
    if arms < LEAST_OTHERS or not LEAST_SEEDS <= n < ENOUGH_SEEDS:
        return st.NAN
    i, j = np.triu_indices(arms, 1)
    return float(np.sort(pair_variances(block)[i, j])[_place(arms)])


def _place(arms: int) -> int:
    """Which of the sorted variances between so many arms is the 90% quantile."""
    return math.ceil(PRIOR_QUANTILE * (arms * (arms - 1) // 2)) - 1


def pair_variances(block: Array) -> Array:
    """The variance over seeds of each arm minus each other, (arms, arms)."""
    centred = block - block.mean(axis=-1, keepdims=True)
    products = centred @ np.swapaxes(centred, -1, -2) / (block.shape[-1] - 1)
    own = np.diagonal(products, axis1=-2, axis2=-1)
    return np.asarray(own[..., :, None] + own[..., None, :] - 2 * products)


# -- from runs to a prior


def sound_arms(read: ReadStudy, key: str) -> dict[str, dict[int, float]]:
    """Finite values by arm and seed, without arms of which a run diverged: what is left of those is no fair sample."""
    runs = {arm: read.values(arm, key) for arm in read.study.arms}
    return {arm: known for arm, r in runs.items() if not r.diverged and (known := st.finite(r.values))}


class Others:
    """What the arms of a study tell about the noise of comparisons in one metric, worked out once for all of them."""

    def __init__(self, read: ReadStudy, key: str) -> None:
        self._read, self._key = read, key
        self._blocks: dict[tuple[int, ...], _Block] = {}

    @cached_property
    def values(self) -> dict[str, dict[int, float]]:
        return sound_arms(self._read, self._key)

    @cached_property
    def shared(self) -> Shared | None:
        return shared_variance(self.values)

    def prior(self, arm: str, reference: str) -> Prior | None:
        """What the study adds to the variance of a comparison of two of its arms; None: nothing."""
        variances = self._read.study.variances
        if variances == "own" or not self._read.paired:
            return None
        if variances == "shared" and self.shared is not None and self.shared.p > GUARD:
            return Prior(2 * self.shared.variance, self.shared.df, self.shared.arms, shared=True)
        if arm not in self.values or reference not in self.values:
            ours, theirs = (st.finite(self._read.values(name, self._key).values) for name in (arm, reference))
            return prior_from(self.values, ours, theirs)
        seeds = tuple(sorted(self.values[arm].keys() & self.values[reference].keys()))
        if not LEAST_SEEDS <= len(seeds) < ENOUGH_SEEDS:
            return None
        if seeds not in self._blocks:
            self._blocks[seeds] = _Block(self.values, seeds)
        return self._blocks[seeds].prior(arm, reference)


class _Block:
    """The arms with a value in every one of some seeds, ready to say what is left without any two of them."""

    def __init__(self, values: Mapping[str, Mapping[int, float]], seeds: Sequence[int]) -> None:
        whole = [arm for arm, own in values.items() if own.keys() >= set(seeds)]
        rows = np.array([[values[arm][seed] for seed in seeds] for arm in whole])
        self.row, self.copies = {arm: i for i, arm in enumerate(whole)}, copies_of(rows)
        i, j = np.triu_indices(len(rows), 1)
        variances = pair_variances(rows)[i, j]
        order = np.argsort(variances)
        self.sorted, self.rank = variances[order], np.full((len(rows), len(rows)), -1)
        self.rank[i[order], j[order]] = self.rank[j[order], i[order]] = np.arange(len(order))

    def prior(self, arm: str, reference: str) -> Prior | None:
        """As `prior_from`, whose rows are these."""
        pair = (self.row[arm], self.row[reference])
        gone = {*pair, *self.copies}.difference(first_of([*pair, *sorted(self.copies)], self.copies)).union(pair)
        others = len(self.row) - len(gone)
        if others < LEAST_OTHERS:
            return None
        left_out = np.unique(self.rank[list(gone)])[1:]  # without the diagonal's -1
        place = _place(others)
        before = np.searchsorted(left_out - np.arange(len(left_out)), place, side="right")
        variance = float(self.sorted[place + before])
        return Prior(variance, PRIOR_DF, others + 2) if variance > 0 else None


def prior_from(
    values: Mapping[str, Mapping[int, float]], ours: Mapping[int, float], theirs: Mapping[int, float]
) -> Prior | None:
    """The prior for a comparison of two arms with these values by seed.

    The other arms are those of `values` with a value in every seed that the two share. Arms that differ from one of
    the two, or from each other, by a constant or not at all are copies, and add nothing.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not LEAST_SEEDS <= len(seeds) < ENOUGH_SEEDS:
        return None
    rows = [[side[seed] for seed in seeds] for side in (ours, theirs)]
    rows += [[own[seed] for seed in seeds] for own in values.values() if seeds and own.keys() >= set(seeds)]
    kept = distinct(np.array(rows))
    others = [rows[i] for i in kept if i > 1]
    variance = prior_variance(np.array(others).reshape(-1, len(seeds)))
    return Prior(variance, PRIOR_DF, len(others) + 2) if variance > 0 else None


def copies_of(rows: Array) -> dict[int, set[int]]:
    """For each of the rows, (arms, seeds), that has any: those that differ from it by rounding, or a constant."""
    spread = np.sqrt(np.maximum(0, pair_variances(rows)))
    # the sum of squares rounds worse than the differences themselves, so what is close is looked at again
    limit, scale = st.ROUNDING * np.abs(rows).max(), 1e-6 * np.abs(rows).max()
    i, j = np.nonzero(np.triu(spread <= scale, 1))
    same = (rows[i] - rows[j]).std(axis=1, ddof=1) <= limit
    found: dict[int, set[int]] = {}
    for a, b in zip(i[same].tolist(), j[same].tolist(), strict=True):
        found.setdefault(a, set()).add(b)
        found.setdefault(b, set()).add(a)
    return found


def first_of(order: Iterable[int], copies: Mapping[int, set[int]]) -> list[int]:
    """The rows in an order, without those that come again and those that are a copy of an earlier one."""
    kept: dict[int, None] = {}
    for i in order:
        if i not in copies or copies[i].isdisjoint(kept):
            kept[i] = None
    return list(kept)


def distinct(rows: Array) -> list[int]:
    """Indices of the rows, (arms, seeds), that are no copy of an earlier one."""
    return first_of(range(len(rows)), copies_of(rows))


def complete_block(values: Mapping[str, Mapping[int, float]]) -> Array:
    """The largest block (arms, seeds) without gaps that keeps all seeds of one of the arms; no copies.

    Arms that lack a run in it are left out.
    """
    sets = {frozenset(own) for own in values.values() if len(own) > 1}
    sizes = {seeds: len(seeds) * sum(own.keys() >= seeds for own in values.values()) for seeds in sets}
    if not sizes:
        return np.empty((0, 0))
    chosen = max(sizes, key=lambda own: (sizes[own], sorted(own)))
    seeds = sorted(chosen)
    rows = np.array([[own[seed] for seed in seeds] for own in values.values() if own.keys() >= chosen])
    return rows[distinct(rows)]


# -- one variance for all arms


@dataclass(frozen=True)
class Shared:
    """The variance of one run, beside the effects of its arm and of its seed, the same for all arms."""

    variance: float
    df: float
    p: float
    """Of equal noise: the smallest F test of one arm against the rest, by Bonferroni over arms."""
    arms: int
    seeds: int


def shared_variance(values: Mapping[str, Mapping[int, float]]) -> Shared | None:
    """From the residuals of arms and seeds; None with fewer than six arms or three seeds without gaps.

    With three arms of equal noise what follows after the guard, one variance or each its own, errs in 7%; with two
    seeds the guard overlooks an arm ten times as noisy.

    Args:
        values: by arm and seed. Arms that lack a run, and copies of another arm, are left out; they are still compared
            with the variance of the rest.
    """
    block = complete_block(values)
    if block.shape[0] < LEAST_OTHERS + 2 or block.shape[1] < LEAST_SEEDS:
        return None
    squares, df = residual_squares(block)
    if not squares.sum() > 0:
        return None
    return Shared(float(squares.sum() / df), df, float(guard(squares, df)), *block.shape)


def residual_squares(block: Array) -> tuple[Array, int]:
    """Each arm's sum of squared residuals, (..., arms), in values (..., arms, seeds); and their degrees of freedom."""
    residuals = (
        block - block.mean(-1, keepdims=True) - block.mean(-2, keepdims=True) + block.mean((-1, -2))[..., None, None]
    )
    return (residuals**2).sum(axis=-1), (block.shape[-2] - 1) * (block.shape[-1] - 1)


def guard(squares: Array, df: int) -> Array:
    """p of equal noise: for each arm F of its residuals against the others', the smallest p times the number of arms.

    Leaving arm i out removes exactly m / (m - 1) times its squares from the sum over m arms, with n - 1 degrees of
    freedom, so the F test of each is exact.
    """
    arms = squares.shape[-1]
    own_df = df / (arms - 1)
    own = squares * arms / (arms - 1)
    rest = np.maximum(squares.sum(-1, keepdims=True) - own, 1e-300)
    p = special.fdtrc(own_df, df - own_df, own / own_df / (rest / (df - own_df)))
    return np.asarray(np.minimum(1, arms * p.min(axis=-1)))


# -- what pairing by seed bought


def correlation(block: Array) -> st.Estimate | None:
    """Intraclass correlation of arms over seeds: the share of the variance that all arms have in common in a seed.

    Two-way, of consistency, with McGraw and Wong's (1996) interval: exact if all arms have equal noise.

    Args:
        block: values (arms, seeds); None below two of each, or without noise.
    """
    if min(block.shape) < 2:
        return None
    arms, n = block.shape
    squares, df = residual_squares(block)
    between, within = float(block.mean(axis=0).var(ddof=1)) * arms, float(squares.sum()) / df
    if not within > 0:
        return None
    f = between / within
    low, high = f / special.fdtri(n - 1, df, 0.975), f * special.fdtri(df, n - 1, 0.975)
    value, low, high = (float((x - 1) / (x + arms - 1)) for x in (f, low, high))
    return st.Estimate(value, low, high, arms, "arms")


def pairing(read: ReadStudy, key: str) -> dict[str, object] | None:
    """{"correlation", "low", "high", "text"} of the arms over seeds; None if two arms do not share two seeds."""
    found = correlation(complete_block(sound_arms(read, key))) if read.paired else None
    if found is None:
        return None
    ratio = math.sqrt(1 - found.value)
    return {
        "correlation": found.value,
        "low": found.low,
        "high": found.high,
        "text": f"Pairing by seed: the arms' values correlate by {found.value:.2f} ({found.low:.2f} to "
        f"{found.high:.2f}) over seeds, so a paired difference has {ratio:.2f} times the sd of an unpaired one.",
    }


def variances_text(read: ReadStudy, key: str) -> str:
    """How the variances of the study's comparisons were estimated, as a sentence; empty if each has its own."""
    values = sound_arms(read, key)
    if not read.paired and len(read.study.arms) < 2:
        return ""
    if not read.paired:
        why = (
            "The runs share no seeds (--paired: they do)"
            if read.elsewhere
            else "Runs measured elsewhere share no seeds"
        )
        return (
            f"{why}, so arms are compared unpaired. Each has its own variance; "
            "the difference of means over its standard error is judged by the distribution of Behrens and Fisher."
        )
    if read.study.variances == "shared":
        shared = shared_variance(values)
        if shared is None:
            return "Variances are not shared: fewer than six arms have completed the same three seeds."
        if shared.p > GUARD:
            return (
                f"One variance for all arms, as the study states: the sd of a run beside its seed's effect is "
                f"{math.sqrt(shared.variance):.3g}, from {shared.arms} arms and {shared.seeds} seeds; no arm is "
                f"noisier than the rest (p = {shared.p:.2g})."
            )
        return (
            f"The study states one variance for all arms, but their noise differs (p = {shared.p:.2g}), so each "
            "comparison has its own variance, shrunk toward the study's."
        )
    block = complete_block(values)
    if read.study.variances == "own" or block.shape[0] < LEAST_OTHERS + 2:
        return ""
    if not LEAST_SEEDS <= block.shape[1] < ENOUGH_SEEDS:
        return ""
    return (
        f"A comparison's variance is shrunk toward the {PRIOR_QUANTILE:.0%} quantile of those between the other arms, "
        f"with {PRIOR_DF:g} more degrees of freedom; a third of the 5% stays with its own variance, and all of it "
        "where that is above the quantile."
    )


# -- the same rule for many studies at once


def judged_p(blocks: Array, pairs: Sequence[tuple[int, int]], variances: str = "shrunk") -> Array:
    """Unadjusted p of each comparison in many studies without gaps or copies, as `Others` and `contrast` give them.

    Args:
        blocks: values (studies, arms, seeds).
        pairs: (arm, reference) of each comparison.

    Returns:
        (studies, comparisons).
    """
    _, arms, n = blocks.shape
    mean = blocks.mean(axis=-1)
    variance = pair_variances(blocks)
    first, second = np.array(pairs).T
    own, delta = variance[:, first, second], mean[:, first] - mean[:, second]
    prior = np.full(own.shape, st.NAN)
    if variances != "own" and arms - 2 >= LEAST_OTHERS and LEAST_SEEDS <= n < ENOUGH_SEEDS:
        for k, pair in enumerate(pairs):
            others = np.delete(np.arange(arms), pair)
            i, j = np.triu_indices(len(others), 1)
            between = variance[:, others[i], others[j]]
            rank = math.ceil(PRIOR_QUANTILE * between.shape[1]) - 1
            prior[:, k] = np.partition(between, rank, axis=1)[:, rank]
    df = np.asarray(n - 1.0)
    if variances == "shared" and arms - 2 >= LEAST_OTHERS and n >= LEAST_SEEDS:
        squares, shared_df = residual_squares(blocks)
        equal = (guard(squares, shared_df) > GUARD)[:, None]
        own = np.where(equal, 2 * squares.sum(axis=1, keepdims=True) / shared_df, own)
        df, prior = np.where(equal, shared_df, df), np.where(equal, st.NAN, prior)
    return np.minimum(1, 2 * lower_p(-np.abs(delta), n, own, df, prior))

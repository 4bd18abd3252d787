"""The statistics of runs, over plain data: numbers in, numbers out, no folder is read.

The same seed means the same initialisation and data order in every arm of a study, so arms are compared seed by seed.
The verdicts on a comparison:

* better, worse: paired t, adjusted by Holm over the family of comparisons, and a difference larger than the margin.
  The probability of any false finding in the family is at most 5%.
* equivalent: two one-sided tests against a margin set beforehand, at 5% per comparison, not per family. Without a
  margin nothing is: one taken from the same runs would call a difference of that size equivalent in up to 37%.
* diverges: a run diverged. One run shows that an arm can diverge; its rate has an exact interval.

Each interval is a 95% interval on its own: one in twenty misses on average. Seeds are never bootstrapped (the
percentile interval of three covers 67.5%); documents within a seed are. NaN stands for an unknown value, such as the
interval of one seed.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from gptlab.report import detection
from gptlab.report.reading import Array

# scipy.stats and scipy.optimize take seconds to import, so the functions that need them import them.

ALPHA = detection.ALPHA
NO_MARGIN = "no margin is stated, so nothing is called equivalent"
RESAMPLES = 2000  # of the bootstrap over documents
DRAWS = 4000  # of the frontier's simulation
BATCHES = 10  # of a run's step times; more batches gain little and are too short (Schmeiser 1982)
ROUNDING = 2**-20  # relative, 8 units in the last place of float32: a smaller spread is rounding, not noise

Better = Literal["lower", "higher"]
Verdict = Literal["better", "worse", "equivalent", "not resolved", "diverges", "reference diverges"]
FlipVerdict = Literal["flips", "agrees", "equivalent", "unresolved", "diverges"]
Name = TypeVar("Name", bound=Hashable)
NAN = float("nan")


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval."""

    value: float
    low: float
    high: float
    n: int
    """Number of `of` (below) in the estimate."""
    of: str
    """seeds, runs, steps, documents or arms."""
    p: float = NAN
    """Two-sided, not adjusted; NaN if nothing is tested."""


@dataclass(frozen=True)
class Difference:
    """Arm minus reference over their common seeds, in the metric's units."""

    n: int
    """Pairs."""
    mean: float
    sd: float
    """Of the differences, with n - 1."""
    low: float
    """95% interval of the mean, by t."""
    high: float
    p: float
    """Paired t, two-sided, not adjusted; 1 if nothing differs. NaN below two seeds, and if every seed shows the same
    difference: without spread (a coarse metric, or a copied run) there is no noise to test against."""

    @property
    def identical(self) -> bool:
        """Bit-identical in every seed, as two arms with the same settings must be (a check of the harness)."""
        return self.mean == 0 and (self.n == 1 or self.sd == 0)


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

    difference: Difference
    """If a run diverged: over the surviving runs, and no evidence."""
    better: Better
    margin: float
    """Differences up to the margin count as none, in the metric's units. 0: not set; nothing can be equivalent."""
    welch: Estimate | None = None
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
        """Not adjusted: paired t, or Fisher's exact test of the counts if a run diverged."""
        if not self.any_diverged:
            return self.difference.p
        from scipy import stats

        return float(stats.fisher_exact([[k, n - k] for k, n in (self.diverged, self.reference_diverged)]).pvalue)

    def p_within(self) -> float:
        """p of equivalence within the margin, not adjusted."""
        return float(tost(self.difference.n, self.difference.mean, self.difference.sd, self.margin))


@dataclass(frozen=True)
class Judgement:
    """The verdict on a contrast, and its evidence."""

    verdict: Verdict
    contrast: Contrast
    p_holm: float
    """The contrast's p adjusted over its family, in which untestable contrasts count with p = 1."""
    p_equivalent: float
    """Two one-sided tests against the margin; not adjusted."""
    divergence: Estimate
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
            return NAN
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
            effect = abs(d.mean) if self.p_holm < ALPHA else 0.0
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
    interaction: Estimate
    """The first task's difference minus the second's, each in margins and positive if the arm is better than its
    reference; Welch's t."""
    p_holm: float
    """The interaction's p adjusted over the pairs."""


# -- textbook tests, for numbers and arrays


def t_interval(mean: ArrayLike, se: ArrayLike, df: ArrayLike, level: float = 0.95) -> tuple[Array, Array]:
    half = special.stdtrit(df, (1 + level) / 2) * np.asarray(se)
    return mean - half, mean + half


def t_test(mean: ArrayLike, se: ArrayLike, df: ArrayLike) -> Array:
    """Two-sided p of a true mean of 0."""
    return 2 * special.stdtr(df, -np.abs(np.divide(mean, se)))


def tost(n: ArrayLike, mean: ArrayLike, sd: ArrayLike, margin: ArrayLike) -> Array:
    """p of a true difference of `margin` or more: the larger of two one-sided t tests (Schuirmann 1987).

    At 5% it passes where the 90% interval lies within the margin.
    """
    return special.stdtr(np.subtract(n, 1), np.subtract(np.abs(mean), margin) * np.sqrt(n) / sd)


def holm(p: ArrayLike) -> Array:
    """p, (comparisons,), adjusted over the family (Holm 1979).

    NaN counts as p = 1: a planned comparison counts even if it could not be made.
    """
    # statsmodels' multipletests gives the same, but collects garbage at every call: 0.2 s with torch loaded.
    p = np.nan_to_num(np.asarray(p, dtype=np.float64), nan=1.0)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def rate(k: int, n: int) -> Estimate:
    """k of n runs, by Clopper and Pearson (1934): covers at least 95% at any n, unlike Wilson's interval."""
    if n == 0:
        return Estimate(NAN, NAN, NAN, 0, "runs")
    from scipy import stats

    low, high = stats.binomtest(k, n).proportion_ci(method="exact")
    return Estimate(k / n, float(low), float(high), n, "runs")


# -- two arms


def difference(n: int, mean: float, sd: float, rounding: float = 0.0) -> Difference:
    """A paired difference from its summary; a spread up to `rounding` counts as none."""
    if n < 2:
        return Difference(n, mean if n else NAN, NAN, NAN, NAN, NAN)
    if sd <= rounding:
        return Difference(n, mean, sd, *((mean, mean, 1.0) if abs(mean) <= rounding else (NAN, NAN, NAN)))
    se = sd / np.sqrt(n)
    low, high = t_interval(mean, se, n - 1)
    return Difference(n, mean, sd, float(low), float(high), float(t_test(mean, se, n - 1)))


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Difference:
    """a - b over their common seeds; a and b map seed to value."""
    a, b = _finite(a), _finite(b)
    pairs = np.array([(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]).reshape(-1, 2)
    delta = pairs[:, 0] - pairs[:, 1]
    if len(delta) > 1 and np.ptp(pairs) == 0:  # one number everywhere measures nothing
        return Difference(len(delta), 0.0, 0.0, NAN, NAN, NAN)
    if len(delta) < 2:
        return difference(len(delta), float(delta.sum()), NAN)
    return difference(len(delta), float(delta.mean()), float(delta.std(ddof=1)), ROUNDING * np.abs(pairs).max())


def welch(a: Mapping[int, float], b: Mapping[int, float]) -> Estimate:
    """a - b without pairing, over all seeds of each (Welch 1947)."""
    x, y = (np.array([*_finite(values).values()]) for values in (a, b))
    if min(len(x), len(y)) < 2:
        return Estimate(float(x.mean() - y.mean()) if len(x) and len(y) else NAN, NAN, NAN, len(x) + len(y), "runs")
    return _welch(x.mean() - y.mean(), x.var(ddof=1) / len(x), y.var(ddof=1) / len(y), len(x), len(y), "runs")


def _welch(delta: float, var_x: float, var_y: float, n_x: int, n_y: int, of: str) -> Estimate:
    """From the squared standard errors of both sides; degrees of freedom by Satterthwaite (1946)."""
    n, var = n_x + n_y, var_x + var_y
    if not var > 0:  # nothing to test against
        return Estimate(float(delta), NAN, NAN, n, of)
    df = var**2 / (var_x**2 / (n_x - 1) + var_y**2 / (n_y - 1))
    low, high = t_interval(delta, np.sqrt(var), df)
    return Estimate(float(delta), float(low), float(high), n, of, float(t_test(delta, np.sqrt(var), df)))


def _finite(values: Mapping[int, float]) -> dict[int, float]:
    return {seed: value for seed, value in values.items() if np.isfinite(value)}


def bootstrap(a: ArrayLike, b: ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean difference of two runs' scores over documents (or windows), by BCa (Efron 1987).

    The interval holds for other documents and these weights; it says nothing about other seeds. Windows of one document
    are not independent: average them first.

    Args:
        a, b: a score for each document, (documents,), in the same order.
        seed: of the resampling.
    """
    delta = np.subtract(a, b, dtype=np.float64)
    n = len(delta)
    mean = float(delta.mean()) if n else NAN
    if n < 2 or np.ptp(delta) == 0:
        return Estimate(mean, *((mean, mean) if n > 1 else (NAN, NAN)), n, "documents")
    generator = np.random.default_rng(seed)
    means = np.array([delta[generator.integers(n, size=n)].mean() for _ in range(resamples)])
    below = (np.mean(means < mean) + np.mean(means <= mean)) / 2
    bias = special.ndtri(np.clip(below, 1 / resamples, 1 - 1 / resamples))
    centred = delta - mean
    acceleration = (centred**3).sum() / (6 * (centred**2).sum() ** 1.5)  # of a mean, what the jackknife gives
    z = bias + special.ndtri([ALPHA / 2, 1 - ALPHA / 2])
    low, high = np.quantile(means, special.ndtr(bias + z / (1 - acceleration * z)))
    return Estimate(mean, float(low), float(high), n, "documents")


# -- verdicts


def contrast(arm: Runs, reference: Runs, better: Better, margin: float) -> Contrast:
    counts, other = ((runs.diverged, len(_finite(runs.values)) + runs.diverged) for runs in (arm, reference))
    delta = paired(arm.values, reference.values)
    return Contrast(delta, better, margin, welch(arm.values, reference.values), counts, other)


def judge(family: Mapping[Name, Contrast]) -> dict[Name, Judgement]:
    """A verdict on each contrast of a family: all the comparisons that were planned together.

    better and worse need p < 5% after Holm and a mean difference beyond the margin, so that many seeds do not turn a
    negligible difference into a finding. equivalent needs TOST at 5%, or identical bits in two seeds or more. If a run
    diverged, the surviving runs decide nothing: they are not a fair sample.
    """
    adjusted = holm([contrast.p for contrast in family.values()])
    return {name: _judge(c, float(p), len(family)) for (name, c), p in zip(family.items(), adjusted, strict=True)}


def _judge(contrast: Contrast, p_holm: float, family: int) -> Judgement:
    d, margin = contrast.difference, contrast.margin
    tested = contrast.tested
    significant, beyond = tested and p_holm < ALPHA, abs(d.mean) > margin
    nothing = tested and d.low == d.high  # identical bits, or all but for rounding
    p_equivalent = NAN
    if tested and margin > 0:
        p_equivalent = 0.0 if nothing else contrast.p_within()

    verdict: Verdict = "not resolved"
    why = ""
    if contrast.any_diverged:
        verdict = "diverges" if contrast.diverged[0] else "reference diverges"
    elif significant and beyond:
        verdict = "better" if (d.mean < 0) == (contrast.better == "lower") else "worse"
    elif p_equivalent < ALPHA:
        verdict = "equivalent"
        why = "differs, by less than the margin" if significant else ""
    elif not tested:
        why = ("no seed in common", "one seed has no spread", "every seed shows the same difference")[min(d.n, 2)]
        why = "every run has the same value, which measures nothing" if d.n > 1 and d.mean == 0 else why
    elif not margin:
        why = NO_MARGIN
    elif significant and not beyond:
        why = "differs, perhaps by less than the margin"
    return Judgement(verdict, contrast, p_holm, p_equivalent, rate(*contrast.diverged), why, family)


def flips(pairs: Mapping[Name, tuple[Contrast, Contrast]]) -> dict[Name, Flip]:
    """Which pairs of arms change places between two tasks; one family of all differences of all pairs in both tasks."""
    judged = judge({(name, task): pair[task] for name, pair in pairs.items() for task in (0, 1)})
    interactions = {name: _interaction(*pair) for name, pair in pairs.items()}
    adjusted = holm([interaction.p for interaction in interactions.values()])
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


def _interaction(a: Contrast, b: Contrast) -> Estimate:
    # Runs of two tasks are independent, even with equal seeds.
    x, y = a.difference, b.difference
    if a.any_diverged or b.any_diverged or min(a.margin, b.margin) == 0 or np.isnan(x.p + y.p):
        return Estimate(NAN, NAN, NAN, x.n + y.n, "seeds")
    unit_a, unit_b = (task.margin if task.better == "higher" else -task.margin for task in (a, b))
    var_x, var_y = (x.sd / unit_a) ** 2 / x.n, (y.sd / unit_b) ** 2 / y.n
    return _welch(x.mean / unit_a - y.mean / unit_b, var_x, var_y, x.n, y.n, "seeds")


# -- throughput


def throughput(runs: Mapping[int, ArrayLike]) -> Estimate:
    """Median rate (or time) of a step, with an interval.

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


def speedup(a: Mapping[int, ArrayLike], b: Mapping[int, ArrayLike]) -> Estimate:
    """throughput(a) / throughput(b), and p of equal ones: t over the logarithms of the ratios, seed by seed.

    For a single seed by the delta method from the steps of both runs, without a p.
    """
    x, y = _log_medians(a), _log_medians(b)
    seeds = sorted(x.keys() & y.keys())
    if len(seeds) != 1:
        logs = np.array([x[seed][0] - y[seed][0] for seed in seeds])
        p = NAN
        if len(logs) > 1 and logs.std() > 0:
            p = float(t_test(logs.mean(), logs.std(ddof=1) / np.sqrt(len(logs)), len(logs) - 1))
        return replace(_over_seeds(logs.tolist(), "seeds"), p=p)
    (centre_x, se_x, n_x), (centre_y, se_y, n_y) = x[seeds[0]], y[seeds[0]]
    log = _welch(centre_x - centre_y, se_x**2, se_y**2, BATCHES, BATCHES, "steps")
    value, low, high = np.exp([log.value, log.low, log.high]).tolist()
    return Estimate(value, low, high, min(n_x, n_y), "steps")


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
        centre, length, se = np.median(log), len(log) // BATCHES, NAN
        if length > 1:
            medians = np.median(log[-BATCHES * length :].reshape(BATCHES, length), axis=1)
            se = np.sqrt(((medians - centre) ** 2).sum() / (BATCHES - 1) / BATCHES)
        result[seed] = float(centre), float(se), len(log)
    return result


def _over_seeds(logs: Sequence[float], of: str) -> Estimate:
    n = len(logs)
    if n < 2:
        return Estimate(NAN, NAN, NAN, n, of)
    return _exp_interval(float(np.mean(logs)), float(np.std(logs, ddof=1)) / np.sqrt(n), n - 1, n, of)


def _exp_interval(centre: float, se: float, df: int, n: int, of: str) -> Estimate:
    low, high = t_interval(centre, se, df)
    return Estimate(float(np.exp(centre)), float(np.exp(low)), float(np.exp(high)), n, of)


# -- many arms


def _block(arms: Mapping[str, Mapping[int, float]]) -> tuple[list[str], Array]:
    """Names and values (arms, seeds) over the seeds that all arms have, without the common effect of each seed.

    An arm with a single run is left out if others have more.
    """
    known = {name: _finite(values) for name, values in arms.items()}
    least = max(1, min(2, max((len(values) for values in known.values()), default=0)))
    known = {name: values for name, values in known.items() if len(values) >= least}
    seeds = sorted(set.intersection(*(set(values) for values in known.values()))) if known else []
    block = np.array([[values[seed] for seed in seeds] for values in known.values()]).reshape(len(known), len(seeds))
    return list(known), block - block.mean(axis=0) + block.mean() if block.size else block


def ranking(a: Mapping[str, Runs], b: Mapping[str, Runs], better: tuple[Better, Better]) -> Estimate:
    """Kendall's tau-b between two studies' rankings of the arms they share. Arms with a diverged run rank last, tied.

    The interval is a projection: every tau that agrees with a joint 95% confidence set of both rankings (as Klein,
    Wright and Wieczorek 2020), which is Tukey's of all pairs with seeds as blocks. A pair whose order is unknown in
    one of the studies agrees for the upper end and disagrees for the lower. It covers 95% or more (in simulations
    even where one arm is ten times as noisy as the others) and is wide until orders are known. Redrawing the means
    gives shorter intervals that miss: noise pulls tau to 0, and where two studies rank twelve close arms alike, not
    one covers 1.

    p is for no association of the observed orders, exact without ties: at best 0.083 with 4 arms, 0.0028 with 6.
    """
    from scipy import stats

    shared = sorted(a.keys() & b.keys())
    orders = [_mean_and_gap({name: s[name] for name in shared}, way) for s, way in zip((a, b), better, strict=True)]
    names = [name for name in shared if all(name in places for places, _ in orders)]
    if len(names) < 2:
        return Estimate(NAN, NAN, NAN, len(names), "arms")
    tau = stats.kendalltau(*(stats.rankdata([places[name] for name in names]) for places, _ in orders))
    x, y = (_signs(np.array([places[name] for name in names]), least) for places, least in orders)
    product = np.where((x == 0) | (y == 0), 0, x * y)
    agree, unknown = np.nansum(product), np.isnan(product).sum()
    untied = np.sqrt(float((x != 0).sum() * (y != 0).sum())) or NAN
    low, high = np.clip([(agree - unknown) / untied, (agree + unknown) / untied], -1, 1)
    return Estimate(float(tau.statistic), float(low), float(high), len(names), "arms", float(tau.pvalue))


@cache
def _studentized_range(arms: int, df: int) -> float:
    from scipy import stats

    return float(stats.studentized_range.ppf(1 - ALPHA / 2, arms, df))  # each of two studies gets half of the 5%


def _mean_and_gap(study: Mapping[str, Runs], better: Better) -> tuple[dict[str, float], float]:
    """Arm to its mean (low is good, infinite if a run diverged), and the gap above which an order is known."""
    places = {name: np.inf for name, runs in study.items() if runs.diverged}
    names, block = _block({name: runs.values for name, runs in study.items() if not runs.diverged})
    if not block.size:
        return places, np.inf
    means, (m, n) = block.mean(axis=1), block.shape
    places |= zip(names, (means if better == "lower" else -means).tolist(), strict=True)
    df = (m - 1) * (n - 1)
    noise = np.sqrt(((block - means[:, None]) ** 2).sum() / max(1, df))
    if noise <= ROUNDING * np.abs(block).max():  # one arm, one seed, or nothing to test against
        return places, np.inf
    return places, float(_studentized_range(m, df) * noise / np.sqrt(n))


def _signs(places: Array, least: float) -> Array:
    """Order of each pair of arms, (pairs,): -1 or 1 if it is known, 0 if both are last, else NaN."""
    i, j = np.triu_indices(len(places), 1)
    last, gap = np.isinf(places), np.nan_to_num(places[i]) - np.nan_to_num(places[j])
    known = (np.abs(gap) > least) | (last[i] != last[j])
    return np.where(last[i] & last[j], 0, np.where(known, np.sign(gap), np.nan))


def frontier(
    axes: Sequence[tuple[Mapping[str, Mapping[int, float]], Better]], seed: int = 0, draws: int = DRAWS
) -> dict[str, float]:
    """Share of simulated draws with an arm on the Pareto frontier: no other is as good on all axes and better on one.

    A draw is each arm's mean on each axis plus t times its standard error, without the common effect of each seed.
    The share is no error rate: if k arms tie in quality, the slowest is on the frontier in 1 / k of the draws. But in
    at most 1% of simulated pairs of equal studies, an arm was on it in over 97.5% of one study's draws and in under
    2.5% of the other's. Arms with fewer than two runs, or without a value on an axis, are left out; leave out arms with
    diverged runs too. Dividing an axis by the baseline changes nothing.

    Args:
        axes: for each, arm to seed to value, and which way is better.
        seed: of the simulation.
    """
    names = [name for name in axes[0][0] if all(len(_finite(arms.get(name, {}))) > 1 for arms, _ in axes)]
    generator = np.random.default_rng(seed)
    good = np.empty((len(axes), draws, len(names)))
    for k, (arms, better) in enumerate(axes):
        _, block = _block({name: arms[name] for name in names})
        m, n = block.shape
        if n < 2:  # fewer than two common seeds
            return dict.fromkeys(names, NAN)
        se = block.std(axis=1, ddof=1) * np.sqrt(m / max(1, m - 1) / n)  # centring took a part 1 / m of the variance
        se[se <= ROUNDING * np.abs(block).max()] = 0  # memory, for example: equal in every seed, so a tie stays a tie
        drawn = block.mean(axis=1) + se * generator.standard_t(n - 1, size=(draws, m))
        good[k] = drawn if better == "higher" else -drawn
    dominated = [
        np.any((good >= own[..., None]).all(axis=0) & (good > own[..., None]).any(axis=0), axis=1)
        for own in np.moveaxis(good, 2, 0)
    ]
    return {name: float(1 - np.mean(lost)) for name, lost in zip(names, dominated, strict=True)}

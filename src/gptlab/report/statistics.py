"""The statistics of runs, over plain data: numbers in, numbers out, no folder is read.

The same seed means the same initialisation and data order in every arm of a study, so arms are compared seed by seed.
What is said of a comparison, and what it rests on:

* better, worse: paired t, adjusted by Holm over the family of comparisons, and a difference larger than the margin.
  The probability of any false one in the family is at most 5%.
* equivalent: two one-sided tests against a margin set beforehand, 5% for each comparison and not for the family.
* diverges: a run did. One is enough to say that an arm can; how often is said with an exact interval.

Every interval is 95% for itself: of twenty one misses on average. Seeds are never bootstrapped (the percentile interval
of three covers 67.5%); documents within a seed are. NaN stands for what cannot be said, as the interval of one seed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from gptlab.report.reading import Array

# scipy.stats and scipy.optimize take seconds to import: the functions that need them do it.

ALPHA = 0.05  # two-sided: of a family of comparisons, and of each test of equivalence
POWER = 0.8
MARGIN_124M = 0.004  # nats: validation losses of a 124M GPT that are closer count as the same
RESAMPLES = 2000  # of the bootstrap over documents
DRAWS = 4000  # of the frontier's simulation
BATCHES = 10  # of a run's step times; Schmeiser (1982): more gain little, and leave each too short
ROUNDING = 2**-20  # relative, 8 units in the last place of float32: a spread below is rounding and no noise
MOST_SEEDS = 10_000  # beyond it no number of seeds is named

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
    """How many of `of` it rests on."""
    of: str
    """seeds, runs, steps, documents or arms."""
    p: float = NAN
    """Two-sided, not adjusted; NaN where nothing is tested."""


@dataclass(frozen=True)
class Difference:
    """Arm minus reference over the seeds that both have, in the metric's units."""

    n: int
    """Pairs."""
    mean: float
    sd: float
    """Of the differences, with n - 1."""
    low: float
    """95% interval of the mean, by t."""
    high: float
    p: float
    """Paired t, two-sided, not adjusted; 1 where nothing differs. NaN below two seeds, and where every seed shows the
    same difference: no spread over a few seeds means a coarse metric or a copy, and leaves no noise to test against."""

    @property
    def identical(self) -> bool:
        """Not a bit differs in any seed: what two arms of the same treatment must show (a check of the harness)."""
        return self.mean == 0 and (self.n == 1 or self.sd == 0)


@dataclass(frozen=True)
class Runs:
    """One arm's runs in one metric."""

    values: Mapping[int, float]
    """Seed to value, of the runs that completed. What is not finite counts as missing."""
    diverged: int = 0
    """Runs that diverged: counted, never averaged in."""


@dataclass(frozen=True)
class Contrast:
    """An arm and its reference; `contrast` makes one from their runs."""

    difference: Difference
    """Where a run diverged: of the survivors, and no evidence."""
    better: Better
    margin: float
    """Differences up to this are none, in the metric's units. 0: none was set, and nothing is shown equivalent."""
    welch: Estimate | None = None
    """The difference without pairing, over all seeds of each: a second look that decides nothing."""
    diverged: tuple[int, int] = (0, 0)
    """The arm's diverged runs, of how many that completed or diverged."""
    reference_diverged: tuple[int, int] = (0, 0)

    @property
    def any_diverged(self) -> bool:
        return self.diverged[0] + self.reference_diverged[0] > 0

    @property
    def p(self) -> float:
        """Not adjusted: paired t, or where a run diverged Fisher's exact test of the counts."""
        if not self.any_diverged:
            return self.difference.p
        from scipy import stats

        return float(stats.fisher_exact([[k, n - k] for k, n in (self.diverged, self.reference_diverged)]).pvalue)


@dataclass(frozen=True)
class Judgement:
    """What may be said of a contrast."""

    verdict: Verdict
    contrast: Contrast
    p_holm: float
    """The contrast's p adjusted over its family, in which what could not be tested keeps its place with p = 1."""
    p_equivalent: float
    """Two one-sided tests against the margin; not adjusted."""
    mde: float
    """True difference that this many seeds find with 80% power at 5%, were it the only comparison; in the metric's
    units. It is as uncertain as the sd, which three seeds give within a factor of 0.5 to 6."""
    mde_family: float
    """The same at Holm's first step, 5% over the number of comparisons."""
    more_seeds: int | None
    """Where not resolved: seeds to add for 80% power with the sd seen. If the difference is beyond the margin: to find
    one of that size; if within: to show the arms equivalent if they are (once it is significant: if it is true).
    None: cannot be said, or over 10,000."""
    divergence: Estimate
    """Rate of the arm's diverged runs."""
    why: str
    """What stood in the way of a better verdict; may be empty."""


@dataclass(frozen=True)
class Flip:
    """A pair of arms in two tasks."""

    verdict: FlipVerdict
    """flips: better in one task and worse in the other. agrees: better in both, or worse in both. equivalent: in both.
    diverges: a run did, in either. The rest is unresolved."""
    first: Judgement
    second: Judgement
    interaction: Estimate
    """The first task's difference minus the second's, each in its margins and positive where the arm is better than its
    reference; Welch's t."""
    p_holm: float
    """The interaction's p adjusted over the pairs."""


# -- the textbook, for numbers and arrays alike


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

    NaN keeps its place as p = 1: a comparison that was planned counts whether or not it could be made.
    """
    # statsmodels' multipletests says the same, and collects garbage at every call: 0.2 s where torch is loaded.
    p = np.nan_to_num(np.asarray(p, dtype=np.float64), nan=1.0)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def rate(k: int, n: int) -> Estimate:
    """k of n runs, by Clopper and Pearson (1934): covers 95% or more at any n, as Wilson's interval does not."""
    if n == 0:
        return Estimate(NAN, NAN, NAN, 0, "runs")
    from scipy import stats

    low, high = stats.binomtest(k, n).proportion_ci(method="exact")
    return Estimate(k / n, float(low), float(high), n, "runs")


# -- two arms


def difference(n: int, mean: float, sd: float, rounding: float = 0.0) -> Difference:
    """A paired difference from its summary; a spread of up to `rounding` is none."""
    if n < 2:
        return Difference(n, mean if n else NAN, NAN, NAN, NAN, NAN)
    if sd <= rounding:
        return Difference(n, mean, sd, *((mean, mean, 1.0) if abs(mean) <= rounding else (NAN, NAN, NAN)))
    se = sd / np.sqrt(n)
    low, high = t_interval(mean, se, n - 1)
    return Difference(n, mean, sd, float(low), float(high), float(t_test(mean, se, n - 1)))


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Difference:
    """a - b, seed to value each, over the seeds that both have."""
    a, b = _finite(a), _finite(b)
    pairs = np.array([(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]).reshape(-1, 2)
    delta = pairs[:, 0] - pairs[:, 1]
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


def margin_from_noise(values: Mapping[int, float], floor: float) -> float:
    """A margin where none is known: twice the sd of one arm's runs, which differ in their seeds, or `floor` if larger.

    Take a pilot's or the baseline's runs, and not differences between arms: those share their seeds and with them most
    of the noise. Three seeds can agree by chance, so the floor (in the metric's units) is stated.
    """
    known = [*_finite(values).values()]
    return max(floor, 2 * float(np.std(known, ddof=1))) if len(known) > 1 else floor


def bootstrap(a: ArrayLike, b: ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean difference of two runs' scores over documents (or windows), by BCa (Efron 1987).

    It says how the difference holds on other documents for these very weights, and nothing of other seeds. Windows of
    one document are not independent: average them first.

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


# -- power


def power(effect: ArrayLike, n: ArrayLike, alpha: float = ALPHA) -> Array:
    """Probability that a paired t test over n seeds finds a true difference, in sds of the paired difference."""
    df, shift = np.subtract(n, 1), np.multiply(effect, np.sqrt(n))
    critical = special.stdtrit(df, 1 - alpha / 2)
    wrong_side = np.nan_to_num(special.nctdtr(df, shift, -critical))  # NaN where it underflows
    return special.nctdtr(df, -shift, -critical) + wrong_side


def power_of_tost(margin: float, n: int, effect: float = 0.0) -> float:
    """Probability that TOST over n seeds passes; margin and true difference in sds of the paired difference."""
    chi2 = special.chdtri(n - 1, (np.arange(200) + 0.5) / 200)  # quantiles, to integrate over the sd that is seen
    room = margin - special.stdtrit(n - 1, 1 - ALPHA) * np.sqrt(chi2 / (n - 1) / n)
    passes = special.ndtr((room - effect) * np.sqrt(n)) - special.ndtr((-room - effect) * np.sqrt(n))
    return float(np.where(room > 0, passes, 0).mean())


@cache
def _mde(n: int, alpha: float) -> float:
    from scipy.optimize import brentq

    top = 1.0
    while power(top, n, alpha) < POWER:
        top *= 2
    return float(brentq(lambda effect: power(effect, n, alpha) - POWER, 0, top))


def minimum_detectable(n: int, sd: float, family: int = 1) -> float:
    """True difference that n seeds find with 80% power, by the noncentral t: 3.26 sd at n = 3.

    Args:
        sd: of the paired difference; where runs are independent, sqrt(2) times one arm's.
        family: number of comparisons; Holm holds the first of them to 5% / family.
    """
    return sd * _mde(n, ALPHA / family) if n > 1 else NAN


def seeds_needed(effect: float, sd: float, family: int = 1) -> int | None:
    """Fewest seeds that find a true difference with 80% power; None: over 10,000. See `minimum_detectable`."""
    if not sd > 0:
        raise ValueError(f"sd = {sd}: must be greater than 0")
    return _fewest(lambda n: float(power(abs(effect) / sd, n, ALPHA / family)))


def seeds_for_equivalence(margin: float, sd: float, effect: float = 0.0) -> int | None:
    """Fewest seeds with which TOST passes with 80% power where `effect` is the true difference; None: over 10,000."""
    if not sd > 0:
        raise ValueError(f"sd = {sd}: must be greater than 0")
    return _fewest(lambda n: power_of_tost(margin / sd, n, effect / sd))


def _fewest(power_of: Callable[[int], float]) -> int | None:
    low, high = 1, MOST_SEEDS
    if not power_of(high) >= POWER:
        return None
    while high - low > 1:  # power grows with n
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(middle) >= POWER else (middle, high)
    return high


# -- verdicts


def contrast(arm: Runs, reference: Runs, better: Better, margin: float) -> Contrast:
    counts = [(runs.diverged, len(_finite(runs.values)) + runs.diverged) for runs in (arm, reference)]
    delta = paired(arm.values, reference.values)
    return Contrast(delta, better, margin, welch(arm.values, reference.values), *counts)


def judge(family: Mapping[Name, Contrast]) -> dict[Name, Judgement]:
    """A verdict on each contrast of a family: all the comparisons that were planned together.

    better and worse need p < 5% after Holm and a mean difference beyond the margin: what the margin calls none, many
    seeds do not make a finding. equivalent needs TOST at 5%; identical bits in two seeds or more are it under any
    margin. Where a run diverged, what the survivors show decides nothing: they are no fair sample.
    """
    adjusted = holm([contrast.p for contrast in family.values()])
    return {name: _judge(c, float(p), len(family)) for (name, c), p in zip(family.items(), adjusted, strict=True)}


def _judge(contrast: Contrast, p_holm: float, family: int) -> Judgement:
    d, margin = contrast.difference, contrast.margin
    tested = not contrast.any_diverged and bool(np.isfinite(d.p))
    significant, beyond = tested and p_holm < ALPHA, abs(d.mean) > margin
    nothing = tested and d.low == d.high  # identical bits, or all but for rounding
    p_equivalent = 0.0 if nothing else NAN
    if tested and not nothing and margin > 0:
        p_equivalent = float(tost(d.n, d.mean, d.sd, margin))

    verdict: Verdict = "not resolved"
    why, needed = "", None
    if contrast.any_diverged:
        verdict = "diverges" if contrast.diverged[0] else "reference diverges"
    elif significant and beyond:
        verdict = "better" if (d.mean < 0) == (contrast.better == "lower") else "worse"
    elif p_equivalent < ALPHA:
        verdict = "equivalent"
        why = "differs, by less than the margin" if significant else ""
    elif not tested:
        why = ("no seed in common", "one seed has no spread", "every seed shows the same difference")[min(d.n, 2)]
    elif beyond:
        needed = seeds_needed(d.mean, d.sd, family)
    else:
        why = "differs, perhaps by less than the margin" if significant else ""
        needed = seeds_for_equivalence(margin, d.sd, abs(d.mean) if significant else 0.0)
    more = max(1, needed - d.n) if needed else None
    mde, mde_family = (minimum_detectable(d.n, d.sd, m) if tested else NAN for m in (1, family))
    return Judgement(verdict, contrast, p_holm, p_equivalent, mde, mde_family, more, rate(*contrast.diverged), why)


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
    # Runs of two tasks are independent, even where their seeds have the same number.
    x, y = a.difference, b.difference
    if a.any_diverged or b.any_diverged or min(a.margin, b.margin) == 0 or np.isnan(x.p + y.p):
        return Estimate(NAN, NAN, NAN, x.n + y.n, "seeds")
    unit_a, unit_b = (task.margin if task.better == "higher" else -task.margin for task in (a, b))
    var_x, var_y = (x.sd / unit_a) ** 2 / x.n, (y.sd / unit_b) ** 2 / y.n
    return _welch(x.mean / unit_a - y.mean / unit_b, var_x, var_y, x.n, y.n, "seeds")


# -- throughput


def throughput(runs: Mapping[int, ArrayLike]) -> Estimate:
    """Median rate (or time) of a step, with an interval.

    Over two runs or more: the geometric mean of their medians, and t over runs. Of one run: how well this run's median
    is known, and nothing of another day or machine.

    Args:
        runs: seed to the run's samples in the steady state, in the order of time: tokens per second, or seconds.
    """
    medians = _log_medians(runs)
    if len(medians) == 1:
        ((centre, se, n),) = medians.values()
        return _exp(centre, se, BATCHES - 1, n, "steps")
    return _over_seeds([centre for centre, _, _ in medians.values()], "runs")


def speedup(a: Mapping[int, ArrayLike], b: Mapping[int, ArrayLike]) -> Estimate:
    """throughput(a) / throughput(b), and p of equal ones: t over the logarithms of the ratios, seed by seed.

    Of a single seed by the delta method from the steps of both runs, without a p.
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
    return _exp(float(np.mean(logs)), float(np.std(logs, ddof=1)) / np.sqrt(n), n - 1, n, of)


def _exp(centre: float, se: float, df: int, n: int, of: str) -> Estimate:
    low, high = t_interval(centre, se, df)
    return Estimate(float(np.exp(centre)), float(np.exp(low)), float(np.exp(high)), n, of)


# -- many arms


def _block(arms: Mapping[str, Mapping[int, float]]) -> tuple[list[str], Array]:
    """Names and values (arms, seeds) over the seeds that all of them have, without what a seed does to all alike.

    An arm with a single run is left out where others have more.
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
    Wright and Wieczorek 2020), which is Tukey's of all pairs with seeds as blocks. A pair whose order is not known in
    one of the studies agrees for the upper end and disagrees for the lower. So it covers 95% or more (in simulations
    even where one arm is ten times as noisy as the others) and is wide until orders are known. Redrawing the means
    gives shorter intervals that miss: noise pulls tau to 0, and where two studies rank twelve close arms alike, not
    one covers 1.

    p is of no association between the two orders as seen, exact without ties: at best 0.083 with 4 arms, 0.0028 with 6.
    """
    from scipy import stats

    shared = sorted(a.keys() & b.keys())
    orders = [_places({name: s[name] for name in shared}, way) for s, way in zip((a, b), better, strict=True)]
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

    return float(stats.studentized_range.ppf(1 - ALPHA / 2, arms, df))  # each of two studies has half of the 5%


def _places(study: Mapping[str, Runs], better: Better) -> tuple[dict[str, float], float]:
    """Arm to its mean (low is good, infinite where a run diverged), and the gap from which on an order is known."""
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
    """Order of each pair of arms, (pairs,): -1 or 1 where it is known, 0 where both are last, else NaN."""
    i, j = np.triu_indices(len(places), 1)
    last, gap = np.isinf(places), np.nan_to_num(places[i]) - np.nan_to_num(places[j])
    known = (np.abs(gap) > least) | (last[i] != last[j])
    return np.where(last[i] & last[j], 0, np.where(known, np.sign(gap), np.nan))


def frontier(
    axes: Sequence[tuple[Mapping[str, Mapping[int, float]], Better]], seed: int = 0, draws: int = DRAWS
) -> dict[str, float]:
    """Share of simulated draws with an arm on the Pareto frontier: none is as good on all axes and better on one.

    A draw is each arm's mean on each axis plus t times its standard error, without what a seed does to all arms alike.
    The share is no error rate: where k arms tie in quality, the slowest of them is there in 1 / k of the draws. But
    that an arm is there in over 97.5% for one study and under 2.5% for another happened in at most 1% of simulated
    pairs of equal studies. Arms with fewer than two runs, or not on every axis, are left out; leave out those with
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
        if n < 2:  # no two seeds that all arms have
            return dict.fromkeys(names, NAN)
        se = block.std(axis=1, ddof=1) * np.sqrt(m / max(1, m - 1) / n)  # centring took a part 1 / m of the variance
        se[se <= ROUNDING * np.abs(block).max()] = 0  # memory, say: equal in every seed, and a tie is a tie
        drawn = block.mean(axis=1) + se * generator.standard_t(n - 1, size=(draws, m))
        good[k] = drawn if better == "higher" else -drawn
    dominated = [
        np.any((good >= own[..., None]).all(axis=0) & (good > own[..., None]).any(axis=0), axis=1)
        for own in np.moveaxis(good, 2, 0)
    ]
    return {name: float(1 - np.mean(lost)) for name, lost in zip(names, dominated, strict=True)}

"""The rules of a report on arrays of simulated studies: how often each errs, and how often it finds a planted effect.

Losses are (studies, arms, seeds), arm 0 is the baseline, lower is better, and a run's sd is 1. Each function plays one
rule of `gptlab.report` in every world that can break it and gives a row for each variant; `before` was replaced.
tests/test_benchmarks_judge.py shows that the arrays follow the rules that the report uses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.random import Generator

from gptlab.report import noise
from gptlab.report import statistics as st
from judging.worlds import WORLDS, Array, equal

SEEDS = (3, 5, 10)
EFFECTS = {3: 5.0, 5: 3.0, 10: 1.5}  # planted differences in sds of a run, by number of seeds
MARGINS = {3: 6.0, 5: 3.0, 10: 1.5}  # of equivalence, likewise
OPEN = 0.5  # margin in sds of a run of studies that go on until they are decided


@dataclass(frozen=True)
class Row:
    """One cell of the table: a variant of a rule in a world."""

    rule: str
    variant: str
    world: str
    size: str
    """Comparisons, or arms of both grids."""
    seeds: int
    stated: float
    """The error that the report promises. NaN: none, as the rule was replaced."""
    error: float
    draws: int
    effect: str = ""
    power: float = float("nan")

    @property
    def se(self) -> float:
        """Standard error of the simulated error, at the stated one if that is larger."""
        share = max(self.error, 0.0 if np.isnan(self.stated) else self.stated, 1 / self.draws)
        return float(np.sqrt(share * (1 - share) / self.draws))

    @property
    def holds(self) -> bool:
        """Whether the error is the stated one or less, within four standard errors. True if none is stated."""
        return not self.error > self.stated + 4 * self.se


# -- tests on arrays ------------------------------------------------------------------------------------------------


def holm(p: Array) -> Array:
    """`statistics.holm` over the last axis."""
    p = np.nan_to_num(p, nan=1.0)
    order = np.argsort(p, axis=-1)
    family = p.shape[-1]
    steps = np.take_along_axis(p, order, -1) * np.arange(family, 0, -1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(1, np.maximum.accumulate(steps, axis=-1)), -1)
    return adjusted


def differences(x: Array, arms: Array, references: Array) -> tuple[Array, Array]:
    """Mean and variance of the paired differences of the given pairs of arms, (studies, pairs).

    A spread that is no more than rounding is NaN, as nothing can be tested against it.
    """
    means = x.mean(-1)
    centred = x - means[..., None]
    covariance = centred @ centred.swapaxes(-1, -2) / (x.shape[-1] - 1)
    own = np.diagonal(covariance, axis1=-2, axis2=-1)
    variance = own[:, arms] + own[:, references] - 2 * covariance[:, arms, references]
    rounding = st.ROUNDING * np.abs(x).max((-2, -1))[:, None]
    return means[:, arms] - means[:, references], np.where(variance > rounding**2, variance, st.NAN)


Test = Callable[[Array, Array, Array], Array]
"""From losses and pairs of arms: two-sided p of no difference, not adjusted, (studies, pairs)."""


def own_variance(x: Array, arms: Array, references: Array) -> Array:
    n = x.shape[-1]
    mean, variance = differences(x, arms, references)
    return np.asarray(st.t_test(mean, np.sqrt(variance / n), n - 1))


def study_variance(variances: str) -> Test:
    """A variance that the other arms of the study have a share in, as `variances` in study.toml says."""

    def test(x: Array, arms: Array, references: Array) -> Array:
        _, own = differences(x, arms, references)
        p = noise.judged_p(x, list(zip(arms.tolist(), references.tolist(), strict=True)), variances)
        return np.where(np.isnan(own), st.NAN, p)

    return test


def where_equal(world: str) -> float:
    """One variance for all arms states its error where the arms have equal noise."""
    return st.ALPHA if world.startswith("equal noise") else st.NAN


TESTS: dict[str, tuple[Test, Callable[[str], float]]] = {
    "own": (own_variance, lambda world: st.ALPHA),
    "shrunk": (study_variance("shrunk"), lambda world: st.ALPHA),
    "shared": (study_variance("shared"), where_equal),
}
"""How the variance of a comparison is estimated, and the error stated in a world. `own` is what `shrunk` replaced."""


def verdicts_of(mean: Array, p: Array, within: Array | float = 1.0, margin: float = 0.0) -> Array:
    """Verdicts as `verdicts.judge` gives them: -1 better, 1 worse, 0 equivalent, NaN open.

    Args:
        mean, p, within: (..., family); p of no difference and p of equivalence, not adjusted.
    """
    found = (holm(p) < st.ALPHA) & (np.abs(mean) > margin)
    return np.where(found, np.sign(mean), np.where(np.less(within, st.ALPHA), 0.0, np.nan))


def against_first(x: Array) -> tuple[Array, Array]:
    """The pairs of every arm and the baseline."""
    arms = np.arange(1, x.shape[1])
    return arms, np.zeros_like(arms)


def judged(x: Array, test: Test, margin: float = 0.0) -> Array:
    """Verdicts on every arm against the baseline, (studies, arms - 1)."""
    pairs = against_first(x)
    within = p_within(x, margin) if margin else 1.0
    return verdicts_of(differences(x, *pairs)[0], test(x, *pairs), within, margin)


def p_within(x: Array, margin: float) -> Array:
    """p of equivalence of every arm and the baseline, not adjusted; always by each comparison's own variance."""
    mean, variance = differences(x, *against_first(x))
    return np.asarray(st.tost(x.shape[-1], mean, np.sqrt(variance), margin))


def is_finding(verdict: Array) -> Array:
    return np.abs(np.nan_to_num(verdict)) == 1


# -- the rules ------------------------------------------------------------------------------------------------------


def against_baseline(draws: int, rng: Generator) -> Iterator[Row]:
    """Arms against the baseline: some arm is called better or worse though none differs."""
    for (world, draw), family, n in itertools.product(WORLDS.items(), (3, 6, 18), SEEDS):
        x = draw(rng, (draws, family + 1, n))
        planted = x[: for_power(draws)].copy()
        planted[:, -1] -= EFFECTS[n]
        for variant, (test, stated) in TESTS.items():
            error, power = is_finding(judged(x, test)).any(-1).mean(), (judged(planted, test)[:, -1] == -1).mean()
            size, effect = f"{family}", f"{EFFECTS[n]:g} sd"
            yield Row("better or worse", variant, world, size, n, stated(world), error, draws, effect, power)


def for_power(draws: int) -> int:
    """Fewer draws: nobody asks for the last percent of a power."""
    return max(1, draws // 5)


def best_of_grids(draws: int, rng: Generator) -> Iterator[Row]:
    """The best of one grid against the best of another: called better or worse though both bests are the same."""
    for (a, b), n in itertools.product(((3, 3), (9, 3)), SEEDS):
        # gaps between neighbouring settings of both grids; where the references are far apart, the rule errs most
        cells = [(world, draw, (0.0, 0.0)) for world, draw in WORLDS.items()]
        cells += [("equal noise, settings 0.5 sd apart", equal, (0.5, 0.5))]
        cells += [("equal noise, references far apart", equal, (0.0, 50.0))]
        for world, draw, gaps in cells:
            x = draw(rng, (draws, b + a, n))  # the references first, so that the noisy baseline is one of them
            x += np.concatenate([gaps[1] * np.arange(b), gaps[0] * np.arange(a)])[:, None]
            planted = x[: for_power(draws)].copy()
            planted[:, b] -= EFFECTS[n]
            rules: dict[str, tuple[Callable[[Array, int], Array], float]] = {"before": (left_out_grids, st.NAN)}
            rules |= {name: (partial(paired_grids, test=t), stated(world)) for name, (t, stated) in TESTS.items()}
            for variant, (rule, states) in rules.items():
                error, power = (np.abs(rule(x, b)) == 1).mean(), (rule(planted, b) == -1).mean()
                size, effect = f"{a} v {b} arms", f"{EFFECTS[n]:g} sd"
                yield Row("best of a grid", variant, world, size, n, states, error, draws, effect, power)


def paired_grids(x: Array, references: int, test: Test) -> Array:
    """`grids.best_of` without a margin: -1 if the best arm is better than the best reference, 1 if worse, else 0."""
    b, a = references, x.shape[1] - references
    pairs = [index.ravel() for index in np.meshgrid(np.arange(b, b + a), np.arange(b), indexing="ij")]
    half = np.nan_to_num(test(x, *pairs), nan=2.0) / 2
    below = np.where(differences(x, *pairs)[0] < 0, half, 1 - half).reshape(-1, a, b)
    p_better, p_worse = a * below.max(2).min(1), b * (1 - below).max(1).min(1)
    return np.where(2 * p_better < st.ALPHA, -1, np.where(2 * p_worse < st.ALPHA, 1, 0))


def left_out_grids(x: Array, references: int) -> Array:
    """What was replaced: for each seed both settings are chosen on the other seeds, then a t test over the seeds."""
    others = x.sum(-1, keepdims=True) - x  # the seeds without each
    chosen = [
        np.take_along_axis(x[:, part], others[:, part].argmin(1)[:, None], 1)[:, 0]
        for part in (slice(references, None), slice(references))
    ]
    delta, n = chosen[0] - chosen[1], x.shape[-1]
    mean = delta.mean(-1)
    return np.where(st.t_test(mean, delta.std(-1, ddof=1) / np.sqrt(n), n - 1) < st.ALPHA, np.sign(mean), 0)


def equivalence(draws: int, rng: Generator) -> Iterator[Row]:
    """An arm is called equivalent, or recommended as such, though all arms are worse by exactly the margin."""
    for (world, draw), n in itertools.product(WORLDS.items(), SEEDS):
        x, margin = draw(rng, (draws, 19, n)), MARGINS[n]
        right = p_within(x[: for_power(draws)], margin)
        x[:, 1:] += margin
        wrong, effect = p_within(x, margin), "no difference"
        error, power = ((p < st.ALPHA).mean() for p in (wrong, right))
        yield Row("equivalent", "each", world, "each of 18", n, st.ALPHA, error, draws, effect, power)
        for variant, p, stated in (("before", (wrong, right), st.NAN), ("Holm", (holm(wrong), holm(right)), st.ALPHA)):
            error, power = ((one < st.ALPHA).any(-1).mean() for one in p)
            yield Row("recommended as equal", variant, world, "any of 18", n, stated, error, draws, effect, power)


def flips(draws: int, rng: Generator) -> Iterator[Row]:
    """A pair of arms is said to change places though one task shows an arm far ahead and the other shows nothing."""
    for (world, draw), arms, n in itertools.product(WORLDS.items(), (4, 7), SEEDS):
        tasks = [draw(rng, (draws, arms, n)) for _ in range(2)]
        few = [x[: for_power(draws)] for x in tasks]
        ahead = np.zeros((arms, 1))
        ahead[-1] = 2 * EFFECTS[n]
        for variant, (test, stated) in TESTS.items():
            error = flipped([tasks[0] - 5 * ahead, tasks[1]], test).any(-1).mean()
            power = flipped([few[0] - ahead, few[1] + ahead], test).any(-1).mean()
            size, effect = f"{arms * (arms - 1) // 2} pairs", f"{2 * EFFECTS[n]:g} sd in both"
            yield Row("flips of two tasks", variant, world, size, n, stated(world), error, draws, effect, power)


def flipped(tasks: list[Array], test: Test) -> Array:
    """`verdicts.flips` without a margin: pairs that are better in one task and worse in the other, (studies, pairs)."""
    pairs = np.triu_indices(tasks[0].shape[1], 1)
    means, ps = zip(*((differences(x, *pairs)[0], test(x, *pairs)) for x in tasks), strict=True)
    first, second = np.split(verdicts_of(np.hstack(means), np.hstack(ps)), 2, axis=1)
    return first * second == -1


def repeated_tests(d: Array, margin: float = OPEN) -> Array:
    """What was replaced: the verdicts of each look as if it were the first, until none is open or one is a finding.

    Args:
        d: paired differences, (studies, comparisons, seeds).
    """
    final = np.full(d.shape[:2], np.nan)
    going = np.arange(len(d))
    for n in range(3, d.shape[-1] + 1):
        seen = d[going, :, :n]
        mean, sd = seen.mean(-1), seen.std(-1, ddof=1)
        verdict = verdicts_of(mean, st.t_test(mean, sd / np.sqrt(n), n - 1), st.tost(n, mean, sd, margin), margin)
        final[going] = verdict
        going = going[np.isnan(verdict).any(-1) & ~is_finding(verdict).any(-1)]
    return final

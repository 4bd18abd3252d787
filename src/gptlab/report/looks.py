"""Tests and intervals that hold however often one looks: after every seed, up to a number of seeds stated beforehand.

Each look is an ordinary one-sided t test, and every look has the same critical p (Pocock 1977). The chance that any of
the looks falls below it, if nothing differs, is the p of the whole; the intervals of all looks hold together (repeated
confidence intervals, Jennison and Turnbull 1989). So p < 5% at any look is wrong in 5% of studies, whatever made one
stop or go on, provided that all seeds count in one order. With looks at 2 to 12 seeds the critical two-sided p of each
is 0.88%.

In simulations it finds true differences earlier than the right-Haar t Bayes factor used as an e-value (Hendriksen, de
Heide and Gruenwald 2021) and than spending as O'Brien and Fleming do; only the e-value would allow more seeds than
stated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from gptlab.report.detection import ALPHA
from gptlab.report.reading import Array

HOPELESS = 0.1  # a comparison ends if the chance to decide it within the stated seeds is smaller
DRAWS = 2000  # of that chance: standard error 0.7% at 10%
GRID, NODES = 257, 24  # of the mean's direction, and of each integral over the next seed


def chance_of_any(p: float, most: int) -> float:
    """Probability that at any look, after 2 to `most` seeds, a one-sided t test of equal arms falls below p <= 0.5.

    Of n normal values with mean 0 let u = mean sqrt(n) / sqrt(sum of squares), so that t = u sqrt((n-1) / (1-u^2)).
    The sum of squares is independent of u, hence the next value in units of its root is tan(a) with a density
    proportional to cos(a)^(n-1), and the next u is (sqrt(n) u cos(a) + sin(a)) / sqrt(n+1): a Markov chain on (-1, 1),
    which is integrated from the last look to the first (Armitage, McPherson and Rowe 1969). Accurate to 1% where the
    chance is above 0.1%, to 5% where it is above 1e-5.
    """
    x, w = np.polynomial.legendre.leggauss(NODES)
    away, weight = ((1 + x) / 2) ** 3, 1.5 * ((1 + x) / 2) ** 2 * w  # nodes on (0, 1), dense at 0
    grid = np.sin(np.sin(np.linspace(-np.pi / 2, np.pi / 2, GRID)) * np.pi / 2)  # dense where t is large
    later = np.zeros(GRID)  # for each u, the chance that a look after this one falls below p
    for n in range(most - 1, 0, -1):
        t = -special.stdtrit(n, p)
        limit = t / np.sqrt(t * t + n)  # of the next u
        length, turn = np.sqrt((n * grid**2 + 1) / (n + 1)), np.arctan(np.sqrt(n) * grid)
        half = np.arccos(np.minimum(1, limit / length))  # the next u is beyond the limit between these two angles
        first, last = (np.clip(np.pi / 2 - turn + side * half, -np.pi / 2, np.pi / 2) for side in (-1, 1))
        chance = special.stdtr(n, np.sqrt(n) * np.tan(last)) - special.stdtr(n, np.sqrt(n) * np.tan(first))
        scale = np.exp(special.gammaln((n + 1) / 2) - special.gammaln(n / 2)) / np.sqrt(np.pi)
        for start, end in ((first, -np.pi / 2), (last, np.pi / 2)):
            angle = start[:, None] + (end - start)[:, None] * away
            u = length[:, None] * np.sin(angle + turn[:, None])
            inner = (np.interp(u, grid, later) * np.cos(angle) ** (n - 1) * weight).sum(axis=1)
            chance += scale * np.abs(end - start) * inner
        later = chance
    return float(later[0] + later[-1]) / 2  # of one value u is -1 or 1


@lru_cache
def _table(most: int) -> tuple[Array, Array]:
    """Logarithms of p at a look and of `chance_of_any`; below 1e-7 toward its bound, p times the number of looks."""
    p = np.geomspace(1e-7, 0.5, 20)
    chance = np.array([chance_of_any(float(one), most) for one in p])
    far = 1e-280
    return np.log([far, *p, 1.0]), np.log([(most - 1) * far, *chance, 1.0])


def overall(p: ArrayLike, most: int) -> Array:
    """p of all looks from the smallest one-sided p at a look."""
    one, every = _table(most)
    return np.exp(np.interp(np.log(np.maximum(p, 1e-280)), one, every))


def at_a_look(level: float, most: int) -> float:
    """The p at a look that makes the looks together a one-sided test at `level`: the inverse of `overall`."""
    one, every = _table(most)
    return float(np.exp(np.interp(np.log(level), every, one)))


@dataclass(frozen=True, eq=False)
class Looks:
    """Paired differences of two arms in the order of their seeds, looked at after every seed from the second on."""

    differences: Array
    """(seeds,), in the metric's units; those after the first `most` are not used."""
    most: int
    rounding: float = field(default=0.0, repr=False)
    """A spread up to it is no noise to test against, and such a look is left out."""

    @cached_property
    def _seen(self) -> tuple[Array, Array, Array]:
        """Number of seeds, mean and standard error of the looks that have a spread, each (looks,)."""
        n, mean, sd = summaries(self.differences[: self.most])
        kept = sd > self.rounding
        return n[kept], mean[kept], sd[kept] / np.sqrt(n[kept])

    def p_below(self, shift: float = 0.0) -> float:
        """One-sided p of "the true difference is below `shift`"."""
        n, mean, se = self._seen
        return float(overall(special.stdtr(n - 1, (mean - shift) / se).min(), self.most)) if len(n) else 1.0

    def p_above(self, shift: float = 0.0) -> float:
        n, mean, se = self._seen
        return float(overall(special.stdtr(n - 1, (shift - mean) / se).min(), self.most)) if len(n) else 1.0

    @property
    def p(self) -> float:
        """Two-sided p of a true difference of 0."""
        return min(1.0, 2 * self.p_below(), 2 * self.p_above())

    def p_within(self, margin: float) -> float:
        """p of a true difference of `margin` or more: two one-sided tests, as in TOST."""
        return max(self.p_below(margin), self.p_above(-margin))

    def interval(self, level: float = ALPHA) -> tuple[float, float]:
        """What the intervals of all looks share, at 1 - `level`; it excludes 0 exactly where p < `level`.

        Where two looks contradict each other, which happens in fewer studies than `level`: the last look's alone.
        """
        n, mean, se = self._seen
        if not len(n):
            return float("nan"), float("nan")
        reach = -special.stdtrit(n - 1, at_a_look(level / 2, self.most)) * se
        low, high = mean - reach, mean + reach
        return (low.max(), high.min()) if low.max() <= high.min() else (low[-1], high[-1])

    def chance_to_decide(self, margin: float, level: float = ALPHA) -> float:
        """Predictive chance of a verdict (better, worse or equivalent) at a look up to `most` seeds.

        Noise and true difference are drawn from their posterior given the seeds so far (flat in the mean and in the
        logarithm of the sd), and the seeds to come from them. The draws are the same at every call.

        Args:
            margin: 0 if none is stated: then only better or worse is a verdict.
            level: of the two-sided test, 5% over the comparisons that are still open.
        """
        x = self.differences[: self.most]
        n, rest = len(x), self.most - len(x)
        sd = float(x.std(ddof=1)) if n > 1 else 0.0
        if not rest:
            return 0.0
        if not sd > self.rounding:
            return 1.0  # unknown
        generator = np.random.default_rng(0)
        spread = sd * np.sqrt((n - 1) / generator.chisquare(n - 1, DRAWS))
        centre = x.mean() + spread / np.sqrt(n) * generator.standard_normal(DRAWS)
        new = centre[:, None] + spread[:, None] * generator.standard_normal((DRAWS, rest))
        seeds, mean, sds = summaries(np.hstack([np.broadcast_to(x, (DRAWS, n)), new]))
        return float(_verdicts(seeds, mean, sds, margin, self.most, level)[:, n - 1 :].any(axis=1).mean())


def summaries(x: Array) -> tuple[Array, Array, Array]:
    """Number of values, mean and sd after each value from the second on; x and the last two are (..., values)."""
    n = np.arange(1, x.shape[-1] + 1)
    first = x[..., :1]  # differences from it lose no digits
    mean = (x - first).cumsum(axis=-1) / n
    squares = ((x - first) ** 2).cumsum(axis=-1) - n * mean**2
    sd = np.sqrt(np.maximum(squares, 0)[..., 1:] / (n[1:] - 1))
    return n[1:], (first + mean)[..., 1:], sd


def _verdicts(n: Array, mean: Array, sd: Array, margin: float, most: int, level: float) -> NDArray[np.bool_]:
    """Whether there is a verdict at each look, (..., looks), by the rules of `verdicts.judge`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        t, half = mean * np.sqrt(n) / sd, margin * np.sqrt(n) / sd
    cut = special.stdtrit(n - 1, 1 - at_a_look(level / 2, most))
    decided = np.logical_or.accumulate(np.abs(t) > cut, axis=-1) & (np.abs(mean) > margin)
    if margin > 0:
        cut = special.stdtrit(n - 1, 1 - at_a_look(ALPHA, most))
        sides = [np.logical_or.accumulate(side, axis=-1) for side in (t < half - cut, t > cut - half)]
        decided |= sides[0] & sides[1]
    return decided

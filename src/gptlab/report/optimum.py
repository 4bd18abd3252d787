"""Where the loss over a setting has its minimum, over plain data: a parabola in the logarithm, with an interval.

Only the values next to the best are fitted, two on each side. Runs of one seed share an offset, which is fitted, so
that shared seeds sharpen the place of the minimum. A parabola alone says it too surely, as losses rise faster above the
best rate than below: a third and a fourth power join it, held near zero as far as the spread of the runs allows (ridge,
by what asymmetry learning-rate curves have). With much noise that is the parabola, with little the curve that the means
draw.

The interval is a profile: it holds every place at which a curve has its minimum and fits about as well as the best, by
t, as Fieller's (1954) does for a parabola. It may be open at an end: the values then do not say where the minimum is.
What it covers is in tests/test_report_optimum.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import special

from gptlab.report.reading import Array
from gptlab.report.statistics import NAN, ROUNDING

LEVEL = 0.9  # of intervals
LEAST_VALUES = 3
BESIDE = 2  # values on each side of the best that are fitted
BENDS = (0.4, 0.2)  # standard deviations of the third and fourth coefficient, as shares of the second
LEAST_SPREAD = 1e-3  # that the higher powers are held by, as a share of what a step away from the minimum costs
PLACES = 201  # at which a minimum is tried, from a step below the fitted values to one above


class NoOptimum(ValueError):
    """The values have no minimum that could be told; the sentence says why."""


@dataclass(frozen=True)
class Optimum:
    """A minimum of the loss over a positive setting."""

    value: float
    low: float
    """0 where the interval is open: a step or more below the fitted values. NaN if the runs have no spread to take
    an interval from, as with one seed of three values."""
    high: float
    loss: float
    """At the minimum: the mean over seeds."""
    loss_low: float
    """NaN with one seed."""
    loss_high: float
    curvature: float
    """Loss per squared natural logarithm: half of the second derivative at the minimum."""
    curvature_low: float
    curvature_high: float
    coefficients: tuple[float, ...]
    """Of powers of log(x / value): the fitted curve, from the constant on."""
    values: tuple[float, ...]
    """All that have losses, ascending."""
    fitted: tuple[float, ...]
    best: float
    """The value with the lowest mean."""
    df: float

    @property
    def edge(self) -> str:
        """`lowest` or `highest` where the minimum is at or beyond that value of the grid, else empty."""
        lowest, highest = self.values[0], self.values[-1]
        if self.best == lowest or self.value <= lowest:
            return "lowest"
        return "highest" if self.best == highest or self.value >= highest else ""

    @property
    def bounded(self) -> bool:
        return bool(self.low > 0 and self.high < np.inf)


@dataclass(frozen=True, eq=False)
class _Runs:
    x: Array
    """Log of the value."""
    levels: Array
    """(runs, values), 1 where a run has the value."""
    seeds: Array
    """(runs, seeds), likewise; one column where seeds are not paired."""
    loss: Array

    def within_seeds(self, values: Array) -> Array:
        """(..., runs) less the mean of its seed."""
        means: Array = values @ self.seeds / self.seeds.sum(axis=0)
        return values - means @ self.seeds.T

    def additive(self) -> tuple[Array, float, int]:
        """The mean of each value, with seeds that it lacks made good, the sum of squares that is left, and its df."""
        columns = np.column_stack([self.levels, self.seeds[:, 1:]])
        theta, _, rank, _ = np.linalg.lstsq(columns, self.loss, rcond=None)
        rest = float(((self.loss - columns @ theta) ** 2).sum())
        return np.asarray(theta[: self.levels.shape[1]], np.float64), rest, len(self.loss) - int(rank)

    def columns(self, places: Array, powers: int) -> Array:
        """Powers of the distance from each place, from the second on: (places, powers, runs)."""
        away = self.x - places[:, None]
        return np.stack([away**power for power in range(2, 2 + powers)], axis=1)


def locate(losses: Mapping[float, Mapping[int, float]], paired: bool = True, level: float = LEVEL) -> Optimum:
    """The minimum of the loss over the logarithm of a setting.

    Args:
        losses: value to (seed to loss); values whose runs diverged are left out by the caller.
        paired: a seed is the same seed at every value.

    Raises:
        NoOptimum: too few values, or losses that have no minimum.
    """
    known = {value: {s: y for s, y in of.items() if np.isfinite(y)} for value, of in sorted(losses.items())}
    known = {value: of for value, of in known.items() if of}
    if len(known) < LEAST_VALUES:
        raise NoOptimum(f"a parabola takes {LEAST_VALUES} values with losses, and there are {len(known)}")
    values = list(known)
    best = int(_runs(known, values, paired).additive()[0].argmin())
    first = max(0, min(best - BESIDE, len(values) - LEAST_VALUES))
    near = values[first : max(best + BESIDE + 1, first + LEAST_VALUES)]
    runs = _runs(known, near, paired)
    x = np.log(near)
    step = float(np.diff(x).max())
    ends = float(x[0] - step), float(x[-1] + step)

    convex, bend, rest, df = _parabola(runs)
    if not convex:
        says = "the loss has no minimum among the values, as its parabola is not convex"
        side = {0: "below", len(values) - 1: "above"}.get(best)
        raise NoOptimum(f"{says}: it is lowest at {values[best]:g}, add values {side} it" if side else says)
    _, pure, pure_df = runs.additive()
    spread = np.sqrt(pure / pure_df) if pure_df else np.sqrt(rest / df) if df else 0.0
    df = pure_df or df
    least = LEAST_SPREAD * bend * step**2  # without a spread, of all curves through the means the straightest
    solved = _Profile(runs, (max(spread, least) / (np.array(BENDS) * bend)) ** 2)
    place, rss, theta, errors = solved.minimum(*ends)
    reach = NAN
    if df and spread > ROUNDING * float(np.abs(runs.loss).max()):
        reach = float(special.stdtrit(df, (1 + level) / 2) * spread)
    low, high = solved.within(rss + reach**2, place, *ends) if np.isfinite(reach) else (NAN, NAN)
    offsets = (runs.loss - theta @ runs.columns(np.array([place]), len(theta))[0]) @ runs.seeds / runs.seeds.sum(axis=0)
    loss, count, half = float(offsets.mean()), len(offsets), NAN
    if paired and count > 1:
        error = np.hypot(offsets.std(ddof=1) / np.sqrt(count), spread * errors[1])
        half = float(special.stdtrit(count - 1, (1 + level) / 2) * error)
    return Optimum(
        value=float(np.exp(place)),
        low=low,
        high=high,
        loss=loss,
        loss_low=loss - half,
        loss_high=loss + half,
        curvature=float(theta[0]),
        curvature_low=float(theta[0]) - reach * errors[0],
        curvature_high=float(theta[0]) + reach * errors[0],
        coefficients=(loss, 0.0, *map(float, theta)),
        values=tuple(values),
        fitted=tuple(near),
        best=values[best],
        df=float(df),
    )


def _runs(known: Mapping[float, Mapping[int, float]], values: list[float], paired: bool) -> _Runs:
    rows = [(i, seed if paired else 0, y) for i, value in enumerate(values) for seed, y in known[value].items()]
    at, seed, loss = (np.array(column) for column in zip(*rows, strict=True))
    levels, seeds = (at[:, None] == np.arange(len(values))), (seed[:, None] == np.unique(seed))
    return _Runs(np.log(values)[at], levels.astype(np.float64), seeds.astype(np.float64), loss.astype(np.float64))


def _parabola(runs: _Runs) -> tuple[bool, float, float, int]:
    """Of a plain parabola: whether it is convex, a size of its curvature that noise does not bring to zero, the sum of
    squares, and df."""
    columns = np.column_stack([runs.x**2, runs.x, runs.seeds])
    theta, _, rank, _ = np.linalg.lstsq(columns, runs.loss, rcond=None)
    rest, df = float(((runs.loss - columns @ theta) ** 2).sum()), len(runs.loss) - int(rank)
    error = rest / df * np.linalg.pinv(columns.T @ columns)[0, 0] if df else 0.0
    return bool(theta[0] > 0), float(np.sqrt(theta[0] ** 2 + error)), rest, df


@dataclass(frozen=True, eq=False)
class _Profile:
    """Curves without a slope at a place, fitted for each place."""

    runs: _Runs
    ridge: Array
    """Of the third and the fourth coefficient."""

    def solve(self, places: Array) -> tuple[Array, Array, Array]:
        """Coefficients, penalised sum of squares (infinite where the place is no minimum), inverse matrices."""
        columns = self.runs.within_seeds(self.runs.columns(places, 1 + len(self.ridge)))
        y = self.runs.within_seeds(self.runs.loss)
        penalty = np.diag([0.0, *self.ridge])
        inverse = np.linalg.pinv(columns @ np.swapaxes(columns, 1, 2) + penalty, hermitian=True)
        theta = np.einsum("gpq,gqm,m->gp", inverse, columns, y)
        rss = ((y - np.einsum("gp,gpm->gm", theta, columns)) ** 2).sum(axis=1) + (theta**2) @ penalty.diagonal()
        return theta, np.where(theta[:, 0] > 0, rss, np.inf), np.asarray(inverse, np.float64)

    def minimum(self, left: float, right: float) -> tuple[float, float, Array, tuple[float, float]]:
        """The best place, its sum of squares and coefficients, and the standard errors, in spreads, of the curvature
        and of the loss there."""
        for _ in range(4):
            places = np.linspace(left, right, PLACES)
            theta, rss, inverse = self.solve(places)
            at = int(rss.argmin())
            left, right = places[max(at - 1, 0)], places[min(at + 1, PLACES - 1)]
        share = float(((self.runs.x - places[at]) ** 2).mean())
        error = float(np.sqrt(inverse[at][0, 0]))
        loss_error = float(np.hypot(1 / np.sqrt(len(self.runs.x)), share * error))
        return float(places[at]), float(rss[at]), theta[at], (error, loss_error)

    def within(self, limit: float, place: float, left: float, right: float) -> tuple[float, float]:
        """The smallest and largest place with a sum of squares up to a limit, as values of the setting."""
        ends = []
        for end, open_end in ((left, 0.0), (right, np.inf)):
            far = place
            for _ in range(3):
                places = np.linspace(far, end, PLACES)
                inside = np.flatnonzero(self.solve(places)[1] <= limit)
                at = int(inside[-1]) if len(inside) else 0
                far, end = places[at], places[min(at + 1, PLACES - 1)]
                if far == end:
                    break
            ends.append(open_end if far == end else float(np.exp(far)))
        return ends[0], ends[1]

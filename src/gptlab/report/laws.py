"""Scaling laws of a ladder of runs, over plain data: how an arm's loss falls with its size, and what larger sizes say.

L(x) = E + A x^-alpha in compute, parameters or tokens, and L(N, D) = E + A N^-alpha + B D^-beta, fitted to relative
residuals (logs, to first order) with Huber's weights (Hoffmann et al. 2022, arXiv 2203.15556, appendix D.2). With the
exponents given a law is linear, so all else is solved exactly for each point of a grid of exponents (variable
projection), which is then narrowed to the exponents that the runs allow: no starting value, no tolerance to miss
(Besiroglu et al. 2024, arXiv 2404.10102).

Intervals are profiles of the same sum of squares: a value is inside if some law through it, with E >= 0, fits about as
well as the best one, by t with the degrees of freedom that the runs leave. A bootstrap over as few runs is too narrow;
profiles hold their level (tests/test_report_laws.py). All this is given that losses follow the law: where they miss it
by more than their seeds explain, the distance to the law is what the intervals rest on.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from gptlab.report.reading import Array
from gptlab.report.statistics import NAN, ROUNDING

LEVEL = 0.9  # of intervals
SHOWN = 0.95  # level at which a difference must exclude zero before its sign is said
LEAST_SIZES = 4
EXPONENTS = (0.01, 3.0)  # between them the fit looks
HUBER = 2.5  # spreads from which a residual counts linearly: one bad run cannot turn a law
MISFIT = 0.25  # p of the lack-of-fit test from which intervals rest on the distance to the law: 0.05 covers too little
GRID = {1: 49, 2: 17}  # exponents in each direction, by their number
ZOOMS = {1: 10, 2: 14}  # toward the best exponents
CELLS = {1: 1, 2: 3}  # that are looked at again on both sides of the best point: two exponents share a valley
MOST_OF_PAIR = 40  # exponents of each arm that are combined with each of another
MOST = 0.999  # correlation of two arms
CLOSEST = 0.99  # correlation of log N and log D from which their exponents cannot be told apart

Axis = Literal["compute", "n", "d", "n,d"]
AXES: dict[Axis, str] = {"compute": "compute", "n": "parameters", "d": "tokens", "n,d": "parameters and tokens"}


@dataclass(frozen=True)
class Point:
    """The loss of one run."""

    arm: str
    n: float
    """Parameters."""
    d: float
    """Training tokens."""
    seed: int
    loss: float
    """NaN if the run has none; it is left out."""
    compute: float = float("nan")
    """FLOPs; 6 N D if unknown."""
    rung: str = ""
    """What the same run of another arm is called; default: the arms' sizes are the same."""
    share: float = 1.0
    """Of an independent run: 1 / m where m runs of the arm share most of their steps, and tell as much as one."""

    def at(self, axis: Axis) -> tuple[float, ...]:
        compute = self.compute if np.isfinite(self.compute) else 6 * self.n * self.d
        return {"compute": (compute,), "n": (self.n,), "d": (self.d,), "n,d": (self.n, self.d)}[axis]


class NoLaw(ValueError):
    """The runs cannot carry a law; the sentence says why."""


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """One arm's loss minus another's at a size; negative where the first is better."""

    shown: bool
    """The sign is known: the 95% interval excludes zero."""


@dataclass(frozen=True)
class Crossing:
    """The size at which two laws cross."""

    value: float
    """NaN if they do not within the range."""
    low: float
    high: float
    """Sizes at which a difference of zero is inside its interval, between the first and the last of them; NaN if there
    is none. An end at an end of the range is open."""
    none: bool
    """No size within the range has zero in its interval: the laws do not cross there."""


@dataclass(frozen=True)
class HeldOut:
    """The largest size as the smaller ones predict it, and as it was measured."""

    size: tuple[float, ...]
    predicted: Interval
    """Of the mean of as many runs as were measured."""
    measured: float
    runs: int

    @property
    def inside(self) -> bool:
        return self.predicted.low <= self.measured <= self.predicted.high


@dataclass(frozen=True, eq=False)
class Runs:
    """The finite runs of an arm."""

    logs: Array
    """Log sizes less `centre`, (runs, axes)."""
    centre: Array
    loss: Array
    rung: NDArray[np.int64]
    """Which runs have one size."""
    keys: list[Hashable]
    """What pairs a run with the run of another arm."""
    weight: Array
    """Of a squared residual, by Huber."""
    share: Array
    """Of an independent run."""

    @property
    def scale(self) -> Array:
        """Of each run the root of its weight over its size's mean loss: it makes residuals relative."""
        sums = np.bincount(self.rung, self.loss) / np.bincount(self.rung)
        return np.sqrt(self.weight * self.share) / sums[self.rung]


@dataclass(frozen=True, eq=False)
class Solved:
    """The linear coefficients of a law, solved for each point of a grid of exponents."""

    theta: Array
    """(grid, p)."""
    inverse: Array
    """Of the normal equations, (grid, p, p)."""
    rss: Array
    floors: Array
    """(grid, q, p): the product with `theta` is E of each arm whose E is free. It must not be negative."""

    @property
    def positive(self) -> NDArray[np.bool_]:
        """Where no E is negative."""
        return np.all(np.einsum("gqp,gp->gq", self.floors, self.theta) >= 0, axis=1)

    def ends(self, at: Array, limit: float, noise: ArrayLike = 0.0) -> tuple[Array, Array]:
        """Smallest and largest value of `at` times the coefficients with a sum of squares of `limit` at most, (sizes,).

        Args:
            at: (grid, sizes, p).
            noise: variance of a measurement of the value, in units of that of the runs.
        """
        room = np.maximum(limit - self.rss, 0)[:, None]
        toward = at @ self.inverse  # (grid, sizes, p)
        variance = np.einsum("gsp,gsp->gs", toward, at) + noise
        value = np.einsum("gsp,gp->gs", at, self.theta)
        step = np.sqrt(room / variance)
        floor = np.einsum("gqp,gp->gq", self.floors, self.theta)[:, None]
        slope = np.einsum("gqp,gsp->gsq", self.floors, toward) * step[..., None]
        inside = (self.rss <= limit)[:, None]
        found = []
        for sign in (-1, 1):
            reached = inside & np.all(floor + sign * slope >= 0, axis=2)
            found.append(np.where(reached, value + sign * step * variance, -sign * np.inf))
        return found[0].min(axis=0), found[1].max(axis=0)


def _design(grid: Array, logs: Array, free: bool) -> Array:
    """The columns of a law at each point of a grid, (grid, sizes, p).

    With E free they are 1 and (x^-alpha - 1) / alpha, which stay apart where alpha is small; else x^-alpha / alpha.
    """
    power = -grid[:, None, :] * logs[None]
    if free:
        return np.concatenate([np.ones_like(power[..., :1]), np.expm1(power) / grid[:, None, :]], axis=2)
    return np.exp(power) / grid[:, None, :]


def _floors(grid: Array, free: bool) -> Array:
    """What E is of the coefficients, (grid, 1, p); of none where E is 0."""
    if not free:
        return np.empty((len(grid), 0, grid.shape[1]))
    return np.concatenate([np.ones_like(grid[:, :1]), -1 / grid], axis=1)[:, None]


def _solve(design: Array, y: Array, floors: Array) -> Solved:
    """Least squares at each point of a grid, of rows that all have variance 1."""
    inverse = np.linalg.inv(np.swapaxes(design, 1, 2) @ design)
    theta = np.einsum("gpq,gmq,m->gp", inverse, design, y)
    rss = ((y - np.einsum("gmp,gp->gm", design, theta)) ** 2).sum(axis=1)
    return Solved(theta, np.asarray(inverse, np.float64), rss, floors)


def _forms(runs: Runs, grid: Array) -> tuple[Solved, Solved]:
    """The law with E free, and with E = 0."""
    scale = runs.scale
    free, zero = (
        _solve(_design(grid, runs.logs, free) * scale[:, None], runs.loss * scale, _floors(grid, free))
        for free in (True, False)
    )
    return free, zero


def _profile(forms: tuple[Solved, Solved]) -> Array:
    """Least sum of squares with E >= 0 at each point of a grid."""
    free, zero = forms
    return np.where(free.positive, free.rss, zero.rss)


def _grid(ranges: Array) -> Array:
    """Exponents, (grid, axes), of (low, high) of each axis."""
    lines = [np.geomspace(low, high, GRID[len(ranges)]) for low, high in ranges]
    return np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1).reshape(-1, len(ranges))


def _around(grid: Array, kept: Array, cells: int) -> Array:
    """The range of each axis that holds some points of its grid, and some cells on both sides."""
    ranges = []
    for axis, values in enumerate(kept.T):
        line = np.unique(grid[:, axis])
        first, last = np.searchsorted(line, [values.min(), values.max()])
        ranges.append((line[max(first - cells, 0)], line[min(last + cells, len(line) - 1)]))
    return np.array(ranges)


def _best(runs: Runs) -> tuple[Array, float, Array]:
    """The exponents that fit best, their sum of squares, and the coefficients of the columns with E free."""
    axes = runs.logs.shape[1]
    ranges = np.array([EXPONENTS] * axes)
    for _ in range(ZOOMS[axes]):
        grid = _grid(ranges)
        free, zero = _forms(runs, grid)
        rss = _profile((free, zero))
        at = int(rss.argmin())
        ranges = _around(grid, grid[at : at + 1], CELLS[axes])
    theta = free.theta[at] if free.positive[at] else np.r_[(zero.theta[at] / grid[at]).sum(), zero.theta[at]]
    return grid[at], float(rss[at]), theta


# -- fitting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Law:
    """A fitted law of one arm."""

    arm: str
    axis: Axis
    e: float
    """Loss that no size gets below; 0 where the runs would have it negative."""
    scales: tuple[float, ...]
    """A, and B of two axes."""
    exponents: tuple[float, ...]
    irreducible: Interval
    """E, with its interval."""
    exponent_intervals: tuple[Interval, ...]
    spread: float
    """Relative standard deviation of a run about the law."""
    df: float
    misfit: float
    """p of the lack-of-fit test; NaN where it cannot be made."""
    sizes: tuple[tuple[float, ...], ...]
    """Ascending."""
    left_out: int
    """Runs without a finite loss."""
    runs: Runs
    grid: Array
    """The exponents that the runs allow, (grid, axes)."""
    rss: float

    @property
    def open(self) -> bool:
        """The runs do not say where the law ends: E may be 0, or an exponent anything beyond what was looked at."""
        ends = [(x.low, x.high) for x in self.exponent_intervals]
        least, most = EXPONENTS
        return self.irreducible.low <= 0 or any(low <= least or high >= most for low, high in ends)

    def limit(self, level: float = LEVEL) -> float:
        """Sum of squares up to which a law is inside an interval."""
        return self.rss + self.spread**2 * float(special.stdtrit(self.df, (1 + level) / 2)) ** 2

    @property
    def residuals(self) -> Array:
        """Of each run, relative and weighted."""
        return (self.runs.loss - self(*np.exp(self.runs.logs + self.runs.centre).T)) * self.runs.scale

    def __call__(self, *size: ArrayLike) -> Array:
        """The fitted loss at sizes, one array of each axis."""
        loss = np.array(self.e)
        for scale, power, x in zip(self.scales, self.exponents, size, strict=True):
            loss = loss + scale * np.asarray(x, np.float64) ** -power
        return loss

    def predict(self, *size: ArrayLike, runs: float = np.inf, level: float = LEVEL) -> list[Interval]:
        """The loss at sizes, one array of each axis, with intervals.

        Args:
            size: smaller or larger than the sizes of the ladder.
            runs: the interval is that of the mean of so many runs; default: of the law.
        """
        at = _columns(size)
        value = self(*at.T)
        low, high = np.full(len(at), np.inf), np.full(len(at), -np.inf)
        for free, solved in zip((True, False), _forms(self.runs, self.grid), strict=True):
            design = _design(self.grid, np.log(at) - self.runs.centre, free)
            ends = solved.ends(design, self.limit(level), value**2 / runs)
            low, high = np.minimum(low, ends[0]), np.maximum(high, ends[1])
        return _intervals(value, low, high)


def _columns(size: Sequence[ArrayLike]) -> Array:
    return np.column_stack([np.atleast_1d(np.asarray(x, np.float64)) for x in size])


def fit(points: Sequence[Point], arm: str, axis: Axis = "compute", least: int = LEAST_SIZES) -> Law:
    """The law of an arm over an axis, or over parameters and tokens.

    Args:
        points: of all arms.
        least: number of sizes.

    Raises:
        NoLaw: the runs cannot carry it.
    """
    runs, sizes, left_out = _read(points, arm, axis, least)
    best, rss, theta = _best(runs)
    for _ in range(3):
        plain = replace(runs, weight=np.ones_like(runs.weight))
        residual = np.abs((_design(best[None], runs.logs, True)[0] @ theta - runs.loss) * plain.scale)
        spread = np.median(residual) / special.ndtri(0.75) * np.sqrt(len(residual) / _df(runs))
        runs = replace(runs, weight=np.minimum(1, HUBER * spread / np.maximum(residual, ROUNDING)))
        if (runs.weight == 1).all():
            break
        best, rss, theta = _best(runs)
    spread, df, misfit = _spread(runs, rss)
    if not spread > ROUNDING:
        raise NoLaw(f"the runs of {arm} have no spread about their law: there is nothing to take an interval from")
    powers = tuple(map(float, best))
    scales = tuple(float(b / g * np.exp(g * c)) for b, g, c in zip(theta[1:], best, runs.centre, strict=True))
    if not all(a > 0 for a in scales):
        raise NoLaw(f"the loss of {arm} does not fall with its {AXES[axis]}: it has no law in it")
    e = max(0.0, float(theta[0] - (theta[1:] / best).sum()))
    nothing = Interval(e, e, e)
    law = Law(arm, axis, e, scales, powers, nothing, (), spread, df, misfit, sizes, left_out, runs, best[None], rss)
    flat = ((runs.loss * runs.scale - runs.scale * np.average(runs.loss, weights=runs.scale**2)) ** 2).sum()
    if flat <= law.limit():
        raise NoLaw(
            f"the loss of {arm} does not fall with its {AXES[axis]} by more than its spread: it has no law in it"
        )
    law = replace(law, grid=_allowed(law))
    return replace(law, irreducible=_irreducible(law), exponent_intervals=_exponents(law))


def _read(points: Sequence[Point], arm: str, axis: Axis, least: int) -> tuple[Runs, tuple[tuple[float, ...], ...], int]:
    own = [point for point in points if point.arm == arm]
    known = [point for point in own if np.isfinite(point.loss)]
    size = np.array([point.at(axis) for point in known], dtype=np.float64)
    sizes = tuple(sorted({tuple(map(float, row)) for row in size}))
    found = len({row[0] for row in sizes})
    if found < least:
        raise NoLaw(f"{arm} has finished runs of {found} sizes: a law in {AXES[axis]} takes {least}")
    logs = np.log(size)
    if axis == "n,d" and (len(np.unique(size[:, 1])) < 3 or abs(np.corrcoef(logs.T)[0, 1]) > CLOSEST):
        apart = "what each of them adds to the loss cannot be told apart; take a law in compute"
        raise NoLaw(f"the tokens of {arm} go with its parameters: {apart}")
    names = [point.rung or (point.n, point.d) for point in known]
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    rung = np.array([order[name] for name in names])
    centre = logs.mean(axis=0)
    loss = np.array([point.loss for point in known])
    keys: list[Hashable] = [(name, point.seed) for name, point in zip(names, known, strict=True)]
    share = np.array([point.share for point in known])
    runs = Runs(logs - centre, centre, loss, rung, keys, np.ones(len(known)), share)
    coefficients = 2 * logs.shape[1] + 1
    if _df(runs) < 1 or len(order) < coefficients:
        left = f"the {coefficients} coefficients of its law leave nothing to tell its spread by"
        raise NoLaw(f"{arm} has {len(known)} finished runs of {len(order)} sizes: {left}")
    return runs, sizes, len(own) - len(known)


def _df(runs: Runs) -> float:
    """Degrees of freedom that a law leaves."""
    return float(runs.share.sum()) - 2 * runs.logs.shape[1] - 1


def _spread(runs: Runs, rss: float) -> tuple[float, float, float]:
    """Relative standard deviation of a run, its degrees of freedom, and p of the lack-of-fit test.

    Where the sizes' means miss the law by more than seeds explain, their distance from it is the spread.
    """
    scale, df = runs.scale, _df(runs)
    means = np.bincount(runs.rung, runs.loss * scale**2) / np.bincount(runs.rung, scale**2)
    pure = float((((runs.loss - means[runs.rung]) * scale) ** 2).sum())
    independent = float((np.bincount(runs.rung, runs.share) / np.bincount(runs.rung)).sum())
    between = independent - 2 * runs.logs.shape[1] - 1
    within = df - between
    if between < 1 or within < 1:
        return float(np.sqrt(rss / df)), df, float("nan")
    lack = max(rss - pure, 0.0) / between
    p = float(special.fdtrc(between, within, lack / (pure / within))) if pure > 0 else 0.0
    return (float(np.sqrt(lack)), between, p) if p < MISFIT else (float(np.sqrt(rss / df)), df, p)


def _allowed(law: Law) -> Array:
    """The exponents within the interval of the widest level asked for, and some beyond."""
    axes = law.runs.logs.shape[1]
    ranges, limit = np.array([EXPONENTS] * axes), law.rss + 1.5 * (law.limit(SHOWN) - law.rss)
    for _ in range(ZOOMS[axes]):
        grid = np.concatenate([_grid(ranges), [law.exponents]])
        inside = _profile(_forms(law.runs, grid)) <= limit
        narrower = _around(grid, grid[inside], 1)
        if np.allclose(narrower, ranges, rtol=0.1, atol=0):
            break
        ranges = narrower
    return grid[inside]


def _irreducible(law: Law) -> Interval:
    free, zero = _forms(law.runs, law.grid)
    low, high = free.ends(free.floors, law.limit())
    if zero.rss.min() <= law.limit():
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    return _intervals(np.array([law.e]), low, high)[0]


def _exponents(law: Law) -> tuple[Interval, ...]:
    inside = law.grid[_profile(_forms(law.runs, law.grid)) <= law.limit()]
    values = np.array(law.exponents)
    return tuple(_intervals(values, inside.min(axis=0), inside.max(axis=0)))


def _intervals(value: Array, low: Array, high: Array) -> list[Interval]:
    ends = zip(value, np.minimum(low, value), np.maximum(high, value), strict=True)
    return [Interval(*map(float, row)) for row in ends]


def held_out(points: Sequence[Point], arm: str, axis: Axis = "compute") -> HeldOut:
    """The largest size of an arm as a law of the smaller ones predicts it. One fewer than `fit` asks for are enough.

    Raises:
        NoLaw: the smaller sizes cannot carry a law.
    """
    own = [point for point in points if point.arm == arm and np.isfinite(point.loss)]
    largest = max((point.at(axis) for point in own), default=())
    rest = [point for point in own if point.at(axis)[0] < largest[0]]
    law = fit(rest, arm, axis, LEAST_SIZES - 1)
    losses = [point.loss for point in own if point.at(axis) == largest]
    return HeldOut(largest, law.predict(*largest, runs=len(losses))[0], float(np.mean(losses)), len(losses))


# -- two arms -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pair:
    """The laws of two arms, fitted together: runs with one seed and size share what the seed decides."""

    a: Law
    b: Law
    correlation: float
    """Of the residuals of paired runs; 0 if fewer than three are paired."""
    grids: tuple[Array, Array]
    """Exponents of a and of b, (grid, axes) each: every one with every other."""
    forms: list[tuple[tuple[bool, ...], Solved]]
    """With E of a and of b free or 0."""

    def at(self, *size: ArrayLike) -> list[Difference]:
        """The loss of a minus that of b at sizes, one array of each axis."""
        value = np.atleast_1d(self.a(*size) - self.b(*size))
        rows = zip(_intervals(value, *self._ends(LEVEL, *size)), *self._ends(SHOWN, *size), strict=True)
        return [Difference(x.value, x.low, x.high, bool(low > 0 or high < 0)) for x, low, high in rows]

    def crossing(self, *size: ArrayLike) -> Crossing:
        """Where the two laws cross along sizes that ascend, one array of each axis; said in the first axis."""
        x = np.log(np.asarray(size[0], np.float64))
        found = self.at(*size)
        value, low, high = (np.array([getattr(one, key) for one in found]) for key in ("value", "low", "high"))
        roots, inside = _roots(x, value), (low <= 0) & (high >= 0)
        if not inside.any() and not len(roots):
            return Crossing(NAN, NAN, NAN, none=True)
        ends = np.r_[x[inside], roots, _roots(x, low), _roots(x, high)]
        last = roots[-1] if len(roots) else NAN
        return Crossing(float(np.exp(last)), float(np.exp(ends.min())), float(np.exp(ends.max())), none=False)

    def _ends(self, level: float, *size: ArrayLike) -> tuple[Array, Array]:
        rss = min(float(np.where(solved.positive, solved.rss, np.inf).min()) for _, solved in self.forms)
        limit = rss + float(special.stdtrit(min(self.a.df, self.b.df), (1 + level) / 2)) ** 2
        logs = np.log(_columns(size))
        ends = []
        for free, solved in self.forms:
            sides = zip((self.a, self.b), self.grids, free, strict=True)
            a, b = (_design(grid, logs - law.runs.centre, own) for law, grid, own in sides)
            ends.append(solved.ends(np.concatenate([a, -b], axis=2), limit))
        lows, highs = zip(*ends, strict=True)
        return np.min(lows, axis=0), np.max(highs, axis=0)


def pair(a: Law, b: Law) -> Pair:
    """Two laws of one axis, to be subtracted.

    Raises:
        ValueError: the laws are of different axes.
    """
    if a.axis != b.axis:
        raise ValueError(f"the law of {a.arm} is in {AXES[a.axis]}, and that of {b.arm} in {AXES[b.axis]}")
    laws = (a, b)
    count, position = len(a.runs.loss), {key: i for i, key in enumerate(b.runs.keys)}
    both = [(i, count + position[key]) for i, key in enumerate(a.runs.keys) if key in position]
    rows, columns = np.array(both, dtype=np.int64).reshape(-1, 2).T
    residuals = np.concatenate([law.residuals for law in laws])
    x, y = residuals[rows], residuals[columns]
    correlation = float(np.clip((x @ y) / np.sqrt((x @ x) * (y @ y)), -MOST, MOST)) if len(both) > 2 else 0.0
    covariance = np.eye(len(residuals))
    covariance[rows, columns] = covariance[columns, rows] = correlation
    whiten = np.linalg.inv(np.linalg.cholesky(covariance))
    halves = whiten[:, :count], whiten[:, count:]

    scales = [law.runs.scale / law.spread for law in laws]
    y = whiten @ np.concatenate([law.runs.loss * scale for law, scale in zip(laws, scales, strict=True)])
    few = [_few(law) for law in laws]
    index = np.divmod(np.arange(len(few[0]) * len(few[1])), len(few[1]))
    forms = []
    for free in itertools.product((True, False), repeat=2):
        of_each = list(zip(laws, few, free, halves, scales, index, strict=True))
        design = [
            (half @ (_design(grid, law.runs.logs, own) * scale[:, None]))[at]
            for law, grid, own, half, scale, at in of_each
        ]
        floors = [_floors(grid, own)[at] for _, grid, own, _, _, at in of_each]
        none = [np.zeros((len(y), q.shape[1], x.shape[2])) for y, q, x in zip(index, floors, design[::-1], strict=True)]
        wide = [np.concatenate([floors[0], none[0]], axis=2), np.concatenate([none[1], floors[1]], axis=2)]
        forms.append((free, _solve(np.concatenate(design, axis=2), y, np.concatenate(wide, axis=1))))
    return Pair(a, b, correlation, (few[0][index[0]], few[1][index[1]]), forms)


def _few(law: Law) -> Array:
    """The law's exponents, few enough to be combined with another's; the best are the last."""
    step = -(-len(law.grid) // MOST_OF_PAIR)
    return np.concatenate([law.grid[:-1:step], law.grid[-1:]])


def _roots(x: Array, y: Array) -> Array:
    """Where y passes zero, by straight lines between its points."""
    with np.errstate(invalid="ignore"):
        at = np.flatnonzero(np.sign(y[:-1]) * np.sign(y[1:]) < 0)
    return x[at] - y[at] * (x[at + 1] - x[at]) / (y[at + 1] - y[at])

"""From many logged points to a readable curve: thinning, smoothing, and the part that is worth showing."""

from __future__ import annotations

import numpy as np

from gptlab.report.reading import Array

MOST_POINTS = 2000  # a figure is about a thousand pixels wide: more points cost time and show nothing
SMOOTHED = 0.04  # share of a run's points under one window of the smoothed curve
FEWEST_SMOOTHED = 20  # below this a smoothed curve says no more than the points
SMOOTHING = f"weighted mean (Hann window) over {SMOOTHED:.0%} of a run's points"


def finite_points(steps: Array, values: Array) -> tuple[Array, Array]:
    kept = np.isfinite(values)
    return steps[kept], values[kept]


def thin(steps: Array, values: Array, most: int = MOST_POINTS) -> tuple[Array, Array]:
    """About `most` of the points: the lowest and the highest of each stretch, so that every spike stays visible.

    Args:
        steps, values: (points,), finite.
    """
    if len(values) <= most:
        return steps, values
    edges = np.linspace(0, len(values), most // 2 + 1).astype(int)
    starts, lengths = edges[:-1, None], np.diff(edges)[:, None]
    within = np.arange(lengths.max())
    stretches = values[starts + np.minimum(within, lengths - 1)]  # (stretches, points), the last point again at the end
    found = [starts[:, 0] + stretches.argmin(axis=1), starts[:, 0] + stretches.argmax(axis=1)]
    index = np.unique(np.concatenate([[0, len(values) - 1], *found]))
    return steps[index], values[index]


def smooth(steps: Array, values: Array, most: int = MOST_POINTS // 2) -> tuple[Array, Array, int]:
    """A centred mean over `SMOOTHED` of the points, with Hann weights, at no more than `most` of them.

    Even weights would turn every spike into a plateau. Near the start the window shrinks on both sides, as a
    lopsided one would lag behind the steepest part of the curve; near the end only its missing half is left out.

    Args:
        steps, values: (points,), finite.

    Returns:
        Steps, means, and how many points a full window has.
    """
    last = len(values) - 1
    half = max(2, round(SMOOTHED * len(values) / 2))
    centres = np.unique(np.linspace(0, last, min(most, len(values))).astype(int))
    means = []
    for i in centres:
        before = min(half, i)
        after = min(before, last - i)
        weights = np.hanning(2 * before + 3)[1:-1][: before + 1 + after]
        means.append(np.average(values[i - before : i + after + 1], weights=weights))
    return steps[centres], np.array(means), 2 * half + 1


def ceiling(values: Array) -> float:
    """The top of the y axis for a curve: its maximum, or less if a few points are far above the rest.

    That is usually the loss of the first steps. The end of the run stays in view, as that is where it diverges, up
    to the value it began with or three times the usual height.

    Args:
        values: (points,), finite, at least one.
    """
    low, top = values.min(), values.max()
    if len(values) < FEWEST_SMOOTHED:  # each of few points is a part of the curve
        return float(top)
    usual = np.quantile(values, 0.98, method="lower")
    end = values[-max(1, len(values) // 20) :].max()
    usual = max(usual, min(end, max(values[0], low + 3 * (usual - low))))
    return float(usual if top - low > 1.5 * (usual - low) else top)

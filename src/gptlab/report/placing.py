"""Where things go in a figure: labels that cover nothing, and axes that far-out values do not stretch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptlab.report.drawing import PALE, annotate
from gptlab.report.reading import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Flags = NDArray[np.bool_]


def spread_out(wanted: Array, gap: float, low: float, high: float) -> Array:
    """Places closest to the wanted ones, in the same order, `gap` apart (less if there is no room), within bounds.

    Args:
        wanted: (labels,).
    """
    from scipy.optimize import isotonic_regression

    order = np.argsort(wanted, kind="stable")
    steps = min(gap, (high - low) / max(1, len(wanted) - 1)) * np.arange(len(wanted))
    places = np.empty(len(wanted))
    places[order] = np.clip(isotonic_regression(wanted[order] - steps).x, low, high - steps[-1]) + steps
    return places


def usual_reach(distances: Array, least: float = 0.0) -> float:
    """The largest distance up to four times the upper quartile; at least `least`."""
    known = distances[distances > 0]  # zeros say nothing about the scale
    fence = max(least, 4 * np.quantile(known, 0.75)) if len(known) else 0.0
    return float(max([least, *known[known <= fence]]))


def limits_of(bars: Array, always: Flags, least: float = 0.0) -> tuple[float, float]:
    """Ends of an axis: all values but far-out ones, and their intervals up to half of that length again.

    Args:
        bars: (arms, 3), value, low, high.
        always: (arms,), values that are always shown.
        least: distance from the median that is always shown.
    """
    middle = float(np.median(bars[:, 0]))
    away = np.abs(bars[:, 0] - middle)
    inside = bars[away <= usual_reach(away, max(least, away[always].max(initial=0.0)))]
    low, high = min(inside[:, 0].min(), middle - least), max(inside[:, 0].max(), middle + least)
    extent = high - low or 0.1 * abs(high) or 1.0
    floor = max(low - extent / 2, np.nanmin([low, *inside[:, 1]])) - 0.08 * extent
    top = min(high + extent / 2, np.nanmax([high, *inside[:, 2]])) + 0.08 * extent
    return (max(0.0, floor) if low >= 0 else floor), top


def place_labels(axes: Axes, figure: Figure, points: Array, texts: Sequence[str], first: Flags) -> None:
    """Put each text beside its point where it covers least; a line connects it if it is further away.

    Args:
        points: (points, 2), in data coordinates.
        texts: of each; an empty one is not drawn.
        first: (points,), texts in bold, which are placed first.
    """
    from matplotlib.text import Text

    if layout := figure.get_layout_engine():
        layout.execute(figure)  # now the positions of the points are known
    unit = figure.dpi / 72  # from here on in points (1/72 inch), as offsets are
    at, frame = axes.transData.transform(points) / unit, np.array(axes.bbox.extents) / unit
    turns, radii = np.arange(16) * np.pi / 8, np.array([7.0, 14, 22, 32, 44, 58, 74, 92])
    ways, radii = np.tile(np.stack([np.cos(turns), np.sin(turns)], axis=1), (8, 1)), np.repeat(radii, 16)
    look: dict[str, Any] = {"ha": "center", "zorder": 6, "in_layout": False}
    look["arrowprops"] = {"arrowstyle": "-", "color": PALE, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 5}
    look["bbox"] = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5}
    drawn = [
        annotate(axes, text, point, (0, 0), fontweight="bold" if bold else "normal", gid=f"label {i}", **look)
        if text
        else None
        for i, (text, point, bold) in enumerate(zip(texts, points, first, strict=True))
    ]
    halves = np.array([Text.get_window_extent(text).size if text else (0, 0) for text in drawn]) / unit / 2
    nowhere = np.tile([np.inf, np.inf, -np.inf, -np.inf], (len(at), 1))
    boxes = np.concatenate([np.concatenate([at - 6, at + 6], axis=1), nowhere])  # points, texts: left, low, right, top
    order = [i for i in np.argsort(np.where(first, 0, 1), kind="stable") if texts[i]]
    for i in [*order, *order]:  # in the second pass, all others have a place
        reach = radii[-1] + 2 * halves[i]
        near = ((boxes[:, :2] < at[i] + reach) & (boxes[:, 2:] > at[i] - reach)).all(axis=1)
        near[[i, len(at) + i]] = False
        others = boxes[near]
        centres = at[i] + ways * (radii[:, None] + halves[i])
        low, high = centres - halves[i], centres + halves[i]
        outside = (np.maximum(frame[:2] - low, 0) + np.maximum(high - frame[2:], 0)).sum(axis=1)
        sides = np.minimum(high[:, None], others[:, 2:]) - np.maximum(low[:, None], others[:, :2])
        covered = np.maximum(sides, 0).prod(axis=2).sum(axis=1)
        line = at[i] + (np.clip(at[i], low, high) - at[i])[:, None] * np.linspace(0.2, 1, 7)[:, None]
        through = ((line[:, :, None] > others[:, :2]) & (line[:, :, None] < others[:, 2:])).all(axis=3)
        best = int((radii + 10 * outside + 2 * covered + 25 * through.any(axis=1).sum(axis=1)).argmin())
        drawn[i].set_position(tuple(centres[best] - at[i]))
        boxes[len(at) + i] = [*low[best], *high[best]]

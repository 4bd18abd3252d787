"""How the plots of runs are drawn: frame, axes, curves, marks and legend. Nothing here uses pyplot's global state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gptlab.report.curves import FEWEST_SMOOTHED, ceiling, finite_points, smooth, thin
from gptlab.report.reading import Array, human, number, series

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

# The colour-blind safe palette of Okabe and Ito (2008), without its yellow, which is lost on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")  # an eighth run has the first colour again, dashed
GREY, PALE, GRID = "#666666", "#8C8C8C", "#E4E4E4"
WIDTH, LIGHT = 1.8, 1.0  # points, of curves and of what stands behind them
SMALL = 8.5  # points, of the names in a figure
TICKS = (1, 2, 2.5, 5, 10)  # steps between ticks that people count in


@dataclass(frozen=True)
class Track:
    """One run as it is drawn: name and look, metrics, and where it diverged."""

    name: str
    color: str
    dash: str
    lines: list[dict[str, Any]]
    diverged_at: float | None
    warmup_steps: int

    @property
    def label(self) -> str:
        return plot_name(self.name)

    def series(self, key: str) -> tuple[Array, Array]:
        return series(self.lines, key)

    def has(self, key: str) -> bool:
        return bool(np.isfinite(self.series(key)[1]).any())


def plot_name(name: str) -> str:
    """A folder's name for matplotlib: $ starts no formula, and a leading underscore does not hide the label.

    A character that matplotlib's font does not have, such as of Chinese, is its escape: boxes would all look alike.
    """
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    name = "".join(c if font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in name).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def style_axes(axes: Axes, x_label: str, y_label: str, ticks: float = 10) -> Axes:
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.tick_params(labelsize=ticks)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def annotate(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any) -> Annotation:
    """Text beside a point; the offset is in points. Text outside of the axes is drawn too."""
    look: dict[str, Any] = {"va": "center", "fontsize": SMALL, "annotation_clip": False} | style
    return axes.annotate(text, at, xytext=offset, textcoords="offset points", **look)


def legend_below(figure: Figure, handles: Sequence[Artist], columns: int, note: str, size: float = SMALL) -> None:
    """A legend under the axes, which covers no curve; the note is its title."""
    look = {"frameon": False, "alignment": "left", "fontsize": size, "title_fontsize": SMALL}
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, title=note or None, **look)


def frame(tracks: Sequence[Track], subject: str, y_label: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.add_subplot()
    names, more = tracks[0].name, len(tracks) - 1
    for track in tracks[1:]:
        if len(subject) + len(names) + len(track.name) > 86:
            break
        names, more = f"{names}, {track.name}", more - 1
    if len(names) > 56:
        names = f"{names[:27]}…{names[-27:]}"
    names += f" and {more} more" if more else ""
    axes.set_title(plot_name(f"{subject}: {names}"), loc="left", fontsize=11, fontweight="bold", pad=10)
    return figure, style_axes(axes, "step", y_label)


def _tokens_per_step(tracks: Sequence[Track]) -> float | None:
    """Tokens per step if all runs have the same number and it never changes, as a token axis needs; else None."""
    ratios = []
    for track in tracks:
        steps, tokens = finite_points(*track.series("tokens"))
        after_start = steps > 0
        if not after_start.any():
            return None
        ratios.append(tokens[after_start] / steps[after_start])
    every = np.concatenate(ratios)
    agree = every.min() > 0 and every.max() < 1.01 * every.min()
    return float(np.median(every)) if agree else None


def finish(figure: Figure, axes: Axes, tracks: Sequence[Track], note: str = "") -> Figure:
    """What all plots share: the axes of steps and tokens, marks where runs diverged, and a legend below."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    steps = [number(line["step"]) for track in tracks for line in track.lines]
    steps += [track.diverged_at for track in tracks if track.diverged_at is not None]
    right = max((step for step in steps if np.isfinite(step)), default=0.0) or 1.0
    axes.set_xlim(-0.01 * right, 1.01 * right)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=TICKS, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    if per_step := _tokens_per_step(tracks):
        _token_axis(axes, per_step)
    for track in tracks:
        if track.diverged_at is not None and np.isfinite(track.diverged_at):
            whose = f"{track.label} " if len(tracks) > 1 else ""
            color, label = track.color if whose else "black", f"{whose}diverged at step {track.diverged_at:,.0f}"
            axes.axvline(track.diverged_at, color=color, ls=(0, (1, 1.5)), lw=WIDTH, gid="diverged", label=label)
    handles, labels = axes.get_legend_handles_labels()
    widest = max((len(label) for label in labels), default=1)
    columns = max(1, min(4, len(labels), 125 // (widest + 8)))
    figure.set_size_inches(9, 4.9 + 0.18 * -(-len(labels) // columns))  # a long legend takes no room from the curves
    if handles:
        legend_below(figure, handles, columns, note, 9)
    return figure


def _token_axis(axes: Axes, per_step: float) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    to_tokens, to_steps = (lambda step: np.multiply(step, per_step)), (lambda tokens: np.divide(tokens, per_step))
    above = axes.secondary_xaxis("top", functions=(to_tokens, to_steps))
    above.xaxis.set_major_locator(MaxNLocator(8, steps=TICKS))
    above.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: human(tokens)))
    above.set_xlabel("tokens", color=GREY, fontsize=9)
    above.tick_params(colors=GREY, labelsize=9)
    above.spines["top"].set_color("#BBBBBB")


def limit_y(
    axes: Axes, curves: Iterable[tuple[Array, Array]], colors: Iterable[str], bottom: float | None = None
) -> None:
    """Set the y limits, and mark points above them, and values that are not finite, on the upper edge."""
    curves = list(curves)
    finite = [finite_points(*curve)[1] for curve in curves]
    finite = [values for values in finite if len(values)]
    high = max(ceiling(values) for values in finite)
    low = min(float(values.min()) for values in finite) if bottom is None else bottom
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = (low - 2.5 * room if bottom is None else bottom), high + room
    axes.set_ylim(low, high)
    highest = max(float(values.max()) for values in finite)
    labels = {"^": f"above the scale (up to {highest:.4g})", "x": "not finite"}
    for (steps, values), color in zip(curves, colors, strict=False):
        for marker, gid, outside in (("^", "above", values > high), ("x", "not finite", ~np.isfinite(values))):
            outside &= ~np.isposinf(values) if marker == "^" else True
            if outside.any():
                where = steps[outside]
                bins = np.floor(where / (steps[-1] or 1) * 80)  # at most 80 marks
                where = where[np.unique(bins, return_index=True)[1]]
                look: dict[str, Any] = {"color": color, "markersize": 6, "clip_on": False, "zorder": 5, "gid": gid}
                axes.plot(where, np.full(len(where), high), marker, label=labels.pop(marker, None), **look)


def draw_line(
    axes: Axes, steps: Array, values: Array, color: str, dash: str = "-", width: float = WIDTH, **more: Any
) -> None:
    """A line, with a marker on each point if there are few."""
    marker = "o" if len(values) <= 40 else None
    steps, values = thin(*finite_points(steps, values))
    axes.plot(steps, values, color=color, linestyle=dash, linewidth=width, marker=marker, markersize=3.5, **more)


def draw_noisy(axes: Axes, track: Track, steps: Array, values: Array, raw_label: str, label: str, color: str) -> None:
    """A light line as logged under a bold smoothed line; a single line if there are too few points to smooth.

    `{steps}` in the label is replaced by the width of the window. An empty label keeps the line out of the legend.
    """
    steps, values = finite_points(steps, values)
    if len(values) < FEWEST_SMOOTHED:
        draw_line(axes, steps, values, color, track.dash, gid="raw", label=raw_label or label)
        return
    mean_steps, means, window = smooth(steps, values)
    width = window * float(np.median(np.diff(steps)))
    axes.plot(*thin(steps, values), color=color, linewidth=LIGHT, alpha=0.35, gid="raw", label=raw_label or None)
    label = label.replace("{steps}", f"{width:,.0f}")
    axes.plot(mean_steps, means, color=color, ls=track.dash, lw=WIDTH, gid="smooth", label=label)


def mark_best_and_last(axes: Axes, track: Track, key: str, color: str, say: bool) -> str:
    """Put a ring on the lowest value and, if `say`, both numbers beside the curve; return them as a phrase."""
    logged = track.series(key)
    steps, values = finite_points(*logged)
    best, last = int(values.argmin()), len(values) - 1
    last_word = "last" if np.isfinite(logged[1][-1]) else "last finite"
    ring: dict[str, Any] = {"mfc": "none", "mec": color, "mew": 1.6, "clip_on": False, "zorder": 6}
    axes.plot(steps[best], values[best], "o", markersize=9, gid="best", **ring)
    best_says = f"best {values[best]:.4f} at step {steps[best]:,.0f}"
    if best == last:
        best_says = f"{last_word} and {best_says}"
    if say:
        # Nothing of this curve is below its lowest point, so the text there covers none of it.
        side = "right" if steps[best] > 0.5 * (steps[-1] or 1) else "left"
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.0}
        look: dict[str, Any] = {"ha": side, "va": "top", "fontweight": "bold", "zorder": 7, "bbox": box}
        at = (steps[best], values[best])
        annotate(axes, best_says, at, (0, -9), color=color, fontsize=9.5, gid="best", **look)
        if best != last:
            text, at = f"{last_word}\n{values[last]:.4f}", (steps[last], values[last])
            annotate(axes, text, at, (9, 0), ha="left", color=color, fontsize=9.5, gid="last")
    return best_says if best == last else f"{best_says}, {last_word} {values[last]:.4f}"

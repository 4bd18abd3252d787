"""The plots of one run, or of several over each other, from their metrics.jsonl.

`figures` builds matplotlib figures and `draw` saves them; a plot that no run has data for is left out. Figures are
made without pyplot, so there is no global state and no display is needed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptlab.errors import RunError
from gptlab.report.reading import Array, human, number, series, short_names
from gptlab.rundir import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colour-blind safe palette of Okabe and Ito (2008), without its yellow, which is lost on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")  # an eighth run has the first colour again, dashed
GREY = "#666666"

# HellaSwag validation accuracy: four endings a row, and the released GPT-2 124M weights.
HELLASWAG_RANDOM = 0.25
HELLASWAG_GPT2 = {"hellaswag_acc_norm": 0.2955, "hellaswag_acc": 0.2859}
HARNESS_GPT2 = {"hellaswag_harness_acc_norm": 0.3114, "hellaswag_harness_acc": 0.2892}  # lm-eval's definition

MOST_POINTS = 2000  # a figure is about a thousand pixels wide: more points cost time and show nothing
SMOOTHED = 0.04  # share of a run's points under one window of the smoothed curve
TICKS = (1, 2, 2.5, 5, 10)  # steps between ticks that people count in
FEWEST_SMOOTHED = 20  # below this a smoothed curve says no more than the points


@dataclass(frozen=True)
class Track:
    """One run as it is drawn: its name and look, what it measured, and how it went."""

    name: str
    color: str
    dash: str
    lines: list[dict[str, Any]]
    diverged_at: float | None
    warmup_steps: int

    @property
    def label(self) -> str:
        return _plain(self.name)

    def series(self, key: str) -> tuple[Array, Array]:
        return series(self.lines, key)

    def has(self, key: str) -> bool:
        return bool(np.isfinite(self.series(key)[1]).any())


def draw(runs: Sequence[RunDir], out: Path) -> list[Path]:
    """Draw every plot that the runs have data for, over each other where there are several.

    Args:
        runs: run directories; one without a single metrics line is passed over.
        out: folder of the PNG files, made where there is something to write.

    Returns:
        The files written, in the order of `PLOTS`.
    """
    written = []
    for name, figure in figures(runs).items():
        out.mkdir(parents=True, exist_ok=True)
        file = out / f"{name}.png"
        figure.savefig(file, dpi=120)
        written.append(file)
    return written


def figures(runs: Sequence[RunDir]) -> dict[str, Figure]:
    """The figures that `draw` saves, by the name of their file."""
    tracks = read_tracks(runs)
    built = {name: build(tracks) for name, build in PLOTS.items()}
    return {name: figure for name, figure in built.items() if figure is not None}


def read_tracks(runs: Sequence[RunDir]) -> list[Track]:
    """The runs that have metrics, each once, with a name and a look of its own."""
    found = {run.path.resolve(): (run, run.read_metrics()) for run in runs}
    drawn = [(run, lines) for run, lines in found.values() if lines]
    names = short_names([run.path for run, _ in drawn])
    looks = itertools.cycle((color, dash) for dash in DASHES for color in PALETTE)
    tracks = []
    for (run, lines), name, (color, dash) in zip(drawn, names, looks, strict=False):
        result: dict[str, Any] = {}
        warmup_steps = 0
        with contextlib.suppress(RunError):  # the curves stand without them
            result = run.read_json("result.json")
        with contextlib.suppress(RunError, FileNotFoundError):
            warmup_steps = run.read_recipe().schedule.warmup_steps
        diverged_at = None
        if result.get("status") == "diverged":
            diverged_at = number(result.get("failed_at_step", max(number(line["step"]) for line in lines)))
        tracks.append(Track(name, color, dash, lines, diverged_at, warmup_steps))
    return tracks


def _plain(name: str) -> str:
    """A folder's name as matplotlib takes it: $ is no formula, and a leading underscore does not hide the label."""
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


# -- from many points to a readable curve ---------------------------------------------------------------------------


def thin(steps: Array, values: Array, most: int = MOST_POINTS) -> tuple[Array, Array]:
    """At most about `most` of the points: the lowest and the highest of each stretch, so that every spike stays.

    Args:
        steps, values: (points,), finite.
    """
    if len(values) <= most:
        return steps, values
    edges = np.linspace(0, len(values), most // 2 + 1).astype(int)
    kept = {0, len(values) - 1}
    for start, stop in itertools.pairwise(edges):
        kept.add(start + int(values[start:stop].argmin()))
        kept.add(start + int(values[start:stop].argmax()))
    index = sorted(kept)
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
    """The top of the part of a curve that is worth the paper: its maximum, or less where a few points tower over it.

    That is usually the loss of the first steps. The end of the run stays in view, as that is where it diverges, up
    to the value it began with or three times the usual height.

    Args:
        values: (points,), finite, at least one.
    """
    low, top = values.min(), values.max()
    if len(values) < 5:
        return float(top)
    usual = np.quantile(values, 0.98, method="lower")
    end = values[-max(1, len(values) // 20) :].max()
    usual = max(usual, min(end, max(values[0], low + 3 * (usual - low))))
    return float(usual if top - low > 1.5 * (usual - low) else top)


# -- the parts of a plot --------------------------------------------------------------------------------------------


def _finite(steps: Array, values: Array) -> tuple[Array, Array]:
    kept = np.isfinite(values)
    return steps[kept], values[kept]


def _frame(tracks: Sequence[Track], subject: str, y_label: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.add_subplot()
    names, more = tracks[0].name, len(tracks) - 1
    for track in tracks[1:]:
        if len(names) + len(track.name) > 42:
            break
        names, more = f"{names}, {track.name}", more - 1
    if len(names) > 56:
        names = f"{names[:27]}…{names[-27:]}"
    names += f" and {more} more" if more else ""
    axes.set_title(_plain(f"{subject}: {names}"), loc="left", fontsize=11, fontweight="bold", pad=10)
    axes.set_xlabel("step")
    axes.set_ylabel(y_label)
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _tokens_per_step(tracks: Sequence[Track]) -> float | None:
    """Tokens of one step, where all the runs agree on it and it never changes; a token axis needs that."""
    ratios = []
    for track in tracks:
        steps, tokens = _finite(*track.series("tokens"))
        after_start = steps > 0
        if not after_start.any():
            return None
        ratios.append(tokens[after_start] / steps[after_start])
    every = np.concatenate(ratios)
    agree = every.min() > 0 and every.max() < 1.01 * every.min()
    return float(np.median(every)) if agree else None


def _finish(figure: Figure, axes: Axes, tracks: Sequence[Track], note: str = "") -> Figure:
    """What all plots share: the two x axes, where runs diverged, and a legend below that covers no curve."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    steps = [number(line["step"]) for track in tracks for line in track.lines]
    steps += [track.diverged_at for track in tracks if track.diverged_at is not None]
    right = max((step for step in steps if np.isfinite(step)), default=0.0) or 1.0
    axes.set_xlim(-0.01 * right, 1.01 * right)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=TICKS, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))

    per_step = _tokens_per_step(tracks)
    if per_step:
        scale: float = per_step
        to_tokens, to_steps = (lambda step: np.multiply(step, scale)), (lambda tokens: np.divide(tokens, scale))
        above = axes.secondary_xaxis("top", functions=(to_tokens, to_steps))
        above.xaxis.set_major_locator(MaxNLocator(8, steps=TICKS))
        above.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: human(tokens)))
        above.set_xlabel("tokens", color=GREY, fontsize=9)
        above.tick_params(colors=GREY, labelsize=9)
        above.spines["top"].set_color("#BBBBBB")

    for track in tracks:
        if track.diverged_at is not None and np.isfinite(track.diverged_at):
            whose = f"{track.label} " if len(tracks) > 1 else ""
            axes.axvline(
                track.diverged_at,
                color=track.color if len(tracks) > 1 else "black",
                linestyle=(0, (1, 1.5)),
                linewidth=2,
                gid="diverged",
                label=f"{whose}diverged at step {track.diverged_at:,.0f}",
            )

    handles, labels = axes.get_legend_handles_labels()
    widest = max((len(label) for label in labels), default=1)
    columns = max(1, min(4, len(labels), 125 // (widest + 8)))
    figure.set_size_inches(9, 4.9 + 0.18 * -(-len(labels) // columns))  # a long legend takes nothing from the curves
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower left",
            ncols=columns,
            frameon=False,
            fontsize=9,
            title=note or None,
            title_fontsize=8.5,
            alignment="left",
        )
    return figure


def _limit(
    axes: Axes, curves: Iterable[tuple[Array, Array]], colors: Iterable[str], bottom: float | None = None
) -> None:
    """Set the y limits, and mark on the upper edge what they leave out: higher points, and values not finite."""
    curves = list(curves)
    finite = [_finite(*curve)[1] for curve in curves]
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
                bins = np.floor(where / (steps[-1] or 1) * 80)  # one mark where there would be a row of them
                where = where[np.unique(bins, return_index=True)[1]]
                axes.plot(
                    where,
                    np.full(len(where), high),
                    marker,
                    color=color,
                    markersize=6,
                    clip_on=False,
                    zorder=5,
                    gid=gid,
                    label=labels.pop(marker, None),
                )


def _curve(
    axes: Axes, steps: Array, values: Array, color: str, dash: str = "-", width: float = 1.8, **more: Any
) -> None:
    """A line through few points, with a marker on each while they can be told apart."""
    marker = "o" if len(values) <= 40 else None
    steps, values = thin(*_finite(steps, values))
    axes.plot(steps, values, color=color, linestyle=dash, linewidth=width, marker=marker, markersize=3.5, **more)


def _noisy_curve(axes: Axes, track: Track, steps: Array, values: Array, raw_label: str, label: str, color: str) -> None:
    """A light line as logged under a bold smoothed one; one plain line where there are too few points for that.

    `{steps}` in the label stands for the width of the window. An empty label keeps the line out of the legend.
    """
    steps, values = _finite(steps, values)
    if len(values) < FEWEST_SMOOTHED:
        _curve(axes, steps, values, color, track.dash, gid="raw", label=raw_label or label)
        return
    mean_steps, means, window = smooth(steps, values)
    width = window * float(np.median(np.diff(steps)))
    axes.plot(*thin(steps, values), color=color, linewidth=0.8, alpha=0.3, gid="raw", label=raw_label or None)
    axes.plot(
        mean_steps,
        means,
        color=color,
        linestyle=track.dash,
        linewidth=2,
        gid="smooth",
        label=label.replace("{steps}", f"{width:,.0f}"),
    )


SMOOTHING = f"weighted mean (Hann window) over {SMOOTHED:.0%} of a run's points"


# -- the plots ------------------------------------------------------------------------------------------------------


def training_loss(tracks: Sequence[Track]) -> Figure | None:
    tracks = [track for track in tracks if track.has("loss")]
    if not tracks:
        return None
    figure, axes = _frame(tracks, "Training loss", "training loss (nats per token)")
    alone = len(tracks) == 1
    for track in tracks:
        raw, label = ("as logged", "smoothed over {steps} steps (Hann window)") if alone else ("", track.label)
        _noisy_curve(axes, track, *track.series("loss"), raw, label, track.color)
    _limit(axes, [track.series("loss") for track in tracks], [track.color for track in tracks])
    return _finish(figure, axes, tracks, "" if alone else f"bold: {SMOOTHING}; light: as logged")


def _mark_best_and_last(axes: Axes, track: Track, key: str, color: str, say: bool) -> str:
    """Put a ring on the lowest value and, where `say`, both numbers beside the curve; returns them as a sentence."""
    logged = track.series(key)
    steps, values = _finite(*logged)
    best, last = int(values.argmin()), len(values) - 1
    last_word = "last" if np.isfinite(logged[1][-1]) else "last finite"
    axes.plot(
        steps[best],
        values[best],
        "o",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor=color,
        markeredgewidth=1.6,
        gid="best",
        clip_on=False,
        zorder=6,
    )
    best_says = f"best {values[best]:.4f} at step {steps[best]:,.0f}"
    if best == last:
        best_says = f"{last_word} and {best_says}"
    if say:
        # Nothing of this curve lies below its lowest point, so the text covers none of it.
        side = "right" if steps[best] > 0.5 * (steps[-1] or 1) else "left"
        axes.annotate(
            best_says,
            (steps[best], values[best]),
            xytext=(0, -9),
            textcoords="offset points",
            ha=side,
            va="top",
            color=color,
            fontsize=9.5,
            fontweight="bold",
            gid="best",
            annotation_clip=False,
            zorder=7,
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.0},
        )
        if best != last:
            axes.annotate(
                f"{last_word}\n{values[last]:.4f}",
                (steps[last], values[last]),
                xytext=(9, 0),
                textcoords="offset points",
                ha="left",
                va="center",
                color=color,
                fontsize=9.5,
                gid="last",
                annotation_clip=False,
            )
    return best_says if best == last else f"{best_says}, {last_word} {values[last]:.4f}"


def validation_loss(tracks: Sequence[Track]) -> Figure | None:
    tracks = [track for track in tracks if track.has("val_loss")]
    if not tracks:
        return None
    figure, axes = _frame(tracks, "Validation loss", "validation loss (nats per token)")
    alone = len(tracks) == 1
    for track in tracks:
        says = _mark_best_and_last(axes, track, "val_loss", track.color, say=alone)
        label = "validation loss" if alone else f"{track.label}: {says}"
        _curve(axes, *track.series("val_loss"), track.color, track.dash, gid="val", label=label)
    _limit(axes, [track.series("val_loss") for track in tracks], [track.color for track in tracks])
    return _finish(figure, axes, tracks)


def train_val_loss(tracks: Sequence[Track]) -> Figure | None:
    tracks = [track for track in tracks if track.has("loss") and track.has("val_loss")]
    if not tracks:
        return None
    figure, axes = _frame(tracks, "Training and validation loss", "loss (nats per token)")
    alone = len(tracks) == 1
    curves, colors = [], []
    for track in tracks:
        val_color = PALETTE[1] if alone else track.color
        if alone:
            _noisy_curve(
                axes,
                track,
                *track.series("loss"),
                "training loss",
                "training loss, smoothed over {steps} steps (Hann window)",
                track.color,
            )
        else:  # raw curves of several runs under the markers of several others are a thicket
            steps, values = _finite(*track.series("loss"))
            if len(values) >= FEWEST_SMOOTHED:
                steps, values, _ = smooth(steps, values)
            axes.plot(steps, values, color=track.color, linewidth=1, alpha=0.6, linestyle=track.dash, gid="smooth")
        says = _mark_best_and_last(axes, track, "val_loss", val_color, say=alone)
        label = "validation loss" if alone else f"{track.label}: {says}"
        _curve(axes, *track.series("val_loss"), val_color, track.dash, gid="val", label=label)
        if alone and track.has("train_eval_loss"):
            same = "training split, measured like validation"
            _curve(axes, *track.series("train_eval_loss"), PALETTE[2], "--", 1.4, gid="train_eval", label=same)
        for key, color in (("loss", track.color), ("val_loss", val_color)):
            curves.append(track.series(key))
            colors.append(color)
    _limit(axes, curves, colors)
    note = f"bold, ring at the best: validation; thin: training, {SMOOTHING}"
    return _finish(figure, axes, tracks, "" if alone else note)


def learning_rate(tracks: Sequence[Track]) -> Figure | None:
    from matplotlib.ticker import FuncFormatter

    tracks = [track for track in tracks if track.has("lr")]
    if not tracks:
        return None
    figure, axes = _frame(tracks, "Learning rate", "learning rate")
    alone = len(tracks) == 1
    curves = [_finite(*track.series("lr")) for track in tracks]
    warmup = max(track.warmup_steps for track in tracks)
    end = max(steps[-1] for steps, _ in curves)
    peak = max(values.max() for _, values in curves)
    if alone and warmup:
        axes.axvspan(0, min(warmup, end), color="#EEEEEE", gid="warmup", label=f"warm-up, {warmup:,} steps", zorder=0)
    panels = [axes]
    if 0 < warmup < 0.04 * end and any((steps <= warmup).sum() > 1 for steps, _ in curves):
        # Too narrow to see: the first steps again, larger, where the curve leaves room.
        late = np.mean([values[steps > end / 2].mean() for steps, values in curves if steps[-1] > end / 2])
        corner = (0.58, 0.54) if late < 0.6 * peak else (0.3, 0.12)
        closer = axes.inset_axes((*corner, 0.38, 0.36))
        closer.set_xlim(0, 2 * warmup)
        closer.set_ylim(0, 1.08 * peak)
        closer.set_title("the first steps", fontsize=8.5)
        closer.tick_params(labelsize=8)
        closer.grid(color="#E4E4E4", linewidth=0.8)
        closer.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels.append(closer)
    for panel in panels:
        for index, (track, (steps, values)) in enumerate(zip(tracks, curves, strict=True)):
            # Runs often share their schedule: the earlier ones are wider, so that they show beneath.
            width = 2 + 1.4 * min(len(tracks) - 1 - index, 6)
            label = "learning rate" if alone else track.label
            _curve(panel, steps, values, track.color, track.dash, width, gid="lr", label=label)
    axes.set_ylim(0, 1.08 * peak or 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return _finish(figure, axes, tracks)


def throughput(tracks: Sequence[Track]) -> Figure | None:
    """Tokens a second, or samples where a task counts those, with a median that leaves the first interval out."""
    from matplotlib.ticker import FuncFormatter

    unit = "tokens" if any(track.has("tokens_per_second") for track in tracks) else "samples"
    key = f"{unit}_per_second"
    tracks = [track for track in tracks if track.has(key)]
    if not tracks:
        return None
    figure, axes = _frame(tracks, "Throughput", f"{unit} per second")
    alone = len(tracks) == 1
    for track in tracks:
        steps, values = _finite(*track.series(key))
        median_says = ""
        if len(values) > 1:  # the first interval has compilation and cold caches in it
            median = float(np.median(values[1:]))
            mfu = _finite(*track.series("mfu"))[1][1:]
            share = f", MFU {np.median(mfu):.1%}" if len(mfu) else ""
            median_says = f"median {human(median)} {unit}/s{share}"
            axes.axhline(
                median,
                color="black" if alone else track.color,
                linestyle="--",
                linewidth=1.4,
                gid="median",
                zorder=4,
                label=f"{median_says}, first interval left out" if alone else f"{track.label}: {median_says}",
            )
        label = "as logged" if alone else None if median_says else track.label
        _curve(axes, steps, values, track.color, track.dash, 1.0, gid="raw", label=label, alpha=0.7 if alone else 0.4)
    _limit(axes, [_finite(*track.series(key)) for track in tracks], [track.color for track in tracks], bottom=0.0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))
    return _finish(figure, axes, tracks, "" if alone else "dashed: median, first interval left out")


def hellaswag_accuracy(tracks: Sequence[Track]) -> Figure | None:
    tokens = any(track.has(key) for track in tracks for key in HELLASWAG_GPT2)
    gpt2 = HELLASWAG_GPT2 if tokens else HARNESS_GPT2  # numbers of two definitions do not share an axis
    tracks = [track for track in tracks if any(track.has(key) for key in gpt2)]
    if not tracks:
        return None
    figure, axes = _frame(tracks, "HellaSwag accuracy", "share of rows answered right")
    alone = len(tracks) == 1
    shown = [HELLASWAG_RANDOM, *gpt2.values()]
    for track in tracks:
        curves = {key: _finite(*track.series(key)) for key in gpt2 if track.has(key)}
        says = {key: f"last {key.removeprefix('hellaswag_')} {values[-1]:.4f}" for key, (_, values) in curves.items()}
        for index, (key, (steps, values)) in enumerate(curves.items()):
            shown += [values.min(), values.max()]
            norm = key.endswith("acc_norm")
            color = track.color if norm or not alone else PALETTE[1]
            label = says[key] if alone else None if index else f"{track.label}: {', '.join(says.values())}"
            _curve(
                axes,
                steps,
                values,
                color,
                track.dash if norm else ":",
                2.0 if norm else 1.2,
                gid=key.removeprefix("hellaswag_"),
                label=label,
            )
    marks = {"random": HELLASWAG_RANDOM}
    marks |= {f"GPT-2 124M {key.removeprefix('hellaswag_')}": value for key, value in gpt2.items()}
    for mark, value in marks.items():
        axes.axhline(value, color=GREY, linestyle=(0, (4, 3)), linewidth=1.1, gid="reference", zorder=1)
        axes.annotate(
            f"{mark}\n{value:.4g}",
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            fontsize=8.5,
            textcoords="offset points",
            va="center",
            color=GREY,
            gid="reference",
            annotation_clip=False,
        )
    room = 0.08 * (max(shown) - min(shown))
    axes.set_ylim(min(shown) - room, max(shown) + room)
    note = (
        f"bold: acc_norm, {'token-normalised' if tokens else 'as lm-eval has it'}: the ending with the lowest mean "
        f"loss per {'token' if tokens else 'character'} is the answer; thin, dotted: acc, the lowest summed loss"
    )
    return _finish(figure, axes, tracks, note)


PLOTS: dict[str, Callable[[Sequence[Track]], Figure | None]] = {
    "training_loss": training_loss,
    "validation_loss": validation_loss,
    "train-val_loss": train_val_loss,
    "learning_rate": learning_rate,
    "throughput": throughput,
    "hellaswag_accuracy": hellaswag_accuracy,
}

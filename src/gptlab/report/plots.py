"""The plots of one run, or of several runs over each other, from their metrics.jsonl.

`run_figures` builds matplotlib figures and `draw` saves them. A plot without data is left out. Figures are made without
pyplot, so there is no global state and no display is needed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptlab.errors import RunError
from gptlab.progress import Tell, tell_nobody
from gptlab.report.curves import FEWEST_SMOOTHED, SMOOTHING, finite_points, smooth
from gptlab.report.drawing import (
    DASHES,
    GREY,
    GRID,
    LIGHT,
    PALETTE,
    SMALL,
    WIDTH,
    Track,
    annotate,
    draw_line,
    draw_noisy,
    finish,
    frame,
    limit_y,
    mark_best_and_last,
)
from gptlab.report.reading import human, number, short_names
from gptlab.rundir import RunDir

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES_HEIGHT = 230.0  # points, at least, of a figure's axes

# HellaSwag validation accuracy: four endings a row, and the released GPT-2 124M weights.
HELLASWAG_RANDOM = 0.25
HELLASWAG_GPT2 = {"hellaswag_acc_norm": 0.2955, "hellaswag_acc": 0.2859}
HARNESS_GPT2 = {"hellaswag_harness_acc_norm": 0.3114, "hellaswag_harness_acc": 0.2892}  # lm-eval's definition


def draw(runs: Sequence[RunDir], out: Path, tell: Tell = tell_nobody) -> list[Path]:
    """Draw every plot that the runs have data for; several runs are drawn over each other.

    Args:
        runs: run directories; runs without metrics are left out.
        out: folder of the PNG files, created if it is needed.
        tell: called as the work goes on.

    Returns:
        The files written, in the order of `PLOTS`.
    """
    written = list[Path]()
    figures = run_figures(runs, tell)
    for name, figure in figures.items():
        tell("writing the plots", len(written), len(figures))
        out.mkdir(parents=True, exist_ok=True)
        file = out / f"{name}.png"
        figure.savefig(file, dpi=120)
        written.append(file)
    return written


def run_figures(runs: Sequence[RunDir], tell: Tell = tell_nobody) -> dict[str, Figure]:
    """The figures that `draw` saves, by the name of their file."""
    tracks = read_tracks(runs, tell)
    built = {}
    for i, (name, (build, needs)) in enumerate(PLOTS.items()):
        tell("drawing the plots", i, len(PLOTS))
        if shown := [track for track in tracks if any(all(map(track.has, keys.split())) for keys in needs)]:
            built[name] = build(shown)
    return built


def read_tracks(runs: Sequence[RunDir], tell: Tell = tell_nobody) -> list[Track]:
    """The runs that have metrics, each once, each with its own name and look."""
    found = {}
    for i, run in enumerate(runs):
        tell("reading the runs", i, len(runs))
        found[run.path.resolve()] = run, run.read_metrics()
    drawn = [(run, lines) for run, lines in found.values() if lines]
    names = short_names([run.path for run, _ in drawn])
    looks = itertools.cycle((color, dash) for dash in DASHES for color in PALETTE)
    tracks = []
    for (run, lines), name, (color, dash) in zip(drawn, names, looks, strict=False):
        result: dict[str, Any] = {}
        warmup_steps = 0
        with contextlib.suppress(RunError):  # the curves can be drawn without
            result = run.read_json("result.json")
        with contextlib.suppress(RunError, FileNotFoundError):
            warmup_steps = run.read_recipe().schedule.warmup_steps
        diverged_at = None
        if result.get("status") == "diverged":
            diverged_at = number(result.get("failed_at_step", max(number(line["step"]) for line in lines)))
        tracks.append(Track(name, color, dash, lines, diverged_at, warmup_steps))
    return tracks


# -- the plots ------------------------------------------------------------------------------------------------------


def _plot_training_loss(tracks: Sequence[Track]) -> Figure:
    figure, axes = frame(tracks, "Training loss", "training loss (nats per token)")
    alone = len(tracks) == 1
    for track in tracks:
        raw, label = ("as logged", "smoothed over {steps} steps (Hann window)") if alone else ("", track.label)
        draw_noisy(axes, track, *track.series("loss"), raw, label, track.color)
    limit_y(axes, [track.series("loss") for track in tracks], [track.color for track in tracks])
    return finish(figure, axes, tracks, "" if alone else f"bold: {SMOOTHING}; light: as logged")


def _plot_validation_loss(tracks: Sequence[Track]) -> Figure:
    figure, axes = frame(tracks, "Validation loss", "validation loss (nats per token)")
    alone = len(tracks) == 1
    for track in tracks:
        says = mark_best_and_last(axes, track, "val_loss", track.color, say=alone)
        label = "validation loss" if alone else f"{track.label}: {says}"
        draw_line(axes, *track.series("val_loss"), track.color, track.dash, gid="val", label=label)
    limit_y(axes, [track.series("val_loss") for track in tracks], [track.color for track in tracks])
    return finish(figure, axes, tracks)


def _plot_train_val_loss(tracks: Sequence[Track]) -> Figure:
    figure, axes = frame(tracks, "Training and validation loss", "loss (nats per token)")
    alone = len(tracks) == 1
    curves, colors = [], []
    for track in tracks:
        val_color = PALETTE[1] if alone else track.color
        if alone:
            label = "training loss, smoothed over {steps} steps (Hann window)"
            draw_noisy(axes, track, *track.series("loss"), "training loss", label, track.color)
        else:  # raw curves of several runs would hide each other
            steps, values = finite_points(*track.series("loss"))
            if len(values) >= FEWEST_SMOOTHED:
                steps, values, _ = smooth(steps, values)
            axes.plot(steps, values, color=track.color, linewidth=LIGHT, alpha=0.6, linestyle=track.dash, gid="smooth")
        says = mark_best_and_last(axes, track, "val_loss", val_color, say=False)  # words here would cover a curve
        label = f"{'validation loss' if alone else track.label}: {says}"
        draw_line(axes, *track.series("val_loss"), val_color, track.dash, gid="val", label=label)
        if alone and track.has("train_eval_loss"):
            same = "training split, measured like validation"
            draw_line(axes, *track.series("train_eval_loss"), PALETTE[2], "--", gid="train_eval", label=same)
        curves += [track.series("loss"), track.series("val_loss")]
        colors += [track.color, val_color]
    limit_y(axes, curves, colors)
    note = f"bold, ring at the best: validation; thin: training, {SMOOTHING}"
    return finish(figure, axes, tracks, "" if alone else note)


def _plot_learning_rate(tracks: Sequence[Track]) -> Figure:
    from matplotlib.ticker import FuncFormatter

    figure, axes = frame(tracks, "Learning rate", "learning rate")
    alone = len(tracks) == 1
    curves = [finite_points(*track.series("lr")) for track in tracks]
    warmup = max(track.warmup_steps for track in tracks)
    end = max(steps[-1] for steps, _ in curves)
    peak = max(values.max() for _, values in curves)
    if alone and warmup:
        axes.axvspan(0, min(warmup, end), color="#EEEEEE", gid="warmup", label=f"warm-up, {warmup:,} steps", zorder=0)
    panels = [axes]
    if 0 < warmup < 0.04 * end and any((steps <= warmup).sum() > 1 for steps, _ in curves):
        # The warm-up is too narrow to see: draw the first steps again, larger, where the curve leaves room.
        late = np.mean([values[steps > end / 2].mean() for steps, values in curves if steps[-1] > end / 2])
        corner = (0.58, 0.54) if late < 0.6 * peak else (0.3, 0.12)
        closer = axes.inset_axes((*corner, 0.38, 0.36))
        closer.set(xlim=(0, 2 * warmup), ylim=(0, 1.08 * peak))
        closer.set_title("the first steps", fontsize=SMALL)
        closer.tick_params(labelsize=8)
        closer.grid(color=GRID, linewidth=0.8)
        closer.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels.append(closer)
    alike: dict[bytes, list[Track]] = {}  # runs often share their schedule, and one line would hide the others
    for track, curve in zip(tracks, curves, strict=True):
        alike.setdefault(np.stack(curve).tobytes(), []).append(track)
    for panel in panels:
        for together in alike.values():
            first, more = together[0], len(together) - 1
            label = "learning rate" if alone else first.label + (f" and {more} more" if more else "")
            curve = finite_points(*first.series("lr"))
            draw_line(panel, *curve, first.color, first.dash, gid="lr", label=label)
    axes.set_ylim(0, 1.08 * peak or 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return finish(figure, axes, tracks)


def _plot_throughput(tracks: Sequence[Track]) -> Figure:
    """Tokens per second, or samples per second, and the median without the first interval."""
    from matplotlib.ticker import FuncFormatter

    unit = "tokens" if any(track.has("tokens_per_second") for track in tracks) else "samples"
    key = f"{unit}_per_second"
    tracks = [track for track in tracks if track.has(key)]
    figure, axes = frame(tracks, "Throughput", f"{unit} per second")
    alone = len(tracks) == 1
    for track in tracks:
        steps, values = finite_points(*track.series(key))
        median_says = ""
        if len(values) > 1:  # the first interval has compilation and cold caches in it
            median = float(np.median(values[1:]))
            mfu = finite_points(*track.series("mfu"))[1][1:]
            share = f", MFU {np.median(mfu):.1%}" if len(mfu) else ""
            median_says = f"median {human(median)} {unit}/s{share}"
            text = f"{median_says}, first interval left out" if alone else f"{track.label}: {median_says}"
            color = "black" if alone else track.color
            axes.axhline(median, color=color, ls="--", lw=WIDTH, gid="median", zorder=4, label=text)
        label = "as logged" if alone else None if median_says else track.label
        draw_line(axes, steps, values, track.color, track.dash, gid="raw", label=label, alpha=0.7 if alone else 0.4)
    axes.set_ylim(0, 1.08 * max(finite_points(*track.series(key))[1].max() for track in tracks) or 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))
    return finish(figure, axes, tracks, "" if alone else "dashed: median, first interval left out")


def _plot_hellaswag_accuracy(tracks: Sequence[Track]) -> Figure:
    tokens = any(track.has(key) for track in tracks for key in HELLASWAG_GPT2)
    gpt2 = HELLASWAG_GPT2 if tokens else HARNESS_GPT2  # scores of two definitions do not share an axis
    tracks = [track for track in tracks if any(track.has(key) for key in gpt2)]
    figure, axes = frame(tracks, "HellaSwag accuracy", "share of correct rows")
    alone = len(tracks) == 1
    shown = [HELLASWAG_RANDOM, *gpt2.values()]
    for track in tracks:
        curves = {key: finite_points(*track.series(key)) for key in gpt2 if track.has(key)}
        says = {key: f"last {key.removeprefix('hellaswag_')} {values[-1]:.4f}" for key, (_, values) in curves.items()}
        for index, (key, (steps, values)) in enumerate(curves.items()):
            shown += [values.min(), values.max()]
            norm = key.endswith("acc_norm")
            color = track.color if norm or not alone else PALETTE[1]
            label = says[key] if alone else None if index else f"{track.label}: {', '.join(says.values())}"
            look = (track.dash, WIDTH) if norm else (":", LIGHT)
            draw_line(axes, steps, values, color, *look, gid=key.removeprefix("hellaswag_"), label=label)
    marks = {"random": HELLASWAG_RANDOM}
    marks |= {f"GPT-2 124M {key.removeprefix('hellaswag_')}": value for key, value in gpt2.items()}
    room = 0.08 * (max(shown) - min(shown))
    low, high = min(shown) - room, max(shown) + room
    axes.set_ylim(low, high)
    free = 0.0  # points above the lowest mark at which the next words have room
    for mark, value in sorted(marks.items(), key=lambda one: one[1]):
        look_of: dict[str, Any] = {"color": GREY, "gid": "reference"}
        axes.axhline(value, ls=(0, (4, 3)), lw=LIGHT, zorder=1, **look_of)
        at = AXES_HEIGHT * (value - low) / (high - low)
        free = max(free, at)
        annotate(
            axes, f"{mark}\n{value:.4g}", (1, value), (5, free - at), xycoords=("axes fraction", "data"), **look_of
        )
        free += 3 * SMALL
    note = (
        f"bold: acc_norm, {'token-normalised' if tokens else 'as lm-eval has it'}: the ending with the lowest mean "
        f"loss per {'token' if tokens else 'character'} is the answer; thin, dotted: acc, the lowest summed loss"
    )
    return finish(figure, axes, tracks, note)


# File name to the function that draws a plot, and alternatives of the metrics that it needs of a run.
PLOTS: dict[str, tuple[Callable[[Sequence[Track]], Figure], Iterable[str]]] = {
    "training_loss": (_plot_training_loss, ("loss",)),
    "validation_loss": (_plot_validation_loss, ("val_loss",)),
    "train-val_loss": (_plot_train_val_loss, ("loss val_loss",)),
    "learning_rate": (_plot_learning_rate, ("lr",)),
    "throughput": (_plot_throughput, ("tokens_per_second", "samples_per_second")),
    "hellaswag_accuracy": (_plot_hellaswag_accuracy, (*HELLASWAG_GPT2, *HARNESS_GPT2)),
}

"""The figures of a study report: loss curves, what speed costs, paired differences, ranks in two studies.

`report_figures` builds them from the payload of `analysis`, and `draw_report` saves them. A figure without data is left
out. Nothing is shown by colour alone: a marker, a dash or a word says the same.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptlab.progress import Tell, tell_nobody
from gptlab.report.curves import FEWEST_SMOOTHED, SMOOTHING, ceiling, smooth
from gptlab.report.drawing import DASHES, GREY, PALE, PALETTE, SMALL, annotate, legend_below, style_axes
from gptlab.report.placing import Flags, limits_of, place_labels, spread_out, usual_reach
from gptlab.report.reading import Array, human, number
from gptlab.report.sweeps import short
from gptlab.report.words import interval, number_form, one_line, shown_verdict, stems, went_wrong

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Look = dict[str, Any]  # a style, as matplotlib takes it

BLUE, VERMILLION, GREEN = PALETTE[:3]
VERDICTS = {"better": (BLUE, "o", BLUE), "worse": (VERMILLION, "s", VERMILLION), "equivalent": (GREEN, "D", GREEN)}
POINTS: tuple[tuple[str, Look], ...] = (
    ("on the frontier: no other arm is as good in both and better in one", {"marker": "o", "color": BLUE, "ls": ""}),
    ("off the frontier", {"marker": "o", "color": GREY, "markerfacecolor": "white", "ls": ""}),
    ("runs diverged or none completed: not on the frontier", {"marker": "X", "color": "black", "ls": ""}),
)
UNDATED: dict[str, Look] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
LONGEST_NAME = 34  # characters; a longer name loses its middle
LINE = 0.17  # inches from one such name to the next
LEAST_SHARE = 0.05  # of a speed or a memory, to either side: what an allocator or a clock adds is less
MOST_NAMED = 50  # arms in a figure; of more, only some are named
ASKED, BEST, WORST = 10, 24, 15  # of those: arms that answers rest on, the best and the worst; and the baseline
ENLARGED = 0.4  # share of the steps, the last ones, that the loss curves show again, enlarged


def draw_report(
    payload: Mapping[str, Any], out: Path, formats: Sequence[str] = ("png",), tell: Tell = tell_nobody
) -> list[Path]:
    """Draw the figures of a report; the same payload gives the same bytes.

    Args:
        payload: what the report says.
        out: folder, made where it is missing.
        formats: of png, svg (whose text stays text) and pdf.
        tell: called before each figure.

    Returns:
        The files, `<study>-loss-curves.png` and so on.
    """
    import matplotlib as mpl

    out.mkdir(parents=True, exist_ok=True)
    written = []
    tell("drawing the figures", 0, 0)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gptlab"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of an arm's name, drawn as a box
        figures = report_figures(payload)
        for done, (name, figure) in enumerate(figures.items()):
            tell("drawing the figures", done, len(figures))
            for suffix in formats:
                written.append(out / f"{name}.{suffix}")
                figure.savefig(written[-1], dpi=120, metadata=UNDATED.get(suffix))
    return written


def report_figures(payload: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures that `draw_report` saves, by the name of their file."""
    built: dict[str, Figure | None] = {}
    for study, stem in zip(payload["studies"], stems(study["name"] for study in payload["studies"]), strict=True):
        built |= {f"{stem}-{name}": build(study) for name, build in FIGURES.items()}
    if payload["across"]:
        built["ranking"] = rank_slopes(payload["across"])
    return {name: figure for name, figure in built.items() if figure is not None}


# -- what the figures share -----------------------------------------------------------------------------------------


def short_labels(names: Iterable[str]) -> dict[str, str]:
    """Names for a figure: on one line, no two alike, and $ starts no formula."""
    full = {name: one_line(name) for name in names}
    for most in (LONGEST_NAME, 2 * LONGEST_NAME, 10**6):
        half = most // 2
        short = {name: t if len(t) <= most else f"{t[:half]}…{t[1 - half :]}" for name, t in full.items()}
        if len(set(short.values())) == len(full):
            break
    return {name: text.replace("$", r"\$") for name, text in short.items()}


def _figure(title: str, name: str, width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(f"{title}: {short_labels([name])[name]}", x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _legend_of(figure: Figure, entries: Mapping[str, Look], note: str = "") -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=label, **{"color": GREY, **look}) for label, look in entries.items()]
    legend_below(figure, handles, len(entries), note)


def named_arms(study: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The arms that a figure names, in the study's order: all, or of very many those that a reader looks for."""
    arms = study["arms"]
    if len(arms) <= MOST_NAMED:
        return list(arms)
    sign = 1 if study["metric"]["better"] == "lower" else -1
    ranked = sorted((arm for arm in arms if arm["quality"]), key=lambda arm: sign * arm["quality"]["mean"])
    asked = [name for of in (*study["recommendations"], *study["questions"]) for name in of["evidence"]]
    names = {study["baseline"], *list(dict.fromkeys(asked))[:ASKED]}
    names |= {arm["name"] for arm in (*ranked[:BEST], *ranked[BEST:][-WORST:])}
    return [arm for arm in arms if arm["name"] in names]


def _left_out(study: Mapping[str, Any], named: Sequence[Mapping[str, Any]], what: str) -> str:
    """That a figure does not name all arms, as a note; empty if it does."""
    if len(named) == len(study["arms"]):
        return ""
    return (
        f"{len(study['arms'])} arms: the baseline, the {BEST} best, the {WORST} worst and those that answers rest on "
        f"are {what}; all are in the CSV files"
    )


# -- loss curves ----------------------------------------------------------------------------------------------------


def loss_curves(study: Mapping[str, Any]) -> Figure | None:
    """Single runs thin, the mean of an arm's completed runs thick, and a mark where a run diverged.

    Validation losses, if some run has two after step 0; else smoothed training losses.
    """
    evaluated = any(sum(step > 0 and loss is not None for step, loss in run["val"]) > 1 for run in study["runs"])
    key, what = ("val", "validation loss") if evaluated else ("train", "training loss")
    unit, better = ", nats", "lower"
    if study["elsewhere"] and evaluated:
        what, unit, better = one_line(study["metric"]["label"]), "", study["metric"]["better"]
    runs = [(run, *_points_of(run[key], not evaluated and run["status"] != "diverged")) for run in study["runs"]]
    known = [(run["status"], values) for run, _, values in runs if len(values)]
    if not known:
        return None
    named = named_arms(study)
    names = {arm["name"] for arm in named}
    completed = [run for run in runs if run[0]["status"] == "completed" and len(run[1])]
    lasts: dict[str, list[float]] = {}
    for run, _, values in completed:
        lasts.setdefault(run["arm"], []).append(float(values[-1]))
    ends = {arm: float(np.mean(values)) for arm, values in lasts.items()}
    means = {run["arm"]: (steps, values) for run, steps, values in completed if len(lasts[run["arm"]]) == 1}
    means |= {arm: _points_of(of[key], not evaluated) for arm, of in study["means"].items() if of.get(key)}

    # The panels as (first step, lowest, highest loss): everything, then the end, without far-out arms.
    usual = [values for status, values in known if status != "diverged"] or [values for _, values in known]
    views = [(0.0, min(values.min() for values in usual), max(ceiling(values) for values in usual))]
    end = max(float(steps[-1]) for _, steps, _ in runs if len(steps))
    start = (1 - ENLARGED) * min([end, *(float(steps[-1]) for steps, _ in means.values() if len(steps))])
    if evaluated:  # two points make a line
        start = min([start, *(float(at[-2]) for at, _ in means.values() if len(at) > 1 and at[-1] == end)])
    away = {arm: abs(value - float(np.median([*ends.values()]))) for arm, value in ends.items()}
    reach = usual_reach(np.array([*away.values()]))
    late = [values[steps >= start] for run, steps, values in completed if away[run["arm"]] <= reach]
    if any(len(values) > 1 for values in late):
        views.append((start, np.concatenate(late).min(), np.concatenate(late).max()))

    ran = {run["arm"] for run, *_ in runs}
    arms = [arm for arm in named if arm["name"] in ran]
    styles = itertools.cycle({"color": color, "linestyle": dash} for dash in DASHES for color in PALETTE)
    looks = dict(zip([arm["name"] for arm in named], styles, strict=False))
    others = [run for run in runs if run[0]["arm"] not in names]
    runs, means = [run for run in runs if run[0]["arm"] in names], {arm: means[arm] for arm in means if arm in names}
    figure = _figure(f"{what[:1].upper()}{what[1:]} of all runs", study["name"], 9.5, max(4.6, 1.6 + LINE * len(arms)))
    panels = figure.subplots(1, len(views), squeeze=False)[0]
    for axes, (left, low, high) in zip(panels, views, strict=True):
        style_axes(axes, "step", f"{what}{unit} ({better} is better)" if axes is panels[0] else "", ticks=9)
        room, margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0, 0.01 * (end - left) or 1.0
        axes.set(xlim=(left - margin, end + margin), ylim=(low - room, high + room))
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        axes.locator_params(axis="x", nbins=5, integer=True)
        if others:
            _draw_others(axes, others)
        _draw_curves(axes, runs, means, looks, "" if axes is panels[0] else "late ")
    if len(views) > 1:
        text = f"the last {1 - start / end:.0%} of the steps, enlarged"
        panels[1].set_title(text, fontsize=9, color=GREY, loc="left")
    _name_ends(panels[-1], figure, arms, ends, looks)
    entries: dict[str, Look] = {"mean of an arm's completed runs": {"linewidth": 1.7}}
    entries |= {"one run": {"linewidth": 0.8, "alpha": 0.6}}
    if any(run["status"] == "diverged" for run, *_ in (*runs, *others)):
        entries["a run diverged here"] = {"marker": "X", "linestyle": "", "markersize": 7}
    notes = ["" if evaluated else f"curves: {SMOOTHING}; of diverged runs as logged", _left_out(study, named, "named")]
    _legend_of(figure, entries, "\n".join(filter(None, notes)))
    return figure


def _points_of(points: Sequence[Sequence[Any]], smoothed: bool) -> tuple[Array, Array]:
    """[[step, loss], ...] as (steps, losses), both (points,), without losses that were not finite."""
    pairs = np.array([[number(step), number(loss)] for step, loss in points], dtype=np.float64).reshape(-1, 2)
    steps, losses = pairs[np.isfinite(pairs).all(axis=1)].T
    return smooth(steps, losses)[:2] if smoothed and len(losses) >= FEWEST_SMOOTHED else (steps, losses)


def _draw_others(axes: Axes, runs: Sequence[tuple[Mapping[str, Any], Array, Array]]) -> None:
    """Runs of arms that are not named: grey, behind the others."""
    from matplotlib.collections import LineCollection

    curves = [np.stack([steps, values], axis=1) for _, steps, values in runs if len(values)]
    look: Look = {"colors": PALE, "linewidths": 0.5, "alpha": 0.3, "zorder": 1, "rasterized": True, "gid": "others"}
    axes.add_collection(LineCollection(curves, **look), autolim=False)
    marks = [place for run, steps, values in runs if (place := _diverged_at(axes, run, steps, values))]
    if marks:
        axes.plot(*np.transpose(marks), "X", color=PALE, markersize=5, clip_on=False, gid="others diverged")


def _diverged_at(axes: Axes, run: Mapping[str, Any], steps: Array, values: Array) -> tuple[float, float] | None:
    """Where a run diverged: as high as it was seen, or on the edge; None if it did not, or left of the axes."""
    ended = number(run["ended"]) if run["ended"] is not None else steps[-1] if len(steps) else 0.0
    if run["status"] != "diverged" or not ended >= axes.get_xlim()[0]:
        return None
    return ended, min([*values[steps <= ended][-1:], axes.get_ylim()[1]])


def _draw_curves(
    axes: Axes,
    runs: Sequence[tuple[Mapping[str, Any], Array, Array]],
    means: Mapping[str, tuple[Array, Array]],
    looks: Mapping[str, Look],
    view: str,
) -> None:
    for run, steps, values in runs:
        look, whose = looks[run["arm"]], one_line(f"{run['arm']} {run['seed']}")
        axes.plot(steps, values, linewidth=0.7, alpha=0.35, gid=f"{view}run {whose}", **look)
        if place := _diverged_at(axes, run, steps, values):
            mark: Look = {"color": look["color"], "markersize": 7, "mec": "white", "clip_on": False, "zorder": 5}
            axes.plot(*place, "X", gid=f"{view}diverged {whose}", **mark)
    for arm, (steps, values) in means.items():
        dots: Look = {"marker": "o" if len(values) < 3 else "", "markersize": 3}
        axes.plot(steps, values, linewidth=1.7, gid=f"{view}mean {one_line(arm)}", **dots, **looks[arm])


def _name_ends(
    axes: Axes, figure: Figure, arms: Sequence[Mapping[str, Any]], ends: Mapping[str, float], looks: Mapping[str, Look]
) -> None:
    """Name the curves at the right edge, in the order in which they end; arms without completed runs are on top."""
    labels, (low, high) = short_labels(arm["name"] for arm in arms), axes.get_ylim()
    shares = np.array([(ends.get(arm["name"], np.inf) - low) / (high - low) for arm in arms])
    places = spread_out(np.clip(shares, -0.1, 1.1), LINE / (figure.get_figheight() - 1.35), 0.0, 1.0)
    beside: Look = {"transform": axes.transAxes, "clip_on": False}
    for arm, share, place in zip(arms, shares, places, strict=True):
        look, wrong = looks[arm["name"]], went_wrong(arm)
        if np.isfinite(share):
            axes.plot([1, 1.05, 1.12], [np.clip(share, 0, 1), place, place], linewidth=1.2, **look, **beside)
        else:
            marker = "X" if arm["statuses"].get("diverged") else "_"
            axes.plot(1.09, place, marker, color=look["color"], markersize=6.5, **beside)
        text = labels[arm["name"]] + (f", {wrong}" if wrong else "")
        axes.text(1.14, place, text, va="center", fontsize=SMALL, gid=f"name {one_line(arm['name'])}", **beside)


# -- what speed costs -----------------------------------------------------------------------------------------------


def pareto(x: Array, y: Array) -> Flags:
    """Points that no other point beats: as good on both axes, better on one; higher is better. Shape (points,)."""
    as_good = (x[:, None] >= x) & (y[:, None] >= y)
    better = (x[:, None] > x) | (y[:, None] > y)
    return np.logical_not((as_good & better).any(axis=0))


def tradeoff(study: Mapping[str, Any], key: str) -> Figure | None:
    """Throughput against quality or memory_gb, with 95% intervals and the Pareto frontier of the point estimates."""
    quality, metric = key == "quality", study["metric"]
    label, better = (metric["label"], metric["better"]) if quality else ("peak memory, GB", "lower")
    arms = [arm for arm in study["arms"] if arm["throughput"] and arm[key]]
    if not arms:
        return None
    x = np.array([[number(arm["throughput"][end]) for end in ("value", "low", "high")] for arm in arms])
    y = np.array([[number(arm[key].get(end)) for end in ("mean", "low", "high")] for arm in arms])
    whole = np.array([bool(arm["quality"]) and not arm["statuses"].get("diverged") for arm in arms])
    frontier = whole.copy()
    frontier[whole] = pareto(x[whole, 0], y[whole, 0] * (-1 if better == "lower" else 1))

    figure = _figure(f"Throughput against {label.split(',')[0]}", study["name"], 9, 6)
    labels_of_axes = (f"{study['unit']} per second (higher is better)", f"{label} ({better} is better)")
    axes = style_axes(figure.subplots(), *labels_of_axes, ticks=9)
    left, right = limits_of(x, np.full(len(arms), True), LEAST_SHARE * np.median(x[:, 0]))
    least = 2 * (metric["margin"] or 0.0) if quality else LEAST_SHARE * np.median(y[:, 0])
    bottom, top = limits_of(y, frontier | (not quality), least)  # only of quality a point may be out of view
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.xaxis.set_major_formatter(lambda value, _: human(value) if right > 1.1 * left else f"{value:,.6g}")
    axes.ticklabel_format(axis="y", useOffset=False)
    if frontier.any():  # drawn on to the edges: being slower makes an arm no better
        speed, cost = np.stack([x[frontier, 0], y[frontier, 0]])[:, np.argsort(x[frontier, 0])]
        edge = top if better == "lower" else bottom
        stairs: Look = {"drawstyle": "steps-pre", "color": BLUE, "linewidth": 1.3, "alpha": 0.7, "zorder": 2}
        axes.plot([left, *speed, speed[-1]], [cost[0], *cost, edge], gid="frontier", **stairs)

    labels, texts, shown = short_labels(arm["name"] for arm in arms), [""] * len(arms), np.clip(y[:, 0], bottom, top)
    kinds = np.where(frontier, 0, np.where(whole, 1, 2))
    named = named_arms(study)
    told = frontier | np.isin([arm["name"] for arm in arms], [arm["name"] for arm in named])
    for kind in range(len(POINTS)):  # without names, in one go
        some = ~told & (kinds == kind)
        if some.any():
            axes.plot(x[some, 0], shown[some], markersize=4, alpha=0.6, zorder=3, gid="others", **POINTS[kind][1])
    for i in np.flatnonzero(told):
        arm = arms[i]
        look, name = POINTS[kinds[i]][1], one_line(arm["name"])
        bar: Look = {"color": look["color"], "linewidth": 0.9, "alpha": 0.4, "zorder": 1}
        axes.plot(x[i, 1:], [shown[i]] * 2, gid=f"x {name}", **bar)
        axes.plot([x[i, 0]] * 2, y[i, 1:], gid=f"y {name}", **bar)
        beyond, wrong = shown[i] != y[i, 0], "" if whole[i] else went_wrong(arm)
        look = look | ({"marker": "^" if y[i, 0] > top else "v"} if beyond else {})
        axes.plot(x[i, 0], shown[i], markersize=7, zorder=4, clip_on=False, gid=f"point {name}", **look)
        share = f"{arm['frontier']:.0%}" if quality and (arm["frontier"] or 0) >= 0.01 else ""
        parts = [labels[arm["name"]], share, f"({y[i, 0]:.4g})" if beyond else "", f"({wrong})" if wrong else ""]
        texts[i] = " ".join(filter(None, parts))
    notes = ["lines: 95% intervals"] if np.isfinite([x[:, 1], y[:, 1]]).any() else []
    if any("%" in text for text in texts):
        notes.append("%: share of simulated draws in which the arm is on the frontier")
    note = "\n".join(filter(None, ["; ".join(notes), _left_out(study, named, "named, and arms on the frontier")]))
    _legend_of(figure, dict(POINTS[kind] for kind in sorted(set(kinds))), note)
    place_labels(axes, figure, np.stack([x[:, 0], shown], axis=1), texts, frontier)
    return figure


# -- differences and ranks ------------------------------------------------------------------------------------------


def paired_differences(study: Mapping[str, Any]) -> Figure | None:
    """A forest plot: each arm's paired difference from the baseline with its interval, and its verdict."""
    metric, margin = study["metric"], study["metric"]["margin"] or 0.0
    values = {arm["name"]: arm["values"] for arm in study["arms"]}
    named = named_arms(study)
    arms = [arm for arm in named if arm["comparison"]]
    bars = np.array([[number(arm["comparison"][end]) for end in ("mean", "low", "high")] for arm in arms])
    bars = bars.reshape(-1, 3)  # also without arms
    bars[["diverges" in arm["comparison"]["verdict"] for arm in arms]] = np.nan  # survivors are no fair sample
    if not np.isfinite(bars[:, 0]).any():
        return None
    title = f"{'Paired differences' if study['paired'] else 'Differences'} in {metric['label'].split(',')[0]}"
    figure = _figure(title, study["name"], 9.5, 1.9 + 0.27 * len(arms))
    axes = _forest_axes(figure, study, arms, bars, margin)
    entries: dict[str, Look] = {"mean": {"marker": "o", "markerfacecolor": "white", "linestyle": ""}}
    entries |= {"95% interval": {"linewidth": 1.6}}
    entries |= {"each seed": {"marker": "|", "linestyle": ""}} if study["paired"] else {}
    if margin:
        axes.axvspan(-margin, margin, color=GREEN, alpha=0.15, linewidth=0, gid="margin", zorder=0)
        entries[f"margin: up to {margin:g} counts as no difference"] = {"color": GREEN, "alpha": 0.3, "linewidth": 8}

    told = [went_wrong(arm) for arm in arms]
    for i in np.flatnonzero(np.isfinite(bars[:, 0])):
        low, high = (arms[i]["comparison"][end] for end in ("low", "high"))
        told[i] = interval(bars[i, 0], low, high, number_form(study))
    column = 20 + 5.4 * max(map(len, told))  # points, of the verdicts beside the numbers
    for row, (arm, bar) in enumerate(zip(arms, bars, strict=True)):
        baseline = (
            {} if np.isnan(bar[0]) or not study["paired"] else values[arm["comparison"].get("b", study["baseline"])]
        )
        seeds = [value - baseline[seed] for seed, value in arm["values"].items() if seed in baseline]
        _forest_row(axes, row, arm, bar, seeds, told[row], column)
    _legend_of(figure, entries, _left_out(study, named, "shown"))
    return figure


def _forest_axes(
    figure: Figure, study: Mapping[str, Any], arms: Sequence[Mapping[str, Any]], bars: Array, margin: float
) -> Axes:
    reach = usual_reach(np.abs(bars[:, 0]), least=1.5 * margin) or 1.0
    near = np.clip([*bars[np.isfinite(bars)], -1.5 * margin, 1.5 * margin], -2.5 * reach, 2.5 * reach)
    room = 0.03 * float(np.ptp(near)) or reach
    left, right = float(near.min()) - room, float(near.max()) + room

    labels, metric = short_labels(arm["name"] for arm in study["arms"]), study["metric"]
    x_label = f"{metric['label']}: difference from {study.get('against') or labels[study['baseline']]}"
    x_label += ", paired by seed" if study["paired"] else ""
    axes = style_axes(figure.subplots(), x_label, "", ticks=9)
    axes.set(xlim=(left, right), ylim=(len(arms) - 0.4, -0.6))
    axes.set_yticks(range(len(arms)), [labels[arm["name"]] for arm in arms])
    axes.grid(visible=False, axis="y")
    axes.axvline(0, color="black", linewidth=1)
    ends = ("better", "worse") if metric["better"] == "lower" else ("worse", "better")
    axes.set_title(f"← {ends[0]}", loc="left", fontsize=9, color=GREY)
    axes.set_title(f"{ends[1]} →", loc="right", fontsize=9, color=GREY)
    return axes


def _forest_row(
    axes: Axes, row: int, arm: Mapping[str, Any], bar: Array, seeds: list[float], told: str, column: float
) -> None:
    """One arm of a forest plot: seeds, interval, mean, arrows where it leaves the axes, numbers and verdict."""
    (mean, low, high), (left, right) = bar, axes.get_xlim()
    name, verdict = one_line(arm["name"]), shown_verdict(arm)
    color, marker, fill = VERDICTS.get(verdict, ("black" if "diverges" in verdict else GREY, "o", "white"))
    axes.plot(seeds, [row] * len(seeds), "|", color=color, markersize=7, alpha=0.7, gid=f"seeds {name}")
    axes.plot([low, high], [row, row], color=color, linewidth=1.6, gid=f"interval {name}")
    axes.plot(mean, row, marker, color=color, markerfacecolor=fill, markersize=6.5, zorder=4, gid=f"mean {name}")
    for edge, arrow, beyond in ((left, "<", min(mean, low) < left), (right, ">", max(mean, high) > right)):
        if beyond:
            axes.plot(edge, row, arrow, color=color, markersize=6, clip_on=False, gid=f"beyond {name}")
    for kind, offset, text, weight in (("numbers", 10, told, "normal"), ("verdict", column, verdict, "bold")):
        beside: Look = {"xycoords": axes.get_yaxis_transform(), "color": color, "fontweight": weight}
        annotate(axes, text, (1, row), (offset, 0), gid=f"{kind} {name}", **beside)


# -- laws of a ladder -----------------------------------------------------------------------------------------------


def ladder_laws(study: Mapping[str, Any]) -> Figure | None:
    """Each arm's loss over compute with its law, and arms minus the baseline over size, beyond the largest that ran."""
    if not (laws := study.get("laws")) or not any(arm["points"] for arm in laws["arms"]):
        return None
    metric, colors = (
        laws["label"],
        {arm["arm"]: c for arm, c in zip(laws["arms"], itertools.cycle(PALETTE), strict=False)},
    )
    marks = {arm["arm"]: m for arm, m in zip(laws["arms"], itertools.cycle("osD^vP*"), strict=False)}
    figure = _figure(f"Laws of {metric.split(',')[0]}", study["name"], 11, 5.4)
    left, right = figure.subplots(1, 2)
    style_axes(left, "training FLOPs of the run", metric, ticks=9).set(xscale="log", yscale="log")
    style_axes(right, "parameters without embeddings", f"difference in {metric}", ticks=9).set(xscale="log")
    left.set_title("each run, and the law of the longest runs of each size", loc="left", fontsize=9, color=GREY)
    right.set_title("minus the baseline at the same size, by the laws", loc="left", fontsize=9, color=GREY)
    for arm in laws["arms"]:
        name, color, marker = one_line(arm["arm"]), colors[arm["arm"]], marks[arm["arm"]]
        for point in arm["points"]:
            if point["loss"] is None or point["compute"] is None:
                continue
            look: Look = {"color": color, "markersize": 6 if point["longest"] else 3.5, "ls": ""}
            look |= {"markerfacecolor": "white", "markeredgewidth": 1.4} if point["held_out"] else {}
            kind = "held out" if point["held_out"] else "point"
            left.plot(point["compute"], point["loss"], marker, gid=f"{kind} {name}", **look)
        if arm["curve"]:
            x, y, low, high = np.array(arm["curve"], dtype=np.float64).T
            left.plot(x, y, color=color, linewidth=1.3, gid=f"law {name}")
            left.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0, gid=f"band {name}")
    for axis in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        axis(lambda value, _: f"{value:.3g}")
    right.axhline(0, color="black", linewidth=1)
    for pair in laws["pairs"]:
        name, color = one_line(pair["a"]), colors[pair["a"]]
        if pair["curve"]:
            x, y, low, high = np.array(pair["curve"], dtype=np.float64).T
            right.plot(x, y, color=color, linewidth=1.3, gid=f"difference {name}")
            right.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0, gid=f"difference band {name}")
        for row in pair["at"]:
            right.plot([row["n"]] * 2, [row["low"], row["high"]], color=color, linewidth=1.6, gid=f"interval {name}")
            right.plot(row["n"], row["value"], marks[pair["a"]], color=color, gid=f"at {row['size']} {name}")
    held = f"hollow: {laws['held_out']}, held out; " if laws["held_out"] else ""
    entries: dict[str, Look] = {
        short: {"color": colors[name], "marker": marks[name], "linewidth": 1.3}
        for name, short in short_labels(colors).items()
    }
    _legend_of(figure, entries, f"{held}small: runs with fewer tokens; bands and bars: {laws['level']:.0%} intervals")
    return figure


def rank_slopes(across: Mapping[str, Any]) -> Figure | None:
    """A slope chart: each arm's rank in both studies, with the arms of a flip in bold."""
    rows = [row for row in across["ranks"] if any(rank is not None for rank in row["ranks"])]
    if not rows:
        return None
    ranks = np.array([[number(rank) for rank in row["ranks"]] for row in rows])
    last, labels = ranks.shape[1] - 1, short_labels(row["arm"] for row in rows)
    figure = _figure("Ranks of the arms, 1 is best", across["name"], 8, 1.8 + 0.24 * len(rows))
    axes = figure.subplots()
    axes.set_title(one_line(across["ranking"]["text"]).replace("$", r"\$"), fontsize=9, color=GREY, wrap=True)
    axes.set(xlim=(-0.03, last + 0.03), ylim=(max(len(rows), np.nanmax(ranks)) + 0.6, 0.4), yticks=[])
    axes.set_xticks(range(last + 1), [short_labels([name])[name] for name in across["studies"]])
    axes.spines[:].set_visible(False)
    flips: Look = {"color": VERMILLION, "linewidth": 2.4, "zorder": 3}
    rest: Look = {"color": PALE, "linewidth": 1.1}
    for row, places in zip(rows, ranks, strict=True):
        look = flips if row["flip"] else rest
        gid = f"ranks {one_line(row['arm'])}"
        axes.plot(range(last + 1), places, marker="o", markersize=5, clip_on=False, gid=gid, **look)
    for column, align, x in ((0, "right", -0.06), (last, "left", last + 0.06)):
        ranked = np.flatnonzero(np.isfinite(ranks[:, column]))
        for i, y in zip(ranked, spread_out(ranks[ranked, column], 0.75, 0.6, len(rows) + 0.4), strict=True):
            rank, name, flip = f"{ranks[i, column]:g}", labels[rows[i]["arm"]], rows[i]["flip"]
            look = {"color": VERMILLION, "fontweight": "bold"} if flip else {"color": "black"}
            text, gid = f"{rank}  {name}" if column else f"{name}  {rank}", f"{align} {one_line(rows[i]['arm'])}"
            axes.text(x, y, text, ha=align, va="center", fontsize=SMALL, gid=gid, **look)
    entries: dict[str, Look] = {"part of a flip": flips} if any(row["flip"] for row in rows) else {}
    _legend_of(figure, entries | {"not part of a flip": rest})
    return figure


# -- sweeps ---------------------------------------------------------------------------------------------------------


def sweep_curves(study: Mapping[str, Any]) -> Figure | None:
    """The metric over a swept setting: each run, the fitted curve, and the interval of the best value under it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    found = study.get("sweeps")
    if not found:
        return None
    sweeps, drifts, label = found["sweeps"], found["drifts"], study["metric"]["label"]
    panels: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for sweep in sweeps:
        of = next((drift["of"] for drift in drifts if sweep["name"] in drift["sweeps"]), "")
        panels.setdefault((sweep["setting"], of), []).append(sweep)
    figure = _figure(f"{label.split(',')[0].capitalize()} over a setting", study["name"], 5.0 * len(panels) + 1, 5.4)
    for axes, ((setting, of), group) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        style_axes(axes, setting, label, ticks=9)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(short_labels([of])[of], fontsize=9, color=GREY, loc="left")
        losses = np.array([y for sweep in group for point in sweep["points"] for y in point["losses"].values()])
        low, high = losses.min(), min(losses.max(), ceiling(losses))
        styles = itertools.cycle({"color": color, "linestyle": dash} for dash in DASHES for color in PALETTE)
        for row, (sweep, look) in enumerate(zip(group, styles, strict=False)):
            name, best = short_labels([sweep["name"]])[sweep["name"]] or setting, sweep["optimum"]
            points = np.array([(p["value"], y) for p in sweep["points"] for y in p["losses"].values()]).reshape(-1, 2)
            dots: Look = {"marker": "o", "ls": "", "markersize": 3.5, "alpha": 0.6, "color": look["color"]}
            axes.plot(*points.T, gid=f"runs {name}", **dots)
            axes.plot(*np.array(sweep["curve"]).reshape(-1, 2).T, label=name, gid=f"curve {name}", **look)
            if best:
                at = low - (0.04 + 0.035 * row) * (high - low)
                left, right = axes.get_xlim()
                if best["low"] is not None or best["open_above"]:
                    ends = (best["low"] or left, best["high"] if best["high"] is not None else right)
                    axes.plot(
                        ends,
                        [at, at],
                        linewidth=3,
                        alpha=0.6,
                        solid_capstyle="butt",
                        gid=f"interval {name}",
                        color=look["color"],
                    )
                axes.plot(best["value"], at, "|", color=look["color"], markersize=9, gid=f"best {name}")
        axes.set_ylim(low - (0.08 + 0.035 * len(group)) * (high - low), high + 0.05 * (high - low))
        axes.legend(fontsize=SMALL, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _legend_of(
        figure,
        {"each run": {"marker": "o", "ls": ""}, "fitted curve": {}, "90% interval of the best value": {"linewidth": 3}},
    )
    return figure


FIGURES: dict[str, Callable[[Mapping[str, Any]], Figure | None]] = {
    "loss-curves": loss_curves,
    "throughput-quality": partial(tradeoff, key="quality"),
    "throughput-memory": partial(tradeoff, key="memory_gb"),
    "differences": paired_differences,
    "laws": ladder_laws,
    "sweeps": sweep_curves,
}

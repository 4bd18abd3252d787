"""The laws of a study with a ladder: each arm's loss over size and compute, and arms compared at sizes that nobody ran.

N is the number of parameters without embeddings and head, D the training tokens, and C = D times the FLOPs per token of
the model (attention included). L(N) and L(C) are of the longest runs of each size, where D is in proportion to N;
L(N, D) is of all runs. The arms are compared by L(N): at the same size, with the same tokens per parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptlab.config import Ladder, parameters_of, size_of
from gptlab.report import laws, words
from gptlab.report.estimates import Plain, clean
from gptlab.report.laws import Axis, Law, NoLaw, Pair, Point
from gptlab.report.reading import duration, human, number
from gptlab.report.studies import ReadRun, ReadStudy

POINTS = 60  # of a curve
BEYOND = 10.0  # times the largest size, up to which a crossing is looked for where no size is named
MISSES = 0.05  # p of the lack-of-fit test from which the report says that the sizes miss the law
LAWS: tuple[Axis, ...] = ("n", "compute", "n,d")


def laws_of(read: ReadStudy) -> Plain | None:
    """What the ladder of a study says, as plain data; None without a ladder."""
    ladder, metric = read.study.ladder, read.study.metric
    if ladder is None:
        return None
    bases = list(dict.fromkeys(ladder.place(arm)[0] for arm in read.study.arms))
    baseline = ladder.place(read.study.baseline)[0]
    every = [(run, point) for run in read.runs.values() if (point := _point(run, ladder, metric.name)) is not None]
    longest = max(ladder.tokens_per_parameter)
    fits: dict[str, dict[Axis, Law | str]] = {base: _laws(base, every, ladder, metric.better) for base in bases}
    label = words.metric_label(metric.name, read.unit)
    arms = [_arm(base, every, fits[base], ladder) for base in bases]
    pairs = [
        _pair(base, baseline, fits[base]["n"], fits[baseline]["n"], ladder, label) for base in bases if base != baseline
    ]
    shared = [b for run in read.runs.values() if isinstance(b := run.environment.get("branch_of"), dict)]
    told: Plain = clean(
        {
            "label": label,
            "level": laws.LEVEL,
            "sizes": ladder.sizes,
            "held_out": ladder.held_out,
            "tokens_per_parameter": longest,
            "arms": arms,
            "pairs": pairs,
            "notes": _notes(ladder, shared, longest),
        }
    )
    return told


def _point(run: ReadRun, ladder: Ladder, metric: str) -> Point | None:
    """A run as a point of a law; None before it has a result."""
    if run.status not in ("completed", "diverged"):
        return None
    base, size, _ = ladder.place(run.arm)
    n = number(run.environment.get("non_embedding_parameters"))
    n = n if n > 0 else float(size_of(size).parameters)
    d = number(run.result.get("tokens"))
    flops = number(run.environment.get("flops_per_token"))
    return Point(base, n, d, run.seed, run.value(metric), flops * d, run.arm.rpartition("@")[2])


def _laws(base: str, every: Sequence[tuple[ReadRun, Point]], ladder: Ladder, better: str) -> dict[Axis, Law | str]:
    """The laws of an arm, or why there is none."""
    if better != "lower":
        return dict.fromkeys(LAWS, "laws are of a loss, and of this study's metric more is better")
    share = 1 / len(ladder.tokens_per_parameter) if ladder.branch else 1.0
    found: dict[Axis, Law | str] = {}
    for axis in LAWS:
        points = []
        for run, point in every:
            _, size, multiple = ladder.place(run.arm)
            longest = multiple == max(ladder.tokens_per_parameter)
            if point.arm == base and size != ladder.held_out and (axis == "n,d" or longest):
                points.append(point if axis != "n,d" else Point(**{**vars(point), "share": share}))
        try:
            found[axis] = laws.fit(points, base, axis)
        except NoLaw as error:
            found[axis] = str(error)
    return found


def _arm(base: str, every: Sequence[tuple[ReadRun, Point]], fits: Mapping[Axis, Law | str], ladder: Ladder) -> Plain:
    longest = max(ladder.tokens_per_parameter)
    points = [
        {
            "size": size,
            "tokens_per_parameter": multiple,
            **{key: getattr(point, key) for key in ("seed", "n", "d", "compute", "loss")},
            "held_out": size == ladder.held_out,
            "longest": multiple == longest,
        }
        for run, point in every
        if point.arm == base
        for _, size, multiple in [ladder.place(run.arm)]
    ]
    law, told = fits["compute"], [_law(axis, fit) for axis, fit in fits.items()]
    curve: list[list[float]] = []
    ends = [point["compute"] for point in points if point["longest"] and math.isfinite(point["compute"])]
    if isinstance(law, Law):
        at = np.geomspace(min(ends), max(ends), POINTS)
        curve = [[x, one.value, one.low, one.high] for x, one in zip(at, law.predict(at), strict=True)]
    return {
        "arm": base,
        "laws": told,
        "held_out": _held_out(fits["n"], [point for point in points if point["held_out"] and point["longest"]]),
        "points": points,
        "curve": curve,
    }


def _law(axis: Axis, law: Law | str) -> Plain:
    name = {"n": "L(N)", "compute": "L(C)", "n,d": "L(N, D)"}[axis]
    if isinstance(law, str):
        return {"law": name, "why": law, "formula": None}
    letters = {"n": "N", "compute": "C", "n,d": "ND"}[axis]
    terms = [f"{a:.3g} {x}^-{k:.3g}" for a, k, x in zip(law.scales, law.exponents, letters, strict=True)]
    remarks = []
    if law.misfit < MISSES:
        remarks.append("the sizes miss the law by more than their seeds explain, and the intervals rest on that")
    if law.open:
        remarks.append("the runs do not say where the loss ends")
    if law.left_out:
        remarks.append(f"{words.counted(law.left_out, 'run')} without a loss left out")
    return {
        "law": name,
        "why": None,
        "formula": f"{law.e:.3f} + {' + '.join(terms)}",
        "e": law.e,
        "e_low": law.irreducible.low,
        "e_high": law.irreducible.high,
        "scales": list(law.scales),
        "exponents": list(law.exponents),
        "exponent_lows": [one.low for one in law.exponent_intervals],
        "exponent_highs": [one.high for one in law.exponent_intervals],
        "spread": law.spread,
        "misfit": law.misfit,
        "remarks": remarks,
    }


def _held_out(law: Law | str, points: Sequence[Plain]) -> Plain | None:
    known = [point for point in points if math.isfinite(point["loss"])]
    if isinstance(law, str) or not known:
        return None
    losses = [point["loss"] for point in known]
    predicted = law.predict(known[0]["n"], runs=len(losses))[0]
    measured = float(np.mean(losses))
    inside = predicted.low <= measured <= predicted.high
    text = (
        f"{law.arm} at {known[0]['size']}, which was held out: predicted {_ends(predicted)}, measured {measured:.4g} "
        f"in {words.counted(len(losses), 'run')}, {'inside' if inside else 'outside'} the interval"
    )
    return {
        "size": known[0]["size"],
        "predicted": predicted.value,
        "low": predicted.low,
        "high": predicted.high,
        "measured": measured,
        "runs": len(losses),
        "inside": inside,
        "text": text,
    }


def _pair(a: str, b: str, of_a: Law | str, of_b: Law | str, ladder: Ladder, label: str) -> Plain:
    """An arm against the baseline at the sizes that are asked for, and where their laws cross."""
    multiple = max(ladder.tokens_per_parameter)
    if isinstance(of_a, str) or isinstance(of_b, str):
        why = "; ".join(dict.fromkeys(law for law in (of_a, of_b) if isinstance(law, str)))
        text = f"{a} against {b}: nothing is extrapolated: {why}."
        return {"a": a, "b": b, "at": [], "crossing": None, "curve": [], "text": text}
    pair = laws.pair(of_a, of_b)
    largest = min(law.sizes[-1][0] for law in (of_a, of_b))
    smallest = max(law.sizes[0][0] for law in (of_a, of_b))
    rows: list[Plain] = []
    said = []
    for text in ladder.extrapolate:
        n = parameters_of(text)
        d = pair.at(n)[0]
        rows.append({"size": text, "n": n, "d": multiple * n, "times": n / largest} | vars(d))
        verdict = (
            f"{'better' if d.value < 0 else 'worse'} by {_ends(d, abs(d.value), d.value)}"
            if d.shown
            else f"open: {_ends(d)}"
        )
        far = f", {n / largest:.2g} times the largest size that was fitted" if n > largest else ""
        said.append(f"at {text} ({human(n)} parameters, {human(multiple * n)} tokens{far}) {a} is {verdict}")
    reach = max([largest, *map(parameters_of, ladder.extrapolate)]) if rows else BEYOND * largest
    crossing, where = _crossing(pair, smallest, reach)
    along = np.geomspace(smallest, reach, POINTS)
    curve = [[n, one.value, one.low, one.high] for n, one in zip(along, pair.at(along), strict=True)]
    told = (
        f"{a} against {b}: {'; '.join([*said, where])}. {label[0].upper()}{label[1:]}; intervals of {laws.LEVEL:.0%}."
    )
    return {"a": a, "b": b, "at": rows, "crossing": crossing, "curve": curve, "text": told}


def _crossing(pair: Pair, low: float, high: float) -> tuple[Plain, str]:
    found = pair.crossing(np.geomspace(low, high, POINTS))
    plain = {"value": found.value, "low": found.low, "high": found.high, "none": found.none, "from": low, "to": high}
    span = f"between {human(low)} and {human(high)} parameters"
    if found.none:
        return plain, f"their laws do not cross {span}"
    first, last = found.low <= low * 1.001, found.high >= high * 0.999
    if not math.isfinite(found.low) or (first and last):
        return plain, f"where the difference is zero is open {span}"
    ends = f"{human(found.low)}{' or less' if first else ''} to {human(found.high)}{' or more' if last else ''}"
    if math.isfinite(found.value):
        return plain, f"the difference is zero at {human(found.value)} parameters [{ends}]"
    return plain, f"their laws do not cross {span}, and may at {ends}"


def _ends(one: laws.Interval, value: float | None = None, signed: float = 1.0) -> str:
    """`0.031 [0.012, 0.05]`; of a negative difference that is said without its sign, the ends change places."""
    value = one.value if value is None else value
    low, high = (one.low, one.high) if signed > 0 else (-one.high, -one.low)
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def _notes(ladder: Ladder, shared: Sequence[Mapping[str, Any]], longest: float) -> list[str]:
    notes = [
        "N is the number of parameters without embeddings and head, D the training tokens, C = D times the model's "
        f"FLOPs per token. L(N) and L(C) are of the runs with {longest:g} tokens per parameter, L(N, D) of all runs.",
        "Beyond the largest size a law extrapolates: its interval is right if the loss goes on as the law has it.",
    ]
    if ladder.held_out:
        notes.append(f"{ladder.held_out} is held out: no law has seen it.")
    if shared:
        trunks = words.counted(len({str(one.get("run")) for one in shared}), "longer run")
        steps = sum(number(one.get("step")) for one in shared)
        seconds = duration(sum(number(one.get("wall_seconds")) for one in shared))
        notes.append(
            f"{words.counted(len(shared), 'run')} branched off {trunks}: their times are of their own steps, and the "
            f"{steps:,.0f} steps before ({seconds}) are counted there. In L(N, D) the runs of one trunk count as one."
        )
    return notes

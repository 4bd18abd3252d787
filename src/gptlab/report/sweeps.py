"""Sweeps of a study: arms that differ in one number, the best value of it with an interval, and by how much it moves.

A sweep is three arms or more that differ in one setting of `optim` or `schedule` alone. A study may have several, such
as one for each optimizer or width. Where they differ in a number that grows, such as the width, `drifts` says by how
much the best value moves from the first to the last.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from gptlab.config import build_recipe
from gptlab.logs.rows import dotted
from gptlab.report import words
from gptlab.report.estimates import Plain
from gptlab.report.optimum import LEAST_VALUES, LEVEL, NoOptimum, Optimum, locate
from gptlab.report.reading import settings_of
from gptlab.report.studies import ReadStudy

SECTIONS = ("optim.", "schedule.")
RATES = ("optim.lr", "optim.muon_lr")  # looked for first
FOLLOWING = ("optim.lr", "optim.muon_lr", "schedule.min_lr")  # that may go with the setting, in one ratio to it
LEADING = ("model.n_embd", "model.n_layer")  # by which sweeps are put in order, before other numbers
CURVE = 41  # points of the fitted curve

Settings = Mapping[str, Any]


def sweeps_of(read: ReadStudy) -> Plain | None:
    """The sweeps of a study that have runs, and the drifts between them, with sentences; None if there are none."""
    if read.elsewhere or read.study.measured:
        return None
    varying = _varying(read)
    sweeps: list[Plain] = []
    for setting, group in _groups(varying):
        rest = {key: value for key, value in varying[group[0]].items() if key != setting}
        found: Plain = {"setting": setting, "name": "", "rest": rest} | _found(read, setting, varying, group)
        if any(point["losses"] for point in found["points"]):
            sweeps.append(found)
    if not sweeps:
        return None
    _name(sweeps, {arm: dict(settings) for arm, settings in varying.items()})
    for sweep in sweeps:
        sweep["text"] = _text(sweep, words.metric_name(read.study.metric.name))
    drifts = _drifts(sweeps)
    for sweep in sweeps:
        del sweep["rest"]
    return {"level": LEVEL, "sweeps": sweeps, "drifts": drifts}


# -- which arms -----------------------------------------------------------------------------------------------------


def _varying(read: ReadStudy) -> dict[str, dict[str, Any]]:
    """Of each arm the settings in which arms differ."""
    study = read.study
    own = {name: dotted(arm.settings) for name, arm in study.arms.items()}
    flags = dotted(study.flags)
    keys = dict.fromkeys(key for settings in own.values() for key in settings if key not in flags)
    if not any(key.startswith(SECTIONS) for key in keys):
        return {}
    shared = settings_of(build_recipe(study.recipe))
    full = {arm: {key: settings.get(key, shared.get(key)) for key in keys} for arm, settings in own.items()}
    differ = [key for key in keys if len({repr(settings[key]) for settings in full.values()}) > 1]
    return {arm: {key: settings[key] for key in differ} for arm, settings in full.items()}


def _groups(varying: Mapping[str, Settings]) -> list[tuple[str, list[str]]]:
    """(setting, arms) of each sweep; an arm is in one at most."""
    keys = [key for key in next(iter(varying.values()), {}) if key.startswith(SECTIONS)]
    found: list[tuple[str, list[str]]] = []
    left = dict(varying)
    for setting in sorted(keys, key=lambda key: RATES.index(key) if key in RATES else len(RATES)):
        for follow in (False, True):
            groups: dict[Hashable, list[str]] = {}
            for arm, settings in left.items():
                if _positive(settings[setting]):
                    groups.setdefault(_others(settings, setting, follow), []).append(arm)
            for arms in groups.values():
                values = [left[arm][setting] for arm in arms]
                if len(arms) >= LEAST_VALUES and len(set(values)) == len(arms):
                    found.append((setting, sorted(arms, key=lambda arm: left[arm][setting])))
            for _, arms in found:
                for arm in arms:
                    left.pop(arm, None)
    order = list(varying)
    return sorted(found, key=lambda one: min(map(order.index, one[1])))


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _others(settings: Settings, setting: str, follow: bool) -> Hashable:
    """All settings but one, to be compared; those that follow it, as their ratio to it."""
    parts = []
    for key, value in settings.items():
        if key != setting:
            ratio = follow and key in FOLLOWING and _positive(value)
            parts.append((key, f"{value / settings[setting]:.6g}" if ratio else repr(value)))
    return tuple(parts)


def _name(sweeps: Sequence[Plain], varying: Mapping[str, Settings]) -> None:
    """Tell sweeps apart: by the one setting in which they differ, else by how the names of their arms begin."""
    if len(sweeps) < 2:
        return
    keys = [key for key in sweeps[0]["rest"] if len({repr(sweep["rest"].get(key)) for sweep in sweeps}) > 1]
    for sweep in sweeps:
        arms = [point["arm"] for point in sweep["points"]]
        same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*arms, strict=False))
        start = "".join(letters[0] for letters in same).rstrip("_-+.=, ")
        sweep["name"] = f"{keys[0]} = {sweep['rest'][keys[0]]}" if len(keys) == 1 else start or arms[0]
    names = [sweep["name"] for sweep in sweeps]
    for sweep in sweeps:
        if names.count(sweep["name"]) > 1:
            sweep["name"] = f"{sweep['points'][0]['arm']} to {sweep['points'][-1]['arm']}"


# -- the best value -------------------------------------------------------------------------------------------------


def _found(read: ReadStudy, setting: str, varying: Mapping[str, Settings], arms: Sequence[str]) -> Plain:
    """The points of a sweep, its optimum if it has one, and the fitted curve."""
    metric = read.study.metric
    sign = 1.0 if metric.better == "lower" else -1.0
    points, losses, left_out = [], {}, []
    for arm in arms:
        runs, value = read.values(arm, metric.name), float(varying[arm][setting])
        known = {seed: y for seed, y in runs.values.items() if math.isfinite(y)}
        points.append({"arm": arm, "value": value, "losses": {str(seed): y for seed, y in known.items()}})
        if runs.diverged:
            left_out.append({"arm": arm, "value": value, "diverged": runs.diverged, "runs": len(runs.values)})
        elif known:
            losses[value] = {seed: sign * y for seed, y in known.items()}
    found: Plain = {"points": points, "left_out": left_out, "optimum": None, "curve": [], "why": ""}
    try:
        best = locate(losses, read.paired)
    except NoOptimum as error:
        return found | {"why": str(error)}
    return found | {"optimum": _plain(best, sign, left_out), "curve": _curve(best, sign)}


def _plain(best: Optimum, sign: float, left_out: Sequence[Plain]) -> Plain:
    loss = sorted((sign * best.loss_low, sign * best.loss_high))
    beyond = best.edge == "highest" and any(one["value"] > best.values[-1] for one in left_out)
    beyond |= best.edge == "lowest" and any(one["value"] < best.values[0] for one in left_out)
    return {
        "value": best.value,
        "low": best.low,
        "high": best.high if math.isfinite(best.high) else None,
        "open_below": best.low == 0,
        "open_above": best.high == math.inf,
        "loss": sign * best.loss,
        "loss_low": loss[0],
        "loss_high": loss[1],
        "curvature": best.curvature,
        "curvature_low": best.curvature_low,
        "curvature_high": best.curvature_high,
        "best": best.best,
        "lowest": best.values[0],
        "highest": best.values[-1],
        "fitted": [best.fitted[0], best.fitted[-1]],
        "edge": best.edge,
        "diverged_beyond": beyond,
        "df": best.df,
    }


def _curve(best: Optimum, sign: float) -> list[list[float]]:
    x = np.linspace(np.log(best.fitted[0]), np.log(best.fitted[-1]), CURVE)
    y = sum(b * (x - np.log(best.value)) ** power for power, b in enumerate(best.coefficients))
    return [[float(np.exp(a)), float(sign * b)] for a, b in zip(x, np.broadcast_to(y, x.shape), strict=True)]


def _text(sweep: Plain, metric: str) -> str:
    """`best optim.lr 3.1e-3 [2.4e-3, 4.0e-3] at 90%, ...`."""
    best, setting = sweep["optimum"], sweep["setting"]
    start = f"{sweep['name']}: " if sweep["name"] else ""
    gone = [f"{one['arm']} ({one['diverged']} of {one['runs']} runs diverged)" for one in sweep["left_out"]]
    out = f"; left out: {', '.join(gone)}" if gone else ""
    if best is None:
        return f"{start}no best {setting}: {sweep['why']}{out}"
    grid = f"the grid is {short(best['lowest'])} to {short(best['highest'])}"
    if best["edge"]:
        side = "above" if best["edge"] == "highest" else "below"
        more = f"values {side} it diverged: put some between" if best["diverged_beyond"] else f"add values {side} it"
        end = short(best[best["edge"]])
        return f"{start}the best {setting} is at or beyond the {best['edge']} value of its grid, {end}: {more}{out}"
    ends = _ends(best)
    parts = [f"{start}best {setting} {short(best['value'])}{ends}", f"{metric} {best['loss']:.4g} there"]
    if best["curvature_low"] is not None and best["curvature_low"] > 0:
        parts.append(f"twice or half of it costs about {best['curvature'] * math.log(2) ** 2:.2g}")
    parts.append(grid)
    if best["open_below"] or best["open_above"]:
        parts.append("the values do not say where it is: add seeds, or values farther apart")
    return f"{', '.join(parts[:2])}{''.join(f'; {part}' for part in parts[2:])}{out}"


def _ends(best: Plain) -> str:
    if best["low"] is None or not math.isfinite(best["low"]):
        return ""
    low = "..." if best["open_below"] else short(best["low"])
    high = "..." if best["open_above"] else short(best["high"])
    return f" [{low}, {high}] at {LEVEL:.0%}"


def short(value: float) -> str:
    """A setting in two digits: 3.1e-3, 0.1, 200."""
    if value >= 0.01 and value < 1e5:
        return f"{value:.2g}" if value < 100 else f"{value:.0f}"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


# -- by how much it moves -------------------------------------------------------------------------------------------


def _drifts(sweeps: Sequence[Plain]) -> list[Plain]:
    """How the best value moves from the sweep with the smallest to that with the largest of a growing setting."""
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[Plain]] = {}
    for sweep in sweeps:
        texts = tuple((key, str(value)) for key, value in sweep["rest"].items() if not _positive(value))
        groups.setdefault((sweep["setting"], texts), []).append(sweep)
    found = []
    for (setting, texts), group in groups.items():
        numbers = [key for key, value in group[0]["rest"].items() if all(_positive(one["rest"][key]) for one in group)]
        keys = [key for key in numbers if len({one["rest"][key] for one in group}) > 1]
        lead = next((key for key in (*LEADING, *keys) if key in keys), None)
        if lead is None:
            continue
        group = sorted(group, key=lambda one: one["rest"][lead])
        steps = np.diff([[one["rest"][key] for key in (lead, *keys)] for one in group], axis=0)
        one_way = (steps >= 0).all(axis=0) | (steps <= 0).all(axis=0)
        if (steps[:, 0] > 0).all() and one_way.all():
            told = {key: value for key, value in texts if len({str(one["rest"][key]) for one in sweeps}) > 1}
            found.append(_drift(group, setting, lead, told))
    return found


def _drift(group: Sequence[Plain], setting: str, lead: str, told: Mapping[str, str]) -> Plain:
    first, last = group[0], group[-1]
    ends = [one["rest"][lead] for one in (first, last)]
    of = ", ".join(f"{key} = {value}" for key, value in told.items())
    drift: Plain = {"setting": setting, "over": lead, "of": of, "from": ends[0], "to": ends[1]}
    drift |= {"sweeps": [one["name"] for one in group], "value": None, "low": None, "high": None}
    start = f"{of}: " if of else ""
    span = f"from {lead} = {ends[0]:g} to {ends[1]:g} ({ends[1] / ends[0]:.3g}x)"
    best = [one["optimum"] for one in (first, last)]
    known = [one and one["low"] is not None and math.isfinite(one["low"]) and not one["edge"] for one in best]
    if not all(known):
        which = " and ".join(one["name"] for one, ok in zip((first, last), known, strict=True) if not ok)
        return drift | {"text": f"{start}{span} the drift of the best {setting} is open: that of {which} is not known"}
    value, low, high = drift_of(best[0], best[1])
    drift |= {"value": value, "low": low, "high": high if math.isfinite(high) else None}
    low_text = f"{low:.2f}" if low > 0 else "..."
    high_text = f"{high:.2f}" if math.isfinite(high) else "..."
    text = f"{start}{span} the best {setting} moves by a factor of {value:.2f} [{low_text}, {high_text}] at {LEVEL:.0%}"
    return drift | {"text": text}


def drift_of(first: Plain, last: Plain) -> tuple[float, float, float]:
    """The ratio of two optima, last to first, with an interval from theirs (MOVER, Zou and Donner 2008)."""
    (x, a, b), (y, c, d) = (
        (
            math.log(one["value"]),
            math.log(one["low"]) if one["low"] > 0 else -math.inf,
            math.log(one["high"]) if one["high"] is not None else math.inf,
        )
        for one in (first, last)
    )
    low, high = y - x - math.hypot(y - c, b - x), y - x + math.hypot(d - y, x - a)
    return math.exp(y - x), math.exp(low), math.exp(high) if math.isfinite(high) else math.inf

"""What the runs of a study logged: curves, failures, losses at equal cost, HellaSwag row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np

from gptlab.report import statistics as st
from gptlab.report.curves import thin
from gptlab.report.estimates import Plain, mean_and_spread
from gptlab.report.reading import Array, number
from gptlab.report.studies import ReadRun, ReadStudy

MOST_ON_PAGE = 300  # points of a curve: 500 runs stay below 10 MB


def failure_of(run: ReadRun) -> Plain:
    r, steps = run.result, [number(run.result.get(key)) for key in ("failed_at_step", "steps")]
    text = {key: None if r.get(key) is None else str(r[key]) for key in ("failure", "failed_tensor", "reason")}
    return {
        "arm": run.arm,
        "seed": run.seed,
        "status": run.status,
        "step": next((int(step) for step in steps if math.isfinite(step)), None),
        "failure": text["failure"],
        "tensor": text["failed_tensor"],
        "reason": text["reason"],
    }


def curves_of(run: ReadRun) -> Plain:
    return {
        "arm": run.arm,
        "seed": run.seed,
        "status": run.status,
        "ended": failure_of(run)["step"] if run.status == "diverged" else None,
        "folder": str(run.folder),
        "train": _thinned(*run.curves["loss"]),
        "val": _thinned(*run.curves["val_loss"]),
    }


def mean_curves(runs: Sequence[ReadRun]) -> Plain:
    """Mean losses of an arm's completed runs, at the steps that all of them logged; {} below two runs."""
    completed = [run for run in runs if run.status == "completed"]
    result = {}
    for name, key in (("train", "loss"), ("val", "val_loss")):
        logged = [run.curves[key] for run in completed]
        if len(logged) < 2:
            continue
        steps = logged[0][0]
        if not all(np.array_equal(steps, at) for at, _ in logged):
            steps = reduce(np.intersect1d, [at for at, _ in logged])
            logged = [(steps, values[np.isin(at, steps)]) for at, values in logged]
        if len(steps):
            result[name] = _thinned(steps, np.mean([values for _, values in logged], axis=0))
    return result


def _thinned(steps: Array, values: Array) -> list[list[float | None]]:
    """[[step, value], ...] as JSON can hold it: a value that is not finite is None."""
    steps, values = thin(steps, values, MOST_ON_PAGE)
    points = zip(steps.astype(int).tolist(), values.tolist(), strict=True)
    return [[step, value if math.isfinite(value) else None] for step, value in points]


def within_seeds(read: ReadStudy) -> list[Plain]:
    """HellaSwag of each run minus the baseline's of the same seed, with an interval over rows.

    The interval holds for other rows and these weights. It says nothing about other seeds.
    """
    result = []
    for (arm, seed), run in read.runs.items():
        base = read.runs.get((read.study.baseline, seed))
        rows = sorted(run.picks.keys() & base.picks.keys()) if base and arm != read.study.baseline else []
        if rows and base:
            e = st.bootstrap([run.picks[row] for row in rows], [base.picks[row] for row in rows])
            result.append({"arm": arm, "seed": seed, "mean": e.value, "low": e.low, "high": e.high, "rows": e.n})
    return result


# -- losses at equal cost -------------------------------------------------------------------------------------------


def _seconds_per_step(run: ReadRun) -> float:
    return number(run.result.get("time_per_iter_ms")) / 1000


def mean_seconds(read: ReadStudy, arm: str) -> float:
    """Mean training time of an arm's completed runs in seconds, without evaluations and checkpoints; NaN if none."""
    known = [_seconds_per_step(run) * run.value("steps") for run in read.of(arm) if run.status == "completed"]
    return float(np.mean(known)) if known else math.nan


def at_equal(read: ReadStudy) -> list[Plain]:
    """Validation losses at equal steps, equal tokens and equal time; [] if all runs spent the same.

    The budget is what the cheapest completed run spent in total. A longer run is read off its curve of validation
    losses at that budget, linearly between evaluations. Its learning rate had not decayed yet, which counts against it.
    """
    done = [run for run in read.runs.values() if run.status == "completed" and len(run.curves["val_loss"][0])]
    result = []
    for what in ("steps", read.unit, "seconds"):
        ends = {id(run): _spent(run, what, run.value("steps")) for run in done}
        known = [end for end in ends.values() if end > 0]
        if len(known) < 2 or max(known) <= 1.01 * min(known):
            continue
        budget = min(known)
        at = {(run.arm, run.seed): _loss_at(run, what, budget) for run in done if ends[id(run)] > 0}
        arms = []
        for name in read.study.arms:
            mine = {seed: value for (arm, seed), value in at.items() if arm == name}
            shared = {seed: v - base for seed, v in mine.items() if (base := at.get((read.study.baseline, seed)))}
            difference = mean_and_spread(list(shared.values())) if name != read.study.baseline else None
            arms.append({"name": name, "quality": mean_and_spread(list(mine.values())), "difference": difference})
        result.append({"what": what, "budget": budget, "arms": arms})
    return result


def _spent(run: ReadRun, what: str, step: float) -> float:
    """Steps, tokens, samples or seconds that a run had spent at a step."""
    if what == "steps":
        return step
    if what == "seconds":
        return step * _seconds_per_step(run)
    return step * run.value(what) / run.value("steps") if run.value("steps") > 0 else math.nan


def _loss_at(run: ReadRun, what: str, budget: float) -> float:
    steps, losses = run.curves["val_loss"]
    return float(np.interp(budget, [_spent(run, what, float(step)) for step in steps], losses))

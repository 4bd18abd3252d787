"""The guard of a training run on curves that something else logged.

The training losses of a log are fed to the guard one by one, as if each were an update, and its held-out losses as
evaluations; steps are those of the log. A loss that was logged every k steps is judged alike: all thresholds are shares
of the level and counts of losses, so a rise is noticed 38 logged losses after it began. Of held-out losses alone the
guard says nothing: they rise when a model overfits, too.

A sparse curve of a healthy run is called diverged less than once in a thousand. Of 9,600 curves of tests/test_guard.py
with 100 to 600 points each none was, whether of 5, 10, 50 or 100 losses one is kept or their mean. Of 14,400 evaluated
runs, half of which overfit, 1 was where every second training loss is kept, none of every 5th, and 8 of every 20th,
which leaves 15 to 60.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from gptlab import guard
from gptlab.guard import Divergence, Guard
from gptlab.logs.run import Array, Curve, LogRun

TRAINING = re.compile(r"(train(ing)?_)*loss(_train(ing)?)?(_step)?")
HELD_OUT = re.compile(r"((val|valid|validation|eval|test|dev|held_?out)_)+loss|loss_(val|valid|validation|eval|test)")
EMPTY = (np.empty(0), np.empty(0))


def diverged(run: LogRun, metric: str) -> Divergence | None:
    """When a logged run diverged and by which rule; None: it did not, as far as its log shows.

    A loss that is not finite, or a metric, is a divergence from where on it never is finite again: of weights that are
    NaN no finite loss comes. A single such value may be a missing one, or an update that a loss scaler skipped.

    Args:
        metric: name of the curve that the run is judged by.
    """
    if run.form == "gptlab" and run.status == "completed":
        return None  # the guard has seen every one of its updates
    found = of_losses(training_losses(run), held_out_losses(run, metric))
    names = [name for name in run.curves if name == metric or TRAINING.fullmatch(plain(name))]
    ends = [end for name in names if (end := _not_finite(name, run.curves[name]))]
    first = min(ends, key=lambda end: end.step, default=None)
    value = run.result.get(metric)
    if not ends and metric not in run.curves and isinstance(value, float) and not math.isfinite(value):
        first = Divergence(_last_step(run), "non_finite", f"its final {metric} is {value:g}")
    if found and not (first and first.step < found.step):
        return found
    if first or run.status != "diverged":
        return first
    last = _last_step(run)
    step = run.result.get("failed_at_step")
    kind, reason = (str(run.result.get(key) or "") for key in ("failure", "reason"))
    return Divergence(step if isinstance(step, int) else last, kind or "unknown", reason or "its log says so")


def _last_step(run: LogRun) -> int:
    return max((int(steps[-1]) for steps, _ in run.curves.values() if len(steps)), default=0)


def training_losses(run: LogRun) -> Curve:
    """The training loss of a run by the name of its curve; empty if it logs none."""
    return _longest(curve for name, curve in run.curves.items() if TRAINING.fullmatch(plain(name)))


def held_out_losses(run: LogRun, metric: str) -> Curve:
    """The held-out loss: the metric if it is one, or a curve that is named as one; empty if the run logs none."""
    if metric in run.curves and HELD_OUT.fullmatch(plain(metric)):
        return run.curves[metric]
    return _longest(curve for name, curve in run.curves.items() if HELD_OUT.fullmatch(plain(name)))


def _longest(curves: Iterable[Curve]) -> Curve:
    return max(curves, key=lambda curve: len(curve[0]), default=EMPTY)


def plain(name: str) -> str:
    """`Loss/train` and `eval.loss` as loss_train and eval_loss."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def of_losses(training: Curve, held_out: Curve = EMPTY) -> Divergence | None:
    """The divergence that the losses of a run show to a guard that does not know the constant predictor's loss.

    Losses that are not positive, as of densities, are not judged: the guard's thresholds are shares of the level.
    """
    (steps, losses), (at, evaluated) = _finite(training), _finite(held_out)
    if not len(losses) or losses.min() <= 0 or (len(evaluated) and evaluated.min() <= 0):
        return None
    done = np.searchsorted(steps, at, side="right")  # losses before each evaluation
    done[at <= steps[0]] = 0
    start = float(evaluated[done == 0][-1]) if (done == 0).any() else 0.0
    if not (_may_rise(losses, start) or _may_rise_held_out(losses, done, evaluated)):
        return None
    judge, position = Logged(steps), 0
    for number, loss in enumerate([*losses.tolist(), None]):
        while position < len(done) and done[position] == number:
            last = position == len(done) - 1 and number == len(losses)
            if verdict := judge.evaluated(int(at[position]), float(evaluated[position]), last):
                return verdict
            position += 1
        if loss is not None and (verdict := judge.update(number + 1, loss, 1.0)):
            return verdict
    return None


class Logged(Guard):
    """Counts the losses of a log, and dates a rise by the log's steps."""

    def __init__(self, steps: Array) -> None:
        super().__init__(None, 0)
        self.steps = steps

    def told(self, step: int) -> int:
        return int(self.steps[step - 1])


# -- a curve on which the guard cannot fire is not fed to it


def _may_rise(losses: Array, start: float) -> bool:
    """Whether `Guard.update` may find a rise in these losses; False: it finds none.

    The lines are the guard's without the noise, which only lifts them.

    Args:
        start: the held-out loss before the first of them; 0: there is none.
    """
    early = guard.FIRST_BLOCK * guard.LAST_BLOCKS
    first, later = losses[:early], losses[early:]
    medians = [_medians(first, guard.FIRST_BLOCK), _medians(later, guard.BLOCK)]
    ends = [
        guard.FIRST_BLOCK * np.arange(1, len(medians[0]) + 1),
        guard.BLOCK * np.arange(1, len(medians[1]) + 1) + early,
    ]
    untrained = max(float(losses[0]), start)
    hopeless = guard.HOPELESS * untrained
    lowest = np.concatenate([np.full(guard.BLOCKS - 1, np.inf), *medians])
    lowest = sliding_window_view(lowest, guard.BLOCKS).min(axis=1) if len(lowest) >= guard.BLOCKS else np.empty(0)
    level = np.where(lowest < hopeless, lowest, untrained)
    rise = np.maximum(guard.SHARE_OF_LEVEL * level, guard.SHARE_OF_LEARNT * (losses[0] - level))
    lines = np.array([[untrained, *level], [hopeless, *np.minimum(hopeless, level + rise)]])
    lines[1] *= 1 - 1e-9  # of rounding the guard may say otherwise
    level, upper = np.repeat(lines, np.diff([0, *np.concatenate(ends), len(losses)]), axis=1)
    beyond = np.flatnonzero(losses > upper)
    beyond = beyond[beyond >= guard.HELD - 1]
    if not len(beyond):
        return False
    padded = np.concatenate([np.full(guard.HOLD - 1, -np.inf), losses])
    last, top = sliding_window_view(padded, guard.HOLD)[beyond], upper[beyond, None]
    lower = level[beyond, None] + guard.CLEAR * (top - level[beyond, None])
    held = (last > lower).sum(axis=1) >= guard.HELD
    return bool((held & ((last[:, -guard.LATE :] > top).sum(axis=1) >= guard.LATE_HELD)).any())


def _may_rise_held_out(losses: Array, done: NDArray[np.int64], evaluated: Array) -> bool:
    """The same of `Guard.evaluated`.

    Args:
        done: losses before each evaluation.
    """
    first = max(int((done == 0).sum()) - 1, 0)  # until there is a loss, the last evaluation is the best
    done, evaluated = done[first:], evaluated[first:]
    if not len(evaluated):
        return False
    best = np.minimum.accumulate(evaluated)
    high = np.flatnonzero(evaluated >= (1 + guard.HELD_OUT_SHARE) * best * (1 - 1e-9))
    if not len(high):
        return False
    lows, index = np.unique(
        np.maximum.accumulate(np.where(evaluated == best, np.arange(len(best)), 0))[high], return_inverse=True
    )
    line = (1 + guard.HELD_OUT_SHARE) * (1 - 1e-9) * _trailing_medians(losses, done[lows], guard.NOW)
    if losses[max(0, done[high[0]] - guard.HELD_OUT_LOSSES) :].max(initial=0.0) < line.min():
        return False  # most runs that overfit
    return bool((_trailing_medians(losses, done[high], guard.HELD_OUT_LOSSES) >= line[index]).any())


def _medians(losses: Array, size: int) -> Array:
    """Of each whole block."""
    blocks = losses[: len(losses) // size * size].reshape(-1, size)
    return np.median(blocks, axis=1) if len(blocks) else np.empty(0)


def _trailing_medians(losses: Array, done: NDArray[np.int64], size: int) -> Array:
    """Of the last `size` losses, or as many as there are, before each of these counts; the first loss before any."""
    few = done < size
    found = np.array(
        [np.median(losses[: max(count, 1)]) if short else 0.0 for count, short in zip(done, few, strict=True)]
    )
    if not few.all():
        found[~few] = np.median(sliding_window_view(losses, size)[done[~few] - size], axis=1)
    return found


def _finite(curve: Curve) -> Curve:
    steps, values = curve
    kept = np.isfinite(values)
    return (steps, values) if kept.all() else (steps[kept], values[kept])


def _not_finite(name: str, curve: Curve) -> Divergence | None:
    """From where on a curve is never finite again."""
    steps, values = curve
    if not len(values) or np.isfinite(values[-1]):
        return None
    known = np.flatnonzero(np.isfinite(values))
    first = int(known[-1]) + 1 if len(known) else 0
    step = int(steps[first])
    return Divergence(step, "non_finite", f"{name} is {values[first]:g} at step {step}, and not finite after it")

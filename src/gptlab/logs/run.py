"""What a log is read as: a run with its curves, and what the reader was told about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gptlab.errors import UserError

Array = NDArray[np.float64]
Curve = tuple[Array, Array]
"""Steps and values, both (points,), sorted by step."""


class Unclear(UserError):
    """What a log holds cannot be told apart without an option; of any other error the log is left out."""


@dataclass
class LogRun:
    """A run as a log tells it. Readers leave open what the log does not say; `read_logs` fills it in."""

    source: Path
    """The file or folder."""
    form: str
    """What kind of log it is: csv, jsonl, parquet, text, gptlab, metrics, trainer_state, tensorboard, wandb, mlflow,
    trackio."""
    curves: dict[str, Curve]
    """Each logged metric by its name."""
    arm: str | None = None
    seed: int | None = None
    counted: bool = False
    """Whether the seed only counts runs, and is not what was set before training."""
    name: str = ""
    """What the log calls the run, if anything."""
    status: str = "completed"
    """Of gptlab.status: completed, unfinished, diverged, failed ..."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the log has of the run's settings, by dotted name."""
    result: dict[str, Any] = field(default_factory=dict)
    """Final numbers that are no curve: a summary, a table's value without a step."""
    remarks: list[str] = field(default_factory=list)
    """What the reader guessed or left out, one sentence each; of a file with many runs the first has them."""


@dataclass(frozen=True)
class How:
    """What the caller says about the logs; an empty string is guessed."""

    arm: str = ""
    """Column of a table, or setting of a log, that names the arm."""
    seed: str = ""
    """The same of the seed."""
    step: str = ""
    """The same of the step."""
    metric: str = ""
    """Name of the metric to judge by."""
    pattern: str = ""
    """For text logs: a regular expression with named groups, or the name of a shipped one."""
    arm_from: str = ""
    """A regular expression searched in the path of a run: group `arm` or the first group is the arm, group `seed` the
    seed."""


def curve(steps: ArrayLike, values: ArrayLike) -> Curve:
    """A curve sorted by step. Of a step that was logged twice, as a resumed run does, the later value counts."""
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    kept = np.isfinite(x)
    if not kept.all():
        x, y = x[kept], y[kept]
    if len(x) > 1 and not (np.diff(x) > 0).all():
        order = np.argsort(x, kind="stable")
        x, y = x[order], y[order]
        last = np.append(np.diff(x) > 0, True)
        x, y = x[last], y[last]
    return x, y

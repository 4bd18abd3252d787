"""What the modules of `report` share: a metric as arrays, and numbers and names as people read them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptlab.config import Recipe, settings
from gptlab.logs.run import curve

Array = NDArray[np.float64]


def number(value: Any) -> float:
    """A logged value as a float. Null (a value that was not finite) and anything that is no number become NaN."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else np.nan
    except OverflowError:  # a whole number beyond 1e308
        return np.nan


def series(lines: Sequence[dict[str, Any]], key: str) -> tuple[Array, Array]:
    """One metric of a run as (steps, values), both (points,), sorted by step.

    If a step was logged twice, the later line counts: a resumed run measured it again.
    """
    having = [line for line in lines if key in line]
    return curve(_numbers([line["step"] for line in having]), _numbers([line[key] for line in having]))


def _numbers(values: list[Any]) -> Array:
    """Each value as `number` has it."""
    if set(map(type, values)) <= {float, int}:  # nearly always, and quickly found out
        with contextlib.suppress(OverflowError):
            return np.array(values, dtype=np.float64)
    return np.array([number(value) for value in values], dtype=np.float64)


@cache
def _names() -> tuple[str, ...]:
    return tuple(name for name, _ in settings())


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Every setting of a recipe by its dotted name."""
    return dict(zip(_names(), attrgetter(*_names())(recipe), strict=True))


def human(count: float) -> str:
    """A large number in three digits: 524288 is 524K, 1e10 is 10B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(count) >= 0.9995 * size:  # 999.6K is 1M
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def duration(seconds: float) -> str:
    """A time in its two largest units: 36184 seconds is 10 h 3 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def short_names(paths: Sequence[Path]) -> list[str]:
    """For each folder the shortest end of its path that no other folder's path ends with."""
    parts = [path.resolve().parts for path in paths]

    def name(own: tuple[str, ...]) -> str:
        others = [other for other in parts if other != own]
        for count in range(1, len(own)):
            if all(other[-count:] != own[-count:] for other in others):
                return "/".join(own[-count:])
        return "/".join(own)

    return [name(own) for own in parts]

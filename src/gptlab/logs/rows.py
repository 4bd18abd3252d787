"""What the readers of other tools' logs share: points that become curves, and settings by dotted name."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from gptlab.errors import DataError, UserError
from gptlab.files import because, open_regular
from gptlab.logs.run import Curve, How, LogRun, curve

Part = TypeVar("Part")
Points = dict[str, tuple[list[float], list[float]]]
"""Steps and values of each metric, in the order in which they were logged."""


def points_of(rows: Iterable[tuple[float, Mapping[str, Any]]], step: str) -> Points:
    """The numbers in rows, each with its step. A truth value is none: JSON's true would be a loss of 1.

    Args:
        step: what in the rows is the step instead, if all rows have it.
    """
    kept, points = list(rows), Points()
    asked = bool(kept) and all(is_number(row.get(step)) for _, row in kept)
    for at, row in kept:
        for name, value in row.items():
            if is_number(value) and not (asked and name == step):
                steps, values = points.setdefault(name, ([], []))
                steps.append(row[step] if asked else at)
                values.append(value)
    return points


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def curves(points: Points) -> dict[str, Curve]:
    return {name: curve(steps, values) for name, (steps, values) in sorted(points.items())}


def dotted(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name: {"optim": {"lr": 1}} is {"optim.lr": 1}."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def from_text(text: str) -> Any:
    """A setting that a tool keeps as text: a number where it is one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, int | float) else text


def name_run(run: LogRun, how: How) -> LogRun:
    """Give a run the arm and the seed that the settings named by `how` hold, where it has them.

    Raises:
        DataError: the setting of the seed is no whole number.
    """
    if how.arm in run.settings:
        run.arm = str(run.settings[how.arm])
    if how.seed in run.settings:
        said = run.settings[how.seed]
        try:
            run.seed = int(said)
        except (TypeError, ValueError, OverflowError):
            run.seed = None
        if run.seed is None or run.seed != (float(said) if isinstance(said, str) else said):
            raise DataError(f"{run.source}: the setting {how.seed} is {said!r}, not a whole number that can be a seed")
    return run


def read_each(
    parts: Iterable[Part], read: Callable[[Part], LogRun | None], nothing: str, before: Iterable[str] = ()
) -> list[LogRun]:
    """Read the runs of a store. What cannot be read is a remark of the first run that can.

    Args:
        parts: what `read` takes, one for each run.
        read: returns None for what is no run.
        nothing: what to say if there is no run.
        before: what could not be read already.

    Raises:
        UserError: no run can be read; the first fault, or `nothing`.
    """
    runs, faults = list[LogRun](), list[UserError](map(DataError, before))
    for part in parts:
        try:
            run = read(part)
        except UserError as fault:
            faults.append(fault)
        else:
            runs += [run] if run else []
    if not runs:
        raise faults[0] if faults else DataError(nothing)
    runs[0].remarks += [str(fault) for fault in faults]
    return runs


def is_sqlite(path: Path, tables: Iterable[str]) -> bool:
    """Whether a file is a SQLite database that has all these tables."""
    try:
        with open_regular(path) as file:
            if file.read(16) != b"SQLite format 3\0":
                return False
        with sqlite(path) as store:
            known = {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except (OSError, DataError):
        return False
    return known.issuperset(tables)


@contextlib.contextmanager
def sqlite(path: Path) -> Iterator[sqlite3.Connection]:
    """An open SQLite file, which is only read.

    Raises:
        DataError: SQLite cannot read it.
    """
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as store:
            yield store
    except sqlite3.Error as fault:
        raise DataError(f"{path} cannot be read by SQLite: {because(fault)}") from None

"""Runs of MLflow: folders of its file store (mlruns/EXPERIMENT/RUN), and its SQLite files (mlflow.db)."""

from __future__ import annotations

import math
import os
import re
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptlab.errors import DataError
from gptlab.files import damaged, read_text
from gptlab.logs.rows import Points, curves, from_text, is_sqlite, name_run, read_each, sqlite
from gptlab.logs.run import How, LogRun

META = "meta.yaml"
STATUSES = {"FINISHED": "completed", "FAILED": "failed", "KILLED": "interrupted"}  # others have not ended
NUMBERS = {"1": "RUNNING", "2": "SCHEDULED", "3": "FINISHED", "4": "FAILED", "5": "KILLED"}  # as files have them
LIMITS = {sys.float_info.max: math.inf, -sys.float_info.max: -math.inf}  # what infinity is kept as in SQLite


def is_mine(path: Path) -> bool:
    if not os.path.isdir(path):
        return path.suffix in (".db", ".sqlite", ".sqlite3") and is_sqlite(path, ("experiments", "runs", "metrics"))
    return any(True for _ in _runs(path))


def read(path: Path, how: How) -> list[LogRun]:
    """Read the runs of a store, an experiment or a run's folder, or of a SQLite file.

    Raises:
        DataError: no run with a metric can be read.
    """
    left = Counter[str]()
    if os.path.isdir(path):
        nothing = f"{path} holds no run with a metric"
        runs = read_each(_runs(path), lambda run: _read_folder(run, how, left), nothing)
    else:
        with sqlite(path) as store:
            runs = _read_database(store, path, how, left)
    runs[0].remarks += [f"{path}: runs left out because {why}: {count}" for why, count in sorted(left.items())]
    return runs


# -- the file store -------------------------------------------------------------------------------------------------


def _runs(path: Path) -> Iterator[Path]:
    """The folders of the runs in a store or an experiment, or a run's own."""
    if _is_run(path):
        yield path
        return
    for child in _folders(path):
        if _is_run(child):
            yield child
        elif os.path.isfile(child / META):
            yield from filter(_is_run, _folders(child))


def _is_run(folder: Path) -> bool:
    return os.path.isfile(folder / META) and os.path.isdir(folder / "metrics")


def _folders(path: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(path))
    except OSError:  # the caller says so, for any form
        return []
    return [path / name for name in names if name[:1] != "." and os.path.isdir(path / name)]


def _read_folder(folder: Path, how: How, left: Counter[str]) -> LogRun | None:
    meta = dict(re.findall(r"^(\w+): *(.*?)[ \r]*$", read_text(folder / META, DataError), re.MULTILINE))
    experiment = folder.parent / META
    of_experiment = read_text(experiment, DataError) if os.path.isfile(experiment) else ""
    name = re.search(r"^name: *(.*?)[ \r]*$", of_experiment, re.MULTILINE)
    remarks, points = list[str](), Points()
    for metric, file in _entries(folder / "metrics"):
        points[metric] = _points(file, remarks)
    tags = {tag: read_text(file, DataError) for tag, file in _entries(folder / "tags")}
    settings = {"experiment": _unquoted(name[1])} if name else {}
    return _run(
        folder,
        tags.get("mlflow.runName") or _unquoted(meta.get("run_name", "")) or folder.name,
        NUMBERS.get(meta.get("status", ""), ""),
        meta.get("lifecycle_stage", ""),
        points,
        settings | {param: read_text(file, DataError) for param, file in _entries(folder / "params")},
        remarks,
        how,
        left,
    )


def _unquoted(text: str) -> str:
    """A word of YAML without its quotes."""
    return text[1:-1].replace("''", "'") if text[:1] == "'" == text[-1:] else text


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of a folder by name; a name with a slash is in a folder of its own."""
    for at, below, names in os.walk(folder):
        below.sort()
        for name in sorted(names):
            yield (Path(at) / name).relative_to(folder).as_posix(), Path(at) / name


def _points(file: Path, remarks: list[str]) -> tuple[list[float], list[float]]:
    """The points of a metric: a line each has the time, the value and the step."""
    whole, _, half = read_text(file, DataError).rpartition("\n")
    if half:
        remarks.append(f"{file} ends within a line, which is left out")
    steps, values = list[float](), list[float]()
    for number, line in enumerate(whole.split("\n") if whole else (), 1):
        try:
            _, value, *step = line.split()
            steps.append(int(step[0]) if step else 0)
            values.append(float(value))
        except ValueError:
            raise DataError(f"{file} is damaged: line {number} is not a time, a value and a step") from None
    return steps, values


# -- SQLite ---------------------------------------------------------------------------------------------------------


def _read_database(store: sqlite3.Connection, path: Path, how: How, left: Counter[str]) -> list[LogRun]:
    found = list[LogRun]()
    every = store.execute(
        "SELECT run_uuid, runs.name, status, runs.lifecycle_stage, experiments.name FROM runs "
        "LEFT JOIN experiments USING (experiment_id) ORDER BY runs.rowid"
    ).fetchall()
    for key, name, status, stage, experiment in every:
        points = Points()
        for metric, value, step, is_nan in store.execute(
            "SELECT key, value, step, is_nan FROM metrics WHERE run_uuid = ? ORDER BY rowid", (key,)
        ):
            steps, values = points.setdefault(metric, ([], []))
            steps.append(step)
            values.append(math.nan if is_nan else LIMITS.get(value, value))
        settings = {"experiment": experiment} if experiment else {}
        settings |= dict(store.execute("SELECT key, value FROM params WHERE run_uuid = ?", (key,)))
        run = _run(path, name or key, status, stage, points, settings, [], how, left)
        found += [run] if run else []
    if not found:
        raise DataError(f"{path} holds no run with a metric")
    return found


def _run(
    source: Path,
    name: str,
    status: str,
    stage: str,
    points: Points,
    settings: dict[str, Any],
    remarks: list[str],
    how: How,
    left: Counter[str],
) -> LogRun | None:
    """A run, or None for one that was deleted or that logged nothing, which `left` counts."""
    points = {metric: some for metric, some in points.items() if some[0]}
    if stage == "deleted" or not points:
        left["they were deleted" if stage == "deleted" else "they logged no metric"] += 1
        return None
    with damaged(source, DataError):
        run = LogRun(source, "mlflow", curves(points), name=name, remarks=remarks)
        run.status = STATUSES.get(status, "unfinished")
        run.settings = {setting: from_text(text) for setting, text in settings.items()}
    return name_run(run, how)

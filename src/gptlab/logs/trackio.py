"""trackio's projects: a SQLite file each, PROJECT.db in ~/.cache/huggingface/trackio."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from gptlab.errors import DataError
from gptlab.files import damaged, parse_json
from gptlab.logs.rows import curves, dotted, is_sqlite, name_run, points_of, sqlite
from gptlab.logs.run import How, LogRun

NUMBERS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}  # trackio keeps these as text


def is_mine(path: Path) -> bool:
    return path.suffix == ".db" and is_sqlite(path, ("configs", "metrics", "system_metrics"))


def read(path: Path, how: How) -> list[LogRun]:
    """Read the runs of a project. trackio does not say how they ended.

    Raises:
        DataError: the file is damaged, or no run has a metric.
    """
    with sqlite(path) as store, damaged(path, DataError):
        runs = _read(store, path, how)
    if not any(run.curves for run in runs):
        raise DataError(f"{path} holds no run with a metric")
    return [name_run(run, how) for run in runs if run.curves]


def _read(store: sqlite3.Connection, path: Path, how: How) -> list[LogRun]:
    columns = {name for _, name, *_ in store.execute("PRAGMA table_info(metrics)")}
    key = "run_id" if "run_id" in columns else "run_name"  # the first versions told runs by their names
    runs: dict[str, tuple[str, list[tuple[int, dict[str, Any]]]]] = {}
    for run, name, step, text in store.execute(f"SELECT {key}, run_name, step, metrics FROM metrics ORDER BY id"):
        _, rows = runs.setdefault(run, (name, []))
        row = {metric: NUMBERS.get(value, value) if isinstance(value, str) else value for metric, value in _json(text)}
        rows.append((step, row))
    settings: dict[str, dict[str, Any]] = {run: {} for run in runs}
    for run, text in store.execute(f"SELECT {key}, config FROM configs"):
        said = dict(_json(text))
        settings[run] = {"group": said["_Group"]} if said.get("_Group") else {}
        settings[run] |= dotted({name: value for name, value in said.items() if name[:1] != "_"})
    return [
        LogRun(path, "trackio", curves(points_of(rows, how.step)), name=name, settings=settings[run])
        for run, (name, rows) in runs.items()
    ]


def _json(text: str | bytes) -> Any:
    return parse_json(text).items()

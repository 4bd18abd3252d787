"""gptlab's own runs and studies, and any folder with a metrics.jsonl."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptlab import config, files
from gptlab.errors import DataError, UserError
from gptlab.logs import tables
from gptlab.logs.run import How, LogRun
from gptlab.rundir import RunDir, open_study, run_name

SETTINGS = ("config.json", "args.json", "params.json", "hparams.json")  # beside a foreign metrics.jsonl


def is_mine(path: Path) -> bool:
    return any((path / name).is_file() for name in ("study.toml", "metrics.jsonl", "recipe.toml"))


def read(path: Path, how: How) -> list[LogRun]:
    """The runs of a study, a run of gptlab, or what a folder's metrics.jsonl holds.

    Raises:
        Unclear: the caller must say which column is which.
        DataError: nothing was logged.
        RunError: a file of gptlab's is damaged.
    """
    if (path / "study.toml").is_file():
        return _read_study(path)
    if (path / "recipe.toml").is_file():
        return [_read_run(RunDir(path))]
    table = tables.load(path / "metrics.jsonl", How(), null_is_nan=True)
    of_table = {flag: name for flag in ("arm", "seed") if (name := getattr(how, flag)) in table.names}
    runs = tables.read_table(table, replace(how, **{"arm": "", "seed": "", **of_table}))  # or they are settings
    for run in runs:
        run.source, run.form = path, "metrics"
    settings = next((_object(path / name) for name in SETTINGS if (path / name).is_file()), {})
    if len(runs) == 1:
        runs[0].settings = {**_flat(settings), **runs[0].settings}
        runs[0].result = {**_numbers(_object(path / "result.json")), **runs[0].result}
    return runs


def _read_run(run: RunDir, summary: dict[str, Any] | None = None) -> LogRun:
    """A run of gptlab, from its folder, or where that was removed from its summary in the study's folder."""
    found = LogRun(run.path, "gptlab", {})
    result = run.read_json("result.json") or summary or {}
    found.status, found.result = result.get("status", "unfinished"), _numbers(result)
    if run.metrics_file.is_file() and run.metrics_file.stat().st_size:
        table = tables.load(run.metrics_file, How(), null_is_nan=True)
        if "step" in table.numbers:
            logged = tables.read_table(table, How(step="step"))[0]
            found.curves, found.remarks = logged.curves, logged.remarks
    if run.exists():
        recipe = run.read_recipe()
        found.seed = recipe.seed
        found.settings = {name: config.value_of(recipe, name) for name, _ in config.settings()}
    if "val_loss" not in found.curves and "final_val_loss" in found.result:
        found.result["val_loss"] = found.result["final_val_loss"]
    if not found.curves and not result:
        raise DataError(f"{run.path} has logged nothing yet")
    return found


def _read_study(folder: Path) -> list[LogRun]:
    study, runs, left = open_study(folder), list[LogRun](), list[str]()
    names = sorted({path.name for path in folder.iterdir() if path.is_dir()} | {p.stem for p in folder.glob("*.json")})
    for name in names:
        match = re.fullmatch(r"(.+)_seed(-?\d+)", name)
        if match is None or match[1] not in study.arms or name != run_name(match[1], int(match[2])):
            if match is not None:
                left.append(f"{folder / name} left out: {study.name} has no such arm")
            continue
        try:
            summary = RunDir(folder).read_json(f"{name}.json")
            if summary and summary.get("study") != study.name:
                left.append(f"{folder / name}.json left out: of the study {summary.get('study')}")
                summary = {}
            run = _read_run(RunDir(folder / name), summary)
        except UserError as error:
            left.append(str(error))
            continue
        run.arm, run.seed = match[1], int(match[2])
        runs.append(run)
    if not runs:
        raise DataError(left[0] if left else f"{folder} is a study without runs yet")
    runs[0].remarks += left
    return runs


def _object(file: Path) -> dict[str, Any]:
    try:
        return files.read_json(file, DataError, finite=False)
    except (FileNotFoundError, DataError):  # of another kind than it is called
        return {}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}

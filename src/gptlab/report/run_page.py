"""A run as a page shows it: curves that are read on as they grow, facts, samples, results and settings.

`run.html` beside card.md is such a page of one run, and `gptlab watch` serves one of all runs in a folder.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.config import Recipe, assignment, settings
from gptlab.errors import UserError
from gptlab.report.card import ARCHITECTURE, ESSENTIAL, EVALUATION_NAMES, RESULT_NAMES, write_card
from gptlab.report.curves import thin
from gptlab.report.listing import Listed, lowest, read_run, tell_apart
from gptlab.report.page import DIGITS, RUNS, fill_page
from gptlab.report.reading import duration, number, settings_of
from gptlab.rundir import MOST_LINE_BYTES, RunDir, parse_metrics, write_atomically
from gptlab.version import VERSION

FILE = "run.html"
MOST_POINTS = 600  # of a curve of one run; of many runs fewer
FEWEST_POINTS, ALL_POINTS = 150, 40_000  # of a curve, and of one metric of all runs together
LINES_A_POINT, LINE_BYTES = 4, 250  # lines that are parsed for a point of a curve, where more are new; about
MOST_SAMPLES, MOST_CHARACTERS, MOST_SAMPLE_BYTES = 6, 3000, 2**16
SAME = (  # these have one name
    "lr",
    "grad_norm",
    "tokens_per_second",
    "samples_per_second",
    "memory_gb",
    "largest_logit",
    "hellaswag_acc_norm",
    "hellaswag_acc",
    "hellaswag_harness_acc_norm",
    "hellaswag_harness_acc",
)
CURVES = {"train": "loss", "val": "val_loss", **{key: key for key in SAME}}  # name on the page: in metrics.jsonl
FACTS = {
    "device_name": "device",
    "processes": "processes",
    "parameters": "parameters",
    "torch": "PyTorch",
    "gptlab": "gptlab",
    "git_commit": "git commit",
}


class Follower:
    """One run, of which no byte of metrics.jsonl is read twice while the file grows.

    Args:
        path: the run directory.
        name: of the run on the page.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.run, self.name = RunDir(path), name
        self.points: dict[str, dict[int, float]] = {key: {} for key in CURVES}
        self.row = Listed(path)
        self.recipe: Recipe | None = None
        self._file, self._offset = (0, 0), 0
        self._seen: Any = None

    def update(self, most: int = MOST_POINTS) -> bool:
        """Read what is new; returns whether anything is. A run that has not changed costs four calls of `stat`.

        Args:
            most: points of a curve on the page.
        """
        row, recipe, seen = self.row, self.recipe, self._signature()
        if seen == self._seen:
            return False
        self._seen = seen
        self._read_on(most)
        self.row, self.recipe = read_run(self.run.path)
        self.row.differs = row.differs if recipe == self.recipe else {}
        self.row.best_val_loss, self.row.best_step = lowest(self.points["val"].items())
        return True

    def _signature(self) -> tuple[Any, ...]:
        found: list[tuple[int, int, int] | None] = []
        for name in ("recipe.toml", "metrics.jsonl", "result.json", "samples"):
            try:
                stat = os.stat(self.run.path / name)
                found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
            except OSError:
                found.append(None)
        return (*found, self.run.is_held())

    def _read_on(self, most: int) -> None:
        try:
            stat = os.stat(self.run.metrics_file)
        except OSError:
            return
        if (stat.st_dev, stat.st_ino) != self._file or stat.st_size < self._offset:  # it was cut when the run resumed
            self._file, self._offset = (stat.st_dev, stat.st_ino), 0
            self.points = {key: {} for key in CURVES}
        if stat.st_size - self._offset > LINE_BYTES * LINES_A_POINT * most:
            self._offset = _end_of_lines(self.run.metrics_file, stat.st_size)
            lines = self.run.read_metrics(LINES_A_POINT * most)
        else:
            with open(self.run.metrics_file, "rb") as file:
                file.seek(self._offset)
                new = file.read(stat.st_size - self._offset)
            whole = new.rfind(b"\n") + 1
            self._offset += whole or len(new) * (len(new) > MOST_LINE_BYTES)  # the last line may be half written
            lines = [line for text in new[:whole].split(b"\n") if (line := parse_metrics(text)) is not None]
        for line in lines:
            for key, logged in CURVES.items():
                if logged in line and np.isfinite(value := number(line[logged])):
                    self.points[key][line["step"]] = value
        for key, points in self.points.items():
            if len(points) > 3 * most:
                self.points[key] = dict(_thinned(points, 2 * most))

    def payload(self, most: int = MOST_POINTS) -> dict[str, Any]:
        """The run as JSON."""
        result = self._json("result.json")
        curves = {key: _two_lists(_thinned(points, most)) for key, points in self.points.items() if points}
        row = self.row
        return {
            "arm": self.name,
            "seed": None,
            "status": row.status,
            "ended": result.get("failed_at_step") if row.status == "diverged" else None,
            "folder": str(row.path),
            "recipe": row.recipe,
            "step": row.step,
            "limit": row.limit,
            "best": row.best_val_loss,
            "best_step": row.best_step,
            "rate": row.rate,
            "unit": row.unit,
            "left": row.seconds_left,
            "written": round(1000 * (time.time() - row.age_seconds)),
            "reason": row.reason,
            "differs": ", ".join(assignment(key, value) for key, value in row.differs.items()),
            "samples": samples_of(self.run),
            "results": _results(result, self._scores()) if result and not row.running else [],
            "settings": _settings(self.recipe) if self.recipe else [],
            "facts": _environment(self._json("environment.json")),
            **curves,
        }

    def _scores(self) -> dict[str, float]:
        return {key: points[max(points)] for key, points in self.points.items() if points and key in EVALUATION_NAMES}

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return self.run.read_json(name)
        except (UserError, OSError):  # the status says that the run is damaged
            return {}


MEASURED = ("completed", "diverged", "interrupted")  # statuses of runs that are worth a page


def write_pages(run: RunDir) -> None:
    """Write card.md and run.html of a run that has ended and measured something."""
    if run.read_json("result.json").get("status") in MEASURED:
        write_card(run)
        write_run_page(run)


def write_run_page(run: RunDir) -> Path:
    """Write run.html into the run's folder: one file that needs nothing else."""
    follower = Follower(run.path, run.path.resolve().name)
    follower.update()
    if follower.recipe:
        tell_apart([follower.row], {follower.row.path: follower.recipe})
    file = run.path / FILE
    write_atomically(file, fill_page(page_payload(follower.name, [follower.payload()]), RUNS))
    return file


def page_payload(title: str, runs: list[dict[str, Any]], **live: Any) -> dict[str, Any]:
    """What the script of the page takes; `live`: version, folder and wait, where a server answers it."""
    return {"title": title, "gptlab": VERSION, "studies": [{"name": title, "runs": runs}], **live}


def points_of_a_curve(runs: int) -> int:
    return min(MOST_POINTS, max(FEWEST_POINTS, ALL_POINTS // max(1, runs)))


def samples_of(run: RunDir) -> list[dict[str, Any]]:
    """Texts that were generated while the run trained: the first, the last and some between."""
    found = {}
    for file in (run.path / "samples").glob("step-*.txt"):
        if match := re.fullmatch(r"step-(\d+)", file.stem):
            found[int(match[1])] = file
    steps, texts = sorted(found), []
    kept = np.linspace(0, len(steps) - 1, min(MOST_SAMPLES, len(steps))).round().astype(int)
    for step in [steps[i] for i in kept]:
        try:
            with open(found[step], "rb") as opened:
                text = opened.read(MOST_SAMPLE_BYTES).decode("utf-8", "replace")
        except OSError:
            continue
        cut = text[:MOST_CHARACTERS] + "…" if len(text) > MOST_CHARACTERS else text
        texts.append({"step": step, "text": cut.rstrip("\n")})
    return texts


def _end_of_lines(file: Path, size: int) -> int:
    """The position behind the last line end before `size`."""
    with open(file, "rb") as opened:
        begin = max(0, size - MOST_LINE_BYTES)
        opened.seek(begin)
        return begin + opened.read(size - begin).rfind(b"\n") + 1


def _thinned(points: dict[int, float], most: int) -> list[tuple[int, float]]:
    steps = sorted(points)
    at, values = thin(np.array(steps, float), np.array([points[step] for step in steps]), most)
    return [(int(step), float(value)) for step, value in zip(at, values, strict=True)]


def _two_lists(points: list[tuple[int, float]]) -> list[list[float]]:
    return [[step for step, _ in points], [float(f"{value:.{DIGITS}g}") for _, value in points]]


def _settings(recipe: Recipe) -> list[list[str]]:
    """Settings that a reader asks for, and those that are not the default's: [dotted name, value]."""
    defaults = {key: field.get_default(call_default_factory=True) for key, field in settings()}
    always = {*ESSENTIAL, *(f"model.{key}" for key in ARCHITECTURE), "train.max_steps"}
    told = ("name", "description", "data.path")
    return [
        [key, _text(value)]
        for key, value in settings_of(recipe).items()
        if key not in told and (key in always or value != defaults[key])
    ]


def _results(result: dict[str, Any], measured: dict[str, float]) -> list[list[str]]:
    """Results as [name, text]; `measured`: the last value of a metric that the result may not have."""
    outcome = {**measured, **result}
    keys = [key for key in RESULT_NAMES if key in outcome]
    keys += [key for key in outcome if key not in (*keys, "status", "steps", "reason", "study", "arm", "group", "seed")]
    names = {**EVALUATION_NAMES, **RESULT_NAMES}
    rows = []
    for key in keys:
        if (value := outcome[key]) not in (None, "", {}, []):
            told = duration(value) if key in ("wall_seconds", "cpu_seconds") else _text(value)
            rows.append([names.get(key, key.replace("_", " ")), told])
    return rows


def _environment(environment: dict[str, Any]) -> list[list[str]]:
    rows = [[name, _text(environment[key])] for key, name in FACTS.items() if environment.get(key)]
    data = environment.get("data") or {}
    rows += [[f"data: {key.replace('_', ' ')}", _text(value)] for key, value in data.items() if value]
    if command := environment.get("command"):
        rows.append(["command", shlex.join(map(str, command)) if isinstance(command, list) else str(command)])
    return rows


def _text(value: Any) -> str:
    """A setting or a result as a reader writes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.5g}"
    return json.dumps(value, ensure_ascii=False)

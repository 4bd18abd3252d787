"""Study folders read for a report: what people have, unfinished, damaged and foreign runs among it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.config import Study, UserError
from gptlab.report.reading import Array, number, series
from gptlab.report.statistics import Runs
from gptlab.rundir import STATUSES, RunDir, open_study, run_name

CURVES = ("loss", "val_loss", "tokens_per_second", "samples_per_second")
WARM_UP = 10  # steps at a run's beginning that no speed is taken from: compilation and warm-up


@dataclass
class ReadRun:
    """A run as its folder and its summary tell it."""

    arm: str
    seed: int
    folder: Path
    status: str
    """How it ended, or `unfinished`."""
    result: dict[str, Any]
    """Its summary; {} while there is none."""
    curves: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    """Steps and values of what it logged: loss, val_loss, tokens_per_second, samples_per_second."""
    environment: dict[str, Any] = field(default_factory=dict)
    picks: dict[int, float] = field(default_factory=dict)
    """HellaSwag's rows to 1 where the pick by loss a token was right, else 0."""

    def value(self, key: str) -> float:
        """A number of a run that completed; NaN where there is none."""
        return number(self.result.get(key)) if self.status == "completed" else float("nan")

    def speeds(self, unit: str) -> list[float]:
        """Tokens or samples a second, a sample each logged stretch of the steady state; else the summary's median."""
        key = f"{unit}_per_second"
        steps, values = self.curves.get(key, (np.array([]), np.array([])))
        steady: list[float] = values[steps > WARM_UP].tolist()
        return steady or [self.result[key]] * (number(self.result.get(key)) > 0)


@dataclass
class ReadStudy:
    study: Study
    folder: Path
    runs: dict[tuple[str, int], ReadRun]
    """Those that were found, by arm and seed, in the study's order."""
    warnings: list[str]

    @property
    def unit(self) -> str:
        return "samples" if self.study.recipe.get("task") == "classify" else "tokens"

    def of(self, arm: str) -> list[ReadRun]:
        return [run for run in self.runs.values() if run.arm == arm]

    def values(self, arm: str, key: str) -> Runs:
        """An arm's runs in one metric, as the statistics take them."""
        runs = self.of(arm)
        return Runs({run.seed: run.value(key) for run in runs}, sum(run.status == "diverged" for run in runs))

    def speeds(self, arm: str) -> dict[int, list[float]]:
        """Seed to speeds, of runs that went on for long enough to have any, diverged ones among them."""
        found = {run.seed: run.speeds(self.unit) for run in self.of(arm) if run.status in ("completed", "diverged")}
        return {seed: speeds for seed, speeds in found.items() if speeds}


def read_study_folder(folder: str | Path) -> ReadStudy:
    """A study's folder, whatever state it is in; what cannot be used is named in `warnings` and left out.

    Raises:
        UserError: there is no study in the folder, or its study.toml is damaged.
    """
    folder = Path(folder)
    study = open_study(folder)
    warnings: list[str] = []
    found: dict[tuple[str, int], ReadRun] = {}
    for name in sorted({p.name for p in folder.iterdir() if p.is_dir()} | {p.stem for p in folder.glob("*.json")}):
        match = re.fullmatch(r"(.+)_seed(-?\d+)", name)
        if match is None or match[1] not in study.arms:
            if match or (folder / name / "recipe.toml").is_file():
                warnings.append(f"{folder / name} is left out: {study.name} has no such arm")
            continue
        try:
            run = _read_run(folder, study, match[1], int(match[2]))
        except (UserError, OSError, ValueError, KeyError, TypeError) as error:
            warnings.append(f"{folder / name} is left out: {error}")
            continue
        if run is not None:
            found[run.arm, run.seed] = run
    seeds = list(dict.fromkeys([*study.seeds, *sorted({seed for _, seed in found})]))
    order = [(arm, seed) for arm in study.arms for seed in seeds if (arm, seed) in found]
    warnings += _unequal(study, [found[key] for key in order])
    return ReadStudy(study, folder, {key: found[key] for key in order}, warnings)


def _read_run(folder: Path, study: Study, arm: str, seed: int) -> ReadRun | None:
    run = RunDir(folder / run_name(arm, seed))
    summary = RunDir(folder).read_json(f"{run_name(arm, seed)}.json")
    if not isinstance(summary, dict):
        raise ValueError("its summary is no table")
    if summary and summary.get("study") != study.name:  # a short trial that left its result beside the study's
        return None
    result = summary or run.read_json("result.json")
    status = result.get("status", "unfinished")
    if status not in (*STATUSES, "unfinished"):
        raise ValueError(f"status = {status}: there is no such status")
    lines = run.read_metrics()
    if not result and not lines:
        return None
    curves = {key: series(lines, key) for key in CURVES}
    return ReadRun(arm, seed, run.path, status, result, curves, run.read_json("environment.json"), _picks(run))


def _picks(run: RunDir) -> dict[int, float]:
    file = run.path / "hellaswag_results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return {row["ind"]: float(row["pick_norm"] == row["label"]) for row in rows}


def _unequal(study: Study, runs: list[ReadRun]) -> list[str]:
    """Sentences on what differs between runs besides their arm and seed, and makes them hard to compare."""
    facts = {
        "device": "device_name", "torch": "torch", "gptlab": "gptlab", "commit": "git_commit", "threads": "threads",
    }  # fmt: skip
    warnings = []
    for what, key in facts.items():
        seen: dict[str, list[ReadRun]] = {}
        for run in runs:
            if run.environment.get(key) is not None:
                seen.setdefault(str(run.environment[key]), []).append(run)
        if len(seen) > 1:
            warnings.append(f"{study.name}: runs differ in their {what}: {_counts(seen)}")
    data: dict[str, list[ReadRun]] = {}
    steps: dict[str, list[ReadRun]] = {}
    for run in runs:
        set_by_arm = json.dumps(study.arms[run.arm].settings)
        if "data" not in set_by_arm and (mark := run.environment.get("data", {}).get("fingerprint")):
            data.setdefault(mark, []).append(run)
        if run.status == "completed" and not any(key in set_by_arm for key in ("max_", "tokens_per_step")):
            work = {key: run.result.get(key) for key in ("steps", "tokens", "samples") if key in run.result}
            steps.setdefault(", ".join(f"{n:,} {key}" for key, n in work.items()), []).append(run)
    for what, seen in (("data", data), ("length", steps)):
        if len(seen) > 1:
            warnings.append(f"{study.name}: runs differ in their {what}: {_counts(seen)}")
    return warnings


def _counts(seen: Mapping[str, list[ReadRun]]) -> str:
    """`A (3 runs), B (arm seed 0)`: where few are unlike the rest they are named."""
    parts = []
    for value, runs in sorted(seen.items(), key=lambda item: -len(item[1])):
        named = ", ".join(f"{run.arm} seed {run.seed}" for run in runs)
        parts.append(f"{value} ({named if len(runs) <= 2 else f'{len(runs)} runs'})")
    return "; ".join(parts)

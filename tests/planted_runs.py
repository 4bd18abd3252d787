"""Run directories and read studies with planted values, for tests of effects and targets."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.config import Study
from gptlab.report.studies import ReadRun, ReadStudy

Value = Callable[[str, int], float | None]


def planted(
    study: Study,
    value: Value,
    ended: Mapping[tuple[str, int], str] | None = None,
    curve: Callable[[str, int], tuple[np.ndarray, np.ndarray]] | None = None,
) -> ReadStudy:
    """A study read from nowhere. A run without a value is missing, unless `ended` has its status.

    Args:
        curve: steps and validation losses of a run; none by default.
    """
    runs = {}
    for arm in study.arms:
        for seed in study.seeds:
            loss, status = value(arm, seed), (ended or {}).get((arm, seed), "completed")
            if loss is None and status == "completed":
                continue
            steps, losses = curve(arm, seed) if curve else (np.array([]), np.array([]))
            result: dict[str, Any] = {"status": status, "steps": 100, "tokens": 51200, "time_per_iter_ms": 20.0}
            if status == "completed":
                result[study.metric.name] = loss
            nothing = (np.array([]), np.array([]))
            curves = {"loss": nothing, "val_loss": (steps, losses), "tokens_per_second": nothing}
            runs[arm, seed] = ReadRun(arm, seed, Path(f"{arm}_seed{seed}"), status, result, curves)
    return ReadStudy(study, Path("results/made"), runs, [])


def write_runs(folder: Path, study: Study, value: Value) -> None:
    """The folder of a study with a summary and a curve of validation losses for each run."""
    folder.mkdir(parents=True)
    (folder / "study.toml").write_text(study.to_toml(), encoding="utf-8")
    for arm in study.arms:
        for seed in study.seeds:
            run, final = folder / f"{arm}_seed{seed}", value(arm, seed)
            if final is None:
                continue
            run.mkdir()
            (run / "recipe.toml").write_text(study.build(arm, seed).to_toml(), encoding="utf-8")
            lines = [{"step": step, "val_loss": final + 1 - step / 100} for step in range(0, 101, 20)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            result = {"status": "completed", "steps": 100, "tokens": 51200, "final_val_loss": final}
            result |= {"time_per_iter_ms": 20.0, "tokens_per_second": 25600.0}
            (run / "result.json").write_text(json.dumps(result), encoding="utf-8")
            summary = {"study": study.name, "arm": arm, "group": "core", "seed": seed, **result}
            (folder / f"{run.name}.json").write_text(json.dumps(summary), encoding="utf-8")

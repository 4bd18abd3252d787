"""Study folders of runs that something else trained, beside which gptlab trains further arms."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.config import Study, read_layer
from gptlab.config.recipe import build_recipe, validated
from gptlab.errors import DataError, RunError
from gptlab.files import printable
from gptlab.logs.naming import VALIDATION, plain
from gptlab.logs.read import Logs
from gptlab.logs.run import Curve, LogRun
from gptlab.progress import Tell, tell_nobody
from gptlab.rundir import RESULT, RunDir, open_study, run_name, write_atomically
from gptlab.study.folder import has_begun, study_files

BASELINES = ("baseline", "base", "control", "default")
TRAINING = ("train_loss", "training_loss")
KEYS = {**dict.fromkeys(VALIDATION, "final_val_loss"), **dict.fromkeys(("loss", *TRAINING), "final_train_loss")}


def import_logs(
    logs: Logs, out: Path, recipe: str = "", baseline: str = "", better: str = "", tell: Tell = tell_nobody
) -> tuple[Study, list[str]]:
    """Write a study's folder of runs that were measured elsewhere. `study report` reads it, `study run` adds arms.

    Args:
        out: the folder, which must be new or empty.
        recipe: name, path or run of the settings that arms trained later share; default: gptlab's own, and as
            many steps as the longest run.
        baseline: default: an arm that is called so, or the one with the most runs.

    Returns:
        The study, and what was changed on the way, one sentence each.

    Raises:
        UserError: there is something in the folder, no arm has the baseline's name, or a run cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists and is not an empty folder: --out names a new one")
    remarks = list[str]()
    arms = _clean({str(run.arm) for run in logs.runs}, remarks)
    for run in logs.runs:
        run.arm = arms[str(run.arm)]
    longest = max((int(steps[-1]) for run in logs.runs for steps, _ in run.curves.values() if len(steps)), default=0)
    layer = read_layer(recipe) if recipe else {"train": {"max_steps": max(1, longest)}}
    shared = {key: value for key, value in layer.items() if key not in ("name", "description", "seed")}
    build_recipe(shared)
    key = KEYS.get(plain(logs.metric), logs.metric)
    forms = ", ".join(sorted({run.form for run in logs.runs}))
    content = {
        "name": re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9_.+=,-]+", "-", out.resolve().name).lstrip("-_.+=,") or "imported",
        "description": f"{len(logs.runs)} runs that were measured elsewhere, read from {forms}",
        "recipe": shared,
        "arms": {arm: {"note": "measured elsewhere", "measured": _places(logs, arm)} for arm in sorted(arms.values())},
        "seeds": sorted({int(run.seed or 0) for run in logs.runs}),
        "baseline": arms.get(baseline, baseline) or _baseline(logs),
        "metric": {"name": key, "better": better or logs.better},
    }
    study = validated(Study, content, f"{out}: ")
    for run in logs.runs:
        _check_steps(run)
    for done, run in enumerate(logs.runs):
        tell(f"writing {out}", done, len(logs.runs))
        _write(run, study, out, logs.metric, key)
    for name, text in study_files(out, study, ()).items():
        write_atomically(out / name, text)
    if key not in KEYS.values():
        remarks.append(f"runs of gptlab have no {printable(key)}, so arms that it trains cannot be compared in it")
    return open_study(out), remarks


def _clean(names: set[str], remarks: list[str]) -> dict[str, str]:
    """Names to names that a study's arms may have."""
    clean: dict[str, str] = {}
    for name in sorted(names):
        base = re.sub(r"[^A-Za-z0-9_.+=,-]+", "-", name).strip("-").lstrip("_.+=,-") or "arm"
        new, more = base, 2
        while new in clean.values():
            new, more = f"{base}-{more}", more + 1
        clean[name] = new
        if new != name:
            remarks.append(f"the arm {printable(name)} is called {new}: an arm has letters, digits and _ . + = , -")
    return clean


def _places(logs: Logs, arm: str) -> str:
    """Where the runs of an arm come from."""
    sources = list(dict.fromkeys(f"{run.form} {printable(str(run.source))}" for run in logs.runs if run.arm == arm))
    return sources[0] + (f" and {len(sources) - 1} more" if len(sources) > 1 else "")


def _baseline(logs: Logs) -> str:
    counts = Counter(str(run.arm) for run in logs.runs)
    named = [arm for arm in counts if arm.lower() in BASELINES]
    return min(named or counts, key=lambda arm: (-counts[arm], arm))


def _check_steps(run: LogRun) -> None:
    for steps, _ in run.curves.values():
        if not (np.equal(np.mod(steps, 1), 0) & (steps >= 0) & (steps < 2**53)).all():
            raise DataError(f"{run.source}: its steps are no whole numbers from 0 on; --step names another column")


def _lines(run: LogRun, metric: str) -> str:
    """metrics.jsonl: the judged validation loss is `val_loss` there, and the training loss `loss`."""
    curves: dict[str, Curve] = dict(run.curves)
    if metric in curves and plain(metric) in VALIDATION:
        curves = {"val_loss": curves.pop(metric), **{k: v for k, v in curves.items() if k != "val_loss"}}
    training = next((name for name in curves if plain(name) in TRAINING), None)
    if training is not None and "loss" not in curves:
        curves["loss"] = curves.pop(training)
    rows: dict[int, dict[str, Any]] = {}
    for name, (steps, values) in curves.items():
        if name == "step":
            continue
        for step, value in zip(steps.tolist(), values.tolist(), strict=True):
            rows.setdefault(int(step), {"step": int(step)})[name] = value if math.isfinite(value) else None
    return "".join(json.dumps(rows[step], allow_nan=False) + "\n" for step in sorted(rows))


def _write(run: LogRun, study: Study, out: Path, metric: str, key: str) -> None:
    folder = RunDir(out / run_name(str(run.arm), int(run.seed or 0)))
    folder.path.mkdir(parents=True)
    result: dict[str, Any] = {"status": {"unfinished": "interrupted"}.get(run.status, run.status)}
    steps, values = run.curves.get(metric, (np.array([]), np.array([])))
    result["steps"] = max((int(x[-1]) for x, _ in run.curves.values() if len(x)), default=0)
    others = {k: v for k, v in run.result.items() if isinstance(v, int | float) and k not in RESULT}
    result |= {name: value if math.isfinite(value) else None for name, value in others.items()}
    last = float(values[-1]) if len(values) else float(run.result.get(metric, math.nan))
    result[key] = last if math.isfinite(last) else None
    if result["status"] == "completed" and (len(values) or metric in run.result) and not math.isfinite(last):
        at = int(steps[-1]) if len(steps) else result["steps"]
        result |= {"status": "diverged", "failed_at_step": at, "reason": f"its last {metric} is no number"}
    folder.metrics_file.write_text(_lines(run, metric), encoding="utf-8")
    folder.write_json("result.json", result)
    where = {"measured": "elsewhere", "source": str(run.source), "form": run.form, "name": run.name}
    settings = {k: v for k, v in run.settings.items() if isinstance(v, str | bool | int) or _is_finite(v)}
    folder.write_json("environment.json", {**where, "settings": settings})
    summary = {"study": study.name, "arm": run.arm, "group": "core", "seed": run.seed, **result}
    RunDir(out).write_json(f"{folder.path.name}.json", summary)


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def study_file_of(folder: Path, file: Path | None) -> str:
    """The text of a study file of the study in a folder, to be edited.

    Raises:
        RunError: there is no study in the folder.
    """
    study = open_study(folder)
    text = study.to_toml().replace("\nquestions = []\n", "\n")  # or [[questions]] could not follow
    name, where = shlex.quote(str(file or "FILE.toml")), shlex.quote(str(folder))
    if study.measured:
        run = f"gptlab study run {name} --out {where}\n#   gptlab study report {where}"
        about = "An arm with `measured` was measured elsewhere and is not trained."
    else:
        begun = has_begun(folder, study)
        run = f"gptlab study run {name} --out results/NEW" + f"    # {where} keeps its own arms" * begun
        about = "All of it can be changed; runs of other settings need another folder."
    return f"""\
# The study in {folder}. {about}
# Add arms, each with the settings that differ from [recipe], and questions, such as
#
#   [arms.mine]
#   optim.lr = 1e-3
#
#   [[questions]]
#   id = "mine"
#   claim = "mine is better than {study.baseline}"
#   contrast = ["mine", "{study.baseline}"]
#   confirmed_if = "better"
#
# and then
#   {run}

{text}"""

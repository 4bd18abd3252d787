"""Which runs a study has, in which order they start, and whether the extended arms may start."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptlab.config import Recipe, Study, shipped
from gptlab.data.manifest import missing_dataset
from gptlab.errors import ConfigError
from gptlab.rundir import RunDir, open_study, run_name
from gptlab.study.table import read_summary


@dataclass
class PlannedRun:
    """One arm with one seed."""

    arm: str
    seed: int
    group: str
    """core or extended."""
    recipe: Recipe
    dir: RunDir
    attempts: int = 0

    def __str__(self) -> str:
        return f"{self.arm} seed {self.seed}"


def find_study(name: str) -> tuple[str, Path | None]:
    """Resolve the argument of `gptlab study run`: a shipped name, a file, or the folder of a study.

    Returns:
        (name or file for load_study, the folder if the study was started before)
    """
    path = Path(name)
    if name in shipped("studies"):
        return name, None
    if path.is_dir():
        open_study(path)
        return str(path / "study.toml"), path
    started = path.name == "study.toml" and (path.parent / ".lock").is_file()
    return name, path.parent if started else None


def first_seeds(study: Study, n: int) -> list[int]:
    """The first n seeds of a study. If the study names fewer, they are counted on from its largest seed."""
    if n < 1:
        raise ConfigError(f"seeds = {n}: must be at least 1")
    more = range(max(study.seeds) + 1, max(study.seeds) + 1 + n - len(study.seeds))
    return [*study.seeds, *more][:n]


def planned_runs(
    study: Study, folder: Path, arms: Sequence[str] | None, seeds: Sequence[int] | None
) -> list[PlannedRun]:
    """The runs in the order in which they start: core arms first, seed by seed.

    Raises:
        ConfigError: an arm is unknown, or a setting is out of bounds.
    """
    for arm in arms or ():
        if arm not in study.arms:
            close = difflib.get_close_matches(arm, study.arms, n=1, cutoff=0.4)
            hint = f"did you mean '{close[0]}'?" if close else f"it has {', '.join(study.arms)}"
            raise ConfigError(f"study {study.name} has no arm '{arm}'; {hint}")
    return [
        PlannedRun(name, seed, arm.group, study.build(name, seed), RunDir(folder / run_name(name, seed)))
        for group in ("core", "extended")
        for seed in dict.fromkeys(seeds if seeds is not None else study.seeds)
        for name, arm in study.arms.items()
        if arm.group == group and (arms is None or name in arms)
    ]


def check_datasets(runs: Sequence[PlannedRun]) -> None:
    """Raise ConfigError if the dataset of a run is not prepared."""
    missing = {}
    for run in runs:
        data = run.recipe.data
        for path in data.mixture or [data.folder]:
            if not Path(path).is_dir():
                missing[path] = str(missing_dataset(path, data.corpus, data.tokenizer))
    if missing:
        raise ConfigError("\n".join(missing.values()))


def sanity_gate(study: Study, folder: Path, runs: Sequence[PlannedRun]) -> list[str]:
    """What is wrong with the core runs, one sentence per run; [] opens the gate for the extended arms.

    Every completed run must have lowered its loss, and the baseline must have completed.
    """
    problems = []
    for run in runs:
        summary = read_summary(folder, study, run.arm, run.seed)
        loss = summary.get("final_val_loss")
        finite = loss is not None and math.isfinite(loss)
        status = summary.get("status", "unfinished")
        if run.arm == study.baseline and not (status == "completed" and finite):
            problems.append(f"{run}, the baseline, is {status} and has no finite loss to compare with")
        elif status == "completed":
            first = next((line["val_loss"] for line in run.dir.read_metrics() if "val_loss" in line), None)
            if first is not None and not (finite and loss < first):
                problems.append(f"{run} ended with val_loss {loss}, no lower than its first val_loss {first}")
    return problems

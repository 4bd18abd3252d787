"""Which runs a study has, in which order they start, and whether the extended arms may start."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptlab.config import Recipe, Study, arms_like, shipped
from gptlab.data.manifest import missing_dataset
from gptlab.errors import ConfigError, RunError
from gptlab.rundir import RunDir, open_study, run_name
from gptlab.study.order import core_arms, run_order
from gptlab.study.table import read_summary

# A run with one of these statuses is not trained again. Failed and not applicable runs are tried at the next start.
RESULTS = ("completed", "diverged", "out_of_memory")
MOST_SEEDS = 1000  # of a study on the command line


@dataclass
class PlannedRun:
    """One arm with one seed."""

    arm: str
    seed: int
    group: str
    """core or extended."""
    recipe: Recipe
    dir: RunDir
    gate: int | None = None
    """The seed whose core arms open the sanity gate; None: no run waits."""
    trunk: tuple[RunDir, int] | None = None
    """The run that this one branches off, and at which step; None if it starts from the beginning."""
    attempts: int = 0

    @property
    def can_branch(self) -> bool:
        """Whether there is a checkpoint to start from: the trunk's at the branch, or one of its own."""
        if self.trunk is None:
            return False
        trunk, step = self.trunk
        steps = [*trunk.checkpoints.glob(f"step-{step:08d}"), *self.dir.checkpoints.glob("step-*")]
        return any((path / "manifest.json").is_file() for path in steps)

    @property
    def opens_gate(self) -> bool:
        return self.group == "core" and self.seed == self.gate

    @property
    def behind_gate(self) -> bool:
        return self.group == "extended" and self.gate is not None

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
    if not 1 <= n <= MOST_SEEDS:
        raise ConfigError(f"seeds = {n}: must be at least 1 and at most {MOST_SEEDS}")
    more = range(max(study.seeds) + 1, max(study.seeds) + 1 + n - len(study.seeds))
    return [*study.seeds, *more][:n]


def planned_runs(
    study: Study, folder: Path, arms: Sequence[str] | None, seeds: Sequence[int] | None
) -> list[PlannedRun]:
    """The runs in the order in which they start, see `run_order`.

    Raises:
        ConfigError: an arm is unknown or was measured elsewhere, or a setting is out of bounds.
    """
    if set(study.measured) >= set(study.arms):
        raise ConfigError(
            f"study {study.name}: all arms were measured elsewhere; add a table [arms.NAME] with settings"
        )
    for arm in arms or ():
        if arm in study.measured:
            raise ConfigError(f"study {study.name}: arm {arm} was measured elsewhere ({study.arms[arm].measured})")
        if not arms_like(study.arms, arm):
            close = difflib.get_close_matches(arm, study.arms, n=1, cutoff=0.4)
            hint = f"did you mean '{close[0]}'?" if close else f"it has {', '.join(study.arms)}"
            raise ConfigError(f"study {study.name} has no arm '{arm}'; {hint}")
    named = set(study.arms if arms is None else (name for arm in arms for name in arms_like(study.arms, arm)))
    asked = [arm for arm in study.arms if arm in named and arm not in study.measured]
    seeds = study.seeds if seeds is None else seeds
    gate = gate_seed(study, folder, asked, seeds)
    trunks = {arm: study.trunk(arm) for arm in asked}
    return [
        PlannedRun(
            arm,
            seed,
            study.arms[arm].group,
            study.build(arm, seed),
            RunDir(folder / run_name(arm, seed)),
            gate,
            (RunDir(folder / run_name(trunk[0], seed)), trunk[1]) if (trunk := trunks[arm]) else None,
        )
        for arm, seed in run_order(study, asked, seeds, gate)
    ]


def gate_seed(study: Study, folder: Path, arms: Collection[str], seeds: Sequence[int]) -> int | None:
    """The seed whose core arms open the sanity gate: the first one asked for.

    If the study's first seed has opened the gate before, it is that seed, and no run has to come first. None: there is
    no gate, because no extended arm is asked for, or not all core arms are.
    """
    core = core_arms(study)
    if not core or not set(core) <= set(arms) or set(arms) <= set(core):
        return None
    first = study.seeds[0]
    ended = all(_summary(folder, study, arm, first).get("status") in RESULTS for arm in core)
    return first if ended and not sanity_gate(study, folder, first) else seeds[0]


def _summary(folder: Path, study: Study, arm: str, seed: int) -> dict[str, Any]:
    """The summary of a run; a damaged one is none, and is written anew from the run's result."""
    try:
        return read_summary(folder, study, arm, seed)
    except RunError:
        return {}


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


def sanity_gate(study: Study, folder: Path, gate: int, others: Sequence[int] = ()) -> list[str]:
    """What is wrong with the core runs, one sentence per run; [] opens the gate for the extended arms.

    Every completed run must have lowered its loss, and the baseline must have completed.

    Args:
        gate: the seed whose core runs must have ended.
        others: seeds whose core runs count as soon as they have a result.
    """
    problems = []
    for seed, arm in itertools.product(dict.fromkeys([gate, *others]), core_arms(study)):
        summary = _summary(folder, study, arm, seed)
        loss = summary.get("final_val_loss")
        finite = loss is not None and math.isfinite(loss)
        status = summary.get("status", "unfinished")
        if seed != gate and status not in RESULTS:
            continue
        if arm == study.baseline and not (status == "completed" and finite):
            problems.append(f"{arm} seed {seed}, the baseline, is {status} and has no finite loss to compare with")
        elif status == "completed":
            lines = RunDir(folder / run_name(arm, seed)).read_metrics()
            first = next((line["val_loss"] for line in lines if "val_loss" in line), None)
            if first is not None and not (finite and loss < first):
                problems.append(
                    f"{arm} seed {seed} ended with val_loss {loss}, no lower than its first val_loss {first}"
                )
    return problems

"""Study folders read for a report, in any state: with unfinished, damaged and foreign runs in them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.config import Recipe, Study, arms_like
from gptlab.errors import UserError
from gptlab.progress import Tell, tell_nobody
from gptlab.report.reading import Array, number, series, settings_of
from gptlab.report.timing import Pace, pace
from gptlab.report.verdicts import Runs
from gptlab.rundir import RegisteredPlan, RunDir, open_study, read_plan, run_name
from gptlab.status import STATUSES

# other facts that runs may differ in: name in a sentence, key in environment.json
FACTS = {"device": "device_name", "torch": "torch", "gptlab": "gptlab", "commit": "git_commit", "threads": "threads"}
CURVES = ("loss", "val_loss", "tokens_per_second", "samples_per_second")
# settings that a run resolves itself, or that do not change what is compared
OWN = ("name", "description", "data.", "compile.", "checkpoint.", "log.", "sample.", "hellaswag.path", "train.device")
WARM_UP = 10  # first steps of a run, without a speed: compilation and warm-up


@dataclass
class ReadRun:
    """A run, from its folder and its summary."""

    arm: str
    seed: int
    folder: Path
    status: str
    """How it ended, or `unfinished`."""
    result: dict[str, Any]
    """Its summary; {} if there is none yet."""
    curves: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    """Steps and values of the logged loss, val_loss, tokens_per_second and samples_per_second."""
    environment: dict[str, Any] = field(default_factory=dict)
    picks: dict[int, float] = field(default_factory=dict)
    """HellaSwag row to 1 if the ending with the lowest loss per token was right, else 0."""
    differs: list[str] = field(default_factory=list)
    """Settings of its recipe that differ from the study's."""
    damaged_lines: int = 0
    """Of metrics.jsonl; they are left out of the curves."""

    def value(self, key: str) -> float:
        """A number from the result of a completed run; NaN if there is none."""
        return number(self.result.get(key)) if self.status == "completed" else float("nan")

    def speeds(self, unit: str) -> Array:
        """Tokens or samples per second of each logged interval after warm-up; else the summary's median."""
        key = f"{unit}_per_second"
        steps, values = self.curves.get(key, (np.array([]), np.array([])))
        steady, rate = values[steps > WARM_UP], number(self.result.get(key))
        return steady if len(steady) else np.array([rate] if rate > 0 else [])


@dataclass(frozen=True)
class Elsewhere:
    """What a report says of runs that something else trained, in place of their recipe and machine."""

    command: str
    """That judged them."""
    sources: list[str]
    """Files and folders that they were read from."""
    paired: bool = True
    """Whether one seed is the same seed in all arms."""
    all_pairs: bool = False
    """Whether each arm is compared with each other, and not with the baseline alone."""
    tabled: frozenset[str] = frozenset()
    """Questions that the table of a target answers, by their ids."""
    notes: list[str] = field(default_factory=list)
    """How the runs were read."""


Look = tuple[str, str, float, tuple[str, ...]]
"""What a comparison asks: study, metric, margin, and the two arms in either order."""


def look_at(of: Mapping[str, Any]) -> Look:
    """The question of a comparison in a report or a ledger."""
    return of["study"], of["metric"], float(of.get("margin") or 0.0), tuple(sorted((of["a"], of["b"])))


@dataclass
class ReadStudy:
    """A study with its runs, which do not change: what is worked out of them for one question is kept for the next."""

    study: Study
    folder: Path
    runs: dict[tuple[str, int], ReadRun]
    """The runs that were found, by arm and seed, in the study's order."""
    warnings: list[str]
    plan: RegisteredPlan | None = None
    """What the study asked at its first run; None if that was not recorded."""
    elsewhere: Elsewhere | None = None
    """Of runs that gptlab did not train; they have no recipe."""
    ledger: Mapping[tuple[Look, str], tuple[float, int]] | None = None
    """Adjusted p of all that was asked so far, as `gptlab.report.ledger.family_of` gives it; None: each report has its
    own families."""

    _paces: dict[tuple[str, int], Pace | None] = field(default_factory=dict, init=False, repr=False, compare=False)
    _digests: dict[tuple[str, str], str] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def paired(self) -> bool:
        """Whether arms are compared seed by seed."""
        return not self.study.measured if self.elsewhere is None else self.elsewhere.paired

    @cached_property
    def unit(self) -> str:
        """What the runs count: "tokens" or "samples"; "" if that is not known."""
        if self.elsewhere:
            return ""
        counts = {
            unit for run in self.runs.values() for unit in ("tokens", "samples") if run.result.get(f"{unit}_per_second")
        }
        return "samples" if counts == {"samples"} else "tokens"

    def of(self, arm: str) -> list[ReadRun]:
        """The runs of an arm, or of all arms that match a pattern such as `adamw_*`."""
        if arm in self.study.arms:
            return list(self._by_arm.get(arm, ()))
        names = arms_like(self.study.arms, arm)
        return [run for run in self.runs.values() if run.arm in names]

    @cached_property
    def _by_arm(self) -> dict[str, list[ReadRun]]:
        found: dict[str, list[ReadRun]] = {}
        for run in self.runs.values():
            found.setdefault(run.arm, []).append(run)
        return found

    def values(self, arm: str, key: str) -> Runs:
        """An arm's runs in one metric, as the statistics take them. Runs that the hardware cannot do are none."""
        runs = [run for run in self.of(arm) if run.status != "not_applicable"]
        lost = [run.seed for run in runs if run.status == "diverged"]
        return Runs({run.seed: run.value(key) for run in runs}, len(lost), lost)

    def digest(self, sides: Sequence[str], key: str) -> str:
        """A hash of what a comparison of two arms in a metric rests on, the same in either direction."""
        for side in sides:
            if (side, key) not in self._digests:
                values = {f"{run.arm} {run.seed}": run.value(key) for run in self.of(side)}
                known = {name: value for name, value in sorted(values.items()) if math.isfinite(value)}
                self._digests[side, key] = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
        return "-".join(sorted(self._digests[side, key] for side in sides))

    def paces(self, arm: str) -> dict[int, Pace]:
        """Seed to speed, for completed runs with any logged speed."""
        unit, found = self.unit, {}
        for run in self.of(arm):
            if run.status == "completed" and (one := self._pace(run, unit)):
                found[run.seed] = one
        return found

    def _pace(self, run: ReadRun, unit: str) -> Pace | None:
        key = (run.arm, run.seed)
        if key not in self._paces:
            speeds = run.speeds(unit)
            self._paces[key] = pace(speeds) if len(speeds) else None
        return self._paces[key]


def read_study_folder(folder: str | Path, tell: Tell = tell_nobody) -> ReadStudy:
    """Read a study's folder in any state. What cannot be used is left out and named in `warnings`.

    Args:
        tell: called before each run.

    Raises:
        UserError: the folder has no study, or its study.toml is damaged.
    """
    folder = Path(folder)
    study = open_study(folder)
    warnings: list[str] = []
    foreign: dict[str, list[str]] = {}  # other studies' summaries
    found: dict[tuple[str, int], ReadRun] = {}
    names = sorted({p.name for p in folder.iterdir() if p.is_dir()} | {p.stem for p in folder.glob("*.json")})
    for done, name in enumerate(names):
        tell(f"reading {folder.name}", done, len(names))
        match = re.fullmatch(r"(.+)_seed(-?\d+)", name)
        if match is None or match[1] not in study.arms:
            if match or (folder / name / "recipe.toml").is_file():
                warnings.append(f"{folder / name} is left out: {study.name} has no such arm")
            continue
        try:
            run = _read_run(folder, study, match[1], int(match[2]), foreign)
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.append(f"{folder / name} is left out: {error}")
            continue
        if run is not None:
            found[run.arm, run.seed] = run
    for other, names in foreign.items():
        warnings.append(f"{', '.join(names)} in {folder} left out: of the study {other!r}")
    for run in found.values():
        if run.status == "completed" and not math.isfinite(run.value(study.metric.name)):
            warnings.append(f"{run.folder} completed without a {study.metric.name}")
        if n := run.damaged_lines:
            warnings.append(f"{run.folder}/metrics.jsonl: {n} damaged line{'s' * (n > 1)} left out of the curves")
    seeds = list(dict.fromkeys([*study.seeds, *sorted({seed for _, seed in found})]))
    order = [(arm, seed) for arm in study.arms for seed in seeds if (arm, seed) in found]
    warnings += _unlike_runs(study, [found[key] for key in order])
    if emulated := list(dict.fromkeys(arm for arm, seed in order if "float8" in found[arm, seed].environment)):
        warnings.append(
            f"{study.name}: float8 was emulated in float32 in {', '.join(emulated)}, so their speed says nothing about "
            "hardware with float8 matrix units"
        )
    plan = read_plan(folder, study)
    warnings += [f"{study.name}: {remark}" for remark in plan.remarks] if plan else []
    return ReadStudy(study, folder, {key: found[key] for key in order}, warnings, plan)


def _read_run(folder: Path, study: Study, arm: str, seed: int, foreign: dict[str, list[str]]) -> ReadRun | None:
    run, name = RunDir(folder / run_name(arm, seed)), f"{run_name(arm, seed)}.json"
    summary = _checked(RunDir(folder).read_json(name), "its summary")
    if summary and summary.get("study") != study.name:  # of a short trial in the same folder
        foreign.setdefault(str(summary.get("study")), []).append(name)
        summary = {}
    if summary and (summary.get("arm"), summary.get("seed")) != (arm, seed):
        raise ValueError(f"its summary is of {summary.get('arm')} seed {summary.get('seed')}")
    result = summary or _checked(run.read_json("result.json"), "its result")
    status = result.get("status", "unfinished")
    if status not in (*STATUSES, "unfinished"):
        raise ValueError(f"status = {status}: unknown status")
    lines, damaged = run.read_metrics(), run.damaged_lines
    if not result and not lines:
        return None
    curves = {key: series(lines, key) for key in CURVES}
    environment = _checked(run.read_json("environment.json"), "its environment")
    environment["data"] = _checked(environment.get("data") or {}, "its environment's data")
    read = ReadRun(arm, seed, run.path, status, result, curves, environment, _picks(run))
    read.damaged_lines = damaged
    if run.exists():
        read.differs = _changed_settings(study.build(arm, seed), run.read_recipe())
    return read


def _checked(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not a JSON object")
    return value


def _changed_settings(planned: Recipe, trained: Recipe) -> list[str]:
    """Settings of a run that differ from the study's, without those that a run resolves or may change."""
    found, of_run = [], settings_of(trained)
    for name, wanted in settings_of(planned).items():
        got = of_run[name]
        resolved = wanted in ("", "auto", "fastest") or (type(wanted) is int and wanted == 0)
        resolved = resolved or (name.startswith("model.") and bool(planned.train.init_from))
        if wanted != got and not resolved and not name.startswith(OWN):
            found.append(f"{name} = {got}")
    return found


def _picks(run: RunDir) -> dict[int, float]:
    file = run.path / "hellaswag_results.jsonl"
    picks: dict[int, float] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # a half-written last line
            row = json.loads(line)
            picks[int(row["ind"])] = float(row["pick_norm"] == row["label"])
    return picks


def _unlike_runs(study: Study, runs: list[ReadRun]) -> list[str]:
    """Warnings about what differs between runs besides arm and seed, and makes them hard to compare."""

    groups: dict[str, dict[str, list[ReadRun]]] = {what: {} for what in (*FACTS, "data", "length")}
    changed: dict[str, list[ReadRun]] = {}
    for run in runs:
        own, environment = study.arms[run.arm].settings, run.environment
        facts = {what: environment.get(key) for what, key in FACTS.items()}
        if "data" not in own:  # else the arm differs in its data on purpose, and below in its length
            facts["data"] = environment["data"].get("fingerprint") or None
        if run.status == "completed" and not {"train", "batch"} & own.keys():
            known = ("steps",) if study.measured else ("steps", "tokens", "samples")
            work = {key: number(run.result.get(key)) for key in known if key in run.result}
            facts["length"] = ", ".join(f"{n:,.0f} {key}" for key, n in work.items())
        for what, value in facts.items():
            if value is not None:
                groups[what].setdefault(str(value), []).append(run)
        if run.differs:
            changed.setdefault(", ".join(run.differs), []).append(run)
    warnings = [
        f"{study.name}: runs differ in their {what}: {_listed(seen)}" for what, seen in groups.items() if len(seen) > 1
    ]
    if changed:
        warnings.append(f"{study.name}: runs were trained with other settings than the study's: {_listed(changed)}")
    return warnings


def _listed(seen: Mapping[str, list[ReadRun]]) -> str:
    """`A (3 runs); B (arm seed 0)`: one or two runs are named, more are counted."""
    parts = []
    for value, runs in sorted(seen.items(), key=lambda item: -len(item[1])):
        named = ", ".join(f"{run.arm} seed {run.seed}" for run in runs)
        parts.append(f"{value} ({named if len(runs) <= 2 else f'{len(runs)} runs'})")
    return "; ".join(parts)

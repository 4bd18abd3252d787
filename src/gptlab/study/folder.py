"""The folder of a study: study.toml, plan.json, one folder per run, and the summary of each run that has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptlab.config import Recipe, Study, may_differ, plan_hash, settings, study_plan, value_of
from gptlab.errors import ConfigError, Locked, RunError
from gptlab.rundir import PLAN, RunDir, new_plan, open_study, run_name, write_atomically
from gptlab.study.runs import MOST_SEEDS, RESULTS, PlannedRun
from gptlab.study.table import read_summary


def study_in_use(folder: Path) -> Locked:
    """The error of `locks.hold` for the folder of a study."""
    return Locked(f"{folder} is being run by another process; `gptlab study status {folder}` shows its progress")


def keep_study(folder: Path, study: Study, seeds: Sequence[int]) -> Study:
    """Write study.toml, and before the first run plan.json. Returns the study with all seeds asked for so far.

    Raises:
        RunError: the folder holds another study.
    """
    for name, text in study_files(folder, study, seeds).items():
        file = folder / name
        if not file.is_file() or file.read_bytes() != text.encode():
            write_atomically(file, text)
    return open_study(folder)


def study_files(folder: Path, study: Study, seeds: Sequence[int]) -> dict[str, str]:
    """The texts of study.toml, with all seeds asked for so far, and of plan.json where it is to be written.

    The plan is registered before the first run and then never again. A folder of an earlier version of gptlab may have
    runs and no plan: what its study.toml asked so far is registered, as late.

    Raises:
        RunError: the folder holds another study.
    """
    before = open_study(folder) if (folder / "study.toml").is_file() else None
    if before is not None and (differ := study_differences(before, study)):
        raise RunError(f"{folder} holds another study: {'; '.join(differ)}; --out names another folder for this study")
    stored = [] if before is None else before.seeds
    whole = study.model_copy(update={"seeds": list(dict.fromkeys([*study.seeds, *stored, *seeds]))})
    begun, kept = has_begun(folder, study), RunDir(folder).read_json(PLAN)
    files = {}
    if not kept or (not begun and kept.get("sha256") != plan_hash(study_plan(study))):
        files[PLAN] = new_plan(before if before is not None and begun else study, late=begun)
    return {**files, "study.toml": whole.to_toml()}  # the plan first: a kill between them leaves the earlier study.toml


def rule_of(study: Study, folder: Path, until_decided: bool, most_seeds: int | None) -> Study:
    """The study with the rule by which its folder was begun, or that is asked for now.

    Raises:
        ConfigError: a number of seeds without the rule, or smaller than the number of seeds that the study has; the
            rule for arms that were measured elsewhere.
        RunError: runs have begun with another number of seeds, for which looks are paid.
    """
    before = open_study(folder) if (folder / "study.toml").is_file() else None
    kept = before is not None and before.until_decided
    if not (until_decided or study.until_decided or kept):
        if most_seeds is not None:
            raise ConfigError("--most-seeds needs --until-decided")
        return study
    if study.ladder is not None:
        raise ConfigError(
            "--until-decided adds seeds to some arms, and a ladder has the same at every rung: leave it out"
        )
    if study.measured:
        raise ConfigError(f"--until-decided adds seeds, and {study.measured[0]} was measured elsewhere: leave it out")
    most = before.most_seeds if before is not None and kept else study.most_seeds
    most = most if most_seeds is None else most_seeds
    if before is not None and kept and most != before.most_seeds and has_begun(folder, before):
        raise RunError(
            f"{folder} was begun with most_seeds = {before.most_seeds}, and its looks are paid for up to there: use "
            f"--most-seeds {before.most_seeds}, or name another folder with --out"
        )
    return study.model_copy(update={"until_decided": True, "most_seeds": most})


def check_seeds(study: Study, folder: Path, seeds: Sequence[int]) -> None:
    """Raise ConfigError if a study that runs until it is decided would have more seeds than are paid for."""
    stored = open_study(folder).seeds if (folder / "study.toml").is_file() else []
    known = dict.fromkeys([*study.seeds, *stored, *seeds])
    if study.until_decided and not max(3, len(known)) <= study.most_seeds <= MOST_SEEDS:
        raise ConfigError(
            f"most_seeds = {study.most_seeds}: must be at least {max(3, len(known))}, the number of seeds, and at most "
            f"{MOST_SEEDS}"
        )


def has_begun(folder: Path, study: Study) -> bool:
    """Whether a run of the study has started; of a deleted run the summary may be left."""

    def of_study(name: str) -> bool:
        try:
            return RunDir(folder).read_json(name).get("study") == study.name
        except RunError:
            return True  # a damaged summary is of a run

    return any(path.is_dir() for path in folder.glob("*_seed*")) or any(
        of_study(file.name) for file in folder.glob("*_seed*.json")
    )


def study_differences(before: Study, now: Study) -> list[str]:
    """What makes two studies different, one sentence each: what their runs are, and what runs are compared with.

    Seeds, texts, and how often runs evaluate or save do not. Nor do questions and metric: `read_plan` shows what was
    changed in them.
    """
    result = []
    for key in ("name", "baseline"):
        one, two = getattr(before, key), getattr(now, key)
        if one != two:
            result.append(f"{key} ({one} then, {two} now)")
    if not before.measured:  # beside runs that were measured elsewhere new arms are trained
        result += [f"there was no arm {arm}" for arm in now.arms if arm not in before.arms]
    result += [f"there was an arm {arm}" for arm in before.arms if arm not in now.arms]
    both = [arm for arm in now.arms if arm in before.arms]
    changes: dict[str, list[str]] = {}  # {what differs: in which arms}
    for arm in both:
        one, two = _arm_identity(before, arm), _arm_identity(now, arm)
        for key in one:
            if key in two and one[key] != two[key]:
                changes.setdefault(f"{key} ({one[key]} then, {two[key]} now)", []).append(arm)
    for change, arms in changes.items():
        result.append(change if arms == both else f"{change} in {', '.join(arms)}")
    if any(change.startswith(("schedule.decay_steps", "train.max_epochs")) for change in changes):
        result.append("the learning rate decays until the run's limit unless schedule.decay_steps says otherwise")
    return result


def _arm_identity(study: Study, arm: str) -> dict[str, Any]:
    """What determines the runs of an arm; of one that was measured elsewhere only where that was."""
    known = {"group": study.arms[arm].group, "measured": study.arms[arm].measured}
    return known if known["measured"] else known | _identity(study.build(arm, 0))


def _identity(recipe: Recipe) -> dict[str, Any]:
    """The settings that determine a run, by dotted name.

    The limit of a run is not among them unless the learning rate decays towards the limit. A run of 100 steps whose
    learning rate has decayed differs from the first 100 steps of a longer run.
    """
    names = [name for name, _ in settings() if not may_differ(name)]
    values: dict[str, Any] = {name: value_of(recipe, name) for name in names}
    if recipe.schedule.shape == "constant":
        values["schedule.decay_steps"] = 0
    elif not recipe.schedule.decay_steps:
        limits = recipe.train
        values["schedule.decay_steps"] = recipe.step_limit(0) if limits.max_steps or limits.max_tokens else 0
        values["train.max_epochs"] = limits.max_epochs
    return {"train.max_epochs": 0.0, **values}


def is_finished(study: Study, folder: Path, run: PlannedRun) -> bool:
    """Whether a run has a result for the limits that are asked for, or damaged files, which nothing overwrites."""
    try:
        if not run.dir.exists():  # only the summary may have been kept
            return read_summary(folder, study, run.arm, run.seed).get("status") in RESULTS
        result = run.dir.read_json("result.json")
        if result.get("status") != "completed":
            return result.get("status") in RESULTS
        then, now = run.dir.read_recipe().train, run.recipe.train
    except RunError:
        return True
    return (then.max_steps, then.max_tokens, then.max_epochs) == (now.max_steps, now.max_tokens, now.max_epochs)


def write_summary(study: Study, folder: Path, run: PlannedRun, result: Mapping[str, Any]) -> None:
    """Write <arm>_seed<k>.json: the result of a run, with its study, arm, group and seed."""
    summary = {"study": study.name, "arm": run.arm, "group": run.group, "seed": run.seed, **result}
    name = f"{run_name(run.arm, run.seed)}.json"
    try:
        same = RunDir(folder).read_json(name) == summary
    except RunError:  # damaged, and written anew
        same = False
    if not same:
        RunDir(folder).write_json(name, summary)

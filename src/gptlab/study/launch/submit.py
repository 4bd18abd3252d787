"""`gptlab launch`: check everything, write launch.json, and submit the jobs of a run or a study.

    gptlab launch -> launch.json, launch/ -> sbatch -> `gptlab launch --job FOLDER --part NAME` in the job

The command of a job names the folder, and the job reads there what it does. Nothing is pickled.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from gptlab import locks
from gptlab.config import Recipe, Study
from gptlab.errors import ConfigError, Locked, RunError, UserError
from gptlab.locks import is_held
from gptlab.rundir import RunDir, write_atomically
from gptlab.study.folder import is_finished, keep_study, rule_of, study_files, study_in_use, write_summary
from gptlab.study.launch.local import check_system, start_local_job
from gptlab.study.launch.record import FILES, RECIPE, RECORD, Launch, LaunchPart, job_command
from gptlab.study.launch.resources import Resources
from gptlab.study.launch.script import batch_script, sbatch_arguments
from gptlab.study.launch.status import job_is_alive, job_states
from gptlab.study.runner import visible_gpus
from gptlab.study.runs import check_datasets, planned_runs


def launch_recipe(recipe: Recipe, out: Path, on: str, resources: Resources, command: str, show: bool) -> Launch:
    """Submit a run, or the continuation of a run.

    Args:
        out: the run directory.
        on: slurm or local.
        command: the command line, for launch.json.
        show: write and submit nothing; `printed_script` has the script of the returned launch.

    Raises:
        UserError: the run cannot be submitted; nothing has been submitted then.
    """
    check_system()
    if on == "local":
        resources = _resources_here(resources, several=False)
    processes = resources.nodes * resources.tasks_per_node
    if processes > 1 and recipe.distributed.strategy == "none":
        raise ConfigError(
            f"distributed.strategy = none trains with one process, and the job has {processes}; use ddp or fsdp"
        )
    launch = Launch(out, on, recipe.name, command, [LaunchPart("run", job_command(out, "run"), resources)])
    launch.files = {RECIPE: recipe.to_toml()}
    if show:
        return launch
    _check_submittable(out, on)
    from gptlab.tasks.base import open_data

    limit, run = recipe.step_limit(open_data(recipe).epoch_tokens(recipe.model.block_size)), RunDir(out)
    if is_held(out):
        raise Locked(f"{out} is being trained by another process")
    before = run.read_json("result.json")
    if before.get("status") == "completed" and (steps := before.get("steps") or 0) >= limit:
        raise RunError(f"{out} holds a finished run of {steps} steps; --out names another folder")
    return submit_launch(launch)


def launch_study(
    study: Study,
    folder: Path,
    arms: Sequence[str] | None,
    seeds: Sequence[int] | None,
    jobs: int | None,
    on: str,
    resources: Resources,
    command: str,
    show: bool,
) -> Launch:
    """Submit the unfinished runs of a study.

    On SLURM: an array of the core arms of one seed, an array of all other runs behind the sanity gate, each with an
    array of its branches after it, and the report when all have ended. On this machine: one job that does the same.

    Args: see `run_study` and `launch_recipe`.
    """
    check_system()
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs = {jobs}: must be at least 1")
    if on == "slurm" and (resources.nodes > 1 or resources.tasks_per_node > 1):
        raise ConfigError(
            "each run of a study is one process: nodes and tasks must be 1, and gpus at most 1 unless tasks = 1"
        )
    study = rule_of(study, folder, until_decided=False, most_seeds=None)
    decided = study.until_decided and arms is None and seeds is None
    if decided and on == "slurm":
        raise ConfigError(
            f"{study.name} runs until it is decided, and jobs on SLURM are planned before they start: launch it with "
            "--on local, or with --seeds N for the first N seeds"
        )
    if on == "local":
        resources = _resources_here(resources, several=True)
    runs = planned_runs(study, folder, arms, seeds)
    if not show:
        check_datasets(runs)
    todo = [run for run in runs if not is_finished(study, folder, run)]
    if not todo and not decided:
        raise RunError(f"every run of {folder} has its result; `gptlab study report {folder}` shows them")

    parts = []
    if on == "local":
        one = resources.model_copy(update={"tasks": 1})
        parts.append(LaunchPart("study", job_command(folder, "study"), one, [(run.arm, run.seed) for run in runs]))
    else:
        for name in ("gate", "gate_branches", "arms", "branches"):  # each run after the one that it branches off
            kind = name.startswith("gate"), name.endswith("branches")
            if pairs := [(run.arm, run.seed) for run in todo if (run.opens_gate, run.trunk is not None) == kind]:
                after = [part.name for part in parts]
                parts.append(LaunchPart(name, job_command(folder, name), resources, pairs, after))
        report = resources.model_copy(update={"gpus": 0, "tasks": 1})
        words = [*job_command(folder, "report")[:4], "study", "report", str(folder.resolve())]
        parts.append(LaunchPart("report", words, report, after=[part.name for part in parts]))
    asked = list(dict.fromkeys(run.seed for run in runs))
    launch = Launch(folder, on, study.name, command, parts, jobs, None if arms is None else list(arms), asked)
    launch.seeds = None if decided else asked
    if show:
        launch.files = study_files(folder, study, asked)
        return launch
    _check_submittable(folder, on)
    with locks.hold(folder, study_in_use(folder)):
        keep_study(folder, study, asked)
    for run in runs:  # a summary of each finished run, as the runner writes it
        if run not in todo and run.dir.exists():
            write_summary(study, folder, run, run.dir.read_json("result.json"))
    return submit_launch(launch)


def _resources_here(resources: Resources, several: bool) -> Resources:
    """Resources on this machine. If no GPUs are asked for: all of them for several runs, else one."""
    if resources.nodes > 1:
        raise ConfigError(f"nodes = {resources.nodes}: --on local has one node, this machine")
    found = len(visible_gpus())
    if resources.gpus > found:
        raise ConfigError(f"gpus = {resources.gpus}: this machine has {found}")
    return resources.model_copy(update={"gpus": resources.gpus or (found if several else min(1, found))})


def _check_submittable(folder: Path, on: str) -> None:
    """Raise UserError if jobs cannot be submitted, or if the folder has jobs that have not ended."""
    if on == "slurm" and not shutil.which("sbatch"):
        raise UserError(
            "there is no sbatch on this machine: launch on the login node of a cluster. `--print` shows the batch "
            "script, `--on local` runs the job here"
        )
    before = Launch.read(folder)
    for job, state in job_states([before] if before is not None else []).items():
        if job_is_alive(state):
            raise RunError(
                f"{folder} is launched already, job {job} is {state.lower()}: `gptlab launch --status {folder}` shows "
                f"the job, `gptlab stop {folder}` ends it"
            )


def submit_launch(launch: Launch) -> Launch:
    """Submit the parts to SLURM, or start the job here, and write the job numbers to launch.json.

    Raises:
        UserError: SLURM refuses a part. The parts before it are cancelled, and launch.json is removed.
    """
    (launch.folder / FILES).mkdir(parents=True, exist_ok=True)
    for name, text in launch.files.items():
        write_atomically(launch.folder / name, text)
    launch.write()  # before the job starts and reads the file
    for part in launch.parts:
        if launch.on == "local":
            part.job = start_local_job(launch, part)
            continue
        file = (launch.folder / FILES).resolve() / f"{part.name}.sh"
        write_atomically(file, batch_script(launch, part))
        done = subprocess.run(["sbatch", *sbatch_arguments(launch, part), str(file)], capture_output=True, text=True)
        if done.returncode:
            if submitted := [part.job for part in launch.parts if part.job]:
                subprocess.run(["scancel", *submitted], check=False)
            (launch.folder / RECORD).unlink()
            raise UserError(f"SLURM refused the job: {' '.join(done.stderr.split())}")
        part.job = done.stdout.split(";")[0].strip()  # NUMBER or NUMBER;CLUSTER
    launch.write()
    return launch

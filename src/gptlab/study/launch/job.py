"""Inside a job: `gptlab launch --job FOLDER --part NAME`.

A job that is warned of its time limit, or of a preemption, saves a checkpoint, is requeued and continues.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gptlab.config import load_recipe
from gptlab.errors import RunError
from gptlab.rundir import RunDir, open_study, run_name
from gptlab.status import EXIT_CODES
from gptlab.study.launch.local import START_AGAIN, rank_variables
from gptlab.study.launch.record import PRINTED, RECIPE, RECORD, Launch, LaunchPart
from gptlab.study.runner import StudyRunner, run_study, visible_gpus
from gptlab.study.runs import check_datasets, planned_runs
from gptlab.training.signals import WARNING, StopSignal


def run_job(folder: Path, name: str, draw: Callable[[Path], None]) -> int:
    """Do the work of a job.

    Args:
        name: of the part.
        draw: called with the folder of a run that has ended, to draw its plots.

    Returns:
        The exit status of `gptlab train` or `gptlab study run`; 0 if the job has been requeued.
    """
    launch = Launch.read(folder)
    if launch is None:
        raise RunError(f"{folder} has no {RECORD}: use `gptlab launch` to submit jobs")
    part, began = launch.part(name), time.monotonic()
    runs = part.runs
    if runs and name != "study":  # an array: only the run of this task
        runs = [part.runs[int(os.environ["SLURM_ARRAY_TASK_ID"])]]
    folders = [folder / run_name(*run) for run in runs] or [folder]
    if launch.on == "slurm":
        os.environ.update(slurm_rank_variables(os.environ))
    first = os.environ.get("RANK", "0") == "0"
    if first and part.job == PRINTED and launch.on == "slurm":
        part.job = slurm_job()
        launch.write()
    with StopSignal() as heard:  # from now on: importing PyTorch takes seconds
        before = _checkpoints(folders)
        status = _train_run(folder, first, heard, draw) if name == "run" else _train_study(launch, part, runs)
        if not first:
            return 0  # rank 0 reports for all ranks, and requeues them
        if status == EXIT_CODES["interrupted"] and heard.reason == WARNING:
            limit, stuck = part.resources.seconds, _checkpoints(folders) == before
            if limit and stuck and time.monotonic() - began > limit / 2:
                print("the time limit is too short for one step: the job is not requeued", file=sys.stderr)
                return status
            return _requeue(launch.on)
    if name == "study" and status != EXIT_CODES["interrupted"]:
        subprocess.run([sys.executable, "-P", "-m", "gptlab", "study", "report", str(folder)], check=False)
    return status


def slurm_job() -> str:
    """The number of this job as scontrol takes it: 41, or 41_2 for a task of an array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def slurm_rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's environment variables for a process that srun has started; {} for a job of one process."""
    ranks, nodes = int(environment.get("SLURM_NTASKS", 1)), int(environment.get("SLURM_JOB_NUM_NODES", 1))
    if ranks == 1:
        return {}
    host = "127.0.0.1"
    if nodes > 1:  # the first host of a list such as rack[1-2]n[03-04,07],login
        host = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", environment["SLURM_JOB_NODELIST"]).split(",")[0]
    rank, local = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    return rank_variables(rank, ranks, local, ranks // nodes, host, int(environment["SLURM_JOB_ID"]))


def _checkpoints(folders: Sequence[Path]) -> list[str]:
    return sorted(str(path) for folder in folders for path in RunDir(folder).checkpoints.glob("step-*"))


def _train_run(folder: Path, first: bool, heard: StopSignal, draw: Callable[[Path], None]) -> int:
    """Train as one rank of the job. Returns the exit status."""
    from gptlab.training.loop import train

    result = train(load_recipe(folder / RECIPE), folder)
    if first:
        reason = f": {result.reason}" if result.reason else ""
        print(f"{result.status} after {result.steps} steps{reason}", flush=True)
        if result.status != "interrupted" or heard.reason != WARNING:  # after a warning only seconds may be left
            draw(folder)
    return EXIT_CODES[result.status]


def _train_study(launch: Launch, part: LaunchPart, runs: Sequence[tuple[str, int]]) -> int:
    """Train the runs of a study, or the one run of an array's task. Returns the exit status."""
    folder, study = launch.folder, open_study(launch.folder)
    if part.name == "study":
        return run_study(study, folder, launch.arms, launch.seeds, launch.jobs)
    todo = [run for run in planned_runs(study, folder, launch.arms, launch.seeds) if (run.arm, run.seed) in runs]
    check_datasets(todo)
    gpus = visible_gpus() if todo[0].recipe.train.device in ("auto", "cuda") else []
    return StudyRunner(study, folder, todo, 1, gpus, quiet=False).run()


def _requeue(on: str) -> int:
    if on == "local":
        print("the job starts again and continues", flush=True)
        return START_AGAIN
    job = slurm_job()
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        print(f"job {job} is saved and could not be requeued: {done.stderr.strip()}", file=sys.stderr)
        return EXIT_CODES["interrupted"]
    print(f"job {job} is requeued and continues", flush=True)
    return 0

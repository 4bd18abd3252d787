"""`gptlab launch --status`: the state of jobs, from squeue, sacct or the process table."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from gptlab.errors import RunError
from gptlab.locks import is_held
from gptlab.rundir import RunDir, open_study, run_name
from gptlab.study.launch.local import local_process
from gptlab.study.launch.record import RECORD, Launch
from gptlab.study.table import COLOURS, last_metrics, read_state

# States in which SLURM has finished a job. In all other states the job waits, runs, or is about to run.
FINISHED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "OUT_OF_MEMORY",
    "NODE_FAIL",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
    "REVOKED",
    "ENDED",
)


def find_launches(folder: Path) -> list[Launch]:
    """The launch of a folder, or the launches of the runs and studies in it, in its runs/ and in its results/."""
    if (launch := Launch.read(folder)) is not None:
        return [launch]
    files = [file for pattern in ("*", "runs/*", "results/*") for file in sorted(folder.glob(f"{pattern}/{RECORD}"))]
    found = [launch for file in files if (launch := Launch.read(file.parent)) is not None]
    if not found:
        raise RunError(
            f"{folder} has no launched run or study: no {RECORD} in the folder, its runs/ or its results/. "
            "`gptlab launch --status DIR` looks in another folder"
        )
    return found


def job_states(launches: Sequence[Launch]) -> dict[str, str]:
    """{job number: state in SLURM's words}. ENDED: SLURM has forgotten the job. UNKNOWN: squeue fails, or the job is on
    another machine.

    squeue forgets a job some minutes after its end; sacct does not, where the cluster keeps accounts.
    """
    known: dict[str, str] = {}
    missing = "ENDED"
    jobs = [(job, launch.on, part.job) for launch in launches for job, part, _ in launch.tasks()]
    if numbers := {number for _, on, number in jobs if on == "slurm" and number}:
        lines = _output_lines(["squeue", "--me", "-h", "-r", "-t", "all", "-o", "%i|%T|%r"])
        for line in lines or ():
            job, state, reason = line.split("|", 2)
            known[job] = f"{state} ({reason})" if state == "PENDING" else state
        gone = sorted(numbers - {job.split("_")[0] for job in known})
        if gone and lines is not None:
            for line in _output_lines(["sacct", "-X", "-n", "-P", "-j", ",".join(gone), "-o", "JobID,State"]) or ():
                job, state = line.split("|", 1)
                known[job] = state.split()[0]  # CANCELLED by 1000
        if lines is None:
            missing = "UNKNOWN"
    for launch in launches:
        if launch.on == "local":
            for part in launch.parts:
                elsewhere = launch.host != socket.gethostname()
                known[part.job] = "UNKNOWN" if elsewhere else "RUNNING" if local_process(part.job) else "ENDED"
    return {job: known.get(job, missing) for job, _, _ in jobs}


def _output_lines(words: list[str]) -> list[str] | None:
    """The lines that a command prints; None if it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines() if done.returncode == 0 else None


def job_is_alive(state: str) -> bool:
    """Whether a job in this state waits or runs."""
    return state != "UNKNOWN" and state.split()[0] not in FINISHED


def launches_table(jobs: Sequence[Mapping[str, Any]]) -> Table:
    """One row per job, as `launched_jobs` has them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("job", "run", "job's state", "run's status", "step"):
        table.add_column(column, justify="right" if column == "step" else "left", no_wrap=True)
    for job in jobs:
        step = "" if job["step"] is None else f"{job['step']:,}"
        table.add_row(job["job"], job["run"], job["state"], Text(job["status"], COLOURS.get(job["status"], "")), step)
    return table


def launched_jobs(launches: Sequence[Launch]) -> list[dict[str, Any]]:
    """Of each job its number, its run, SLURM's state of the job, and the status and step of the run."""
    states, rows = job_states(launches), []
    for launch in launches:
        study = open_study(launch.folder) if launch.parts[0].name != "run" else None
        for job, part, run in launch.tasks():
            name, status, step = str(launch.folder), "", None
            if part.name == "report":
                name += ": report"
                status = "written" if (launch.folder / "report.html").is_file() else "waiting"
            elif study is not None and run is not None:
                state = read_state(launch.folder, study, *run)
                name, status = f"{launch.folder / run_name(*run)}", state.status
                step = state.step or None
            else:
                status, step = _run_status(RunDir(launch.folder))
            rows.append({"job": job, "run": name, "state": states[job].lower(), "status": status, "step": step})
    return rows


def _run_status(run: RunDir) -> tuple[str, int | None]:
    """(status, step) of a run."""
    step = next((line["step"] for line in reversed(last_metrics(run.metrics_file))), None)
    if is_held(run.path):
        return "running", step
    return run.read_json("result.json").get("status") or ("waiting" if step is None else "stopped"), step

"""`gptlab stop`: ask a run or a study to save and end, and cancel its jobs that wait."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gptlab.errors import RunError
from gptlab.locks import is_held
from gptlab.rundir import RunDir, run_name
from gptlab.study.launch.local import local_process
from gptlab.study.launch.record import Launch
from gptlab.study.launch.status import job_is_alive, job_states
from gptlab.study.table import read_study, study_progress
from gptlab.training.signals import STOP_FILE

POLL_SECONDS = 0.2


def stop_run_or_study(folder: Path, wait: bool, say: Callable[[str], None]) -> None:
    """Ask the process that trains a run, or runs a study, to save and end; cancel its jobs that wait.

    Args:
        wait: until the process has ended, and say how it ended.

    Raises:
        RunError: the folder has no run or study, or no process works on it. Nothing is written then.
    """
    launch, is_study = Launch.read(folder), (folder / "study.toml").is_file()
    if not (is_study or launch or RunDir(folder).exists() or is_held(folder)):
        raise RunError(f"{folder} is neither the folder of a run nor of a study: no recipe.toml, no study.toml")

    # The holder of a lock saves when it finds the file. The runner of a study passes the request on to its runs.
    working = [folder] if is_held(folder) else []
    if is_study and not working:  # the tasks of an array have no runner
        working = sorted(file.parent for file in folder.glob("*/.lock") if is_held(file.parent))
    # A job without a lock has not begun to train, or has saved. It is cancelled before other jobs end and it starts.
    cancelled = _cancel_idle_jobs(launch, working) if launch is not None else 0
    if not working and not cancelled:
        raise RunError(f"no process works on {folder}: there is nothing to stop")
    if cancelled:
        say(f"{cancelled} job{'s' if cancelled > 1 else ''} cancelled")
    for path in working:
        (path / STOP_FILE).touch()
    if not wait:
        say(f"{folder}: asked to save and end")
        return
    while held := [path for path in working if is_held(path)]:
        for path in held:  # a run that had just begun removed the file as a leftover
            (path / STOP_FILE).touch()
        time.sleep(POLL_SECONDS)
    for path in working:
        (path / STOP_FILE).unlink(missing_ok=True)
    say(_how_it_ended(folder, launch, is_study))


def _how_it_ended(folder: Path, launch: Launch | None, is_study: bool) -> str:
    if is_study:
        again = launch.command if launch is not None else f"gptlab study run {folder}"
        states = read_study(folder)
        unfinished = "" if all(state.ended for state in states) else f"; `{again}` continues"
        return f"{folder}: {study_progress(states)}{unfinished}"
    again = launch.command if launch is not None else f"gptlab train {folder / 'recipe.toml'} --out {folder}"
    result = RunDir(folder).read_json("result.json")
    if result.get("status") == "interrupted":
        return f"{folder}: saved at step {result.get('steps') or 0}; `{again}` continues"
    if result.get("status"):
        return f"{folder}: {result['status']} after {result.get('steps', 0)} steps"
    return f"{folder}: ended; `{again}` continues from its last checkpoint"


def _cancel_idle_jobs(launch: Launch, working: Sequence[Path]) -> int:
    """Cancel the jobs of a launch that train nothing. Returns their number."""
    states = job_states([launch])
    idle = []
    for job, _, run in launch.tasks():
        path = launch.folder if run is None or launch.on == "local" else launch.folder / run_name(*run)
        if path not in working and job_is_alive(states[job]) and job not in idle:
            idle.append(job)
    if launch.on == "slurm" and idle:
        subprocess.run(["scancel", *idle], check=False)
    for job in idle if launch.on == "local" else ():
        if (process := local_process(job)) is not None:
            process.send_signal(signal.SIGTERM)  # passed on to the ranks
    return len(idle)

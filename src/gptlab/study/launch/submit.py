"""Runs and studies as jobs, through submitit: on a SLURM cluster, or in the background of this machine.

    gptlab launch -> checks everything -> launch.json, launch/ -> sbatch -> `gptlab launch --job FOLDER` in the job

A job that is warned of its time limit, or of a preemption, saves, requeues itself and goes on. No object travels by
pickle: the job's command names the run's folder, and what is to be done is read there. The folder is all the state
there is; `launch.json` in it says which jobs were submitted for it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError
from rich.table import Table
from rich.text import Text

from gptlab.config import Count, Positive, Recipe, Section, Study, load_recipe
from gptlab.errors import ConfigError, Locked, RunError, UserError
from gptlab.locks import is_held
from gptlab.rundir import RunDir, open_study, run_name
from gptlab.study import runner
from gptlab.study.runner import Runner, gate, is_finished, keep_study, plan, run_study, visible_gpus, write_summary
from gptlab.study.table import COLOURS, _tail, progress, read_state, read_study
from gptlab.training.signals import STOP_FILE, WARNING, StopSignal

if TYPE_CHECKING:
    import psutil

RECORD = "launch.json"
FILES = "launch"  # beside it: batch scripts, logs, the recipe
NO_LIMIT_MINUTES = 365 * 24 * 60  # submitit's local executor wants a number
LOCAL_REQUEUE = 144  # the exit status at which that executor starts its tasks again
# States in which SLURM has done with a job; in all others it waits, runs, or is about to.
ENDED = (
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
POLL_SECONDS = 0.2
FLAGS = ("partition", "time", "gpus", "nodes", "tasks", "cpus", "mem", "account", "qos", "signal_delay")


class Resources(Section):
    """What a job asks the cluster for: flags of `gptlab launch`, or keys of a profile file."""

    partition: str = ""
    time: str = ""
    """Limit in sbatch's words: minutes, H:M:S or D-H:M:S; the partition's where it is left out."""
    gpus: Count = 0
    """GPUs a node."""
    nodes: Positive = 1
    tasks: Count = 0
    """Processes a node; 0 is one a GPU, or one."""
    cpus: Count = 0
    """Cores a process; 0 is the cluster's default, often one."""
    mem: str = ""
    """Memory a node, as sbatch reads it: 64G."""
    account: str = ""
    qos: str = ""
    signal_delay: Positive = 120
    """Seconds before the limit at which the job is warned; SLURM may be a minute early."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """More of sbatch's options, by their long names; true stands for an option without a value."""

    @property
    def tasks_per_node(self) -> int:
        return self.tasks or self.gpus or 1

    @property
    def seconds(self) -> int | None:
        return limit_seconds(self.time) if self.time else None


def limit_seconds(text: str) -> int:
    """A time limit as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ConfigError(f"time = {text}: must be minutes, H:M:S or D-H:M:S")
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def read_resources(profile: Path | None, flags: Mapping[str, Any]) -> Resources:
    """A profile file (TOML) and flags, which beat it.

    Raises:
        ConfigError: a file or a key that there is not, or a value out of bounds.
    """
    content: dict[str, Any] = {}
    if profile is not None:
        try:
            content = tomllib.loads(profile.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"--profile {profile} cannot be read: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{profile} is not a TOML file: {error}") from None
        for key in content:
            if key not in Resources.model_fields:
                raise ConfigError(f"{profile} has no key {key!r}; it may have {', '.join(Resources.model_fields)}")
        for key in ("time", "mem"):  # minutes, megabytes
            if type(content.get(key)) is int:
                content[key] = str(content[key])
    try:
        resources = Resources.model_validate({**content, **flags})
    except ValidationError as error:
        first = error.errors()[0]
        says = first["msg"].replace("Input should", "must")
        raise ConfigError(f"{'.'.join(map(str, first['loc']))} = {first['input']}: {says}") from None
    if resources.seconds is not None and resources.seconds <= resources.signal_delay:
        raise ConfigError(
            f"time = {resources.time}: must be longer than signal_delay, {resources.signal_delay} s, at which the job "
            "is warned"
        )
    return resources


# -- what is submitted ----------------------------------------------------------------------------------------------


@dataclass
class Part:
    """A job, or an array of them."""

    name: str
    """run or study; of a study on SLURM core, extended, report."""
    words: list[str]
    """Its command."""
    resources: Resources
    runs: list[tuple[str, int]] = field(default_factory=list)
    """(arm, seed) of each task of an array, or of all that one job trains."""
    after: list[str] = field(default_factory=list)
    """Parts that must have ended."""
    job: str = ""
    """The number it got."""


@dataclass
class Launch:
    """What is launched for a folder; launch.json holds it."""

    folder: Path
    on: str
    """slurm or local."""
    name: str
    command: str
    """The command line that launched it; it goes on with what is not finished."""
    parts: list[Part]
    jobs: int | None = None
    """Runs of a study at the same time."""
    arms: list[str] | None = None
    seeds: list[int] | None = None
    host: str = ""
    launched: str = ""

    def write(self) -> None:
        parts = {
            part.name: {"job": part.job, "runs": part.runs, "resources": part.resources.model_dump()}
            for part in self.parts
        }
        content = {key: getattr(self, key) for key in ("on", "name", "command", "jobs", "arms", "seeds", "host")}
        self.folder.mkdir(parents=True, exist_ok=True)
        RunDir(self.folder).write_json(RECORD, {**content, "launched": self.launched, "parts": parts})

    @classmethod
    def read(cls, folder: Path) -> Launch | None:
        """What was launched for a folder, if anything was."""
        content = RunDir(folder).read_json(RECORD)
        if not content:
            return None
        try:
            parts = [
                Part(
                    name,
                    [],
                    Resources(**part["resources"]),
                    [(arm, seed) for arm, seed in part["runs"]],
                    job=part["job"],
                )
                for name, part in content.pop("parts").items()
            ]
            return cls(folder, parts=parts, **content)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{folder / RECORD} is damaged: {error}") from None

    def part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)

    def tasks(self) -> Iterator[tuple[str, Part, tuple[str, int] | None]]:
        """(job number as SLURM writes it, part, its run) for every job and every task of an array."""
        for part in self.parts:
            for i, run in enumerate(part.runs):
                yield f"{part.job}_{i}" if self.on == "slurm" and part.job else part.job, part, run
            if not part.runs:
                yield part.job, part, None


def job_command(folder: Path, part: str) -> list[str]:
    return [sys.executable, "-u", "-m", "gptlab", "launch", "--job", str(folder.resolve()), "--part", part]


def launch_recipe(recipe: Recipe, out: Path, on: str, resources: Resources, command: str, show: bool) -> Launch:
    """Submit a run, or go on with one.

    Args:
        out: the run directory.
        on: slurm or local.
        command: the command line, which is kept.
        show: submit nothing; `scripts` has the batch script.

    Raises:
        UserError: what would not run, or runs already; nothing has been submitted then.
    """
    resources = _here(resources, several=False) if on == "local" and not show else resources
    processes = resources.nodes * resources.tasks_per_node
    if processes > 1 and recipe.distributed.strategy == "none":
        raise ConfigError(
            f"distributed.strategy = none: {processes} processes were asked for; ddp or fsdp share the work"
        )
    launch = _new(out, on, recipe.name, command, [Part("run", job_command(out, "run"), resources)])
    if show:
        return launch
    _check(out, on)
    from gptlab.tasks.base import open_data

    limit, run = recipe.step_limit(open_data(recipe).epoch_tokens(recipe.model.block_size)), RunDir(out)
    if is_held(out):
        raise Locked(f"{out} is being trained by another process")
    before = run.read_json("result.json")
    if before.get("status") == "completed" and before["steps"] >= limit:
        raise RunError(f"{out} holds a finished run of {before['steps']} steps; --out names another folder")
    (out / FILES).mkdir(parents=True, exist_ok=True)
    RunDir(out / FILES).write_recipe(recipe)
    return submit(launch)


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
    """Submit a study's runs that are not finished: on SLURM an array for the core arms, one behind the sanity gate for
    the extended ones, and its report when all have ended; on this machine one job that does the same.

    Args: see `run_study` and `launch_recipe`.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs = {jobs}: must be at least 1")
    if on == "slurm" and (resources.nodes > 1 or resources.tasks_per_node > 1):
        raise ConfigError("a study's run is one process: nodes and tasks are 1, and so is gpus unless tasks = 1 is set")
    runs = plan(study, folder, arms, seeds)
    todo = [run for run in runs if not is_finished(study, folder, run)]
    if not todo:
        raise RunError(f"every run of {folder} has its result; `gptlab study report {folder}` says what they are")

    parts = []
    if on == "local":
        resources = resources if show else _here(resources, several=True)
        one = resources.model_copy(update={"tasks": 1})
        parts.append(Part("study", job_command(folder, "study"), one, [(run.arm, run.seed) for run in runs]))
    else:
        for name in ("core", "extended"):
            if pairs := [(run.arm, run.seed) for run in todo if run.group == name]:
                after = [part.name for part in parts] if arms is None else []
                parts.append(Part(name, job_command(folder, name), resources, pairs, after))
        report = resources.model_copy(update={"gpus": 0, "tasks": 1})
        words = [sys.executable, "-u", "-m", "gptlab", "study", "report", str(folder.resolve())]
        parts.append(Part("report", words, report, after=[part.name for part in parts]))
    launch = _new(folder, on, study.name, command, parts)
    launch.jobs, launch.arms = jobs, list(arms) if arms is not None else None
    launch.seeds = list(dict.fromkeys(run.seed for run in runs))
    if show:
        return launch
    _check(folder, on)
    with runner.lock(folder):
        keep_study(folder, study, launch.seeds)
    for run in runs:  # a summary of what is finished, as the runner writes it
        if run not in todo and run.dir.exists():
            write_summary(study, folder, run, run.dir.read_json("result.json"))
    return submit(launch)


def _new(folder: Path, on: str, name: str, command: str, parts: list[Part]) -> Launch:
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return Launch(folder, on, name, command, parts, host=socket.gethostname(), launched=now)


def _here(resources: Resources, several: bool) -> Resources:
    """The GPUs of this machine where none were asked for: all, or one."""
    _submitit()  # says where there can be no jobs
    if resources.nodes > 1:
        raise ConfigError(f"nodes = {resources.nodes}: --on local has this machine alone")
    found = len(visible_gpus())
    if resources.gpus > found:
        raise ConfigError(f"gpus = {resources.gpus}: this machine has {found}")
    gpus = resources.gpus or (found if several else min(1, found))
    return resources.model_copy(update={"gpus": gpus})


def _check(folder: Path, on: str) -> None:
    """Whether jobs can be submitted, and none are there for this folder; before anything is written."""
    _submitit()
    if on == "slurm" and not shutil.which("sbatch"):
        raise UserError(
            "there is no sbatch on this machine: launch on a cluster's login node, `--print` shows the batch script, "
            "`--on local` runs it here"
        )
    before = Launch.read(folder)
    states = job_states([before] if before is not None else [])
    for job, state in states.items():
        if _alive(state):
            raise RunError(
                f"{folder} is launched already, job {job} is {state.lower()}: `gptlab launch --status {folder}` shows "
                f"it, `gptlab stop {folder}` ends it"
            )


def submit(launch: Launch) -> Launch:
    """Give the parts to SLURM or to submitit's local executor, and write down which numbers they got.

    Raises:
        UserError: SLURM refuses; launch.json is not left behind then.
    """
    submitit = _submitit()
    files = launch.folder / FILES
    files.mkdir(parents=True, exist_ok=True)
    launch.write()  # before the job starts and reads it
    try:
        for part in launch.parts:
            if launch.on == "slurm":
                executor = submitit.SlurmExecutor(folder=files.resolve())
                executor.parameters = sbatch_parameters(launch, part)
                with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what sbatch says, and raises it too
                    part.job = executor._submit_command(shlex.join(part.words)).job_id
            else:
                part.job = _start_here(files.resolve(), part)
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        submitted = [part.job for part in launch.parts if part.job]
        if submitted:
            subprocess.run(["scancel", *submitted], check=False)
        (launch.folder / RECORD).unlink()
        raise UserError(f"SLURM takes no job: {' '.join(str(error).split())}") from None
    launch.write()
    return launch


def scripts(launch: Launch) -> Iterator[str]:
    """The batch script of every part, as it would be submitted; of a local job its command."""
    _submitit()
    from submitit.slurm import slurm

    for part in launch.parts:
        if launch.on == "local":
            yield shlex.join(part.words)
        else:
            yield slurm._make_sbatch_string(
                command=shlex.join(part.words),
                folder=(launch.folder / FILES).resolve(),
                **sbatch_parameters(launch, part),
            )


def sbatch_parameters(launch: Launch, part: Part) -> dict[str, Any]:
    """What submitit makes the #SBATCH lines and the srun command of."""
    asked = part.resources
    given = {
        "partition": asked.partition,
        "gpus_per_node": asked.gpus,
        "cpus_per_task": asked.cpus,
        "mem": asked.mem,
        "account": asked.account,
        "qos": asked.qos,
    }
    parameters: dict[str, Any] = {key: value for key, value in given.items() if value}
    if part.runs:
        parameters |= {"map_count": len(part.runs), "array_parallelism": launch.jobs or len(part.runs)}
    if part.after:
        numbers = [launch.part(name).job or f"{name.upper()}_JOB" for name in part.after]
        parameters["dependency"] = "afterany:" + ":".join(numbers)
    # a rank that fails ends the others, which would wait for it; srun does not take cores from sbatch (SLURM 22.05 on)
    srun = ["--kill-on-bad-exit=1", *([f"--cpus-per-task={asked.cpus}"] if asked.cpus else [])]
    return {
        **parameters,
        "job_name": launch.name if part.name == "run" else f"{launch.name}-{part.name}",
        "time": asked.time or None,
        "nodes": asked.nodes,
        "ntasks_per_node": asked.tasks_per_node,
        "signal_delay_s": asked.signal_delay,
        "wckey": "gptlab",
        "stderr_to_stdout": True,
        "srun_args": srun,
        "additional_parameters": {"requeue": True, **asked.extra},
    }


def _start_here(files: Path, part: Part) -> str:
    """Start submitit's local controller, which outlives this process. Returns its process id."""
    from submitit.local import local

    asked = part.resources
    devices = ",".join(visible_gpus()[: asked.gpus]) if asked.gpus else ""
    kept = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_RDWR)
    try:  # `gptlab launch | tee` must not wait for it
        for number in (1, 2):
            os.dup2(nowhere, number)
        process = local.start_controller(
            files,
            shlex.join(part.words),
            tasks_per_node=asked.tasks_per_node,
            cuda_devices=devices,
            timeout_min=asked.seconds / 60 if asked.seconds else NO_LIMIT_MINUTES,
            signal_delay_s=asked.signal_delay,
            stderr_to_stdout=True,
        )
    finally:
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)
    return str(process.pid)


def _submitit() -> Any:
    if not hasattr(signal, WARNING):
        raise UserError("gptlab launch needs Linux or macOS; gptlab train and gptlab study run work on this system too")
    try:
        import submitit
    except ImportError:
        raise UserError("launching needs submitit: pip install 'gptlab[cluster]'") from None
    return submitit


# -- in the job -----------------------------------------------------------------------------------------------------


def work(folder: Path, name: str, draw: Callable[[Path], None]) -> int:
    """What a job does: `gptlab launch --job FOLDER --part NAME`.

    Args:
        name: of the part.
        draw: what the command line does with a run that has ended.

    Returns:
        The exit status: that of `gptlab train` or `gptlab study run`; 0 where the job has been requeued.
    """
    here = _submitit().JobEnvironment()
    launch = Launch.read(folder)
    if launch is None:
        raise RunError(f"{folder} has no {RECORD}: `gptlab launch` starts jobs")
    part, began = launch.part(name), time.monotonic()
    runs = part.runs
    if name in ("core", "extended"):  # an array: this task's
        runs = [part.runs[int(here.array_task_id)]]
    folders = [folder / run_name(*run) for run in runs] or [folder]
    with StopSignal() as heard:  # from here on: importing PyTorch takes a while
        before = _checkpoints(folders)
        status = _work_run(folder, here, heard, draw) if name == "run" else _work_study(launch, part, runs)
        if here.global_rank > 0:
            return 0  # the first speaks for all, and requeues them
        if status == 4 and heard.reason == WARNING:
            limit, stuck = part.resources.seconds, _checkpoints(folders) == before
            if limit and stuck and time.monotonic() - began > limit / 2:
                print("the time limit is too short for one step: the job is not requeued", file=sys.stderr)
                return status
            return _requeue(here)
    if name == "study" and status != 4:
        subprocess.run([sys.executable, "-m", "gptlab", "study", "report", str(folder)], check=False)
    return status


def _checkpoints(folders: Sequence[Path]) -> list[str]:
    return sorted(str(path) for folder in folders for path in RunDir(folder).checkpoints.glob("step-*"))


def _work_run(folder: Path, here: Any, heard: StopSignal, draw: Callable[[Path], None]) -> int:
    """Train, as a rank of the job where it has several. Returns the exit status."""
    if here.num_tasks > 1:
        os.environ.update(ranks(here))
    from gptlab.training.loop import train

    result = train(load_recipe(folder / FILES / "recipe.toml"), folder)
    if here.global_rank == 0:
        reason = f": {result.reason}" if result.reason else ""
        print(f"{result.status} after {result.steps} steps{reason}", flush=True)
        if result.status != "interrupted" or heard.reason != WARNING:  # else there may be seconds left only
            draw(folder)
    return {"completed": 0, "failed": 1, "not_applicable": 2, "interrupted": 4}.get(result.status, 3)


def ranks(here: Any) -> dict[str, str]:
    """torchrun's environment variables, for a task of a SLURM step or of submitit's local executor."""
    host = here.hostnames[0] if here.num_nodes > 1 else "127.0.0.1"
    return {
        "RANK": str(here.global_rank),
        "WORLD_SIZE": str(here.num_tasks),
        "LOCAL_RANK": str(here.local_rank),
        "LOCAL_WORLD_SIZE": str(here.num_tasks // here.num_nodes),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(10000 + int(here.raw_job_id) % 20000),  # below what systems give to outgoing connections
    }


def _work_study(launch: Launch, part: Part, runs: Sequence[tuple[str, int]]) -> int:
    folder, study = launch.folder, open_study(launch.folder)
    if part.name == "study":
        return run_study(study, folder, launch.arms, launch.seeds, launch.jobs)
    if part.name == "extended" and launch.arms is None:
        core = [run for run in plan(study, folder, None, launch.seeds) if run.group == "core"]
        if problems := gate(study, folder, core):
            print(f"the extended arms are not started: {'; '.join(problems)}. --arm NAME runs an arm anyway")
            return 1
    ((arm, seed),) = runs
    todo = plan(study, folder, [arm], [seed])
    gpus = visible_gpus() if todo[0].recipe.train.device in ("auto", "cuda") else []
    return Runner(study, folder, todo, 1, gpus, quiet=False, gated=False).run()


def _requeue(here: Any) -> int:
    if here.cluster == "local":
        print("the job starts again and goes on", flush=True)
        return LOCAL_REQUEUE
    done = subprocess.run(["scontrol", "requeue", here.job_id], capture_output=True, text=True)
    if done.returncode:
        print(f"job {here.job_id} is saved and could not be requeued: {done.stderr.strip()}", file=sys.stderr)
        return 4
    print(f"job {here.job_id} is requeued and goes on", flush=True)
    return 0


# -- how it stands --------------------------------------------------------------------------------------------------


def find_launches(folder: Path) -> list[Launch]:
    """What was launched for a folder, or for the runs and studies in it, in its runs/ and in its results/."""
    if (launch := Launch.read(folder)) is not None:
        return [launch]
    files = [file for pattern in ("*", "runs/*", "results/*") for file in sorted(folder.glob(f"{pattern}/{RECORD}"))]
    found = [launch for file in files if (launch := Launch.read(file.parent)) is not None]
    if not found:
        raise RunError(f"nothing was launched in {folder}: it, its runs/ and results/ have no {RECORD}")
    return found


def job_states(launches: Sequence[Launch]) -> dict[str, str]:
    """{job number: its state in SLURM's words}; ENDED where SLURM knows it no more, UNKNOWN where it cannot be said:
    squeue fails, or a job is of another machine.

    squeue forgets a job some minutes after its end; sacct does not, where the cluster keeps accounts.
    """
    known: dict[str, str] = {}
    unheard = "ENDED"
    jobs = [(job, launch.on, part.job) for launch in launches for job, part, _ in launch.tasks()]
    if numbers := {number for _, on, number in jobs if on == "slurm" and number}:
        lines = _lines(["squeue", "--me", "-h", "-r", "-t", "all", "-o", "%i|%T|%r"])
        for line in lines or ():
            job, state, reason = line.split("|", 2)
            known[job] = f"{state} ({reason})" if state == "PENDING" else state
        gone = sorted(numbers - {job.split("_")[0] for job in known})
        if gone and lines is not None:
            for line in _lines(["sacct", "-X", "-n", "-P", "-j", ",".join(gone), "-o", "JobID,State"]) or ():
                job, state = line.split("|", 1)
                known[job] = state.split()[0]  # CANCELLED by 1000
        if lines is None:
            unheard = "UNKNOWN"
    for launch in launches:
        if launch.on == "local":
            for part in launch.parts:
                elsewhere = launch.host != socket.gethostname()
                known[part.job] = "UNKNOWN" if elsewhere else "RUNNING" if _controller(part.job) else "ENDED"
    return {job: known.get(job, unheard) for job, _, _ in jobs}


def _lines(words: list[str]) -> list[str] | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines() if done.returncode == 0 else None


def _alive(state: str) -> bool:
    return state != "UNKNOWN" and state.split()[0] not in ENDED


def _controller(job: str) -> psutil.Process | None:
    """The process of a local job, if it still is that one."""
    import psutil

    try:
        process = psutil.Process(int(job))
        return process if "submitit.local._local" in process.cmdline() else None
    except (ValueError, psutil.Error):
        return None


def render(launches: Sequence[Launch]) -> Table:
    """A line a job: its number, what it is, SLURM's word for it, and how the run stands."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("job", "run", "job's state", "run's status", "step"):
        table.add_column(column, justify="right" if column == "step" else "left", no_wrap=True)
    states = job_states(launches)
    for launch in launches:
        study = open_study(launch.folder) if launch.parts[0].name != "run" else None
        for job, part, run in launch.tasks():
            name, status, step = str(launch.folder), "", ""
            if part.name == "report":
                name += ": report"
                status = "written" if (launch.folder / "report.html").is_file() else "waiting"
            elif study is not None and run is not None:
                stands = read_state(launch.folder, study, *run)
                name, status = f"{launch.folder / run_name(*run)}", stands.status
                step = f"{stands.step:,}" if stands.step else ""
            else:
                status, step = _stands(RunDir(launch.folder))
            table.add_row(job, name, states[job].lower(), Text(status, COLOURS.get(status, "")), step)
    return table


def _stands(run: RunDir) -> tuple[str, str]:
    """(status, step) of a run."""
    step = next((f"{line['step']:,}" for line in reversed(_tail(run.metrics_file))), "")
    if is_held(run.path):
        return "running", step
    return run.read_json("result.json").get("status") or ("stopped" if step else "waiting"), step


# -- stopping -------------------------------------------------------------------------------------------------------


def stop(folder: Path, wait: bool, say: Callable[[str], None]) -> None:
    """Ask whoever trains a run, or runs a study, to save and end; keep its jobs that wait from starting.

    Args:
        wait: until they have, and say how they ended.

    Raises:
        RunError: there is no run or study in the folder, or nobody is at work on it; nothing is written then.
    """
    launch, is_study = Launch.read(folder), (folder / "study.toml").is_file()
    if not (is_study or launch or RunDir(folder).exists() or is_held(folder)):
        raise RunError(f"{folder} is neither a run's folder nor a study's: it has no recipe.toml and no study.toml")

    # who holds a lock saves when it finds the file; a study's runner passes the wish on to its runs
    at_work = [folder] if is_held(folder) else []
    if is_study and not at_work:  # the tasks of an array have no runner
        at_work = sorted(file.parent for file in folder.glob("*/.lock") if is_held(file.parent))
    # a job that holds none has not begun to train, or has saved: it can be cancelled, before others end and it starts
    cancelled = _cancel(launch, at_work) if launch is not None else 0
    if not at_work and not cancelled:
        raise RunError(f"nobody is at work on {folder}: there is nothing to stop")
    if cancelled:
        say(f"{cancelled} job{'s' if cancelled > 1 else ''} cancelled")
    for path in at_work:
        (path / STOP_FILE).touch()
    if not wait:
        say(f"{folder}: asked to save and end")
        return
    while working := [path for path in at_work if is_held(path)]:
        for path in working:  # one that had only just begun took it for an old request
            (path / STOP_FILE).touch()
        time.sleep(POLL_SECONDS)
    for path in at_work:
        (path / STOP_FILE).unlink(missing_ok=True)

    if is_study:
        goes_on = launch.command if launch is not None else f"gptlab study run {folder}"
        states = read_study(folder)
        says = progress(states)
        say(f"{folder}: {says}" + ("" if all(state.ended for state in states) else f"; `{goes_on}` goes on"))
        return
    result = RunDir(folder).read_json("result.json")
    goes_on = launch.command if launch is not None else f"gptlab train {folder / 'recipe.toml'} --out {folder}"
    if result.get("status") == "interrupted":
        say(f"{folder}: saved at step {result['steps']}; `{goes_on}` goes on")
    elif result.get("status"):
        say(f"{folder}: {result['status']} after {result.get('steps', 0)} steps")
    else:
        say(f"{folder}: ended; `{goes_on}` goes on from its last checkpoint")


def _cancel(launch: Launch, at_work: Sequence[Path]) -> int:
    """Cancel the jobs of a launch that train nothing. Returns how many."""
    states = job_states([launch])
    idle = []
    for job, _, run in launch.tasks():
        path = launch.folder if run is None or launch.on == "local" else launch.folder / run_name(*run)
        if path not in at_work and _alive(states[job]) and job not in idle:
            idle.append(job)
    if launch.on == "slurm" and idle:
        subprocess.run(["scancel", *idle], check=False)
    for job in idle if launch.on == "local" else ():
        if (process := _controller(job)) is not None:
            process.send_signal(signal.SIGTERM)  # it passes it on
    return len(idle)

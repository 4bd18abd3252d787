"""Runs a study: every arm with every seed, each in a fresh process, and what is there already is not done again.

    check everything -> core arms, seed by seed -> sanity gate -> extended arms

The folder is all the state there is: study.toml, a folder a run, and its summary beside it once it has ended. A runner
that was killed is started again with the same command.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from gptlab import locks, machine
from gptlab.config import Recipe, Study, may_differ, settings, shipped
from gptlab.errors import ConfigError, Locked, RunError
from gptlab.rundir import RunDir, open_study, run_name, write_atomically
from gptlab.study.table import RunState, duration, progress, read_state, read_summary, render
from gptlab.study.worker import RUNNER
from gptlab.training.signals import STOP_FILE, StopSignal

RESULTS = ("completed", "diverged", "out_of_memory")  # not trained again; failed and not_applicable are looked at again
RETRIES = 2  # of a fault of the machine
POLL_SECONDS = 0.1

# Faults of the machine, in the words of PyTorch's and Python's errors. The rest would only happen again.
MACHINE = re.compile(
    r"CUDA\w* (unknown )?error|CUBLAS_STATUS|cuDNN|NCCL|driver|\bOSError|Connection\w*Error|BrokenPipeError"
    r"|TimeoutError|timed out",
    re.IGNORECASE,
)
HOPELESS = re.compile(r"out of memory|No space left|quota exceeded|device-side assert|ALLOC_FAILED", re.IGNORECASE)


@dataclass
class Run:
    """A run that is asked for."""

    arm: str
    seed: int
    group: str
    recipe: Recipe
    dir: RunDir
    attempts: int = 0

    def __str__(self) -> str:
        return f"{self.arm} seed {self.seed}"


@dataclass
class Worker:
    """A run that a process trains."""

    run: Run
    process: subprocess.Popen[bytes]
    log_start: int
    """Where in worker.log this attempt begins."""


def run_study(
    study: Study,
    out: str | Path | None = None,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    jobs: int | None = None,
    quiet: bool = False,
) -> int:
    """Train a study's runs, or go on with them.

    Args:
        study: see `load_study`.
        out: the study's folder; default results/<study>.
        arms: only these, without the sanity gate.
        seeds: default the study's.
        jobs: runs at the same time; default one a GPU, on a CPU as many as train.threads leaves cores for, or one.
        quiet: print nothing.

    Returns:
        0: every run has a result, diverged, out of memory and not applicable ones too; 1: a run failed, or the sanity
        gate did not hold; 4: interrupted, and the same call goes on.

    Raises:
        UserError: an arm, setting, dataset or folder that cannot be used; nothing has been started then.
    """
    folder = Path(out or f"results/{study.name}")
    runs = plan(study, folder, arms, seeds)
    gpus = visible_gpus() if any(run.recipe.train.device in ("auto", "cuda") for run in runs) else []
    jobs = jobs if jobs is not None else default_jobs(runs, gpus)
    if jobs < 1:
        raise ConfigError(f"jobs = {jobs}: must be at least 1")
    with lock(folder):
        keep_study(folder, study, [run.seed for run in runs])
        return Runner(study, folder, runs, jobs, gpus, quiet, gated=arms is None).run()


# -- before anything starts -----------------------------------------------------------------------------------------


def find_study(name: str) -> tuple[str, Path | None]:
    """What `gptlab study run` is given: a shipped name, a file, or the folder of a study that was begun.

    Returns:
        (name or file for load_study, the folder if it is one that was begun)
    """
    path = Path(name)
    if name in shipped("studies"):
        return name, None
    if path.is_dir():
        open_study(path)
        return str(path / "study.toml"), path
    begun = path.name == "study.toml" and (path.parent / ".lock").is_file()
    return name, path.parent if begun else None


def first_seeds(study: Study, n: int) -> list[int]:
    """The first n seeds of a study, counting on from its largest where it names fewer."""
    if n < 1:
        raise ConfigError(f"seeds = {n}: must be at least 1")
    more = range(max(study.seeds) + 1, max(study.seeds) + 1 + n - len(study.seeds))
    return [*study.seeds, *more][:n]


def plan(study: Study, folder: Path, arms: Sequence[str] | None, seeds: Sequence[int] | None) -> list[Run]:
    """The runs in the order they are started: core arms first, seed by seed.

    Raises:
        ConfigError: an arm that is not the study's, a setting out of bounds, or a dataset that is not prepared.
    """
    for arm in arms or ():
        if arm not in study.arms:
            close = difflib.get_close_matches(arm, study.arms, n=1, cutoff=0.4)
            hint = f"did you mean '{close[0]}'?" if close else f"it has {', '.join(study.arms)}"
            raise ConfigError(f"study {study.name} has no arm '{arm}'; {hint}")
    runs = [
        Run(name, seed, arm.group, study.build(name, seed), RunDir(folder / run_name(name, seed)))
        for group in ("core", "extended")
        for seed in dict.fromkeys(seeds if seeds is not None else study.seeds)
        for name, arm in study.arms.items()
        if arm.group == group and (arms is None or name in arms)
    ]
    missing = {}
    for run in runs:
        data = run.recipe.data
        for path in data.mixture or [data.folder]:
            if not Path(path).is_dir():
                missing[path] = (
                    f"no prepared dataset at {path}: `gptlab prepare {data.corpus} --tokenizer {data.tokenizer} "
                    f"--out {path}` makes it, --data.path names another"
                )
    if missing:
        raise ConfigError("\n".join(missing.values()))
    return runs


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, in the words of CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count()  # without taking a context, and the memory of one, on any
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def default_jobs(runs: Sequence[Run], gpus: Sequence[str]) -> int:
    if gpus:
        return len(gpus)
    threads = [run.recipe.train.threads for run in runs]
    return max(1, machine.cores() // max(threads)) if all(threads) else 1


def worker_environment(run: Run, slot: int, jobs: int, gpus: Sequence[str], others: int = 0) -> dict[str, str]:
    """The environment of a worker: its share of the cores, and its GPU.

    A run that goes on keeps the number of threads that it had, as far as its share allows: its sums are taken in the
    same order then, and it repeats what it would have been without the interruption.

    Args:
        slot: which of the `jobs` places it takes; more places than GPUs share them in turn.
        others: runs outside the study that train on the same cores.
    """
    recipe, environment = run.recipe, {**os.environ, RUNNER: str(os.getpid())}
    machine.spin_less(environment)
    share = machine.share_of_cores(jobs + others)
    had = run.dir.read_json("environment.json").get("threads")
    if recipe.train.threads:
        environment["OMP_NUM_THREADS"] = str(recipe.train.threads)
    elif had or jobs + others > 1:
        environment["OMP_NUM_THREADS"] = str(min(share, had or share))
    if gpus and recipe.train.device in ("auto", "cuda"):
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment


def command(folder: Path, run: Run) -> list[str]:
    return [sys.executable, "-m", "gptlab.study.worker", str(folder), run.arm, str(run.seed)]


# -- the folder -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a study's folder for one runner. Raises Locked where there is another one."""
    with locks.hold(
        folder, Locked(f"{folder} is being run by another process; `gptlab study status {folder}` shows how far it is")
    ):
        yield


def keep_study(folder: Path, study: Study, seeds: Sequence[int]) -> None:
    """Write study.toml, its seeds with all that have been asked for. Raises RunError where it is another study's."""
    file, stored = folder / "study.toml", []
    if file.is_file():
        before = open_study(folder)
        if differ := differences(before, study):
            raise RunError(
                f"{folder} holds another study: {'; '.join(differ)}; --out names another folder for this one"
            )
        stored = before.seeds
    seeds = list(dict.fromkeys([*study.seeds, *stored, *seeds]))
    text = study.model_copy(update={"seeds": seeds}).to_toml()
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write_atomically(file, text)


def differences(before: Study, now: Study) -> list[str]:
    """What makes two studies different ones, a sentence each; seeds, words and cadences do not."""
    result = []
    for key in ("name", "baseline", "metric", "questions"):
        one, two = before.model_dump()[key], now.model_dump()[key]
        if one != two:
            result.append(key if isinstance(one, list) else f"{key} ({one} then, {two} now)")
    result += [f"there was no arm {arm}" for arm in now.arms if arm not in before.arms]
    result += [f"there was an arm {arm}" for arm in before.arms if arm not in now.arms]
    both = [arm for arm in now.arms if arm in before.arms]
    changes: dict[str, list[str]] = {}  # {what differs: in which arms}
    for arm in both:
        one = {"group": before.arms[arm].group, **_identity(before.build(arm, 0))}
        two = {"group": now.arms[arm].group, **_identity(now.build(arm, 0))}
        for key in one:
            if one[key] != two[key]:
                changes.setdefault(f"{key} ({one[key]} then, {two[key]} now)", []).append(arm)
    for change, arms in changes.items():
        result.append(change if arms == both else f"{change} in {', '.join(arms)}")
    if any(change.startswith(("schedule.decay_steps", "train.max_epochs")) for change in changes):
        result.append("the learning rate decays until the run's limit unless schedule.decay_steps says otherwise")
    return result


def _identity(recipe: Recipe) -> dict[str, Any]:
    """The settings that make a recipe this one, by dotted name.

    A limit is none of them, unless the learning rate decays towards it: a run of 100 steps that is made a longer one
    has had its decay, and would not be the run that a longer limit alone stands for.
    """
    names = [name for name, _ in settings() if not may_differ(name)]
    values: dict[str, Any] = {name: reduce(getattr, name.split("."), recipe) for name in names}
    if recipe.schedule.shape == "constant":
        values["schedule.decay_steps"] = 0
    elif not recipe.schedule.decay_steps:
        limits = recipe.train
        values["schedule.decay_steps"] = recipe.step_limit(0) if limits.max_steps or limits.max_tokens else 0
        values["train.max_epochs"] = limits.max_epochs
    return {"train.max_epochs": 0.0, **values}


def is_finished(study: Study, folder: Path, run: Run) -> bool:
    """Whether a run has its result, and with the limits that are asked for."""
    if not run.dir.exists():  # the summary alone may have been kept
        return read_summary(folder, study, run.arm, run.seed).get("status") in RESULTS
    result = run.dir.read_json("result.json")
    if result.get("status") != "completed":
        return result.get("status") in RESULTS
    then, now = run.dir.read_recipe().train, run.recipe.train
    return (then.max_steps, then.max_tokens, then.max_epochs) == (now.max_steps, now.max_tokens, now.max_epochs)


def write_summary(study: Study, folder: Path, run: Run, result: Mapping[str, Any]) -> None:
    """<arm>_seed<k>.json: the run's result, and which run it is."""
    summary = {"study": study.name, "arm": run.arm, "group": run.group, "seed": run.seed, **result}
    name = f"{run_name(run.arm, run.seed)}.json"
    if RunDir(folder).read_json(name) != summary:
        RunDir(folder).write_json(name, summary)


def gate(study: Study, folder: Path, runs: Sequence[Run]) -> list[str]:
    """What is wrong with the core runs: nothing, or a sentence a run.

    A run that completed must have learnt something, and the baseline must have completed.
    """
    problems = []
    for run in runs:
        summary = read_summary(folder, study, run.arm, run.seed)
        loss = summary.get("final_val_loss")
        finite = loss is not None and math.isfinite(loss)
        status = summary.get("status", "unfinished")
        if run.arm == study.baseline and not (status == "completed" and finite):
            problems.append(f"{run}, the baseline, {status} and has no finite loss to compare with")
        elif status == "completed":
            first = next((line["val_loss"] for line in run.dir.read_metrics() if "val_loss" in line), None)
            if first is not None and not (finite and loss < first):
                problems.append(f"{run} ended with val_loss {loss}, no lower than the {first} it began with")
    return problems


# -- at work --------------------------------------------------------------------------------------------------------


class Runner:
    """Starts workers, watches them, and writes down how they ended."""

    def __init__(
        self, study: Study, folder: Path, runs: Sequence[Run], jobs: int, gpus: Sequence[str], quiet: bool, gated: bool
    ) -> None:
        self.study, self.folder, self.runs, self.jobs, self.gpus = study, folder, runs, jobs, gpus
        self.quiet, self.gated = quiet, gated
        self.others = 0  # runs outside the study that share its cores
        self.workers: dict[int, Worker] = {}  # by slot
        self.states: dict[str, RunState] = {}
        self.failed = self.interrupted = False
        self.console = Console(file=sys.stderr)
        self.live: Live | None = None
        self.shown_at = -math.inf

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def run(self) -> int:
        """Everything, to the end; see run_study for the status."""
        self.say_beaten()
        self.look_around()
        todo = []
        for run in self.runs:
            if is_finished(self.study, self.folder, run):
                if run.dir.exists():
                    write_summary(self.study, self.folder, run, run.dir.read_json("result.json"))
            else:
                todo.append(run)
            self.states[str(run)] = read_state(self.folder, self.study, run.arm, run.seed)
        core = [run for run in todo if run.group == "core" or not self.gated]
        extended = [run for run in todo if run not in core]
        if not self.quiet and self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False, vertical_overflow="crop")
        with self.live or contextlib.nullcontext(), StopSignal(self.folder) as stop:
            try:
                self.work(core, stop)
                if extended and not self.interrupted:
                    if problems := gate(self.study, self.folder, [run for run in self.runs if run.group == "core"]):
                        self.failed = True
                        self.say(
                            f"the extended arms are not started: {'; '.join(problems)}. --arm NAME runs an arm anyway"
                        )
                    else:
                        self.work(extended, stop)
            except KeyboardInterrupt:
                self.interrupted = True
            finally:
                self.kill()
                self.show(last=True)
        if self.live is None:
            self.say(f"{self.folder}: {progress(list(self.states.values()), self.jobs)}")
        if self.interrupted:
            self.say("the same command goes on from here")
        return 4 if self.interrupted else 1 if self.failed else 0

    def say_beaten(self) -> None:
        beaten: dict[str, list[str]] = {}
        for arm, key in self.study.beaten():
            if any(run.arm == arm for run in self.runs):
                beaten.setdefault(key, []).append(arm)
        for key, arms in beaten.items():
            self.say(f"--{key} takes the place of what is set by {', '.join(arms)}")

    def look_around(self) -> None:
        """Leave other runs on this machine their cores. Once, so that the study's runs do not differ in threads."""
        on_cpu = [run for run in self.runs if run.recipe.train.device == "cpu" or not self.gpus]
        self.others = machine.other_runs() if on_cpu else 0
        if self.others and not all(run.recipe.train.threads for run in on_cpu):
            share = machine.share_of_cores(self.jobs + self.others)
            self.say(
                f"{machine.say_others(self.others)}: each run of the study takes {share} of {machine.cores()} cores, "
                "since with more threads than cores all are slower"
            )

    def work(self, queue: list[Run], stop: StopSignal) -> None:
        """Train runs, `jobs` at a time, until all have ended or `stop` says so."""
        asked = False
        while self.workers or (queue and not stop()):
            for slot, worker in list(self.workers.items()):
                if (code := worker.process.poll()) is not None:
                    del self.workers[slot]
                    if self.ended(worker, code, stop()):
                        queue.insert(0, worker.run)
            while queue and len(self.workers) < self.jobs and not stop():
                self.start(queue.pop(0))
            if stop() and not asked:
                asked = True
                self.say("stopping: each run saves a checkpoint and ends; Ctrl-C once more kills them")
                for worker in self.workers.values():
                    if os.name == "nt":  # where terminating is killing
                        (worker.run.dir.path / STOP_FILE).touch()
                    else:
                        worker.process.terminate()
            self.show()
            time.sleep(POLL_SECONDS)
        self.interrupted = self.interrupted or bool(queue)

    def start(self, run: Run) -> None:
        slot = next(i for i in range(self.jobs) if i not in self.workers)
        run.attempts += 1
        run.dir.path.mkdir(exist_ok=True)
        if run.dir.read_json("result.json").get("status") == "failed":
            # it is looked at again: what it died of then may not be why it does now
            (run.dir.path / "result.json").unlink()
        line = command(self.folder, run)
        with open(run.dir.path / "worker.log", "ab") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} start {run.attempts}: {' '.join(line)}\n".encode())
            log.flush()
            log_start = log.tell()
            process = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is ours alone
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # on Windows
                env=worker_environment(run, slot, self.jobs, self.gpus, self.others),
            )
            self.workers[slot] = Worker(run, process, log_start)
        self.states[str(run)] = read_state(self.folder, self.study, run.arm, run.seed, running=True)
        if self.live is None:
            self.say(f"{run}: started")

    def ended(self, worker: Worker, code: int, stopping: bool) -> bool:
        """Write down how a run ended. Returns whether it is to be started again."""
        run = worker.run
        result = run.dir.read_json("result.json")
        if code in (0, 3) and result.get("status") not in (None, "interrupted", "failed"):
            pass
        elif code == 4 or (code < 0 and stopping):
            self.interrupted = True
            result = {"status": "interrupted"}
        else:
            reason, passing = self.fault(worker, code, result)
            if stopping and passing:
                self.interrupted = True
                result = {"status": "interrupted"}
            elif passing and run.attempts <= RETRIES:
                self.say(f"{run}: {reason}; it goes on from its last checkpoint")
                return True
            else:
                self.failed = True
                times = ("", "", ", twice", ", three times")[run.attempts]
                hint = "; the system log may say that memory ran out" if code == -9 else ""
                result = {"status": "failed", "reason": f"{reason}{times}{hint}"}
                if run.dir.read_json("result.json").get("status") != "completed":
                    run.dir.write_json("result.json", result)
        if result["status"] != "interrupted":
            write_summary(self.study, self.folder, run, result)
        state = self.states[str(run)] = read_state(self.folder, self.study, run.arm, run.seed, running=False)
        if self.live is None:
            says = f"{run}: {state.status}" + (f" at step {state.step:,}" if state.step else "")
            says += f", val_loss {state.val_loss:.4f}" if state.val_loss is not None else ""
            says += f", in {duration(state.seconds_whole)}" if state.seconds_whole else ""
            self.say(says + (f": {state.reason}" if state.reason else ""))
        return False

    def fault(self, worker: Worker, code: int, result: Mapping[str, Any]) -> tuple[str, bool]:
        """(why a worker failed, whether it may go better the next time)."""
        if code < 0:
            return f"the process was killed by signal {-code}", True
        with open(worker.run.dir.path / "worker.log", "rb") as log:
            log.seek(worker.log_start)
            lines = log.read().decode(errors="replace").strip().splitlines()
        last = lines[-1].removeprefix("gptlab: ") if lines else f"the process ended with {code} and said nothing"
        reason = str(result["reason"]) if code == 1 and result.get("status") == "failed" else last
        return reason, code == 1 and bool(MACHINE.search(reason)) and not HOPELESS.search(reason)

    def kill(self) -> None:
        """Whatever still runs, and its own children, now."""
        for worker in self.workers.values():
            with contextlib.suppress(ProcessLookupError):
                if hasattr(os, "killpg"):
                    os.killpg(worker.process.pid, signal.SIGKILL)
                else:
                    worker.process.kill()
            worker.process.wait()
            run = worker.run
            self.states[str(run)] = read_state(self.folder, self.study, run.arm, run.seed)
        self.workers.clear()

    def show(self, last: bool = False) -> None:
        """Draw the table again, at most once a second."""
        if self.live is None or (time.monotonic() - self.shown_at < 1 and not last):
            return
        for worker in self.workers.values():
            run = worker.run
            self.states[str(run)] = read_state(self.folder, self.study, run.arm, run.seed, running=True)
        rows = None if last else max(3, self.console.height - 6)
        if last:
            self.live.vertical_overflow = "visible"
        self.live.update(render(list(self.states.values()), self.jobs, rows), refresh=True)
        self.shown_at = time.monotonic()

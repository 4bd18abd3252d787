"""Runs a study: every arm with every seed, each in a fresh process. Runs that have a result are not run again.

    check everything -> core arms of one seed -> sanity gate -> all other runs, seed by seed

The folder is the whole state: study.toml, one folder per run, and the summary of each run that has ended. A runner that
was killed is started again with the same command.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.live import Live

from gptlab import locks, machine
from gptlab.config import Study
from gptlab.data.prepare.missing import is_of_this_python, prepare_missing
from gptlab.errors import ConfigError, RunError
from gptlab.files import printable
from gptlab.notebook import COLUMNS, Display
from gptlab.progress import Progress, stderr_console
from gptlab.rundir import PLAN, read_plan
from gptlab.status import EXIT_CODES
from gptlab.study.folder import check_seeds, is_finished, keep_study, rule_of, study_in_use, write_summary
from gptlab.study.runs import RESULTS, PlannedRun, check_datasets, planned_runs, sanity_gate
from gptlab.study.table import RunState, duration, plain_text, read_state, study_progress, study_table
from gptlab.study.worker import RUNNER
from gptlab.training.signals import STOP_FILE, StopSignal

if TYPE_CHECKING:
    from gptlab.study.deciding import Decider

RETRIES = 2  # of a run that a fault of the machine ended
POLL_SECONDS = 0.1

# Faults of the machine for which PyTorch raises RuntimeError: only the message tells which library failed.
LIBRARY_FAULT = re.compile(r"CUDA\w* (unknown )?error|CUBLAS_STATUS|cuDNN|NCCL|driver|timed out", re.IGNORECASE)
NOT_TRANSIENT = re.compile(r"out of memory|device-side assert|ALLOC_FAILED", re.IGNORECASE)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class Worker:
    """A process that trains a run."""

    run: PlannedRun
    process: subprocess.Popen[bytes]
    log_start: int
    """Where in worker.log this attempt begins, in bytes."""


def run_study(
    study: Study,
    out: str | Path | None = None,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    jobs: int | None = None,
    quiet: bool = False,
    until_decided: bool = False,
    most_seeds: int | None = None,
    budget: float | None = None,
) -> int:
    """Train the runs of a study, or continue with them.

    Args:
        study: see `load_study`.
        out: the study's folder; default results/<study>.
        arms: run only these arms; without the sanity gate, unless all core arms are among them.
        seeds: default: the seeds of the study.
        jobs: runs at the same time. Default: one per GPU; on a CPU one per train.threads cores, or one.
        quiet: print nothing.
        until_decided: after these seeds, add seeds where a comparison is open, see `gptlab.study.deciding`. The study's
            folder keeps the rule: a later call does so too, unless it names arms or seeds.
        most_seeds: of an arm; default: what the study says.
        budget: hours of training, summed over runs; no seed starts beyond it.

    Returns:
        The exit status. 0: every run has a result, also if it diverged, ran out of memory or is not applicable. 1: a
        run failed, or the sanity gate is closed. 4: interrupted; the same call continues.

    Raises:
        UserError: an arm, setting, dataset or folder cannot be used. Nothing has been started then.
    """
    folder = Path(out or f"results/{study.name}")
    study = rule_of(study, folder, until_decided, most_seeds)
    check_seeds(study, folder, seeds or ())
    goes_on = until_decided or (study.until_decided and arms is None and seeds is None)
    if budget is not None and not (goes_on and 0 < budget < math.inf):
        raise ConfigError(f"--budget {budget:g}: must be hours above 0, and needs --until-decided")
    if until_decided and arms is not None:
        raise ConfigError("--arm names the arms to train, and --until-decided chooses them: leave one of them out")
    runs = planned_runs(study, folder, arms, seeds)
    with Progress("checking the runs", not quiet):
        check_datasets([run for run in runs if not is_of_this_python(run.recipe.data)])
        gpus = visible_gpus() if any(run.recipe.train.device in ("auto", "cuda") for run in runs) else []
    jobs = jobs if jobs is not None else default_jobs(runs, gpus)
    if jobs < 1:
        raise ConfigError(f"jobs = {jobs}: must be at least 1")
    with locks.hold(folder, study_in_use(folder)):
        prepare_missing((run.recipe.data for run in runs), quiet=quiet)
        check_datasets(runs)
        study = keep_study(folder, study, [run.seed for run in runs])
        if goes_on:
            from gptlab.study.deciding import Decider

            first = planned_runs(study, folder, None, study.seeds)
            return StudyRunner(study, folder, first, jobs, gpus, quiet, Decider(study, folder, first, budget)).run()
        return StudyRunner(study, folder, runs, jobs, gpus, quiet).run()


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()  # without a context, and its memory, on any GPU
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def default_jobs(runs: Sequence[PlannedRun], gpus: Sequence[str]) -> int:
    if gpus:
        return len(gpus)
    threads = [run.recipe.train.threads for run in runs]
    return max(1, machine.cores() // max(threads)) if all(threads) else 1


def worker_environment(run: PlannedRun, slot: int, jobs: int, gpus: Sequence[str], others: int = 0) -> dict[str, str]:
    """The environment of a worker: its share of the cores, and its GPU.

    A run that continues, or branches off another, keeps its number of threads, as far as its share allows. Its sums
    then have the same order, and the run repeats bit for bit what it would have been without the interruption.

    Args:
        slot: index of the worker in [0, jobs). If there are more workers than GPUs, GPUs are shared in turn.
        others: runs outside the study on the same cores.
    """
    recipe, environment = run.recipe, {**os.environ, RUNNER: str(os.getpid())}
    machine.spin_less(environment)
    share = machine.share_of_cores(jobs + others)
    facts = run.dir.read_json("environment.json")
    if not facts and run.trunk is not None:
        facts = run.trunk[0].read_json("environment.json")
    had = facts.get("threads")
    if recipe.train.threads:
        environment["OMP_NUM_THREADS"] = str(recipe.train.threads)
    elif had or jobs + others > 1:
        environment["OMP_NUM_THREADS"] = str(min(share, had or share))
    if gpus and recipe.train.device in ("auto", "cuda"):
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment


def command(folder: Path, run: PlannedRun) -> list[str]:
    # -P: a file torch.py in the folder where a study is started is not imported
    return [sys.executable, "-P", "-m", "gptlab.study.worker", str(folder), run.arm, str(run.seed)]


class StudyRunner:
    """Starts workers, watches them, and records how they ended."""

    def __init__(
        self,
        study: Study,
        folder: Path,
        runs: Sequence[PlannedRun],
        jobs: int,
        gpus: Sequence[str],
        quiet: bool,
        decider: Decider | None = None,
    ) -> None:
        """decider: hands out the runs round by round; without one, all of them are trained."""
        self.decider = decider
        self.study, self.folder, self.runs, self.jobs, self.gpus = study, folder, runs, jobs, gpus
        self.quiet, self.gate_is_closed = quiet, False
        self.others = 0  # runs outside the study on the same cores
        self.workers: dict[int, Worker] = {}  # by slot
        self.states: dict[str, RunState] = {}
        self.failed = self.interrupted = False
        self.console = stderr_console()
        self.live: Live | None = None
        self.display = Display() if self.console.is_jupyter and not quiet else None
        self.shown_at = -math.inf

    def say(self, text: str) -> None:
        if self.display is not None:
            self.display.message(printable(text))
        elif not self.quiet:
            self.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    @property
    def draws(self) -> bool:
        """Whether there is a table that is drawn again and again; else each start and each end is a line."""
        return self.live is not None or self.display is not None

    def run(self) -> int:
        """Train all runs. Returns the exit status, see `run_study`."""
        self.say_overridden()
        self.say_plan()
        self.count_other_runs()
        todo = self.unfinished(self.runs)
        if not self.quiet and self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False, vertical_overflow="crop")
        with self.live or contextlib.nullcontext(), StopSignal(self.folder) as stop:
            try:
                if self.decider is None:
                    self.train(todo, stop)
                while self.decider is not None and not self.interrupted and (runs := self.decider.next_round()):
                    for line in self.decider.news:
                        self.say(line)
                    self.train(self.unfinished(runs), stop)
            except KeyboardInterrupt:
                self.interrupted = True
            finally:
                self.kill()
                self.show(last=True)
        if not self.draws:
            self.say(f"{self.folder}: {study_progress(list(self.states.values()), self.jobs)}")
        if not self.interrupted and self.decider is not None:
            for line in self.decider.closing():
                self.say(line)
        return EXIT_CODES["interrupted" if self.interrupted else "failed" if self.failed else "completed"]

    def unfinished(self, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
        """Those of the runs that have no result; the others get a summary if they lack one.

        A run of which a file is damaged is named and left as it is, and the study goes on without it.
        """
        todo = []
        for run in runs:
            if (state := self.look_at(run)).status == "damaged":
                self.failed = True
                self.say(f"{run} is left out: {state.reason}")
            elif not is_finished(self.study, self.folder, run):
                todo.append(run)
            elif run.dir.exists():
                write_summary(self.study, self.folder, run, run.dir.read_json("result.json"))
        return todo

    def train(self, runs: Sequence[PlannedRun], stop: StopSignal) -> None:
        self.work([run for run in runs if run.opens_gate], stop)
        if not self.interrupted:
            self.work([run for run in runs if not run.opens_gate], stop)

    def look_at(self, run: PlannedRun, running: bool | None = None) -> RunState:
        state = self.states[str(run)] = read_state(self.folder, self.study, run.arm, run.seed, running)
        return state

    def say_overridden(self) -> None:
        beaten: dict[str, list[str]] = {}
        for arm, key in self.study.beaten():
            if any(run.arm == arm for run in self.runs):
                beaten.setdefault(key, []).append(arm)
        for key, arms in beaten.items():
            self.say(f"--{key} overrides the value of {', '.join(arms)}")

    def say_plan(self) -> None:
        if self.study.until_decided:
            most, more = self.study.most_seeds, "seeds are added until it is decided, at most"
            self.say(f"{self.study.name}: {more} {most}" + ("" if self.decider else "; now only the named runs start"))
        if (plan := read_plan(self.folder, self.study)) is not None:
            self.say(f"{self.folder / PLAN}: registered on {plan.date[:10]}, sha256 {plan.sha256}")
            for remark in plan.remarks:
                self.say(remark)

    def count_other_runs(self) -> None:
        """Count other runs on this machine, once: all runs of the study then have the same number of threads."""
        on_cpu = [run for run in self.runs if run.recipe.train.device == "cpu" or not self.gpus]
        self.others = machine.other_runs() if on_cpu else 0
        if self.others and not all(run.recipe.train.threads for run in on_cpu):
            share = machine.share_of_cores(self.jobs + self.others)
            self.say(
                f"{machine.say_others(self.others)}: each run of the study takes {share} of {machine.cores()} cores; "
                "more threads than cores would slow all runs down"
            )

    def work(self, queue: list[PlannedRun], stop: StopSignal) -> None:
        """Train runs, `jobs` at a time, until all have ended or a stop is requested."""
        asked = False
        while self.workers or (queue and not stop()):
            for slot, worker in list(self.workers.items()):
                if (code := worker.process.poll()) is not None:
                    del self.workers[slot]
                    if self.ended(worker, code, stop()):
                        queue.insert(0, worker.run)
            while len(self.workers) < self.jobs and not stop() and (run := self.next_of(queue)):
                if self.may_start(run) and not self.ends_with_trunk(run):
                    self.start(run)
            if stop() and not asked:
                asked = True
                self.say("stopping: each run saves a checkpoint and ends; a second Ctrl-C kills the runs")
                for worker in self.workers.values():
                    if os.name == "nt":  # terminate() kills on Windows
                        (worker.run.dir.path / STOP_FILE).touch()
                    else:
                        worker.process.terminate()
            self.show()
            time.sleep(POLL_SECONDS)
        self.interrupted = self.interrupted or bool(queue)

    def next_of(self, queue: list[PlannedRun]) -> PlannedRun | None:
        """Take the first run that need not wait for its trunk to reach the branch; None if all of them do."""
        ahead = {run.dir.path for run in [*queue, *(worker.run for worker in self.workers.values())]}
        for place, run in enumerate(queue):
            if run.trunk is None or run.trunk[0].path not in ahead or run.can_branch:
                return queue.pop(place)
        return None

    def ends_with_trunk(self, run: PlannedRun) -> bool:
        """Whether the trunk of a run ended before the branch, and the run with it: its steps until there are the same.

        Where the trunk has no result, the run starts from the beginning.
        """
        if run.trunk is None or run.can_branch:
            return False
        trunk, step = run.trunk
        try:
            result = trunk.read_json("result.json")
        except RunError:  # damaged, and named already
            return False
        if (status := result.get("status")) not in ("diverged", "out_of_memory", "failed", "not_applicable"):
            return False
        self.failed = self.failed or status == "failed"
        kept = ("status", "steps", "tokens", "failed_at_step", "failure", "failed_tensor")
        why = f": {result['reason']}" if result.get("reason") else ""
        said = f"{trunk.path.name}, of which it is a branch at step {step:,}, is {status.replace('_', ' ')}{why}"
        mine = {key: result[key] for key in kept if key in result} | {"reason": said}
        run.dir.path.mkdir(exist_ok=True)
        run.dir.write_json("result.json", mine)
        write_summary(self.study, self.folder, run, mine)
        self.look_at(run, running=False)
        if not self.draws:
            self.say(f"{run}: {status}: {said}")
        return True

    def may_start(self, run: PlannedRun) -> bool:
        """Whether the sanity gate lets a run start. What has begun goes on, and what closes the gate is said once."""
        if run.gate is None or not run.behind_gate or run.attempts:
            return True
        if not self.gate_is_closed and (problems := sanity_gate(self.study, self.folder, run.gate, self.study.seeds)):
            self.gate_is_closed = self.failed = True
            self.say(f"extended arms are not started: {'; '.join(problems)}. --arm NAME runs an arm anyway")
        return not self.gate_is_closed

    def start(self, run: PlannedRun) -> None:
        slot = next(i for i in range(self.jobs) if i not in self.workers)
        run.attempts += 1
        run.dir.path.mkdir(exist_ok=True)
        if run.dir.read_json("result.json").get("status") in ("failed", "not_applicable"):
            run.dir.remove("result.json")  # so that it is not taken for the result of this attempt
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
                start_new_session=True,  # Ctrl-C reaches only this process
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # on Windows
                env=worker_environment(run, slot, self.jobs, self.gpus, self.others),
            )
            self.workers[slot] = Worker(run, process, log_start)
        self.look_at(run, running=True)
        if not self.draws:
            self.say(f"{run}: started")

    def ended(self, worker: Worker, code: int, stopping: bool) -> bool:
        """Record how a run ended. Returns whether to start it again."""
        run = worker.run
        result = run.dir.read_json("result.json")
        if result.get("status") in (*RESULTS, "not_applicable") and code == EXIT_CODES[result["status"]]:
            pass
        elif code == EXIT_CODES["interrupted"] or (code < 0 and stopping):
            self.interrupted = True
            result = {"status": "interrupted"}
        else:
            reason, passing = self.fault(worker, code, result)
            if stopping and passing:
                self.interrupted = True
                result = {"status": "interrupted"}
            elif passing and run.attempts <= RETRIES:
                self.say(f"{run}: {reason}; it continues from its last checkpoint")
                return True
            else:
                self.failed = True
                times = ("", "", ", twice", ", three times")[run.attempts]
                hint = "; the system log may say that memory ran out" if code == -9 else ""
                own = result if result.get("status") == "failed" else {}  # with the steps that it took
                result = {**own, "status": "failed", "reason": f"{reason}{times}{hint}"}
                if run.dir.read_json("result.json").get("status") != "completed":
                    run.dir.write_json("result.json", result)
        if result["status"] != "interrupted":
            write_summary(self.study, self.folder, run, result)
        state = self.look_at(run, running=False)
        if not self.draws:
            says = f"{run}: {state.status}" + (f" at step {state.step:,}" if state.step else "")
            says += f", val_loss {state.val_loss:.4f}" if state.val_loss is not None else ""
            says += f", in {duration(state.seconds_whole)}" if state.seconds_whole else ""
            self.say(says + (f": {state.reason}" if state.reason else ""))
        return False

    def fault(self, worker: Worker, code: int, result: Mapping[str, Any]) -> tuple[str, bool]:
        """(why a worker failed, whether another attempt may succeed)."""
        if code < 0:
            return f"the process was killed by signal {-code}", True
        with open(worker.run.dir.path / "worker.log", "rb") as log:
            log.seek(worker.log_start)
            lines = log.read().decode(errors="replace").strip().splitlines()
        last = lines[-1].removeprefix("gptlab: ") if lines else f"the process ended with {code} and no message"
        failed = code == EXIT_CODES["failed"]
        reason = str(result["reason"]) if failed and result.get("status") == "failed" else last
        return reason, failed and is_transient(reason)

    def kill(self) -> None:
        """Kill all workers and their children."""
        for worker in self.workers.values():
            with contextlib.suppress(ProcessLookupError):
                if hasattr(os, "killpg"):
                    os.killpg(worker.process.pid, signal.SIGKILL)
                else:
                    worker.process.kill()
            worker.process.wait()
            self.look_at(worker.run)
        self.workers.clear()

    def show(self, last: bool = False) -> None:
        """Draw the table again, at most once a second."""
        if not self.draws or (time.monotonic() - self.shown_at < 1 and not last):
            return
        for worker in self.workers.values():
            self.look_at(worker.run, running=True)
        rows = None if last else max(3, self.console.height - 6)
        table = study_table(list(self.states.values()), self.jobs, rows)
        if self.display is not None:
            self.display.show(plain_text(table, COLUMNS))
        elif self.live is not None:
            if last:
                self.live.vertical_overflow = "visible"
            self.live.update(table, refresh=True)
        self.shown_at = time.monotonic()


def is_transient(reason: str) -> bool:
    """Whether another attempt may succeed, judged by the reason of a failed run: `TYPE: MESSAGE`."""
    name, _, message = reason.partition(": ")
    kind = getattr(builtins, name.rpartition(".")[2], None)
    if kind is OSError or (isinstance(kind, type) and issubclass(kind, ConnectionError | TimeoutError)):
        return not any(f"[Errno {number}]" in message for number in DISK_FULL)
    return bool(LIBRARY_FAULT.search(reason)) and not NOT_TRANSIENT.search(reason)

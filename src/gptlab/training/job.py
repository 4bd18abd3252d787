"""What is open while a run trains: its folder and lock, its data, the ranks, and the signal to stop."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptlab.config import Recipe
from gptlab.distributed.world import World, process_group
from gptlab.errors import RunError, UserError
from gptlab.files import because
from gptlab.machine import kept_memory
from gptlab.rundir import RunDir
from gptlab.streams import say
from gptlab.tasks.base import Task, TaskData, open_data
from gptlab.training.checkpoint import checkpoint_step, has_begun, list_checkpoints
from gptlab.training.result import Result
from gptlab.training.setup import pick_device, resolve
from gptlab.training.signals import StopSignal
from gptlab.training.state import State

FIRST_STEPS = 10  # a run that runs out of memory later than this is not tried again with smaller micro-batches


@dataclass
class Job:
    """One call of `train`."""

    recipe: Recipe
    run: RunDir
    data: TaskData
    device: torch.device
    world: World
    signal: StopSignal
    quiet: bool
    before: dict[str, Any]
    """result.json as an earlier attempt left it."""
    auto_micro_batch: bool
    """Whether batch.micro_batch was left open."""
    state: State | None = None
    """How far the trainer is, and what it trains on; None before it has them."""
    task: Task | None = None

    def halve_micro_batch(self) -> bool:
        """After running out of memory in the first steps: half the micro-batch, with twice the accumulation.

        Only where batch.micro_batch was auto: a given number is not changed. The new one goes into recipe.toml.

        Returns:
            Whether the run can be tried again.
        """
        if not self.auto_micro_batch or not self.run.exists():
            return False
        stored = self.run.read_recipe()
        begun = max((checkpoint_step(path) for path in list_checkpoints(self.run)), default=0)
        done = (self.run.last_line("loss") or {"step": 0})["step"]
        most = stored.batch.micro_batch
        if most == "auto" or most == 1 or done > begun + FIRST_STEPS:
            return False
        self.recipe = self.recipe.replace({"batch.micro_batch": most // 2, "precision.regime": stored.precision.regime})
        self.run.write_recipe(stored.replace({"batch.micro_batch": most // 2}))
        gc.collect()  # what the failed attempt still holds
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # the result's peak is of the attempt that succeeds
        if not self.quiet:
            say(
                f"out of memory with micro-batches of {most} sequences: trying again with {most // 2}; a step still "
                f"has {self.recipe.batch.tokens_per_step:,} tokens"
            )
        return True

    def finish(self, result: Result) -> Result:
        """Write result.json, where it does not say so already; the result that all ranks return."""
        if not self.world.broadcast(has_begun(self.run)):
            self.run.write_recipe(resolve(self.recipe, self.run, self.data, self.device, self.world)[0])
        if result.to_json() != self.run.read_json("result.json"):
            self.write(result)
        return self.world.broadcast(result)

    def write(self, result: Result) -> None:
        """Write result.json. Where it cannot be written, say on the terminal what would be in it, and raise OSError."""
        try:
            self.run.write_json("result.json", result.to_json())
        except OSError as error:
            if not self.quiet:
                says = f"{self.run.path / 'result.json'} cannot be written ({because(error)}); it would hold"
                say(f"{says} {json.dumps(result.to_json())}")
            raise


@contextlib.contextmanager
def open_job(recipe: Recipe, out: str | Path | None, resume: str, quiet: bool) -> Iterator[Job]:
    """Open the data, connect the ranks, lock the run directory and listen for signals; arguments as for `train`.

    Raises:
        UserError: the data, the device or the folder cannot be used.
    """
    run = RunDir(out or f"runs/{recipe.name}_seed{recipe.seed}")
    if resume == "never" and has_begun(run):
        raise RunError(f"{run.path} already has a run in it: --resume auto resumes it, --out names another folder")
    device, data = pick_device(recipe.train.device), open_data(recipe)
    with process_group(recipe.distributed.strategy, device) as world:
        run.writes = world.first
        before = run.read_json("result.json")
        signal = StopSignal(run.path if world.first else None)
        memory = kept_memory() if device.type == "cpu" else contextlib.nullcontext()
        with _locked(run, world), signal, cpu_threads(recipe.train.threads), memory:
            yield Job(recipe, run, data, device, world, signal, quiet, before, recipe.batch.micro_batch == "auto")


@contextlib.contextmanager
def _locked(run: RunDir, world: World) -> Iterator[None]:
    """Hold the run's lock. Rank 0 takes it, and all ranks raise the error where it cannot."""
    with contextlib.ExitStack() as held:
        refused: UserError | None = None
        try:
            held.enter_context(run.lock())
            for left in run.path.glob("stack-rank-*.txt") if world.first else ():  # by an earlier process
                left.unlink(missing_ok=True)
        except UserError as error:
            refused = error
        if refused := world.broadcast(refused):
            raise refused
        yield


@contextlib.contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """Set PyTorch's number of CPU threads, and restore it for the next run in this process. 0 leaves it as it is."""
    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number:
            torch.set_num_threads(before)

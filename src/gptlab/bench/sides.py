"""A trainer whose steps are timed part by part, in a process of its own.

A part of a step begins where the one before it ended, so that parts add up to the step.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import torch

from gptlab.bench.peers import Peer, telling
from gptlab.config import Recipe
from gptlab.distributed.world import SINGLE
from gptlab.errors import OutOfMemory, RunError, UserError
from gptlab.hardware import device_name
from gptlab.machine import forget_peak, peak_memory_since
from gptlab.optim.optimizers import after_update
from gptlab.precision.regimes import enter_regime
from gptlab.progress import tell_nobody
from gptlab.rundir import RunDir
from gptlab.tasks.base import open_data, task_of
from gptlab.training import loop
from gptlab.training.job import cpu_threads, open_job
from gptlab.training.loop import update
from gptlab.training.outcome import typed
from gptlab.training.result import NotStarted
from gptlab.training.setup import pick_device, resolve
from gptlab.training.step_buffer import clip_gradients
from gptlab.training.throughput import Stopwatch, peak_memory_gb
from gptlab.training.trainer import Trainer

OURS = "gptlab"
# The head: logits and loss, with gptlab's the gradients of both too. Compiled, it is a part of the forward pass.
PARTS = ("data", "forward", "head", "backward", "clipping", "optimizer", "logging")
WARM_UP = 2  # steps; the first one compiles
TOP = 15  # operations of a profile


class Side(Protocol):
    """What is timed: `update` makes one optimizer step and says when its parts end."""

    device: torch.device
    micro_batch: int

    def update(self, did: Callable[[str], None] = tell_nobody) -> None: ...

    def loss(self) -> float:
        """Of the last step."""
        ...


class Ours:
    """The steps of `gptlab train`, with what it does between them but evaluations and checkpoints."""

    def __init__(self, trainer: Trainer) -> None:
        trainer.limit = sys.maxsize  # no step is the last one, which would be logged
        self.trainer, self.device, self.micro_batch = trainer, trainer.device, trainer.micro_batch

    def update(self, did: Callable[[str], None] = tell_nobody) -> None:
        t = self.trainer
        with t.monitor.paused():  # its clock does not run between turns
            pass
        with told(t, did):
            self.seen = update(t, t.state.step)
        did("optimizer")
        t.monitor.observe(self.seen)
        t.state.next()
        if t.logs_at(t.state.step):
            t.monitor.report(t.state, t.logs)
        did("logging")

    def loss(self) -> float:
        return float(self.seen.loss)

    def batches(self) -> float:
        """Seconds of making the batches of the next step alone."""
        began = time.perf_counter()
        for _ in self.trainer.task.micro_batches(self.trainer.state.step, self.micro_batch):
            pass
        return time.perf_counter() - began


@contextlib.contextmanager
def told(t: Trainer, did: Callable[[str], None]) -> Iterator[None]:
    """`loop.update` says when its parts end. The loop need not know: what it calls is wrapped meanwhile."""

    def wrapped(call: Callable[..., Any], part: str, before: str = "") -> Callable[..., Any]:
        return telling(did, call, part, before)

    def batches(step: int) -> Iterator[Any]:
        for batch in made(step):
            did("data")
            yield batch

    made, whole = t.batches, t.recipe.compile.enabled
    with contextlib.ExitStack() as stack:
        if not whole:
            stack.enter_context(patch.object(t.model, "hidden", wrapped(t.model.hidden, "forward")))
        for of, name, instead in (
            (t, "batches", batches),
            (t, "net", wrapped(t.net, "forward" if whole else "head")),
            (torch.Tensor, "backward", wrapped(torch.Tensor.backward, "backward")),
            (loop, "clip_gradients", wrapped(clip_gradients, "clipping")),
            (t.scaler, "step", wrapped(t.scaler.step, "optimizer", before="logging")),  # lost updates are logged
            (loop, "after_update", wrapped(after_update, "optimizer", before="logging")),
        ):
            stack.enter_context(patch.object(of, name, instead))
        yield


@dataclass
class Order:
    """What a process is to do."""

    name: str
    """`OURS`, or one of `peers.PEERS`."""
    recipe: Recipe
    """For a peer: resolved, as ours has it."""
    folder: str
    """An empty folder that this process may write to."""


@contextlib.contextmanager
def opened(order: Order) -> Iterator[tuple[Side, dict[str, Any]]]:
    """A side, and facts about it. The recipe among them is resolved."""
    recipe, folder = order.recipe, Path(order.folder)
    if order.name == OURS:
        with open_job(recipe, folder, "never", quiet=True) as job, Trainer(job) as t:
            facts = {
                "recipe": t.recipe,
                "parameters": t.model.parameter_count(),
                "flops_per_token": t.model.flops_per_token(),
                "peak": t.monitor.peak,
                "unit": t.task.unit,
                "per_step": t.task.per_step,
                "device": t.device.type,
                "device_name": device_name(t.device),
                "threads": torch.get_num_threads(),
            }
            yield Ours(t), facts
        return
    device, data = pick_device(recipe.train.device), open_data(recipe)
    with cpu_threads(recipe.train.threads):
        regime = enter_regime(recipe.precision, device)
        recipe, init = resolve(recipe, RunDir(folder), data, device)
        task = task_of(recipe)(recipe, data, device, folder, SINGLE)
        yield Peer(order.name, recipe, task, regime, init, device, int(recipe.batch.micro_batch)), {}


def timed(side: Side) -> dict[str, float]:
    """Seconds of each part of one step. On a GPU, by events in its queue."""
    watch, names = Stopwatch(side.device), []

    def did(part: str) -> None:
        watch.step()
        names.append(part)

    synchronize(side.device)
    watch.start()
    side.update(did)
    watch.lap()
    seconds = dict.fromkeys(PARTS, 0.0)
    for name, spent in zip(names, watch.step_seconds, strict=True):
        seconds[name] += spent
    return seconds


def first_step(side: Side) -> float:
    """Seconds of the first step, which compiles. A peer that runs out of memory takes smaller micro-batches."""
    while True:
        try:
            return sum(timed(side).values())
        except Exception as error:
            if not isinstance(side, Peer) or not is_out_of_memory(error) or side.micro_batch == 1:
                raise
        side.micro_batch //= 2
        side.optimizer.zero_grad(set_to_none=True)
        if side.device.type == "cuda":
            torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(typed(error, SINGLE), OutOfMemory)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def profiled(side: Side) -> list[dict[str, Any]]:
    """The operations (on a GPU: kernels) in which one step spends most, by their own time."""
    cuda, activity = side.device.type == "cuda", torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA] if cuda else [activity.CPU]) as profiler:
        side.update()
        synchronize(side.device)
    found = []
    for event in profiler.key_averages():
        if event.device_type.name == ("CUDA" if cuda else "CPU") and not getattr(event, "is_user_annotation", False):
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            found.append({"operation": event.key[:160], "calls": event.count, "ms": spent / 1000})
    return sorted(found, key=lambda one: -one["ms"])[:TOP]


def serve(order: Order, pipe: Connection) -> None:
    """A process: warm up, then do what each message asks for, and answer it."""
    try:
        with opened(order) as (side, facts):
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the process that asks, and this one with it
            first = first_step(side)
            facts |= {"first_step_seconds": first, "first_loss": side.loss(), "micro_batch": side.micro_batch}
            for _ in range(WARM_UP - 1):
                timed(side)
            if side.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(side.device)
            forget_peak()
            pipe.send(facts)
            while (asked := pipe.recv()) != "stop":
                if asked == "step":
                    pipe.send(timed(side))
                elif asked == "memory":
                    cuda = side.device.type == "cuda"
                    pipe.send(peak_memory_gb(side.device) if cuda else peak_memory_since() / 1e9)
                elif asked == "profile":
                    pipe.send(profiled(side))
                elif asked == "batches" and isinstance(side, Ours):
                    pipe.send(side.batches())
    except (EOFError, BrokenPipeError, ConnectionError, KeyboardInterrupt):
        return  # the other end has gone
    except NotStarted as error:
        tell(pipe, RunError(f"{order.name} cannot take a step here: it {error}"))
    except UserError as error:
        tell(pipe, error)
    except Exception as error:
        said = next(iter(str(error).splitlines()), "")
        what = "ran out of memory" if is_out_of_memory(error) else f"failed ({type(error).__name__})"
        tell(pipe, RunError(f"{order.name} {what}: {said}"))


def tell(pipe: Connection, error: UserError) -> None:
    with contextlib.suppress(OSError):
        pipe.send(error)


class Worker:
    """The process of a side, seen from outside."""

    def __init__(self, order: Order) -> None:
        self.name = order.name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(order, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def answer(self) -> Any:
        """Raises UserError for what went wrong there."""
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            raise RunError(f"the process of {self.name} ended without a word: it may have run out of memory") from None
        if isinstance(answer, UserError):
            raise answer
        return answer

    def ask(self, what: str) -> Any:
        with contextlib.suppress(BrokenPipeError):  # `answer` says why
            self.pipe.send(what)
        return self.answer()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send("stop")
        self.pipe.close()
        self.process.join(5)
        self.process.kill()

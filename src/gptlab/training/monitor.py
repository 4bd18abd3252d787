"""Watches a run: buffers updates, times them, judges them, and writes the training lines."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from gptlab.config import Recipe
from gptlab.distributed.shard import Weights
from gptlab.distributed.world import World
from gptlab.guard import Diverged, Divergence, Guard
from gptlab.hardware import gpu_of, mfu
from gptlab.optim.rounding import LostUpdates
from gptlab.precision.regimes import Regime
from gptlab.rundir import RunDir
from gptlab.sparsity.pruner import NoPruner, Pruner
from gptlab.tasks.base import Task
from gptlab.training.logs import Logs
from gptlab.training.state import State
from gptlab.training.step_buffer import Seen, StepBuffer, Update
from gptlab.training.throughput import Stopwatch, peak_memory_gb


class Monitor:
    """The observer of a run.

    Args:
        run: sparsity.json and divergence.json are written here.
        model: with `flops_per_token` and `device`.
        weights: the model, or its local rows.
        pruner, scaler: asked for facts when a line is written.
    """

    def __init__(
        self,
        run: RunDir,
        recipe: Recipe,
        regime: Regime,
        task: Task,
        model: Any,
        weights: Weights,
        pruner: Pruner | NoPruner,
        scaler: Any,
        world: World,
    ) -> None:
        self.run, self.regime, self.task, self.model = run, regime, task, model
        self.pruner, self.scaler, self.world, self.device = pruner, scaler, world, model.device
        self.buffer = StepBuffer(weights, regime.weights is not torch.float32, world)
        self.watch = Stopwatch(self.device)
        constant_loss = world.broadcast(task.constant_loss() if world.first else None)
        self.guard = Guard(constant_loss, recipe.schedule.warmup_steps)
        self.lost = LostUpdates(weights)
        self.updates_lost: torch.Tensor | None = None  # share, of the last update that is logged
        self.mask_seconds = 0.0
        self.lr = 0.0  # of the last update
        self.updates: list[Update] = []  # of the last report
        gpu = gpu_of(self.device)
        self.peak = gpu.peak(regime.matmul_format) if gpu else None  # FLOP/s

    @property
    def pending(self) -> bool:
        """Whether there are updates that `report` has not seen."""
        return bool(self.buffer)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the throughput clock; it starts again for the next update."""
        self.watch.pause()
        yield
        self.watch.start()

    @contextlib.contextmanager
    def lost_updates(self, measured: bool) -> Iterator[None]:
        """Around the optimizer's step: measure which share of the weights it leaves as they were."""
        if measured:
            self.lost.before()
        yield
        self.updates_lost = self.lost.after() if measured else None

    def observe(self, seen: Seen) -> None:
        """An update is done."""
        self.lr = seen.lr
        self.buffer.append(seen)
        self.watch.step()

    def report(self, state: State, logs: Logs | None) -> None:
        """Read the buffered updates, judge each, and write a training line of the last one. A GPU is waited for.

        Args:
            logs: where the line goes, if one is due.

        Raises:
            Diverged: an update was not finite, or the losses show a divergence; divergence.json has the evidence.
        """
        self.updates = updates = self.buffer.read(state.step)
        first = not self.watch.step_seconds
        seconds, masking = self.watch.lap(), self.pruner.overhead()
        if first and self.world.first:  # with the time of compilation
            here = self.run.read_json("environment.json")
            self.run.write_json("environment.json", here | {"first_step_seconds": self.watch.step_seconds[0]})
        self.mask_seconds += masking
        state.largest_logit = max(state.largest_logit, *(update.largest_logit for update in updates))
        diverged: Divergence | None = None
        for update in updates:
            skipped = self.regime.loss_scaling and not math.isfinite(update.grad_norm)
            state.skipped_steps += skipped
            diverged = diverged or self.guard.update(update.step, update.loss, update.grad_norm, skipped)
        if logs:
            share = masking / (seconds * len(updates))
            logs.training(self._line(state, updates[-1], seconds) | self._masks(state.step, share))
        if diverged:
            raise self.buffer.evidence(diverged, updates, self.run, self.task.batch_of)

    def evaluated(self, state: State, loss: float, last: bool) -> None:
        """Judge a held-out loss. All ranks call this.

        Raises:
            Diverged: it is not finite, or has risen with the training loss.
        """
        if diverged := self.guard.evaluated(state.step, loss, last):
            if not self.updates:  # nothing is known but the loss
                raise Diverged(diverged)
            raise self.buffer.evidence(diverged, self.updates, self.run, self.task.batch_of)

    def _line(self, state: State, update: Update, seconds: float) -> dict[str, Any]:
        unit, per_step = self.task.unit, self.task.per_step
        line: dict[str, Any] = {
            "step": state.step,
            unit: state.step * per_step,
            "loss": update.loss,
            "lr": self.lr,
            "grad_norm": update.grad_norm,
            f"{unit}_per_second": per_step / seconds,
            "memory_gb": peak_memory_gb(self.device),
            "largest_logit": update.largest_logit,
        }
        if self.updates_lost is not None and not (self.regime.loss_scaling and not math.isfinite(update.grad_norm)):
            line["updates_lost"] = float(self.updates_lost)
        if self.peak and unit == "tokens":
            line["mfu"] = mfu(self.model.flops_per_token(), line["tokens_per_second"], self.world.size * self.peak)
        if self.regime.loss_scaling:
            line |= {"loss_scale": self.scaler.get_scale(), "skipped_steps": state.skipped_steps}
        return line

    def _masks(self, step: int, share: float) -> dict[str, Any]:
        """The masks' part of a training line; sparsity.json has each matrix's share and is written when masks change.

        Args:
            share: of the time since the last line, spent on masks.
        """
        if not (facts := self.pruner.facts()):
            return {}
        if self.run.read_json("sparsity.json").get("changed_at") != facts["changed_at"]:
            self.run.write_json("sparsity.json", {"step": step, **facts})
        return {
            "sparsity": facts["sparsity"],
            "mask_changes": facts["changes"],
            "mask_overhead_percent": 100 * share,
        }

"""Watches a run: buffers updates, times them, judges them, and writes the training lines."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from gptlab.hardware import gpu_of, mfu
from gptlab.optim.rounding import LostUpdates
from gptlab.training.guard import Divergence, Guard
from gptlab.training.state import State
from gptlab.training.step_buffer import Seen, StepBuffer, Update
from gptlab.training.throughput import Stopwatch, peak_memory_gb

if TYPE_CHECKING:
    from gptlab.training.trainer import Trainer


class Monitor:
    """The observer of a run.

    Args:
        t: its task, weights and regime are there already; its logs are used when `report` is called.
    """

    def __init__(self, t: Trainer) -> None:
        self.t = t
        self.buffer = StepBuffer(t.weights, t.regime.weights is not torch.float32, t.world)
        self.watch = Stopwatch(t.device)
        self.guard = Guard(
            t.world.broadcast(t.task.constant_loss() if t.world.first else None), t.recipe.schedule.warmup_steps
        )
        self.lost = LostUpdates(t.weights)
        self.updates_lost: torch.Tensor | None = None  # share, of the last update that is logged
        self.mask_seconds = 0.0
        self.lr = 0.0  # of the last update
        gpu = gpu_of(t.device)
        self.peak = gpu.peak(t.regime.matmul_format) if gpu else None  # FLOP/s

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

    def report(self, state: State, write: bool) -> None:
        """Read the buffered updates, judge each, and write a training line of the last one. A GPU is waited for.

        Raises:
            Diverged: an update was not finite, or the losses show a divergence; divergence.json has the evidence.
        """
        t, updates = self.t, self.buffer.read(state.step)
        seconds, masking = self.watch.lap(), t.pruner.overhead()
        self.mask_seconds += masking
        state.largest_logit = max(state.largest_logit, *(update.largest_logit for update in updates))
        diverged: Divergence | None = None
        for update in updates:
            skipped = t.regime.loss_scaling and not math.isfinite(update.grad_norm)
            state.skipped_steps += skipped
            diverged = diverged or self.guard.update(update.step, update.loss, update.grad_norm, skipped)
        if write:
            share = masking / (seconds * len(updates))
            t.logs.training(self._line(state, updates[-1], seconds) | self._masks(state.step, share))
        if diverged:
            raise self.buffer.evidence(diverged, updates, t.run)

    def _line(self, state: State, update: Update, seconds: float) -> dict[str, Any]:
        t, unit, per_step = self.t, self.t.task.unit, self.t.task.per_step
        line: dict[str, Any] = {
            "step": state.step,
            unit: state.step * per_step,
            "loss": update.loss,
            "lr": self.lr,
            "grad_norm": update.grad_norm,
            f"{unit}_per_second": per_step / seconds,
            "memory_gb": peak_memory_gb(t.device),
            "largest_logit": update.largest_logit,
        }
        if self.updates_lost is not None and not (t.regime.loss_scaling and not math.isfinite(update.grad_norm)):
            line["updates_lost"] = float(self.updates_lost)
        if self.peak and unit == "tokens":
            line["mfu"] = mfu(t.model.flops_per_token(), line["tokens_per_second"], t.world.size * self.peak)
        if t.regime.loss_scaling:
            line |= {"loss_scale": t.scaler.get_scale(), "skipped_steps": state.skipped_steps}
        return line

    def _masks(self, step: int, share: float) -> dict[str, Any]:
        """The masks' part of a training line; sparsity.json has each matrix's share and is written when masks change.

        Args:
            share: of the time since the last line, spent on masks.
        """
        t, facts = self.t, self.t.pruner.facts()
        if not facts:
            return {}
        if t.run.read_json("sparsity.json").get("changed_at") != facts["changed_at"]:
            t.run.write_json("sparsity.json", {"step": step, **facts})
        return {
            "sparsity": facts["sparsity"],
            "mask_changes": facts["changes"],
            "mask_overhead_percent": 100 * share,
        }

"""A model in training whose updates are made one at a time, so that several models can be measured in turns.

`gptlab.train` only makes whole runs. This module uses the same parts in the same order as `training/loop.py`.
"""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gptlab.config import Recipe
from gptlab.distributed.world import SINGLE
from gptlab.distributed.wrap import make_scaler
from gptlab.hardware import mfu
from gptlab.optim.optimizers import make_optimizer, set_lr
from gptlab.optim.schedule import learning_rate
from gptlab.planning.memory import step_memory
from gptlab.planning.shape import Shape
from gptlab.precision.regimes import enter_regime
from gptlab.rundir import RunDir
from gptlab.tasks.base import open_data, task_of
from gptlab.training.ahead import Ahead
from gptlab.training.attention import attention_kernel
from gptlab.training.setup import resolve
from gptlab.training.step_buffer import Seen, StepBuffer, clip_gradients
from gptlab.training.trainer import COMPILE_MODES
from gpu_stages.stage import Row, Stage, peak_of, synchronize

TINY = {
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.n_embd": 32,
    "model.block_size": 64,
    "model.vocab_size": 512,
    "batch.micro_batch": 4,
    "batch.tokens_per_step": 512,
    "schedule.warmup_steps": 2,
    "train.threads": 1,
    "compile.enabled": False,
}


def settings_of(stage: Stage) -> Row:
    """Settings of all stages: the stage's data, and no evaluations, samples or checkpoints."""
    return {
        "data.path": str(stage.data),
        "train.eval_every": 0,
        "eval.train": False,
        "hellaswag.every": 0,
        "sample.every": 0,
        "checkpoint.every": 0,
        "checkpoint.keep_best": False,
    } | (TINY if stage.tiny else {"compile.enabled": True})


class Trained:
    """The model of a recipe in training.

    Args:
        ahead: whether a thread makes the batches; default: on a GPU, as in a run.

    Attributes:
        losses: losses of the updates so far, on the device.
        step: number of updates so far.
    """

    def __init__(self, recipe: Recipe, device: torch.device, work: Path, ahead: bool | None = None) -> None:
        self.device = device
        self.regime = enter_regime(recipe.precision, device)
        data = open_data(recipe)
        self.recipe, init = resolve(recipe, RunDir(work / "no-run"), data, device)
        self.task = task_of(recipe)(self.recipe, data, device, work, SINGLE)
        self.model = self.task.build(self.regime, init)
        make = partial(self.task.micro_batches, micro_batch=int(self.recipe.batch.micro_batch))
        self.batches = Ahead(make) if (device.type == "cuda" if ahead is None else ahead) else make
        self.optimizer = make_optimizer(self.model, self.recipe.optim, self.recipe.seed, shape=self.recipe.model)
        self.scaler = make_scaler(device, self.regime.loss_scaling, False)
        self.buffer = StepBuffer(self.model, self.regime.weights is not torch.float32)
        if self.recipe.compile.enabled:
            self.model.compile(dynamic=False, mode=COMPILE_MODES[self.recipe.compile.mode])
        self.step = 0
        self.losses: list[torch.Tensor] = []

    @property
    def tokens(self) -> int:
        """Tokens per update."""
        return self.recipe.batch.tokens_per_step

    def micro_step(self, batch: Any, factor: torch.Tensor) -> Any:
        with attention_kernel(self.recipe.train.attention):
            with self.regime.context(self.device):
                out = self.model(*batch, factor)  # a HeadLoss
            out.train.backward()
        return out

    def update(self) -> None:
        """One update, as `gptlab.training.loop.update` makes it; nothing waits for the GPU."""
        recipe, device, per_step = self.recipe, self.device, self.tokens
        enter_regime(recipe.precision, device)  # TF32 is a setting of the whole process
        set_lr(self.optimizer, lr := learning_rate(self.step, recipe.optim.lr, recipe.schedule))
        factor = self.scaler.scale(torch.full((), 1 / per_step, device=device))
        loss, largest = torch.zeros((), device=device), torch.zeros((), device=device)
        for batch in self.batches(self.step):
            _, value, logit = self.micro_step(batch, factor)
            loss, largest = loss + value / per_step, torch.maximum(largest, logit)
        self.scaler.unscale_(self.optimizer)
        own = None if self.regime.loss_scaling else self.optimizer  # whose kernel may clip
        norms = clip_gradients(self.model, recipe.optim.grad_clip or math.inf, own)
        self.scaler.step(self.optimizer)
        self.buffer.append(Seen(lr, loss, largest, norms))
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.detach())
        self.step += 1
        if self.step % 10 == 0:
            self.buffer.read(self.step)

    def warm_up(self, updates: int) -> float:
        """Make some updates. Returns the seconds of the first update, which compiles."""
        synchronize(self.device)
        began = time.perf_counter()
        self.update()
        synchronize(self.device)
        first = time.perf_counter() - began
        for _ in range(updates - 1):
            self.update()
        synchronize(self.device)
        return first

    def losses_so_far(self) -> list[float]:
        return [float(loss) for loss in self.losses]

    def mfu(self, tokens_per_second: float) -> float | None:
        peak = peak_of(self.device, self.regime.matmul_format)
        return mfu(self.model.flops_per_token(), tokens_per_second, peak) if peak else None

    def planned(self) -> float:
        """The planner's peak memory of a step in bytes."""
        shape = Shape(self.recipe.model, self.recipe.precision, 0)
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        assert isinstance(self.recipe.batch.micro_batch, int)
        return step_memory(self.recipe, shape, self.recipe.batch.micro_batch, kind).peak


def seconds_of(action: Any, device: torch.device) -> float:
    """Seconds of an action, until the GPU has finished it."""
    synchronize(device)
    began = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - began


def compile_many() -> None:
    """Allow many compiled models in one process. By default, PyTorch stops compiling a function after eight."""
    torch.compiler.config.recompile_limit = 256
    torch.compiler.config.accumulated_recompile_limit = 1024

"""An exponential moving average of the weights, beside any optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SHARED = "ema"  # key of the state that belongs to no parameter


class WeightAverage:
    """Makes the parameters of an optimizer the moving average of their weights, between updates.

        raw <- the optimizer's update of raw
        average <- (average (d - d^t) + raw (1 - d)) / (1 - d^t)

    which after t updates is the mean of the raw weights with powers of d as weights; after the first it is raw. What is
    evaluated, sampled and saved as the model is the average. The raw weights are in the optimizer's state, and so in
    its file of a checkpoint, and `before_gradients` swaps the two. The optimizer's `step` is replaced by one that ends
    with the average.

    Args:
        optimizer: of weights in float32 or float64, which has no `before_gradients` of its own.
        decay: d.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        self.optimizer, self.decay, self.update = optimizer, decay, optimizer.step
        self.raw = False  # whether the parameters are the raw weights
        optimizer.step = self.step  # type: ignore[method-assign, assignment]
        optimizer.before_gradients = self.before_gradients  # type: ignore[attr-defined]
        optimizer.after_update = self.after_update  # type: ignore[attr-defined]
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # a skipped step is not counted

    @torch.no_grad()
    def _swap(self) -> None:
        for p, state in self._states():
            if "raw" in state:
                other = p.clone()
                p.copy_(state["raw"])
                state["raw"].copy_(other)
        self.raw = not self.raw

    def _states(self) -> list[tuple[Tensor, dict[str, Any]]]:
        return [(p, self.optimizer.state[p]) for group in self.optimizer.param_groups for p in group["params"]]

    def before_gradients(self) -> None:
        """From the average to the raw weights."""
        if not self.raw:
            self._swap()

    def after_update(self) -> None:
        """From the raw weights to the average, where loss scaling has skipped the step."""
        if self.raw:
            self._swap()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """The optimizer's update. Afterwards the parameters are the average."""
        self.before_gradients()
        self.update()
        shared: dict[str, Any] = self.optimizer.state[SHARED]  # type: ignore[index]
        t = shared["updates"] = shared.get("updates", 0) + 1
        share = (1 - self.decay) / (1 - self.decay**t)
        for p, state in self._states():
            if "raw" in state:
                state["raw"].lerp_(p, share)  # it holds the average meanwhile
            elif p.grad is not None:
                state["raw"] = p.detach().clone()
        self._swap()

"""Schedule-Free AdamW: an average of the weights in the place of a decay of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gptlab.config import Optim
from gptlab.optim.cost import OptimizerBytes, Parameters, total_bytes

SHARED = "schedule-free"  # key of the state that belongs to no parameter


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """Schedule-Free AdamW (Defazio et al. 2024, arXiv 2405.15682), as the authors' package `schedulefree` has it.

        y = (1 - beta1) z + beta1 x                        where the gradient is taken
        v <- beta2 v + (1 - beta2) grad^2
        z <- z - lr (grad / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay y)
        x <- (1 - c) x + c z,  c = lr_max^2 / (sum of lr_max^2 so far)

    lr_max is the largest learning rate so far (of the first group; those of others are multiples of it). Between
    updates the parameters are x, the average, which is evaluated and saved; z and v are the state. `before_gradients`
    makes them y. The step gets x back from y and z, so no third copy is needed; in float32 that costs a rounding error
    per step. The paper's algorithm 1 multiplies lr by sqrt(1 - beta2^t) instead of dividing v.

    Args:
        params: parameters, or groups of parameters, in float32 or float64.
        lr: after a warm-up it does not change.
        betas: beta1 is above 0.
        eps, weight_decay: as in torch.optim.AdamW.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._at_y = False

    def _move(self, towards_z: float) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if "z" in self.state[p]]
            if params:
                torch._foreach_lerp_(params, [self.state[p]["z"] for p in params], towards_z)

    @torch.no_grad()
    def before_gradients(self) -> None:
        """From x to y."""
        if not self._at_y:
            self._move(1 - self.defaults["betas"][0])
            self._at_y = True

    @torch.no_grad()
    def after_update(self) -> None:
        """From y to x, where loss scaling has skipped the step."""
        if self._at_y:
            self._move(1 - 1 / self.defaults["betas"][0])
            self._at_y = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Afterwards the parameters are x."""
        self.before_gradients()
        shared: dict[str, Any] = self.state[SHARED]  # type: ignore[index]
        for name in ("largest_lr", "weight_sum"):
            shared.setdefault(name, torch.zeros((), dtype=torch.float64))
        t = shared["updates"] = shared.get("updates", 0) + 1
        lr = self.param_groups[0]["lr"]
        shared["largest_lr"].clamp_(min=lr)
        weight = float(shared["largest_lr"]) ** 2
        shared["weight_sum"] += weight
        c = weight / total if (total := float(shared["weight_sum"])) else 0.0
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["z"], self.state[p]["exp_avg_sq"] = p.detach().clone(), torch.zeros_like(p)
            grads = [p.grad for p in params if p.grad is not None]
            z, square = ([self.state[p][kind] for p in params] for kind in ("z", "exp_avg_sq"))
            (beta1, beta2), decay = group["betas"], group["weight_decay"]
            torch._foreach_mul_(square, beta2)
            torch._foreach_addcmul_(square, grads, grads, value=1 - beta2)
            root = torch._foreach_sqrt(square)
            torch._foreach_div_(root, math.sqrt(1 - beta2**t))
            torch._foreach_add_(root, group["eps"])
            change = torch._foreach_div(grads, root)
            if decay:
                torch._foreach_add_(change, params, alpha=decay)  # the parameters are y
            torch._foreach_lerp_(params, z, 1 - 1 / beta1)  # x
            torch._foreach_add_(z, change, alpha=-group["lr"])
            torch._foreach_lerp_(params, z, c)
        self._at_y = False


def schedule_free_bytes(parameters: Parameters, optim: Optim, gpu: bool) -> OptimizerBytes:
    """z and the second moment; for a while two copies of everything."""
    total = total_bytes(parameters)
    return OptimizerBytes(2 * total, 2 * total)

"""AdamW for bf16 weights, with stochastic rounding or Kahan summation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from gptlab.config import Optim
from gptlab.distributed.shard import shard_spec
from gptlab.optim.cost import OptimizerBytes, Parameters, largest, total_bytes
from gptlab.optim.rounding import round_stochastically
from gptlab.seeding import address


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with a choice of rounding for bf16 weights.

    Everything is computed in float32. Moments are stored in the dtype of the weights, rounded to nearest, as in
    PyTorch's fused kernel; only the rounding of the new weight differs from that kernel. Weight decay and Adam's step
    are added before the rounding. Parameters in float32 are updated in float32, whatever `rounding` is.

    - nearest: an update of less than half the distance to the next bf16 number is lost.
    - stochastic: the weight moves to the next bf16 number with the probability that makes it right on average (arXiv
      2010.06192, section 4; arXiv 2502.20566). The random bits are addressed by (seed, step, parameter), so a resumed
      run repeats them.
    - kahan: a second bf16 number per weight keeps the rounding error, which is added to the next update (Kahan
      summation; arXiv 2010.06192, section 4).

    Args:
        params: parameters, or groups of parameters.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        rounding: of bf16 weights.
        seed: of stochastic rounding.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        rounding: Literal["nearest", "stochastic", "kahan"] = "nearest",
        seed: int = 0,
    ) -> None:
        self.rounding, self.seed = rounding, seed
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        parameters = [(group, p) for group in self.param_groups for p in group["params"]]
        for index, (group, p) in enumerate(parameters):
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)  # on the CPU: reading it from a GPU would wait
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                if self.rounding == "kahan" and p.dtype is torch.bfloat16:
                    state["compensation"] = torch.zeros_like(p)
            state["step"] += 1
            step, (beta1, beta2) = int(state["step"]), group["betas"]

            # .to does not copy float32 tensors: the state itself is then updated, and copied onto itself
            wide = torch.promote_types(p.dtype, torch.float32)
            weight, grad = p.to(wide), p.grad.to(wide)
            mean = state["exp_avg"].to(wide).lerp_(grad, 1 - beta1)
            square = state["exp_avg_sq"].to(wide).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            state["exp_avg"].copy_(mean)
            state["exp_avg_sq"].copy_(square)
            root = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
            update = weight * (-group["lr"] * group["weight_decay"])
            update.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))

            if self.rounding == "stochastic" and p.dtype is torch.bfloat16:
                seed = address(self.seed, "rounding", step, index)
                p.copy_(round_stochastically(weight.add_(update), seed, shard_spec(p)))
            elif "compensation" in state:
                update.add_(state["compensation"])
                p.copy_(weight + update)
                state["compensation"].copy_(update.sub_(p.to(wide).sub_(weight)))  # intended minus actual update
            else:
                p.copy_(weight.add_(update))


def adamw_bytes(parameters: Parameters, optim: Optim, gpu: bool) -> OptimizerBytes:
    """PyTorch's AdamW and, with another rounding, `AdamW`: two moments, AMSGrad's maximum, Kahan's compensation.

    For a while PyTorch's foreach kernel copies everything, and `AdamW` has six float32 tensors and random bits.
    """
    kept = 0
    for p in parameters.values():
        compensated = optim.rounding == "kahan" and p.dtype is torch.bfloat16
        kept += ((3 if optim.amsgrad is True else 2) + compensated) * p.nbytes
    if optim.rounding != "nearest":
        return OptimizerBytes(kept, largest(parameters) * (6 * 4 + (8 if optim.rounding == "stochastic" else 0)))
    return OptimizerBytes(kept, total_bytes(parameters) if optim.kernel == "foreach" else 0)

"""AdamW whose bf16 weights take an update stochastically rounded, or with what rounding took away added back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from gptlab.distributed.shard import shard_spec
from gptlab.optim.rounding import round_stochastically
from gptlab.seeding import address


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) that says how a bf16 weight is rounded.

    All is computed in float32 and the moments are stored in the dtype of the weights, to nearest, as PyTorch's fused
    kernel does; so the rounding of the new weight is all that tells this optimizer from that one. Weight decay and
    Adam's step are added up before that rounding. Parameters in float32 are updated in float32, whatever `rounding`.

    - nearest: an update of less than half the distance to the next bf16 is lost.
    - stochastic: it is taken with the probability that makes the weight right on average (arXiv 2010.06192, section 4;
      arXiv 2502.20566). The random bits are addressed by (seed, step, parameter): a resumed run repeats them.
    - kahan: what rounding took away is kept in a second bf16 number per weight and added to the next update
      (Kahan summation; arXiv 2010.06192, section 4).

    Args:
        params: parameters or groups of them.
        lr, betas, eps, weight_decay: as torch.optim.AdamW has them.
        rounding: of bf16 weights.
        seed: of the stochastic rounding.
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
                state["step"] = torch.zeros((), dtype=torch.float32)  # not on a GPU, where reading it would wait
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                if self.rounding == "kahan" and p.dtype is torch.bfloat16:
                    state["compensation"] = torch.zeros_like(p)
            state["step"] += 1
            step, (beta1, beta2) = int(state["step"]), group["betas"]

            # of float32 tensors .to makes no copy: then the state itself is updated, and copied onto itself
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
                state["compensation"].copy_(update.sub_(p.to(wide).sub_(weight)))  # meant to move less moved
            else:
                p.copy_(weight.add_(update))

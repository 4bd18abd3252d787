"""AdEMAMix: AdamW with a second, slow moving average of the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from gptlab.config import Optim
from gptlab.optim.cost import OptimizerBytes, Parameters, largest, total_bytes
from gptlab.optim.elementwise import Elementwise, decay


class AdEMAMix(Elementwise):
    """AdEMAMix (Pagliardini et al. 2024, arXiv 2409.03137, algorithm 1).

        m1 <- beta1 m1 + (1 - beta1) grad
        m2 <- beta3(t) m2 + (1 - beta3(t)) grad
        v  <- beta2 v + (1 - beta2) grad^2
        weight <- weight - lr ((m1 / (1 - beta1^t) + alpha(t) m2) / (sqrt(v / (1 - beta2^t)) + eps)
                               + weight_decay weight)

    In the first `warmup` steps alpha rises linearly from 0, and beta3 from beta1 so that its half-life rises linearly.
    The slow average needs float32: an update of it by 1e-4 of a gradient is lost in 16 bits.

    Args:
        params: parameters, or groups of parameters.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        beta3, alpha: of the slow average.
        warmup: steps; the authors take those of the whole run. 0 or 1: none.
        cautious_decay: decay only where update and weight agree in sign; see `decay`.
    """

    moments = ("exp_avg", "exp_avg_slow", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        beta3: float = 0.9999,
        alpha: float = 8.0,
        warmup: int = 0,
        cautious_decay: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "cautious_decay": cautious_decay,
        }
        super().__init__(params, {**defaults, "beta3": beta3, "alpha": alpha, "warmup": warmup})

    def change(self, group: dict[str, Any], step: int, weight: Tensor, grad: Tensor, *moments: Tensor) -> Tensor:
        (fast, slow, square), (beta1, beta2) = moments, group["betas"]
        done = min(1.0, step / max(1, group["warmup"]))
        fast.lerp_(grad, 1 - beta1)
        slow.lerp_(grad, 1 - slow_decay(done, beta1, group["beta3"]))
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        mean = (fast / (1 - beta1**step)).add_(slow, alpha=done * group["alpha"])
        return decay(group, weight, mean).addcdiv_(mean, root, value=-group["lr"])


def slow_decay(done: float, start: float, end: float) -> float:
    """The decay rate whose half-life lies between those of `start` and `end`, at the share `done` of the way (0, 1]."""
    if done >= 1:
        return end
    lives = [1 / math.log(beta) if beta else 0.0 for beta in (start, end)]  # half-lives over -log 2
    return math.exp(1 / ((1 - done) * lives[0] + done * lives[1]))


def ademamix_bytes(parameters: Parameters, optim: Optim, gpu: bool) -> OptimizerBytes:
    """Three moments; for a while five float32 tensors of the largest parameter."""
    return OptimizerBytes(3 * total_bytes(parameters), 5 * 4 * largest(parameters))

"""AdamW for bf16 weights, with stochastic rounding or Kahan summation, and AdamW with cautious weight decay."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from gptlab.config import Optim
from gptlab.optim.cost import OptimizerBytes, Parameters, largest, total_bytes
from gptlab.optim.elementwise import Elementwise, decay


class PlainAdamW(torch.optim.AdamW):
    """torch.optim.AdamW without what is for compiled and differentiable steps, which imports PyTorch's compiler.

    The import takes a second. The update is the same function.
    """

    __module__, __qualname__ = torch.optim.AdamW.__module__, torch.optim.AdamW.__qualname__  # for environment.json
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    grad_scale: Tensor | None = None
    """By which the fused kernel divides the gradients."""


class AdamW(Elementwise):
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
        cautious_decay: decay only where update and weight agree in sign; see `decay`.
    """

    moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        rounding: Literal["nearest", "stochastic", "kahan"] = "nearest",
        seed: int = 0,
        cautious_decay: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "cautious_decay": cautious_decay}, rounding, seed)

    def change(self, group: dict[str, Any], step: int, weight: Tensor, grad: Tensor, *moments: Tensor) -> Tensor:
        (mean, square), (beta1, beta2) = moments, group["betas"]
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        return decay(group, weight, mean).addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))


def adamw_bytes(parameters: Parameters, optim: Optim, gpu: bool) -> OptimizerBytes:
    """PyTorch's AdamW and, with another rounding or decay, `AdamW`: two moments, AMSGrad's maximum, compensation.

    For a while PyTorch's foreach kernel copies everything, and `AdamW` has six float32 tensors and random bits.
    """
    kept = 0
    for p in parameters.values():
        compensated = optim.rounding == "kahan" and p.dtype is torch.bfloat16
        kept += ((3 if optim.amsgrad is True else 2) + compensated) * p.nbytes
    if optim.rounding != "nearest" or optim.cautious_decay:
        return OptimizerBytes(kept, largest(parameters) * (6 * 4 + (8 if optim.rounding == "stochastic" else 0)))
    return OptimizerBytes(kept, total_bytes(parameters) if optim.kernel == "foreach" else 0)

"""Lion: the sign of a momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from gptlab.config import Optim
from gptlab.optim.cost import OptimizerBytes, Parameters, largest, total_bytes
from gptlab.optim.elementwise import Elementwise, decay


class Lion(Elementwise):
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

        update = sign(beta1 m + (1 - beta1) grad)
        weight <- weight - lr (update + weight_decay weight)
        m      <- beta2 m + (1 - beta2) grad

    Every weight with a gradient moves by lr, so lr is 3 to 10 times smaller than AdamW's, and weight_decay as much
    larger. The authors' betas are (0.9, 0.99).

    Args:
        params: parameters, or groups of parameters.
        lr, betas, weight_decay: as above.
        cautious_decay: decay only where update and weight agree in sign; see `decay`.
    """

    moments = ("exp_avg",)

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        cautious_decay: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "cautious_decay": cautious_decay}
        super().__init__(params, defaults)

    def change(self, group: dict[str, Any], step: int, weight: Tensor, grad: Tensor, *moments: Tensor) -> Tensor:
        (mean,), (beta1, beta2) = moments, group["betas"]
        update = mean.lerp(grad, 1 - beta1).sign_()
        mean.lerp_(grad, 1 - beta2)
        return decay(group, weight, update).add_(update, alpha=-group["lr"])


def lion_bytes(parameters: Parameters, optim: Optim, gpu: bool) -> OptimizerBytes:
    """One moment; for a while four float32 tensors of the largest parameter."""
    return OptimizerBytes(total_bytes(parameters), 4 * 4 * largest(parameters))

"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gptlab.config import Optim
from gptlab.optim.cost import OptimizerBytes, Parameters, largest, total_bytes


class SOAP(torch.optim.Optimizer):
    """SOAP (Vyas et al. 2024, arXiv 2409.11321, algorithm 3), as the authors' code has it.

    A matrix W (rows, cols) has the moving averages L of G G^T and R of G^T G, with beta2, and orthogonal matrices Q_L
    and Q_R, which approximate their eigenvectors. With G' = Q_L^T G Q_R a step is Adam's in that basis:

        M <- beta1 M + (1 - beta1) G;    V <- beta2 V + (1 - beta2) G'^2
        W <- W - lr sqrt(1 - beta2^t) / (1 - beta1^t) Q_L (Q_L^T M Q_R / (sqrt(V) + eps)) Q_R^T
        W <- (1 - lr weight_decay) W

    Every `every` steps Q becomes the orthogonal factor of the QR decomposition of L Q (one power iteration), with its
    columns, and V's, in the order of falling eigenvalues. The first step only makes L and R, whose eigenvectors are
    the first Q. A side longer than `largest_side` has Q = 1 (one-sided SOAP). Vectors have Adam's update.

    Args:
        params: parameters, or groups of parameters, in float32 or float64, whole (not the rows of FSDP).
        lr, betas, eps, weight_decay: as above.
        every: steps between two refreshments of Q.
        largest_side: that has an eigenbasis.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        every: int = 10,
        largest_side: int = 10000,
    ) -> None:
        self.every, self.largest_side = every, largest_side
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(group, p, p.grad)

    def _update(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # on the CPU: reading it from a GPU would wait
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            for side, n in enumerate(p.shape if p.dim() == 2 else ()):
                if n <= self.largest_side:
                    state[f"gram{side}"] = (1 - beta2) * gram(grad, side)
                    state[f"basis{side}"] = torch.linalg.eigh(state[f"gram{side}"])[1].flip(1).contiguous()
            return  # the authors' code: the basis never comes from the gradient that is projected
        state["step"] += 1
        step, mean, square = int(state["step"]), state["exp_avg"], state["exp_avg_sq"]
        left, right = state.get("basis0"), state.get("basis1")
        mean.lerp_(grad, 1 - beta1)
        square.lerp_(project(grad, left, right).square_(), 1 - beta2)
        update = project(mean, left, right).div_(square.sqrt().add_(group["eps"]))
        update = project(update, None if left is None else left.mT, None if right is None else right.mT)
        p.add_(update, alpha=-group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        for side in range(p.dim()):
            if f"gram{side}" in state:
                state[f"gram{side}"].lerp_(gram(grad, side), 1 - beta2)
                if step % self.every == 0:
                    refresh(state[f"gram{side}"], state[f"basis{side}"], square, side)


def refresh(gram: Tensor, basis: Tensor, square: Tensor, side: int) -> None:
    """One power iteration of the basis of a side, in place, and the order of its columns in the second moment."""
    product = gram @ basis
    order = (basis * product).sum(0).argsort(descending=True, stable=True)
    basis.copy_(torch.linalg.qr(product[:, order])[0])
    square.copy_(square.index_select(side, order))


def gram(grad: Tensor, side: int) -> Tensor:
    """G G^T of side 0, the rows, and G^T G of side 1; of a matrix, or of each of several."""
    return grad.mT @ grad if side else grad @ grad.mT


def project(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """left^T x right, a new tensor; None is the identity."""
    x = x.clone() if left is None else left.mT @ x
    return x if right is None else x @ right


def soap_bytes(parameters: Parameters, optim: Optim, gpu: bool) -> OptimizerBytes:
    """Two moments, and two square matrices for each side of a matrix; for a while six tensors of the largest sizes."""
    sides = {p: [n for n in p.shape if n <= optim.soap_largest_side] for p in parameters.values() if p.dim() == 2}
    squares = sum(2 * n * n * p.dtype.itemsize for p, ns in sides.items() for n in ns)
    longest = max((n for ns in sides.values() for n in ns), default=0)
    return OptimizerBytes(2 * total_bytes(parameters) + squares, 6 * 4 * max(largest(parameters), longest**2))

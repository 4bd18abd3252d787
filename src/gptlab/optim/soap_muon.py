"""SOAP-Muon: Muon whose momentum is first scaled in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gptlab.config import Optim
from gptlab.optim.cost import OptimizerBytes, Parameters
from gptlab.optim.muon import Muon, muon_bytes, muon_matrices
from gptlab.optim.soap import gram, project, refresh


class SOAPMuon(Muon):
    """SOAP's preconditioner on Muon's matrices, as modded-nanogpt's track 3 has it (pull requests 278 and 321, 2026).

    With U, the Nesterov momentum of `Muon`, and L, R, Q_L, Q_R of `SOAP`:

        P = Q_L^T U Q_R;    V <- beta V + (1 - beta) P^2
        U <- Q_L (P / (sqrt(V) + eps)) Q_R^T

    U then goes through the rest of Muon's step, where its norm does not matter (the pull requests restore it, as they
    subtract some of U from what is orthogonalised). Afterwards L and R are averaged with the same beta, and every
    `every` steps Q is refreshed. In the first step U stays as it is, and its gradient makes the first Q. Pull request
    278 has this for the MLP with every = 10; 321 for all matrices with every = 1. What those runs have besides is not
    here.

    Args:
        params: groups as of `Muon`; queries, keys and values are three matrices here too. In float32 or float64, and
            whole (not the rows of FSDP).
        beta: of V, L and R.
        every: steps between two refreshments of Q.
        largest_side: that has an eigenbasis.
        settings: of `Muon`.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], beta: float, every: int, largest_side: int, **settings: Any
    ) -> None:
        self.beta, self.every, self.largest_side = beta, every, largest_side
        super().__init__(params, **settings)

    def precondition(self, group: dict[str, Any], p: Tensor, update: Tensor) -> Tensor:
        assert p.grad is not None
        state, parts = self.state[p], group["parts"]
        grad = p.grad.unflatten(0, (parts, -1))  # (parts, rows, cols), as update
        sides = [side for side in (0, 1) if update.shape[1 + side] <= self.largest_side]
        if "soap_step" not in state:
            state["soap_step"], state["exp_avg_sq"] = torch.zeros((), dtype=torch.float32), torch.zeros_like(p)
            for side in sides:
                state[f"gram{side}"] = (1 - self.beta) * gram(grad, side)
                state[f"basis{side}"] = torch.linalg.eigh(state[f"gram{side}"])[1].flip(2).contiguous()
            return update
        left, right = state.get("basis0"), state.get("basis1")
        square = state["exp_avg_sq"].unflatten(0, (parts, -1))
        turned = project(update, left, right)
        square.lerp_(turned.square(), 1 - self.beta)
        turned = turned / (square.sqrt() + group["eps"])
        scaled = project(turned, None if left is None else left.mT, None if right is None else right.mT)
        state["soap_step"] += 1
        for side in sides:
            state[f"gram{side}"].lerp_(gram(grad, side), 1 - self.beta)
            if int(state["soap_step"]) % self.every == 0:
                for i in range(parts):
                    refresh(state[f"gram{side}"][i], state[f"basis{side}"][i], square[i], side)
        return scaled


def soap_muon_bytes(parameters: Parameters, optim: Optim, gpu: bool) -> OptimizerBytes:
    """Muon's bytes, a second moment and two square matrices for each side.

    For a while what Muon needs, or before that its inputs and six times the largest matrix.
    """
    kept, temporary = muon_bytes(parameters, optim, gpu)
    largest = inputs = 0
    for name, p in muon_matrices(parameters).items():
        parts = 3 if name.endswith(".c_attn.weight") else 1
        sides = [n for n in (len(p) // parts, p.shape[1]) if n <= optim.soap_largest_side]
        kept += p.nbytes + 2 * parts * sum(n * n for n in sides) * p.dtype.itemsize
        inputs += p.nbytes
        largest = max(largest, p.numel(), *(parts * n * n for n in sides))
    return OptimizerBytes(kept, max(temporary, inputs + 6 * 4 * largest))

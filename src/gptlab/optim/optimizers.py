"""Parameter groups and the optimizers over them."""

from __future__ import annotations

import torch
from torch import nn

from gptlab.config import Optim


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices and embeddings decay, biases and norm weights (one dimension) do not.

    Every parameter is in exactly one group.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    decays = [p for p in parameters if p.dim() >= 2]
    rest = [p for p in parameters if p.dim() < 2]
    assert {id(p) for p in parameters} == {id(p) for p in decays} | {id(p) for p in rest}
    groups: list[dict[str, object]] = [{"params": decays, "weight_decay": weight_decay}]
    return [*groups, {"params": rest, "weight_decay": 0.0}] if rest else groups


def make_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) in PyTorch's fused kernel."""
    return torch.optim.AdamW(
        parameter_groups(model, optim.weight_decay), lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True
    )

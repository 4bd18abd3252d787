"""What AdamW with rounding, Lion and AdEMAMix share: updates in float32, decay, one rounding of the new weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gptlab.distributed.shard import shard_spec
from gptlab.optim.rounding import round_stochastically
from gptlab.seeding import address


class Elementwise(torch.optim.Optimizer):
    """An optimizer whose update of a number depends on the gradients of that number alone.

    Everything is computed in float32 (float64 for float64 weights). Moments are stored in the dtype of the weights,
    rounded to nearest, and the new weight is rounded once. The local rows of FSDP need nothing else.

    Args:
        params: parameters, or groups of parameters.
        defaults: of the groups: lr, weight_decay, cautious_decay, and what `change` reads.
        rounding: of bf16 weights, as `AdamW` says.
        seed: of stochastic rounding.
    """

    moments: ClassVar[tuple[str, ...]]
    """Names of the moments in the state, all zeros at first."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        defaults: dict[str, Any],
        rounding: Literal["nearest", "stochastic", "kahan"] = "nearest",
        seed: int = 0,
    ) -> None:
        self.rounding, self.seed = rounding, seed
        super().__init__(params, defaults)

    def change(self, group: dict[str, Any], step: int, weight: Tensor, grad: Tensor, *moments: Tensor) -> Tensor:
        """What is added to a weight, a new tensor. Moments are updated in place. `step` counts from 1."""
        raise NotImplementedError

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
                state.update({kind: torch.zeros_like(p) for kind in self.moments})
                if self.rounding == "kahan" and p.dtype is torch.bfloat16:
                    state["compensation"] = torch.zeros_like(p)
            state["step"] += 1
            step = int(state["step"])

            # .to does not copy float32 tensors: the state itself is then updated, and copied onto itself
            wide = torch.promote_types(p.dtype, torch.float32)
            weight, moments = p.to(wide), [state[kind].to(wide) for kind in self.moments]
            update = self.change(group, step, weight, p.grad.to(wide), *moments)
            for kind, moment in zip(self.moments, moments, strict=True):
                state[kind].copy_(moment)

            if self.rounding == "stochastic" and p.dtype is torch.bfloat16:
                seed = address(self.seed, "rounding", step, index)
                p.copy_(round_stochastically(weight.add_(update), seed, shard_spec(p)))
            elif "compensation" in state:
                update.add_(state["compensation"])
                p.copy_(weight + update)
                state["compensation"].copy_(update.sub_(p.to(wide).sub_(weight)))  # intended minus actual update
            else:
                p.copy_(weight.add_(update))


def decay(group: dict[str, Any], weight: Tensor, direction: Tensor) -> Tensor:
    """The change by decoupled weight decay, - lr weight_decay weight, a new tensor.

    With `cautious_decay` in the group it is 0 where decay would work against the update: where `direction`, of which a
    multiple is subtracted from the weight, has the other sign than the weight (cautious weight decay, Chen et al. 2025,
    arXiv 2510.12402).
    """
    change = weight * (-group["lr"] * group["weight_decay"])
    return change.mul_(direction.sign().mul_(weight) >= 0) if group["cautious_decay"] else change

"""What is kept on the device of every update until it is read: loss, gradient norms, and which weights broke."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gptlab.distributed.shard import Weights, all_reduce_shards, norms
from gptlab.distributed.world import SINGLE, World
from gptlab.guard import Diverged, Divergence
from gptlab.optim.adamw import PlainAdamW
from gptlab.rundir import RunDir


@dataclass(frozen=True)
class Seen:
    """What `update` observed, as tensors that nobody has waited for."""

    lr: float
    loss: Tensor
    """(): mean over this rank's units of the step, in nats; the ranks' losses add up to the step's."""
    largest_logit: Tensor
    """(): the largest |logit|."""
    norms: Tensor
    """(n + 1,): see `clip_gradients`."""


@dataclass(frozen=True)
class Update:
    """An update as numbers."""

    step: int
    loss: float
    grad_norm: float
    largest_logit: float


def clip_gradients(model: Weights, max_norm: float, optimizer: torch.optim.Optimizer | None = None) -> Tensor:
    """Scale the gradients down to a global norm of max_norm, as torch's clip_grad_norm_ does.

    With an infinite max_norm they are only measured.

    Args:
        optimizer: that takes the next step. PyTorch's fused AdamW divides the gradients itself, which saves a pass over
            them; without loss scaling, for which PyTorch sets its `grad_scale`.

    Returns:
        (n + 1,): the norms before clipping: the global norm, then each parameter's, in the order of
        model.parameters().
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [p.grad for p in parameters if p.grad is not None]
    assert len(grads) == len(parameters), "every parameter takes part in the loss"
    each = norms(grads, parameters)  # (n,)
    total = torch.linalg.vector_norm(each)
    if math.isfinite(max_norm) and type(optimizer) is PlainAdamW and optimizer.defaults["fused"]:
        optimizer.grad_scale = ((total + 1e-6) / max_norm).clamp(min=1.0).float()
    elif math.isfinite(max_norm):
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        one_dtype = all(grad.dtype is grads[0].dtype for grad in grads)  # then it is one kernel
        torch._foreach_mul_(grads, factor.to(grads[0].dtype) if one_dtype else factor)
    return torch.cat((total[None], each)).float()


class StepBuffer:
    """The updates since the last `read`. A GPU does not wait for them before that.

    Args:
        model: its parameters.
        weights_too: check the weights after each update. Only 16-bit weights can break with a finite gradient.
        world: its ranks read together.
    """

    def __init__(self, model: Weights, weights_too: bool, world: World = SINGLE) -> None:
        self.world = world
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.weights_too = weights_too
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.rows: list[list[float]] = []  # of the last read: loss, largest |logit|, norms
        self.broken: list[list[int]] = []  # of the last read and the update before it: 1 where a weight is not finite

    def __len__(self) -> int:
        return len(self.waiting)

    @torch.no_grad()
    def append(self, seen: Seen) -> None:
        loss = seen.loss
        row = torch.cat((torch.stack((loss, seen.largest_logit.to(loss.dtype))), seen.norms.to(loss.dtype)))
        broken = torch.zeros(0, dtype=torch.int32)
        if self.weights_too:
            broken = torch.stack([~torch.isfinite(p).all() for p in self.parameters]).int()
        self.waiting.append((row, broken))

    def read(self, step: int) -> list[Update]:
        """The buffered updates, in order; `step` is the number of the last one. All ranks call this."""
        rows = torch.stack([row for row, _ in self.waiting])
        if self.world.size > 1:
            losses, logits = self.world.all_gather(rows[:, :2].contiguous()).unbind(-1)  # (ranks, updates) each
            rows[:, 0], rows[:, 1] = losses.sum(0), logits.nan_to_num(nan=math.inf, posinf=math.inf).amax(0)
        self.rows = rows.tolist()
        broken = torch.stack([broken for _, broken in self.waiting])
        broken = self.world.all_reduce(broken, "max") if self.weights_too else broken
        self.broken = self.broken[-1:] + broken.tolist()
        self.waiting = []
        first = step - len(self.rows) + 1
        return [Update(first + i, row[0], row[2], row[1]) for i, row in enumerate(self.rows)]

    def evidence(
        self, diverged: Divergence, updates: list[Update], run: RunDir, batch_of: Callable[[int], dict[str, Any]]
    ) -> Diverged:
        """Find the first tensor that was not finite, and write divergence.json.

        Args:
            batch_of: what the batch of an update was; updates count from 0 there.

        Returns:
            The exception to raise. Where an update broke the weights, the divergence is dated back to that update.
        """
        tensor: str | None = None
        at = diverged.step - updates[0].step  # index into the rows read last
        if diverged.kind == "non_finite" and 0 <= at < len(self.rows):
            row, before = self.rows[at], at - len(updates) - 1
            broken = self.broken[before] if self.weights_too and len(self.broken) >= -before else []
            if any(broken):
                tensor = f"weight {self.names[broken.index(1)]}"
                diverged = replace(
                    diverged,
                    step=diverged.step - 1,
                    reason=f"the update of step {diverged.step - 1} left {tensor} not finite: {diverged.reason}",
                )
            elif not math.isfinite(row[0]):
                tensor = "loss" if math.isfinite(row[1]) else "logits"
            elif not math.isfinite(row[2]):  # the backward pass reaches the last parameter first
                named = [name for name, norm in zip(self.names, row[3:], strict=True) if not math.isfinite(norm)]
                tensor = f"gradient of {named[-1]}" if named else "gradient norm"
        counts = all_reduce_shards(torch.stack([(~torch.isfinite(p)).sum() for p in self.parameters]), self.parameters)
        run.write_json(
            "divergence.json",
            {
                "kind": diverged.kind,
                "step": diverged.step,
                "first_tensor": tensor,
                "reason": diverged.reason,
                "batch": batch_of(diverged.step - 1) if diverged.step else None,
                "updates": [{key: str(value) for key, value in asdict(update).items()} for update in updates],
                "gradient_norms": {
                    name: str(norm)
                    for name, norm in zip(self.names, self.rows[min(max(at, 0), len(self.rows) - 1)][3:], strict=True)
                },
                "weights_not_finite": {name: n for name, n in zip(self.names, counts.tolist(), strict=True) if n},
            },
        )
        return Diverged(diverged, tensor)

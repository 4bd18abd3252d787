"""Cross-entropy of rows of logits in one pass over them, as a Triton kernel: loss, largest |logit| and gradient.

Importing this file needs Triton, which PyTorch for GPUs brings. `loss.cross_entropy_` is the operation.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits at a time; a row of 50,304 in one block would spill registers


@triton.jit
def cross_entropy_row(
    logits, targets, factor, losses, largest, V: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)  # row * V may exceed 32 bits
    logits += row * V
    target = tl.load(targets + row)
    kept = target >= 0
    own = tl.load(logits + target, mask=kept & (target < V), other=float("nan")).to(tl.float32)
    lanes = tl.arange(0, BLOCK)

    highest = tl.full((), float("-inf"), tl.float32)  # logit so far
    total = tl.zeros((BLOCK,), tl.float32)  # of exp(logit - highest), a lane each
    magnitude = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        ids = start + lanes
        x = tl.load(logits + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
        before = highest
        highest = tl.maximum(highest, tl.max(x, axis=0))
        total = total * tl.exp(before - highest) + tl.exp(x - highest)
        magnitude = tl.maximum(magnitude, tl.where(ids < V, tl.abs(x), 0.0))
    mass = tl.sum(total, axis=0)
    # highest - own is exact where the log-sum-exp of large logits would be rounded before the subtraction
    tl.store(losses + row, tl.where(kept, (highest - own) + tl.log(mass), 0.0))
    tl.store(largest + row, tl.max(magnitude, axis=0))

    if GRADIENT:  # (softmax - one hot) * factor over the logits, which are still in a cache
        scale = tl.load(factor)
        for start in range(0, V, BLOCK):
            ids = start + lanes
            x = tl.load(logits + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
            grad = (tl.exp(x - highest) / mass - tl.where(ids == target, 1.0, 0.0)) * scale
            grad = tl.where(kept, grad, 0.0)
            tl.store(logits + ids, grad.to(logits.dtype.element_ty), mask=ids < V)


def launch(logits: Tensor, targets: Tensor, factor: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """See `loss.cross_entropy_`."""
    N, V = logits.shape
    losses = torch.empty(N, dtype=torch.float32, device=logits.device)
    largest = torch.empty_like(losses)
    block = min(BLOCK, triton.next_power_of_2(V))
    with torch.cuda.device_of(logits):  # Triton launches on the current GPU
        cross_entropy_row[(N,)](
            logits, targets, factor, losses, largest, V, block, gradient, num_warps=8 if block == BLOCK else 4
        )
    return losses, largest

"""Cross-entropy of a linear head, computed in chunks of tokens.

The logits (tokens, 50304) are by far the largest tensor of a training step of GPT-2 124M. They are computed for one
chunk of tokens at a time, and so is their gradient, which depends on nothing else. No logits are stored for the
backward pass, and none are computed twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bytes of a chunk of float32 logits: small beside the model, but large enough to keep the device busy.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}


def chunk_length(n_tokens: int, vocab_size: int, device: str) -> int:
    """Number of tokens in a chunk: the smallest number of equal chunks that each fit in CHUNK_BYTES."""
    most = max(1, CHUNK_BYTES.get(device, 64 << 20) // (4 * vocab_size))
    chunks = max(1, -(-n_tokens // most))
    return max(1, -(-n_tokens // chunks))


def head_bytes(
    n_tokens: int, weight: Tensor, stream: torch.dtype, dtype: torch.dtype, loss_dtype: torch.dtype, device: str
) -> float:
    """Bytes that `linear_cross_entropy` needs at one moment, without the activations below the hidden states.

    They are the hidden states and the weight in the dtype of the matmuls, the gradients of both, and the largest of
    what a chunk of logits goes through: float32 logits, as much again inside log-sum-exp, and the gradient of the
    chunk before.

    Args:
        n_tokens: N.
        weight: (V, C) of the head, without memory if need be.
        stream: dtype of the hidden states.
        dtype, loss_dtype: as `linear_cross_entropy` takes them.
        device: type of the device, which decides the length of a chunk.
    """
    (V, C), N = weight.shape, n_tokens
    low, wide = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
    n = chunk_length(N, V, device)
    chunk = 2 * wide + (0 if loss_dtype is torch.float32 else loss_dtype.itemsize) + (low if n < N else 0)
    last = n * V * (wide + (low if low != wide else 0)) + low * V * C  # its gradient, times the hidden states
    total = N * C * stream.itemsize  # the last hidden states
    total += N * C * low if dtype is not stream else 0
    total += V * C * low if dtype is not weight.dtype else 0
    total += V * C * wide + N * C * low  # gradients of the weight and of the hidden states
    return float(total + max(n * V * chunk, last))


class HeadLoss(NamedTuple):
    """Output of a model's head in training."""

    train: Tensor
    """The loss to differentiate: the summed loss times `factor`, in the regime's loss dtype, ()."""
    value: Tensor
    """The loss to log: the summed loss without `factor`, float32 in every regime, without a gradient, ()."""
    largest_logit: Tensor
    """The largest |logit|, float32, (). It grows long before a run diverges."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, factor: Tensor, dtype: torch.dtype, loss: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        N, V = x.shape[0], weight.shape[0]
        wide = torch.promote_types(dtype, torch.float32)
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        x_low, w_low = x.to(dtype), weight.to(dtype)
        keep = (targets >= 0)[:, None]  # (N, 1)
        picks = targets.clamp(min=0)[:, None]  # (N, 1)
        value = torch.zeros((), dtype=wide, device=x.device)
        largest = torch.zeros((), dtype=dtype, device=x.device)
        dx = []
        dw = torch.zeros(weight.shape if wants_grad else 0, dtype=wide, device=x.device)
        # rounded to the loss dtype, as PyTorch's own operations would round it; in float16, 1 / tokens may become 0
        factor = factor.to(loss).to(wide)
        step = chunk_length(N, V, x.device.type)
        for i in range(0, N, step):
            chunk, pick, kept = x_low[i : i + step], picks[i : i + step], keep[i : i + step]  # (n, C), (n, 1), (n, 1)
            logits = chunk @ w_low.t()  # (n, V)
            low, high = torch.aminmax(logits)
            largest = torch.maximum(largest, torch.maximum(-low, high))
            logits = logits.to(wide)
            lse = torch.logsumexp(logits, dim=1, keepdim=True)  # (n, 1)
            value = value + ((lse - logits.gather(1, pick)) * kept).sum()
            if not wants_grad:
                continue
            logits = logits.sub_(lse).to(loss).to(wide)  # log softmax, rounded to the loss dtype
            grad = logits.exp_()  # d loss / d logits = softmax - one_hot, computed in place
            grad.scatter_add_(1, pick, torch.full_like(lse, -1.0))
            grad = grad.mul_(factor).to(loss).to(dtype)  # (n, V)
            seen = chunk * kept  # ignored tokens must not add to dw; masking (n, C) is cheaper than masking (n, V)
            dx.append((grad @ w_low).mul_(kept))
            if dtype == wide:
                dw.addmm_(grad.t(), seen)
            else:
                dw.add_(grad.t() @ seen)
        if wants_grad:
            ctx.save_for_backward(torch.cat(dx) if dx else torch.zeros_like(x_low), dw)
            ctx.dtypes = x.dtype, weight.dtype
        largest = largest.to(torch.float32)
        ctx.mark_non_differentiable(value, largest)
        return (value * factor).to(loss), value, largest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        dx, dw = ctx.saved_tensors
        above = grads[0]  # 1 if the loss itself is differentiated
        dx = dx.to(torch.promote_types(dx.dtype, above.dtype)) * above
        # in place; autograd raises an error for a second backward pass through the same graph
        return dx.to(ctx.dtypes[0]), dw.mul_(above).to(ctx.dtypes[1]), None, None, None, None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    factor: Tensor | float = 1.0,
    dtype: torch.dtype | None = None,
    loss_dtype: torch.dtype | None = None,
) -> HeadLoss:
    """Cross-entropy of the logits `x @ weight.T` in nats, summed over tokens.

    Args:
        x: (N, C) hidden states.
        weight: (V, C) weight of the head.
        targets: (N,) ids. Tokens with negative targets are ignored.
        factor: multiplies the loss to differentiate: the loss scale / tokens of the step. Applied here, because small
            gradients would underflow in fp16 before a later multiplication.
        dtype: of the matmuls. Default: the autocast dtype if autocast is on, else the dtype of x.
        loss_dtype: of the softmax and its gradient. Default: float32, or float64 for float64 matmuls.
    """
    device = x.device.type
    if dtype is None:
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(device, enabled=False):
        factor = torch.as_tensor(factor, dtype=wide, device=x.device)
        return HeadLoss(*_LinearCrossEntropy.apply(x, weight, targets, factor, dtype, loss_dtype or wide))

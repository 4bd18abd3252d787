"""Cross-entropy of a linear head without a full copy of the logits in float32.

The logits of 124M GPT-2 are the largest tensor of a step by far: (tokens, 50304). They are made a chunk of tokens at a
time, and as their gradient needs nothing but themselves, it is taken in the same pass: no logits are kept, and none
are computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bytes of one chunk of float32 logits. Small enough not to matter beside the model, large enough to fill the device.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}


def chunk_length(n_tokens: int, vocab_size: int, device: str) -> int:
    """Tokens in a chunk: equal chunks, as few as keep each under the bound."""
    most = max(1, CHUNK_BYTES.get(device, 64 << 20) // (4 * vocab_size))
    chunks = max(1, -(-n_tokens // most))
    return max(1, -(-n_tokens // chunks))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        N, V = x.shape[0], weight.shape[0]
        wide = torch.promote_types(dtype, torch.float32)
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        # float16 has no number for a probability of 1e-8: dx is kept times 1024 until it is float32 again
        scale = 1024.0 if dtype == torch.float16 else 1.0
        x_low, w_low = x.to(dtype), weight.to(dtype)
        keep = (targets >= 0)[:, None]  # (N, 1)
        picks = targets.clamp(min=0)[:, None]  # (N, 1)
        loss = torch.zeros((), dtype=wide, device=x.device)
        dx = []
        dw = torch.zeros(weight.shape if wants_grad else 0, dtype=wide, device=x.device)
        step = chunk_length(N, V, x.device.type)
        for i in range(0, N, step):
            chunk, pick, kept = x_low[i : i + step], picks[i : i + step], keep[i : i + step]  # (n, C), (n, 1), (n, 1)
            logits = (chunk @ w_low.t()).to(wide)  # (n, V)
            lse = torch.logsumexp(logits, dim=1, keepdim=True)  # (n, 1)
            loss = loss + ((lse - logits.gather(1, pick)) * kept).sum()
            if not wants_grad:
                continue
            grad = logits.sub_(lse).exp_()  # d loss / d logits = softmax - one_hot, in the place of the logits
            grad.scatter_add_(1, pick, torch.full_like(lse, -1.0))
            seen = chunk * kept  # what a left-out token would add to dw, and its dx, is 0: cheaper here than in (n, V)
            low = (grad * scale if scale != 1 else grad).to(dtype)  # (n, V)
            dx.append((low @ w_low).mul_(kept))
            if dtype == torch.bfloat16:
                dw.add_(low.t() @ seen)
            else:  # a sum over tokens outgrows float16's 65504; TF32, which amp_fp16 allows, has the same mantissa
                dw.addmm_(grad.t(), seen.to(wide))
        if wants_grad:
            ctx.save_for_backward(torch.cat(dx) if dx else torch.zeros_like(x_low), dw)
            ctx.scale, ctx.dtypes = scale, (x.dtype, weight.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        dx, dw = ctx.saved_tensors
        factor = grads[0]
        dx = dx.to(torch.promote_types(dx.dtype, factor.dtype)) * (factor / ctx.scale)
        # in place, so a second backward pass through the same graph is an error, which autograd raises
        return dx.to(ctx.dtypes[0]), dw.mul_(factor).to(ctx.dtypes[1]), None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of the cross-entropy of `x @ weight.T` in nats, a float32 scalar (float64 for float64).

    Multiplies in the autocast dtype where autocast is on, else in x's; softmax and sum are float32.

    Args:
        x: (N, C) hidden states.
        weight: (V, C) of the head.
        targets: (N,) ids; negative ones are left out.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(x, weight, targets, dtype)

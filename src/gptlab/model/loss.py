"""Cross-entropy of a linear head without a full copy of the logits in float32.

The logits of 124M GPT-2 are the largest tensor of a step by far: (tokens, 50304). They are made a chunk of tokens at a
time, and as their gradient needs nothing but themselves, it is taken in the same pass: no logits are kept, and none
are computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Bytes of one chunk of float32 logits. Small enough not to matter beside the model, large enough to fill the device.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}


def chunk_length(n_tokens: int, vocab_size: int, device: str) -> int:
    """Tokens in a chunk: equal chunks, as few as keep each under the bound."""
    most = max(1, CHUNK_BYTES.get(device, 128 << 20) // (4 * vocab_size))
    chunks = -(-n_tokens // most)
    return -(-n_tokens // chunks)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        N, V = x.shape[0], weight.shape[0]
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        # float16 has no numbers for a probability of 1e-8: gradients are kept times 1024 until they are float32 again
        scale = 1024.0 if dtype == torch.float16 else 1.0
        x_low, w_low = x.to(dtype), weight.to(dtype)
        valid = targets >= 0
        picks = targets.clamp(min=0)[:, None]  # (N, 1)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        dx, dw = [], None
        step = chunk_length(N, V, x.device.type)
        for i in range(0, N, step):
            chunk = x_low[i : i + step]  # (n, C)
            pick, keep = picks[i : i + step], valid[i : i + step, None]
            logits = (chunk @ w_low.t()).float()  # (n, V)
            lse = torch.logsumexp(logits, dim=1, keepdim=True)  # (n, 1)
            loss = loss + ((lse - logits.gather(1, pick)) * keep).sum()
            if wants_grad:  # d loss / d logits = softmax - one_hot
                grad = torch.exp(logits - lse)
                grad = grad.scatter_add(1, pick, torch.full_like(lse, -1.0))
                grad = (grad * (keep * scale)).to(dtype)
                dx.append(grad @ w_low)
                if dw is None:
                    dw = (grad.t() @ chunk).float()
                elif dtype == torch.float32:
                    dw.addmm_(grad.t(), chunk)
                else:
                    dw += grad.t() @ chunk
        if wants_grad:
            assert dw is not None
            ctx.save_for_backward(torch.cat(dx), dw)
            ctx.scale, ctx.dtypes = scale, (x.dtype, weight.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dx, dw = ctx.saved_tensors
        factor = grads[0].float() / ctx.scale
        return (dx.float() * factor).to(ctx.dtypes[0]), (dw * factor).to(ctx.dtypes[1]), None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of the cross-entropy of `x @ weight.T` in nats, a float32 scalar.

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

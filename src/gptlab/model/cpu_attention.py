"""Causal attention on a CPU by products of matrices, where those are faster than PyTorch's kernel.

PyTorch's kernel multiplies with MKL, which uses AVX-512 on Intel's processors only and emulates bf16 elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptlab.model import matmul
from gptlab.model.matmul import not_traced, product

SHORT = 512  # tokens below which bf16 keeps all scores, and float32 has nothing to gain
ROWS = 256  # queries whose scores are computed at once
HEADS = 4  # whose scores stay in the cache of a core
FEW = 2  # threads: more of them share one float32 product badly


@not_traced
def has_few_threads() -> bool:
    return torch.get_num_threads() <= FEW


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention without dropout of q, k and v, (B, H, T, D) each; `scale` is D^-0.5 by default.

    PyTorch's kernel on a GPU, and wherever it is faster. The processor, its threads, the dtype and T decide, never a
    timing.
    """
    B, H, T, D = q.shape
    long = T >= SHORT
    ours = q.dtype is torch.bfloat16 or (q.dtype is torch.float32 and long and has_few_threads())
    if not (ours and matmul.ONEDNN and q.device.type == "cpu"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True, scale=scale)
    scale = D**-0.5 if scale is None else scale
    q, k, v = (x.reshape(B * H, T, D).contiguous() for x in (q, k, v))  # of one sequence it is a view
    with torch.autocast("cpu", enabled=False):
        y: Tensor = _Attention.apply(q, k, v, scale) if long else _whole(q, k, v, scale)
    return y.view(B, H, T, D)


def _whole(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of (N, T, D) by whole products. Their scores are kept for the backward pass."""
    return torch.softmax(torch.baddbmm(_future(q.shape[1], q.dtype), q, k.mT, alpha=scale), dim=-1) @ v


def _future(n: int, dtype: torch.dtype) -> Tensor:
    """(n, n): what is added to the scores of n queries, minus infinity for the keys after each."""
    return torch.full((n, n), float("-inf"), dtype=dtype).triu_(1)


class _Attention(torch.autograd.Function):
    """Attention of (N, T, D), a few heads and `ROWS` queries at a time, which attend to the keys before them.

    The backward pass computes the scores again, so nothing of T x T is kept.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        y: Tensor = torch.ops.gptlab.attention(q, k, v, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return *torch.ops.gptlab.attention_backward(grads[0].contiguous(), *ctx.saved_tensors, ctx.scale), None


# Operations of their own, which PyTorch's compiler does not look into. `custom_op` would import it.
torch.library.define("gptlab::attention", "(Tensor q, Tensor k, Tensor v, float scale) -> Tensor")
torch.library.define(
    "gptlab::attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("gptlab::attention", "CPU")
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out, future = torch.empty_like(q), _future(ROWS, q.dtype)
    for of_out, of_q, of_k, of_v in _parts(out, q, k, v):
        for rows, seen, _, _, p in _blocks(of_q, of_k, future, scale):
            of_out[..., rows, :] = _times(p, of_v[..., seen, :])
    return out


@torch.library.impl("gptlab::attention_backward", "CPU")
def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    future = _future(ROWS, q.dtype)
    for of_dq, of_dk, of_dv, of_grad, of_q, of_k, of_v in _parts(dq, dk, dv, grad, q, k, v):
        sum_k, sum_v = (torch.zeros_like(of_k, dtype=torch.float32) for _ in range(2))
        for rows, seen, queries, keys, p in _blocks(of_q, of_k, future, scale):
            g = of_grad[..., rows, :].contiguous()
            sum_v[..., seen, :] += _times(p.mT, g)
            dp = _times(g, of_v[..., seen, :].mT)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            of_dq[..., rows, :] = _times(ds, keys, scale)
            sum_k[..., seen, :] += _times(ds.mT, queries)
        of_dk.copy_(sum_k.mul_(scale))
        of_dv.copy_(sum_v)
    return dq, dk, dv


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q)


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


torch.library.register_fake("gptlab::attention", _fake)
torch.library.register_fake("gptlab::attention_backward", _fake_backward)


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of (N, T, D): a few heads per thread; in float32 (T, D) each, as oneDNN has no batches of it in PyTorch."""
    if tensors[0].dtype is torch.float32:
        return zip(*tensors, strict=True)
    return zip(*(x.split(HEADS * torch.get_num_threads()) for x in tensors), strict=True)


def _blocks(
    q: Tensor, k: Tensor, future: Tensor, scale: float
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    """For blocks of queries of (..., T, D): their rows, those of the keys that they see, both, and the attention."""
    T = q.shape[-2]
    for start in range(0, T, ROWS):
        stop = min(start + ROWS, T)
        rows, seen = slice(start, stop), slice(0, stop)
        queries, keys = q[..., rows, :].contiguous(), k[..., seen, :].contiguous()
        scores = _times(queries, keys.mT, scale)
        scores[..., start:] += future[: stop - start, : stop - start]
        yield rows, seen, queries, keys, torch.softmax(scores, dim=-1)


def _times(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale a @ b, of matrices or of batches of them."""
    if a.dim() == 3:
        return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scale)
    return product(a, b) if scale == 1 else product(a, b).mul_(scale)

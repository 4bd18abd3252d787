"""Cross-entropy of a linear head, computed in chunks of tokens.

The logits (tokens, 50304) are by far the largest tensor of a training step of GPT-2 124M. They are computed for one
chunk of tokens at a time, and so is their gradient, which depends on nothing else. No logits are stored for the
backward pass, and none are computed twice.

The logits stay in the dtype of the matmul. On a GPU one kernel takes the loss and the largest |logit| and writes the
gradient over them (`head_kernel`); on a CPU `cross_entropy_by_rows` does the same, some rows at a time, which stay in
the cache. On other devices, and for a loss in less than float32, whole chunks are copied to float32.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptlab.model.matmul import add_product, not_traced, product

# Bytes of a chunk of logits: small beside the model, but large enough to keep the device busy.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}
# Bytes of a chunk of logits for the kernel. Chunks save memory and cost time: 64 x 1,024 tokens of GPT-2's vocabulary
# in bf16, 6.6 GB, are one.
KERNEL_BYTES = 8 << 30
KERNEL_DEVICES = ("cuda",)
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CACHE_BYTES = 2 << 20  # of rows in float32, which the cache of a core holds


def chunk_length(n_tokens: int, vocab_size: int, device: str, dtype: torch.dtype | None = None) -> int:
    """Number of tokens in a chunk: the smallest number of equal chunks that each fit in CHUNK_BYTES, or KERNEL_BYTES.

    Args:
        dtype: of logits that become their gradient (`in_place_dtype`). None: they are copied to float32.
    """
    most = KERNEL_BYTES if dtype is not None and device in KERNEL_DEVICES else CHUNK_BYTES.get(device, 64 << 20)
    most //= (4 if dtype is None else dtype.itemsize) * vocab_size
    chunks = max(1, -(-n_tokens // max(1, most)))
    return max(1, -(-n_tokens // chunks))


@functools.cache
def _has_triton() -> bool:
    """Whether Triton compiles for this machine's GPU. A GPU that is only planned for has it: PyTorch brings it."""
    if not torch.cuda.is_available():
        return True
    return find_spec("triton") is not None and torch.cuda.get_device_capability() >= (7, 0)


@not_traced
def in_place_dtype(device: str, dtype: torch.dtype, loss_dtype: torch.dtype) -> torch.dtype | None:
    """dtype of logits that become their gradient: that of the matmul. None: PyTorch's operations work on copies."""
    if device in KERNEL_DEVICES:
        runs = dtype in KERNEL_DTYPES and loss_dtype is torch.float32 and _has_triton()
    else:
        runs = device == "cpu" and loss_dtype is torch.promote_types(dtype, torch.float32)
    return dtype if runs else None


@torch.library.custom_op("gptlab::cross_entropy_", mutates_args={"logits"})
def cross_entropy_(logits: Tensor, targets: Tensor, factor: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """Loss and largest |logit| of each row, (n,) in float32 at least; the gradient may be written over the logits.

    The compiler sees one operation. What it could fuse with it are matmuls, and those it does not fuse.

    Args:
        logits: (n, V), contiguous. With `gradient` they become the gradient of the summed losses times `factor`.
        targets: (n,) ids. A negative one has no loss and no gradient. For one beyond V the kernel's loss is NaN, and
            `cross_entropy_by_rows` raises a RuntimeError.
        factor: (), in float32 at least.
    """
    if logits.device.type not in KERNEL_DEVICES:
        return cross_entropy_by_rows(logits, targets, factor, gradient)
    from gptlab.model.head_kernel import launch

    return launch(logits, targets, factor, gradient)


def rows_at_once(vocab_size: int, itemsize: int) -> int:
    """Rows that `cross_entropy_by_rows` takes at once."""
    return max(1, CACHE_BYTES * torch.get_num_threads() // (itemsize * vocab_size))


def cross_entropy_by_rows(logits: Tensor, targets: Tensor, factor: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """`cross_entropy_` on a CPU, for code that is not compiled."""
    losses, largest = factor.new_empty(len(targets), 1), factor.new_empty(len(targets), 1)
    n = rows_at_once(logits.shape[1], factor.itemsize)
    kept, picks = (targets >= 0).to(factor.dtype)[:, None], targets.clamp(min=0)[:, None]  # (N, 1)
    for x, pick, keep, loss, magnitude in zip(
        *(t.split(n) for t in (logits, picks, kept, losses, largest)), strict=True
    ):
        wide = x.to(factor.dtype)  # (n, V)
        highest = wide.amax(1, keepdim=True)
        torch.maximum(highest, -wide.amin(1, keepdim=True), out=magnitude)
        p = torch.softmax(wide, dim=1)  # the largest is exp(highest - log-sum-exp)
        torch.mul(highest - x.gather(1, pick) - p.amax(1, keepdim=True).log(), keep, out=loss)
        if gradient:
            scale, own = keep * factor, p.gather(1, pick)
            x.copy_(p.mul_(scale).scatter_(1, pick, (own - 1) * scale))
    return losses[:, 0], largest[:, 0]


@cross_entropy_.register_fake
def _(logits: Tensor, targets: Tensor, factor: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    rows = factor.new_empty(logits.shape[0])
    return rows, torch.empty_like(rows)


def head_bytes(
    n_tokens: int, weight: Tensor, stream: torch.dtype, dtype: torch.dtype, loss_dtype: torch.dtype, device: str
) -> float:
    """Bytes that `linear_cross_entropy` needs at one moment, without the activations below the hidden states.

    They are the hidden states and the weight in the dtype of the matmuls, the gradients of both, and the largest of
    what a chunk of logits goes through: the logits alone, or float32 copies, and as much again inside log-sum-exp.

    Args:
        n_tokens: N.
        weight: (V, C) of the head, without memory if need be.
        stream: dtype of the hidden states.
        dtype, loss_dtype: as `linear_cross_entropy` takes them.
        device: type of the device, which decides the length of a chunk.
    """
    (V, C), N = weight.shape, n_tokens
    low, wide = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
    in_place = in_place_dtype(device, dtype, loss_dtype)
    n = chunk_length(N, V, device, in_place)
    part = low * V * C if low != wide else 0  # a part of the weight's gradient, before it is added
    if in_place:
        copies = 0
        if device not in KERNEL_DEVICES:
            copies = min(n, rows_at_once(V, wide)) * V * (wide + (wide if low != wide else 0))
        most = max(n * V * low + copies, n * V * low + part)
    else:
        chunk = 2 * wide + (0 if loss_dtype is torch.float32 else loss_dtype.itemsize)
        most = max(n * V * chunk, n * V * (wide + (low if low != wide else 0)) + part)
    total = N * C * stream.itemsize  # the last hidden states
    total += N * C * low if dtype is not stream else 0
    total += V * C * low if dtype is not weight.dtype else 0
    total += V * C * wide + N * C * low  # gradients of the weight and of the hidden states
    return float(total + most)


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
        in_place = in_place_dtype(x.device.type, dtype, loss)
        plain = x.device.type not in KERNEL_DEVICES and not torch.compiler.is_compiling()
        take = cross_entropy_by_rows if plain else cross_entropy_
        x_low, w_low = x.to(dtype), weight.to(dtype)
        keep = (targets >= 0)[:, None]  # (N, 1)
        picks = targets.clamp(min=0)[:, None]  # (N, 1)
        value = torch.zeros((), dtype=wide, device=x.device)
        largest = torch.zeros((), dtype=wide if in_place else dtype, device=x.device)
        dx = []
        dw = torch.zeros(weight.shape if wants_grad else 0, dtype=wide, device=x.device)
        # rounded to the loss dtype, as PyTorch's own operations would round it; in float16, 1 / tokens may become 0
        factor = factor.to(loss).to(wide)
        step = chunk_length(N, V, x.device.type, in_place)
        for i in range(0, N, step):
            chunk, pick, kept = x_low[i : i + step], picks[i : i + step], keep[i : i + step]  # (n, C), (n, 1), (n, 1)
            logits = product(chunk, w_low.t())  # (n, V)
            if in_place:
                losses, magnitudes = take(logits, targets[i : i + step], factor, wants_grad)
                value, largest = value + losses.sum(), torch.maximum(largest, magnitudes.max())
                if wants_grad:  # which the logits now are
                    dx.append(product(logits, w_low))
                    add_product(dw, logits.t(), chunk)
                del logits  # before the next chunk's
                continue
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
            dx.append(product(grad, w_low).mul_(kept))
            add_product(dw, grad.t(), seen)
            del logits, grad
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

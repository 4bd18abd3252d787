"""Cross-entropy of a linear head, computed in chunks of tokens.

The logits (tokens, 50304) are by far the largest tensor of a training step of GPT-2 124M. They are computed for one
chunk of tokens at a time, and so is their gradient, which depends on nothing else. No logits are stored for the
backward pass, and none are computed twice.

On a GPU the logits stay in the dtype of the matmul, and one kernel takes the loss and the largest |logit| and writes
the gradient over them (`head_kernel`). Elsewhere, and for a loss in less than float32, PyTorch's operations do the
same on float32 copies of smaller chunks.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptlab.model.matmul import add_product, product

# Bytes of a chunk of float32 logits: small beside the model, but large enough to keep the device busy.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}
# Bytes of a chunk of logits for the kernel. Chunks save memory and cost time: 64 x 1,024 tokens of GPT-2's vocabulary
# in bf16, 6.6 GB, are one.
KERNEL_BYTES = 8 << 30
KERNEL_DEVICES = ("cuda",)
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def chunk_length(n_tokens: int, vocab_size: int, device: str, kernel_dtype: torch.dtype | None = None) -> int:
    """Number of tokens in a chunk: the smallest number of equal chunks that each fit in CHUNK_BYTES as float32.

    Args:
        kernel_dtype: of logits for the kernel, which fit in KERNEL_BYTES instead. None: PyTorch's operations.
    """
    if kernel_dtype is not None:
        most = KERNEL_BYTES // (kernel_dtype.itemsize * vocab_size)
    else:
        most = CHUNK_BYTES.get(device, 64 << 20) // (4 * vocab_size)
    chunks = max(1, -(-n_tokens // max(1, most)))
    return max(1, -(-n_tokens // chunks))


@functools.cache
def _has_triton() -> bool:
    """Whether Triton compiles for this machine's GPU. A GPU that is only planned for has it: PyTorch brings it."""
    if not torch.cuda.is_available():
        return True
    return find_spec("triton") is not None and torch.cuda.get_device_capability() >= (7, 0)


def kernel_dtype(device: str, dtype: torch.dtype, loss_dtype: torch.dtype) -> torch.dtype | None:
    """dtype of the logits that the kernel takes: that of the matmul. None: PyTorch's operations take the loss."""
    runs = device in KERNEL_DEVICES and dtype in KERNEL_DTYPES and loss_dtype is torch.float32 and _has_triton()
    return dtype if runs else None


# what torch.compiler.assume_constant_result does, which would import the compiler: it calls this and does not trace it
kernel_dtype._dynamo_marked_constant = True  # type: ignore[attr-defined]


@torch.library.custom_op("gptlab::cross_entropy_", mutates_args={"logits"})
def cross_entropy_(logits: Tensor, targets: Tensor, factor: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """Loss and largest |logit| of each row, (n,) float32, by the kernel, which may write the gradient over the logits.

    The compiler sees one operation. What it could fuse with it are matmuls, and those it does not fuse.

    Args:
        logits: (n, V), contiguous. With `gradient` they become the gradient of the summed losses times `factor`.
        targets: (n,) ids. A negative one has no loss and no gradient; one beyond V has the loss NaN.
        factor: float32, ().
    """
    from gptlab.model.head_kernel import launch

    return launch(logits, targets, factor, gradient)


@cross_entropy_.register_fake
def _(logits: Tensor, targets: Tensor, factor: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    rows = factor.new_empty(logits.shape[0])
    return rows, torch.empty_like(rows)


def head_bytes(
    n_tokens: int, weight: Tensor, stream: torch.dtype, dtype: torch.dtype, loss_dtype: torch.dtype, device: str
) -> float:
    """Bytes that `linear_cross_entropy` needs at one moment, without the activations below the hidden states.

    They are the hidden states and the weight in the dtype of the matmuls, the gradients of both, and the largest of
    what a chunk of logits goes through: float32 logits, and as much again inside log-sum-exp. The kernel needs the
    logits alone.

    Args:
        n_tokens: N.
        weight: (V, C) of the head, without memory if need be.
        stream: dtype of the hidden states.
        dtype, loss_dtype: as `linear_cross_entropy` takes them.
        device: type of the device, which decides the length of a chunk.
    """
    (V, C), N = weight.shape, n_tokens
    low, wide = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
    kernel = kernel_dtype(device, dtype, loss_dtype)
    n = chunk_length(N, V, device, kernel)
    chunk = 2 * wide + (0 if loss_dtype is torch.float32 else loss_dtype.itemsize)
    last = n * V * (wide + (low if low != wide else 0)) + low * V * C  # its gradient, times the hidden states
    if kernel:
        chunk, last = low, n * V * low + (low * V * C if low != wide else 0)
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
        kernel = kernel_dtype(x.device.type, dtype, loss)
        x_low, w_low = x.to(dtype), weight.to(dtype)
        keep = (targets >= 0)[:, None]  # (N, 1)
        picks = targets.clamp(min=0)[:, None]  # (N, 1)
        value = torch.zeros((), dtype=wide, device=x.device)
        largest = torch.zeros((), dtype=wide if kernel else dtype, device=x.device)
        dx = []
        dw = torch.zeros(weight.shape if wants_grad else 0, dtype=wide, device=x.device)
        # rounded to the loss dtype, as PyTorch's own operations would round it; in float16, 1 / tokens may become 0
        factor = factor.to(loss).to(wide)
        step = chunk_length(N, V, x.device.type, kernel)
        for i in range(0, N, step):
            chunk, pick, kept = x_low[i : i + step], picks[i : i + step], keep[i : i + step]  # (n, C), (n, 1), (n, 1)
            logits = product(chunk, w_low.t())  # (n, V)
            if kernel:
                losses, magnitudes = cross_entropy_(logits, targets[i : i + step], factor, wants_grad)
                value, largest = value + losses.sum(), torch.maximum(largest, magnitudes.max())
                if wants_grad:  # which the logits now are
                    dx.append(logits @ w_low)
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

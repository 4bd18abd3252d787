"""Matrix products on a CPU, by oneDNN where it has the faster kernels.

PyTorch multiplies float32 matrices with MKL, which uses AVX-512 on Intel's processors only. oneDNN, which PyTorch
contains as well, uses it on all, and is about twice as fast on AMD's. The products differ by rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptlab.hardware import cpu_facts

Function = TypeVar("Function", bound=Callable[..., Any])

SMALLEST = 2**22  # multiplications; below it oneDNN's call costs more than its product saves
ROWS = 8192  # in a temporary part of `add_product`


def not_traced(function: Function) -> Function:
    """Decorator: PyTorch's compiler calls the function, and takes what it returns as a constant.

    `torch.compiler.assume_constant_result` does the same, and imports the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def has_onednn() -> bool:
    """Whether this PyTorch multiplies by oneDNN where it is asked to."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_is_faster() -> bool:
    """Whether the processor has AVX-512 and MKL leaves it unused.

    Nothing is timed: a resumed run has to multiply by the same library.
    """
    return (
        has_onednn()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and cpu_facts().get("vendor_id", "GenuineIntel") != "GenuineIntel"
    )


ONEDNN = onednn_is_faster()


@contextlib.contextmanager
def mkl() -> Iterator[None]:
    """Use the kernels that PyTorch takes by itself."""
    global ONEDNN
    before, ONEDNN = ONEDNN, False
    try:
        yield
    finally:
        ONEDNN = before


def by_onednn(a: Tensor, weight: Tensor) -> bool:
    """Whether `a @ weight.T`, (..., k) and (n, k), is multiplied by oneDNN."""
    return (
        ONEDNN
        and a.dtype is weight.dtype is torch.float32
        and a.device.type == "cpu"
        and a.numel() * weight.shape[0] >= SMALLEST
    )


def onednn(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """a @ weight.T + bias of (..., k), (n, k) and (n,) by oneDNN; the weight may be packed. Not for compiled code."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, weight, bias, "none", [], "")
    return result


def _onednn(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same of (m, k), (n, k) and (n,), in compiled code too."""
    if not (weight.is_contiguous() or weight.t().is_contiguous()):  # oneDNN would take a thousand times as long
        weight = weight.contiguous()
    return _opaque(a, weight, bias) if torch.compiler.is_compiling() else onednn(a, weight, bias)


@torch.library.custom_op("gptlab::onednn", mutates_args=())
def _opaque(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`onednn` for PyTorch's compiler, which wants oneDNN's weight to be a constant."""
    return onednn(a, weight, bias)


@_opaque.register_fake
def _(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(len(a), len(weight))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of (m, k) and (k, n). Not differentiable."""
    weight = b.t()
    return _onednn(a, weight) if by_onednn(a, weight) else a @ b


def _each_by_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether the products of (B, m, k) and (B, k, n) are oneDNN's, one after the other: they must be larger to pay."""
    return len(a) > 0 and by_onednn(a[0, ::2], b[0].t())


def batch_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of (B, m, k) and (B, k, n). Not differentiable."""
    if _each_by_onednn(a, b):
        return torch.stack([product(x, y) for x, y in zip(a, b, strict=True)])
    return a @ b


def batch_sum(beta: float, c: Tensor, alpha: float, a: Tensor, b: Tensor) -> Tensor:
    """beta c + alpha a @ b of (B, m, n), (B, m, k) and (B, k, n), a new tensor. Not differentiable."""
    if _each_by_onednn(a, b):
        return batch_product(a, b).mul_(alpha).add_(c, alpha=beta)
    return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in place; a and b may be in a narrower dtype. On a CPU with little temporary memory."""
    if a.dtype is total.dtype and not by_onednn(a, b.t()):
        total.addmm_(a, b)
    elif total.device.type == "cpu" and not (a.dtype is not total.dtype and torch.compiler.is_compiling()):
        for rows, of_a in zip(total.split(ROWS), a.split(ROWS), strict=True):  # the product stays in the cache
            rows.add_(product(of_a, b))
    else:
        total.add_(a @ b)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (x, weight), (of_x, of_weight, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
        grad, flat = grads[0].flatten(0, -2), x.flatten(0, -2)  # (m, n), (m, k)
        change: Tensor | None = None
        if of_weight and grad.shape[1] > flat.shape[1]:  # oneDNN copies the left matrix: the smaller one
            change = product(flat.t(), grad).t().contiguous()
        elif of_weight:
            change = product(grad.t(), flat)
        return product(grad, weight).view(x.shape) if of_x else None, change, grad.sum(0) if of_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of x (..., k), weight (n, k) and bias (n,)."""
    if by_onednn(x, weight) and not torch.is_autocast_enabled("cpu"):
        result: Tensor = _Linear.apply(x, weight, bias)
        return result
    return F.linear(x, weight, bias)

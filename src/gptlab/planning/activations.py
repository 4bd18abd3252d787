"""Bytes of activations that autograd keeps for the backward pass.

A forward pass on fake tensors, which have shapes and no memory, counts the storages that autograd saves. It is made
with one and two layers and with two and three sequences; the bytes are linear in both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from gptlab.model.encoder import Encoder
from gptlab.model.gpt import GPT
from gptlab.model.matmul import mkl
from gptlab.planning.shape import Shape
from gptlab.precision.regimes import Regime


class _Saves(torch.autograd.Function):
    """Makes a tensor, and saves for the backward pass what a kernel saves: other tensors, and perhaps its output."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], Tensor], saved: list[Tensor], output: bool, *inputs: Tensor) -> Tensor:
        out = make()
        ctx.save_for_backward(*saved, *([out] if output else []))
        return out


class _GpuKernels(TorchFunctionMode):
    """Replaces operations whose GPU kernels save other tensors than the CPU kernels of the fake pass.

    Attention saves queries, keys, values, the output and one float32 per row, never the scores: flash attention, or
    the memory-efficient kernel in float32 and with a mask, which is saved in the dtype of the queries. Dropout saves
    one byte per element, RMSNorm its input and one float32 per row.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = args
            mask = kwargs["attn_mask"]
            rows = q.new_empty(q.shape[:-1], dtype=torch.float32)  # (B, H, T), log-sum-exp
            masks = [] if mask is None else [q.new_empty(mask.shape)]
            flash = mask is None and q.dtype is not torch.float32
            B, H, T, D = q.shape

            def attended() -> Tensor:  # flash attention keeps the layout of the queries, other kernels (B, T, H, D)
                low = q.detach().transpose(1, 2)
                return (torch.empty_like(low) if flash else low.new_empty(B, T, H, D)).transpose(1, 2)

            return _Saves.apply(attended, [q, k, v, rows, *masks], True, q, k, v)
        if func is F.dropout and kwargs["p"] and kwargs["training"]:
            x = args[0]
            return _Saves.apply(lambda: torch.empty_like(x), [torch.empty_like(x, dtype=torch.bool)], False, x)
        if func is F.rms_norm:
            x, weight = args[0], kwargs["weight"]
            saved = [x, weight, x.new_empty(x.shape[:-1])]
            return _Saves.apply(lambda: torch.empty_like(x), saved, False, x, weight)
        return func(*args, **kwargs)


def saved_bytes(model: GPT | Encoder, regime: Regime, batch: int, gpu: bool) -> int:
    """Bytes that a forward pass saves for the backward pass. Each storage counts once, parameters do not count.

    A language model's pass ends at its last hidden states (`model.loss.head_bytes` counts its head), a classifier's
    at its loss.

    Args:
        model: on the CPU, real or fake.
        batch: sequences of model.config.block_size tokens.
        gpu: whether to count the tensors that GPU kernels save.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, tuple[int, Tensor]] = {}  # holds the tensor too, so that its address is not used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes(), tensor
        return tensor

    tokens = torch.zeros(batch, model.config.block_size, dtype=torch.long)
    model.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        regime.context(torch.device("cpu")),
        mkl() if gpu else nullcontext(),
        _GpuKernels() if gpu else nullcontext(),
    ):
        if isinstance(model, Encoder):
            model(tokens, torch.ones(batch, dtype=torch.long), torch.zeros(batch, model.head.out_features))
        else:
            model.hidden(tokens, tokens if model.config.document_attention else None)
    return sum(size for size, _ in saved.values())


@dataclass(frozen=True)
class Activations:
    """Bytes saved for the backward pass, linear in sequences and layers."""

    fixed: float
    per_sequence: float
    per_layer: float
    """Autocast's copies of a layer's weights."""
    per_layer_and_sequence: float

    def of(self, sequences: float, layers: float) -> float:
        return self.fixed + self.per_sequence * sequences + layers * self.layer(sequences)

    def layer(self, sequences: float) -> float:
        return self.per_layer + self.per_layer_and_sequence * sequences


@functools.lru_cache(maxsize=256)
def count_activations(shape: Shape, gpu: bool) -> Activations:
    """Activations of a shape, counted by `saved_bytes`."""
    found = {}
    models = {layers: shape.lay_out(layers) for layers in (1, 2)}
    with FakeTensorMode():
        for layers, model in models.items():
            for module in model.modules():  # `to_empty` would swap parameters, which fake tensors do not allow
                for name, p in module._parameters.items():
                    if p is not None:
                        module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype))
                for name, b in module._buffers.items():
                    if b is not None:
                        module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)
            for batch in (2, 3):
                found[layers, batch] = saved_bytes(model, shape.regime, batch, gpu)
    both = found[2, 3] - found[2, 2] - found[1, 3] + found[1, 2]
    per_sequence = found[1, 3] - found[1, 2] - both
    per_layer = found[2, 2] - found[1, 2] - 2 * both
    return Activations(found[1, 2] - 2 * per_sequence - per_layer - 2 * both, per_sequence, per_layer, both)


def bound_activations(shape: Shape, gpu: bool) -> Activations:
    """An upper bound of `count_activations` without a forward pass, about 1.5 to 3 times as large.

    Everything counts as float32: 20 elements per channel and 5 per hidden unit of the MLP for every token, and the
    scores of attention with dropout on a CPU.
    """
    m, T = shape.model, shape.model.block_size
    matrices = 4 * m.n_embd**2 + 3 * m.n_embd * m.mlp_hidden
    scores = 4 * m.n_head * T * T if m.dropout and not gpu else 0
    return Activations(
        fixed=4 * m.n_embd * shape.n_labels,
        per_sequence=4 * (T * (6 * m.n_embd + 4) + T * T + 8 * shape.n_labels),
        per_layer=4 * matrices,
        per_layer_and_sequence=4 * (T * (20 * m.n_embd + 5 * m.mlp_hidden) + T * T + scores),
    )

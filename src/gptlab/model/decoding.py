"""A model as generation needs it: the logits of the next id of several sequences, which may differ in length.

Shapes: B sequences, T tokens, C = n_embd, V = vocab_size.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gptlab.machine import free_memory
from gptlab.model.gpt import GPT, KVCache, Linear
from gptlab.model.matmul import has_onednn, onednn

ROUND = 256  # a static cache has a multiple of this many slots, so that one compilation serves many lengths
PAYS = 32  # steps that save what packing the weights costs


class Fixed(nn.Module):
    """A linear layer for generation: its weight is cast once, and follows the model's no more.

    On a CPU oneDNN multiplies. For few rows it is up to twice as fast as MKL in float32 on processors that are not
    Intel's, and up to twice as fast again in bf16 with a packed weight, which gives the same bits.

    Args:
        weight, bias: of the layer.
        dtype: of the product.
        onednn: multiply by oneDNN.
        rows: pack the weight for products with this many rows; 0 does not.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, onednn: bool, rows: int) -> None:
        super().__init__()
        self.dtype, self.onednn = dtype, onednn
        self.matrix, self.offset = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
        if rows:
            self.matrix = torch.ops.mkldnn._reorder_linear_weight(self.matrix, rows)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.onednn:
            return onednn(x, self.matrix, self.offset)
        return F.linear(x, self.matrix, self.offset)


def multiplies_by_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    if not has_onednn():
        return False
    return dtype is torch.float32 or (dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def twin(module: nn.Module, dtype: torch.dtype, onednn: bool, rows: int) -> nn.Module:
    """The same module in evaluation mode, with the same tensors but for `Linear` layers, which are `Fixed`."""
    if type(module) is Linear:
        return Fixed(module.weight, module.bias, dtype, onednn, rows)
    made: Any = copy.copy(module)
    made._modules = {name: child and twin(child, dtype, onednn, rows) for name, child in module._modules.items()}
    made.training = False
    return made


def cache_dtype(device: torch.device, dtype: torch.dtype, autocast: bool) -> torch.dtype:
    """Dtype of the keys and values of a model that multiplies in `dtype`.

    On a CPU attention of one query to bf16 keys is 2.5 times as slow as to float32 keys. Autocast would cast all of
    them for each token.
    """
    return torch.float32 if device.type == "cpu" and dtype is torch.bfloat16 and not autocast else dtype


class Decoder:
    """The logits of the next id of B sequences, with the keys and values of what they have read.

    A sequence lies in its row of the cache from the first slot on, so slots are positions. Sequences of one length are
    read without a mask. The regime is that of the model, and autocast if it is on when the decoder is made.

    Args:
        model: its weights must not change while the decoder is used.
        batch: B.
        room: tokens of the longest sequence.
        steps: about how many will be taken.
        compiled: compile the step. Its shapes are fixed, so it is compiled once.
    """

    def __init__(self, model: GPT, batch: int, room: int, steps: int, compiled: bool = False) -> None:
        device, autocast = model.device, torch.is_autocast_enabled(model.device.type)
        weights = model.stream_dtype or model.wte.weight.dtype
        dtype = torch.get_autocast_dtype(device.type) if autocast else weights
        head = model.head_dtype or dtype
        self.compiled, self.block = compiled, model.config.block_size
        size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        packs = steps >= PAYS and size < free_memory() / 2

        def how(dtype: torch.dtype) -> tuple[torch.dtype, bool, int]:
            by_onednn = multiplies_by_onednn(device, dtype) and not compiled  # the compiler knows no packed weights
            few = dtype is torch.float32 and batch == 1  # read once as fast as they are
            return dtype, by_onednn, batch if by_onednn and packs and not few else 0

        self.model: GPT = twin(model, *how(dtype))  # type: ignore[assignment]
        self.head = Fixed(model.head_weight, None, *how(head))
        if compiled:
            room = min(-(-room // ROUND) * ROUND, self.block)
        self.cache = KVCache(model, batch, room, cache_dtype(device, dtype, autocast))
        self.next = self._next
        if compiled:
            if device.type == "cuda":  # replayed as one CUDA graph, which reads the cache where it is
                torch._dynamo.mark_static_address(self.cache.keys)
                torch._dynamo.mark_static_address(self.cache.values)
            mode = "reduce-overhead" if device.type == "cuda" else "default"
            self.next = torch.compile(self._next, fullgraph=True, dynamic=False, mode=mode)
        self.lengths = [0] * batch

    def read(self, contexts: Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> Tensor:
        """The logits (B, V) after each context, which its row of the cache then holds.

        Args:
            contexts: ids, at least one each.
            rows: of the contexts; default all. The others stay as they are.
        """
        device, cache = self.model.device, self.cache
        lengths = [len(ids) for ids in contexts]
        tokens = torch.zeros(len(contexts), max(lengths), dtype=torch.long)  # shorter ones end in ids that none reads
        for b, ids in enumerate(contexts):
            tokens[b, : len(ids)] = torch.as_tensor(ids)
        part = cache if rows is None else cache.like(len(contexts), max(lengths))
        part.length, part.at = 0, None
        x = self.model.hidden(tokens.to(device), cache=part)  # (B, T, C)
        if rows is not None:
            cache.keys[:, rows, :, : part.length] = part.keys
            cache.values[:, rows, :, : part.length] = part.values
        for b, length in zip(range(len(contexts)) if rows is None else rows, lengths, strict=True):
            self.lengths[b] = length
        self._place()
        last = torch.tensor(lengths, device=device) - 1
        return self._logits(x[torch.arange(len(contexts), device=device), last])

    def step(self, ids: Tensor) -> Tensor:
        """The logits (B, V) after one more id of each sequence, ids (B,)."""
        logits = self.next(ids)
        self.lengths = [length + 1 for length in self.lengths]
        if self.cache.at is not None:
            self._place()
        return logits

    def _place(self) -> None:
        """Tell the cache where the next ids go. A full sequence is to be read anew before its next id counts."""
        cache, last = self.cache, self.cache.room - 1
        cache.length, cache.at = max(self.lengths), None
        if self.compiled or min(self.lengths) < cache.length:
            cache.at = torch.tensor([min(length, last) for length in self.lengths], device=self.model.device)
            cache.end = cache.room if self.compiled else min(cache.length, last) + 1

    def _next(self, ids: Tensor) -> Tensor:
        return self._logits(self.model.hidden(ids[:, None], cache=self.cache)[:, 0])

    def _logits(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.head(x)

"""Masks of one bit a weight. A bit is 1 where the weight is masked, that is pruned and zero."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """A bool mask of N entries as (ceil(N / 8),) uint8: entry i is bit i % 8, the lowest first, of byte i // 8."""
    bits = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool mask of that shape that `pack` packed."""
    n = torch.Size(shape).numel()
    # a row of the table is 8 bools seen as one int64: what is gathered has an eighth of the entries
    return _table(packed.device).index_select(0, packed.int()).view(torch.bool)[:n].view(tuple(shape))


@functools.cache
def _table(device: torch.device) -> Tensor:
    """(256,) int64: the 8 bits of each byte as 8 bools, the lowest first."""
    bytes_, bits = torch.arange(256, device=device), torch.arange(8, device=device)
    return (bytes_[:, None] >> bits & 1).bool().view(torch.int64).flatten()

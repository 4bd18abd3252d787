"""Masks with one bit per weight: 1 for a weight that is masked, that is pruned and zero."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """Pack a bool mask (..., n) into uint8 (..., ceil(n / 8)).

    Entry i of a row is bit i % 8, lowest first, of byte i // 8. Each row starts at a byte, so the rows of the packed
    mask are the packed rows of the mask.
    """
    n = mask.shape[-1]
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, -n % 8)).view(*mask.shape[:-1], -(-n // 8), 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool mask of this shape from its packed form."""
    # a row of the table is 8 bools viewed as one int64, so an eighth of the entries is gathered
    bits = _table(packed.device).index_select(0, packed.flatten().int()).view(torch.bool)
    return bits.view(*shape[:-1], 8 * packed.shape[-1])[..., : shape[-1]].contiguous()


@functools.cache
def _table(device: torch.device) -> Tensor:
    """(256,) int64: the 8 bits of each byte as 8 bools, lowest first."""
    bytes_, bits = torch.arange(256, device=device), torch.arange(8, device=device)
    return (bytes_[:, None] >> bits & 1).bool().view(torch.int64).flatten()

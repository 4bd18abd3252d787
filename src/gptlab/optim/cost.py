"""How optimizers state the memory that they need, for `gptlab plan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

Parameters = Mapping[str, Tensor]  # those that are trained, by name, on any device; local rows under FSDP


class OptimizerBytes(NamedTuple):
    """Bytes that an optimizer needs beside weights and gradients."""

    kept: float
    """State between updates: moments, momentum, masks. Step counts and other scalars may be left out."""
    temporary: float
    """The most that an update needs for a while, when the activations are gone. Fused kernels need nothing."""


def largest(parameters: Parameters) -> int:
    """Elements of the largest parameter."""
    return max(p.numel() for p in parameters.values())


def widest(parameters: Parameters) -> int:
    """Bytes of one element of the widest dtype."""
    return max(p.dtype.itemsize for p in parameters.values())


def total_bytes(parameters: Parameters) -> int:
    return sum(p.nbytes for p in parameters.values())

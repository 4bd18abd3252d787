"""Stochastic rounding to bf16, and the share of updates that rounding loses."""

from __future__ import annotations

import torch
from torch import Tensor

from gptlab.distributed.shard import ShardSpec, Weights, all_reduce_shards, global_shape


def round_stochastically(x: Tensor, seed: int, shard: ShardSpec | None = None) -> Tensor:
    """Round float32 to one of the two neighbours in bf16, so that the mean is x (arXiv 2010.06192, section 4).

    A bf16 number is the upper half of a float32's bits. A uniform 16-bit number is added to the lower half, which is
    then cut off, so the upper half grows by one with probability lower / 2^16. Negative numbers and subnormals need no
    special case, as the bits are sign and magnitude. Numbers that bf16 can represent do not change.

    Args:
        x: float32, any shape.
        seed: decides the random numbers, together with the shape and the type of device.
        shard: if x has local rows; they are rounded as in the whole tensor.
    """
    shape = shard.shape if shard else x.shape
    generator = torch.Generator(x.device).manual_seed(seed)
    draws = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    draws.random_(-(2**63), None, generator=generator)  # all 64 bits of a draw: four numbers
    noise = draws.view(torch.int16)[: shape.numel()].view(shape)
    noise = shard.local(noise, len(x)) if shard else noise
    noise = noise.to(torch.int32).bitwise_and_(0xFFFF)
    rounded = noise.add_(x.view(torch.int32)).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
    # a carry would turn the largest bf16 into infinity, and a NaN into anything: those are rounded to nearest
    return torch.where(x.abs() < torch.finfo(torch.bfloat16).max, rounded, x.to(torch.bfloat16))


class LostUpdates:
    """Share of the weights with a gradient that an update does not change (arXiv 2405.03637: lost arithmetic).

    Rounded to nearest, a weight does not change if its update is less than half the distance to the next number of its
    type. The share is above 0 with stochastic rounding and Kahan summation as well, where nothing is lost: such a
    weight changes at other steps. It is 1 for a step that loss scaling skips.

    The share is that of a fixed sample, spread evenly over each tensor. Under FSDP each rank samples its local rows, so
    the sample differs a little from that of one process.

    Args:
        model: each parameter is sampled in proportion to its size, with at least one element.
        sample: elements in total.
    """

    def __init__(self, model: Weights, sample: int = 65536) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        share = sample / sum(global_shape(p).numel() for p in parameters)
        self.where = [(p, _places(p.numel(), max(1, round(share * p.numel()))).to(p.device)) for p in parameters]
        self.kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def before(self) -> None:
        """Remember the sampled weights and which have a gradient. Call it between the backward pass and the step."""
        self.kept = [
            (p, index, p.flatten()[index], p.grad.flatten()[index] != 0)
            for p, index in self.where
            if p.grad is not None
        ]

    @torch.no_grad()
    def after(self) -> Tensor:
        """The share, (), on the device; 0 without gradients."""
        lost = [((p.flatten()[index] == weight) & moves).sum() for p, index, weight, moves in self.kept]
        of = [moves.sum() for _, _, _, moves in self.kept]
        parameters, self.kept = [p for p, *_ in self.kept], []
        if not parameters:
            return torch.zeros(())
        counts = all_reduce_shards(torch.stack((torch.stack(lost).sum(), torch.stack(of).sum())), parameters)
        return counts[0] / counts[1].clamp(min=1)


def _places(numel: int, n: int) -> Tensor:
    """n of numel positions, at multiples of the golden ratio modulo 1: evenly spread, and periodic in no row length."""
    if n >= numel:
        return torch.arange(numel)
    return (torch.arange(n, dtype=torch.float64) * 0.6180339887498949 % 1 * numel).long()

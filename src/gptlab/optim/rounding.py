"""Rounding of weights in 16 bits: to bf16 stochastically, and how many updates rounding loses."""

from __future__ import annotations

import torch
from torch import Tensor

from gptlab.distributed.shard import ShardSpec, Weights, all_reduce_shards, global_shape


def round_stochastically(x: Tensor, seed: int, shard: ShardSpec | None = None) -> Tensor:
    """float32 to bf16: to one of the two neighbours, by chances that make the mean x (arXiv 2010.06192, section 4).

    A bf16 is the upper half of a float32's bits. A uniform 16-bit number is added to the lower half, which is then cut
    off, so that the upper half grows by one with probability lower / 2^16: exactly. The bits hold a magnitude beside
    the sign, which makes negative numbers and subnormals no special case; a number that bf16 can hold stays as it is.

    Args:
        x: float32, of any shape.
        seed: the same numbers are drawn for the same seed and shape on one kind of device.
        shard: x holds local rows; they are rounded as in the whole tensor.
    """
    shape = shard.shape if shard else x.shape
    generator = torch.Generator(x.device).manual_seed(seed)
    draws = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    draws.random_(-(2**63), None, generator=generator)  # all 64 bits of a draw: four numbers
    noise = draws.view(torch.int16)[: shape.numel()].view(shape)
    noise = shard.local(noise, len(x)) if shard else noise
    noise = noise.to(torch.int32).bitwise_and_(0xFFFF)
    rounded = noise.add_(x.view(torch.int32)).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
    # from the largest bf16 on a carry would make infinity, and of a NaN anything: those go to nearest
    return torch.where(x.abs() < torch.finfo(torch.bfloat16).max, rounded, x.to(torch.bfloat16))


class LostUpdates:
    """Share of the weights with a gradient that an update left as they were (arXiv 2405.03637: lost arithmetic).

    To nearest, a weight stays where its update is less than half the distance to the next number of its type. Rounded
    stochastically it stays by chance and moves the more at other times, and under Kahan's compensation the update
    waits: there the share is above 0 too, with nothing lost. A step that loss scaling skips changes no weight: 1.
    Looked at is a fixed sample, spread evenly over each tensor, so that it costs next to no memory or time. Where
    processes have rows of a tensor each samples its own, and the share is that of all: not quite one process's sample.

    Args:
        model: its parameters, each with a part of the sample in proportion to its size and at least one element.
        sample: elements in all.
    """

    def __init__(self, model: Weights, sample: int = 65536) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        share = sample / sum(global_shape(p).numel() for p in parameters)
        self.where = [(p, _places(p.numel(), max(1, round(share * p.numel()))).to(p.device)) for p in parameters]
        self.kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def before(self) -> None:
        """Keep the sampled weights and whether they have a gradient; between the backward pass and the step."""
        self.kept = [
            (p, index, p.flatten()[index], p.grad.flatten()[index] != 0)
            for p, index in self.where
            if p.grad is not None
        ]

    @torch.no_grad()
    def after(self) -> Tensor:
        """The share, as a tensor of no dimensions: reading it is left to whoever logs it. 0 without a gradient."""
        lost = [((p.flatten()[index] == weight) & moves).sum() for p, index, weight, moves in self.kept]
        of = [moves.sum() for _, _, _, moves in self.kept]
        parameters, self.kept = [p for p, *_ in self.kept], []
        if not parameters:
            return torch.zeros(())
        counts = all_reduce_shards(torch.stack((torch.stack(lost).sum(), torch.stack(of).sum())), parameters)
        return counts[0] / counts[1].clamp(min=1)


def _places(numel: int, n: int) -> Tensor:
    """n of numel positions: multiples of the golden section modulo 1, evenly spread and in step with no row length."""
    if n >= numel:
        return torch.arange(numel)
    return (torch.arange(n, dtype=torch.float64) * 0.6180339887498949 % 1 * numel).long()

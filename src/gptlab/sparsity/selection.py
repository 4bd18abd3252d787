"""Which weights go: exactly k with the smallest scores, or two of each four."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gptlab.distributed.shard import all_reduce_shards, shard_spec

BINS = 2**16  # of each half of a float32's bits
PART = 2**20  # scores that are counted at a time


def smallest(scores: Sequence[Callable[[], Tensor]], k: int, parameters: Sequence[Tensor] = ()) -> Iterator[Tensor]:
    """Masks (bool), one a matrix, that are true at exactly the k smallest scores of all; of equal ones at the earlier.

    Nothing is sorted and the scores are never all there at once: the k-th smallest is found by counting their upper 16
    bits, then, of those that share its upper 16, the lower 16. A GPU waits for nothing here. Of matrices whose rows are
    spread over processes, each makes the masks of its rows, and counts are all that is sent.

    Args:
        scores: make the float32 scores of one matrix each, any shape, no NaN; called three times, one after another,
            the last time right before its mask is yielded; once more between where rows are spread.
        k: 0 to the number of scores, everyone's.
        parameters: what the scores are of, if they may be spread.
    """
    spread = shard_spec(parameters[0]) if parameters else None

    def of_all(counts: Iterator[Tensor]) -> Tensor:
        total = functools.reduce(torch.add, counts)
        return all_reduce_shards(total, parameters) if spread else total

    if k == 0:
        for score in scores:
            yield torch.zeros_like(score(), dtype=torch.bool)
        return

    def lower_half(keys: Tensor) -> Tensor:
        """The lower 16 bits; of others than `upper` in bins apart, as a GPU's threads would queue for a shared one."""
        return (keys & (BINS - 1)) | ((keys >> 16 != upper).int() << 16)

    counts = (_counts((keys >> 16) + BINS // 2, BINS) for score in scores for keys in _keys(score()))
    upper, left = _find(of_all(counts), k)
    upper = upper - BINS // 2
    counts = (_counts(lower_half(keys), 2 * BINS)[:BINS] for score in scores for keys in _keys(score()))
    lower, left = _find(of_all(counts), left)
    threshold = (upper << 16) + lower

    lefts: Tensor | None = None
    if spread:  # the earlier: in a matrix before, or in one that lower processes have rows of
        equals = left.new_zeros(len(scores), spread.group.size())
        for i, score in enumerate(scores):
            for keys in _keys(score()):
                equals[i, spread.group.rank()] += (keys == threshold).sum()
        all_reduce_shards(equals, parameters)
        before = equals.flatten().cumsum(0).view_as(equals) - equals
        lefts = left - before[:, spread.group.rank()]
    for i, score in enumerate(scores):
        values, parts = score(), []
        left = left if lefts is None else lefts[i]
        for keys in _keys(values):
            equal = keys == threshold
            seen = equal.cumsum(0, dtype=torch.int32)
            parts.append((keys < threshold) | (equal & (seen <= left)))
            left = left - seen[-1:].sum()  # there may be no rows here
        yield torch.cat(parts).view(values.shape)


def ordered(scores: Tensor) -> Tensor:
    """Float32 numbers (N,) as int32 keys that have their order; -0.0 and 0.0 have one key."""
    bits = (scores + 0.0).view(torch.int32)
    return bits.bitwise_xor_((bits >> 31) & 0x7FFFFFFF)  # of negative numbers, larger bits are smaller numbers


def _keys(scores: Tensor) -> Iterator[Tensor]:
    """`ordered`, a part at a time: what is made of a part is small beside the matrix."""
    return map(ordered, scores.flatten().split(PART))


def _counts(index: Tensor, bins: int) -> Tensor:
    """(bins,) int64: how often each bin is in index (N,)."""
    ones = torch.ones((), dtype=torch.int64, device=index.device)
    return torch.zeros(bins, dtype=torch.int64, device=index.device).index_add_(0, index, ones.expand(len(index)))


def _find(counts: Tensor, k: Tensor | int) -> tuple[Tensor, Tensor]:
    """The bin that holds the k-th, from 1, and how many of its members are among the first k; both (), int64."""
    total = counts.cumsum(0)
    before = total < k
    return before.sum(), k - (total * before).max()


def two_of_four(weight: Tensor) -> Tensor:
    """The mask (bool) of 2:4 sparsity: of each aligned four along the last dimension, the two smallest |w|.

    Of equal ones the earlier goes. The four are inputs of one output, as the kernels of
    `torch.sparse.to_sparse_semi_structured` take nn.Linear's weight.
    """
    fours = weight.float().abs().view(-1, 4)
    drop = fours.argsort(dim=1, stable=True)[:, :2]
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(1, drop, True).view(weight.shape)

"""Selection of the weights to prune: exactly k with the smallest scores, or two of each four."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gptlab.distributed.shard import all_reduce_shards, shard_spec

BINS = 2**16  # values of half of a float32's bits
PART = 2**20  # scores per part of a count


def smallest(scores: Sequence[Callable[[], Tensor]], k: int, parameters: Sequence[Tensor] = ()) -> Iterator[Tensor]:
    """One bool mask per matrix, true at exactly the k smallest scores of all matrices. Of equal scores the first count.

    Nothing is sorted, and only one matrix's scores exist at a time. The k-th smallest score is found by counting the
    upper 16 bits of all scores, and then the lower 16 bits of those with its upper 16 bits. A GPU is not waited for.
    Under FSDP each rank makes the masks of its local rows, and ranks exchange only counts.

    Args:
        scores: functions that return the float32 scores of one matrix each, of any shape and without NaN. They are
            called in turn, three times (four times under FSDP), the last time right before the mask is yielded.
        k: 0 to the number of scores, on all ranks.
        parameters: of the scores, if they may be sharded.
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
        """The lower 16 bits. Keys of another upper half get bins of their own: threads of a GPU would queue for one."""
        return (keys & (BINS - 1)) | ((keys >> 16 != upper).int() << 16)

    counts = (_counts((keys >> 16) + BINS // 2, BINS) for score in scores for keys in _keys(score()))
    upper, left = _find(of_all(counts), k)
    upper = upper - BINS // 2
    counts = (_counts(lower_half(keys), 2 * BINS)[:BINS] for score in scores for keys in _keys(score()))
    lower, left = _find(of_all(counts), left)
    threshold = (upper << 16) + lower

    lefts: Tensor | None = None
    if spread:  # first come earlier matrices, then rows of lower ranks
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
            left = left - seen[-1:].sum()  # a rank may have no rows
        yield torch.cat(parts).view(values.shape)


def ordered(scores: Tensor) -> Tensor:
    """Float32 numbers (N,) as int32 keys with the same order; -0.0 and 0.0 have one key."""
    bits = (scores + 0.0).view(torch.int32)
    return bits.bitwise_xor_((bits >> 31) & 0x7FFFFFFF)  # larger bits of a negative number are a smaller number


def _keys(scores: Tensor) -> Iterator[Tensor]:
    """`ordered` in parts, so that temporary tensors are small beside the matrix."""
    return map(ordered, scores.flatten().split(PART))


def _counts(index: Tensor, bins: int) -> Tensor:
    """(bins,) int64: how often each bin occurs in index (N,)."""
    ones = torch.ones((), dtype=torch.int64, device=index.device)
    return torch.zeros(bins, dtype=torch.int64, device=index.device).index_add_(0, index, ones.expand(len(index)))


def _find(counts: Tensor, k: Tensor | int) -> tuple[Tensor, Tensor]:
    """The bin of the k-th member, counted from 1, and how many of its members are among the first k; both (), int64."""
    total = counts.cumsum(0)
    before = total < k
    return before.sum(), k - (total * before).max()


def two_of_four(weight: Tensor) -> Tensor:
    """The bool mask of 2:4 sparsity: the two smallest |w| of each aligned four along the last dimension.

    Of equal weights the first is masked. The four are inputs of one output, as the kernels of
    `torch.sparse.to_sparse_semi_structured` expect of nn.Linear's weight.
    """
    fours = weight.float().abs().view(-1, 4)
    drop = fours.argsort(dim=1, stable=True)[:, :2]
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(1, drop, True).view(weight.shape)

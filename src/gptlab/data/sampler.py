"""Which window of a split is sequence g of a run.

The order is a function of (seed, g) alone. There is no list of windows and no state to save; each rank computes its
part of a batch, and the global batch of a step is the same for any number of GPUs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gptlab.data.shards import Tokens
from gptlab.errors import DataError

Indices = NDArray[np.int64]
Sampling = Literal["shuffled", "random", "sequential"]

ROUNDS = 12  # 6 is borderline in statistical tests, 4 fails them
MIXTURE_BLOCK = 1000  # sequences within which a mixture's shares are exact
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment, 2^64 / golden ratio (Steele et al. 2014)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea and Flood 2014, with Stafford's constants): 64 bits to 64 bits, bijective."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


@lru_cache(maxsize=64)
def _keys(key: str) -> NDArray[np.uint64]:
    digests = [hashlib.blake2b(f"{key}/{round}".encode(), digest_size=8).digest() for round in range(ROUNDS)]
    return np.frombuffer(b"".join(digests), "<u8")


def permute(indices: Indices, n: int, key: str) -> Indices:
    """Images of some indices under a pseudo-random permutation of 0 ... n - 1, in constant memory.

    An additive Feistel network on the digits of x = left * b + right, with a = ceil(sqrt(n)) and b = ceil(n / a). Each
    round adds a hash of one digit to the other, modulo its base. A round can be undone, so the network is a bijection
    of 0 ... a * b - 1. Values from n on, fewer than sqrt(n), pass through it again until they are below n (cycle
    walking; Black and Rogaway 2002, "Ciphers with arbitrary finite domains").

    For small n the permutations are not equally likely, and not all n! occur. After 12 rounds statistical tests of
    position, neighbourhood and serial correlation find nothing.

    Args:
        indices: any shape, each in 0 ... n - 1.
        n: size of the permutation, 1 ... 2^63 - 1.
        key: chooses the permutation.
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    sizes = np.uint64(a), np.uint64(b)
    keys = _keys(key)
    shift = np.uint64(32)

    def network(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        digits = list(np.divmod(x, sizes[1]))
        for round in range(ROUNDS):
            moved, size = round % 2, sizes[round % 2]
            hashed = _mix(digits[1 - moved] + keys[round]) >> shift
            digits[moved] = (digits[moved] + (hashed * size >> shift)) % size
        whole: NDArray[np.uint64] = digits[0] * sizes[1] + digits[1]
        return whole

    image = network(np.asarray(indices).astype(np.uint64))
    while (beyond := image >= n).any():
        image[beyond] = network(image[beyond])
    return image.astype(np.int64)


class Windows:
    """A split cut into windows of block_size + 1 tokens: block_size inputs, and the same shifted by one as targets.

    Window i covers tokens i * block_size ... (i + 1) * block_size. Neighbours share one token, a target of the first
    and an input of the second, so every token but the first is a target once an epoch.

    shuffled    every window once an epoch, in another order each epoch, over all shards together
    sequential  every window once an epoch, in the order of the text
    random      independently drawn positions in the split, as in nanoGPT

    Attributes:
        windows_per_epoch: number of windows in the split, for any sampling.

    Raises:
        DataError: the split is shorter than one window.
    """

    def __init__(self, source: Tokens, block_size: int, sampling: Sampling, seed: int | str) -> None:
        if len(source) < block_size + 1:
            raise DataError(
                f"{source.name} has {len(source)} tokens, less than one window of block_size + 1 = {block_size + 1}: "
                "prepare more text or choose a smaller model.block_size"
            )
        self.source, self.block_size, self.sampling, self.seed = source, block_size, sampling, seed
        self.windows_per_epoch = (len(source) - 1) // block_size

    def starts(self, sequences: Indices) -> Indices:
        """Position in the split of the first token of each sequence of the run, (B,) to (B,)."""
        sequences = np.asarray(sequences, np.int64)
        if self.sampling == "random":
            return self._random_starts(sequences)
        epochs, windows = np.divmod(sequences, self.windows_per_epoch)
        if self.sampling == "shuffled":
            shuffled = windows.copy()
            for epoch in np.unique(epochs).tolist():
                here = epochs == epoch
                shuffled[here] = permute(windows[here], self.windows_per_epoch, f"{self.seed}/{epoch}")
            windows = shuffled
        return windows * self.block_size

    def _random_starts(self, sequences: Indices) -> Indices:
        """splitmix64 as a counter: draw g needs no draw before it. The bias of the remainder is n / 2^64."""
        key = _keys(f"{self.seed}/random")[0]
        draws = _mix(sequences.astype(np.uint64) * GOLDEN + key)
        return (draws % np.uint64(len(self.source) - self.block_size)).astype(np.int64)

    def places(self, sequences: Indices) -> tuple[Indices, Indices]:
        """As of a `Mixture` with one source."""
        return np.zeros_like(sequences), sequences

    @property
    def sources(self) -> list[Windows]:
        return [self]

    def batch(self, first: int, count: int) -> Indices:
        """Sequences first ... first + count - 1 of the run, (count, block_size + 1)."""
        return self.source.gather(self.starts(np.arange(first, first + count)), self.block_size + 1)


class Mixture:
    """Several sources of one block size in fixed shares, with the methods of `Windows`.

    Each source has its exact share of every 1,000 sequences, rounded by largest remainder (ties go to the earlier
    source), at places that are permuted for each 1,000. The j-th sequence taken from a source is its sequence j, so
    each source has its own epochs.

    Attributes:
        windows_per_epoch: windows of all sources together.

    Raises:
        DataError: a share is too small to appear among 1,000 sequences, or a weight is not positive.
    """

    def __init__(self, sources: Sequence[Windows], weights: Sequence[float]) -> None:
        assert len(sources) == len(weights) > 0
        assert len({source.block_size for source in sources}) == 1
        if min(weights) <= 0:
            raise DataError(f"the weights of a mixture must be positive: {min(weights)} is not")
        self.sources = list(sources)
        self.block_size, self.seed = sources[0].block_size, sources[0].seed
        self.windows_per_epoch = sum(source.windows_per_epoch for source in sources)
        shares = np.array(weights, np.float64) / sum(weights) * MIXTURE_BLOCK
        self.counts = np.floor(shares).astype(np.int64)  # (sources,) sequences of each in a block
        largest = np.argsort(-(shares - self.counts), kind="stable")
        self.counts[largest[: MIXTURE_BLOCK - self.counts.sum()]] += 1
        if (self.counts == 0).any():
            raise DataError(
                f"a share of {shares.min() / MIXTURE_BLOCK:.2g} of a mixture is less than one sequence in "
                f"{MIXTURE_BLOCK}: raise the weight or leave the dataset out"
            )

    def places(self, sequences: Indices) -> tuple[Indices, Indices]:
        """The source of each sequence of the run, and its number within the source, (B,) and (B,)."""
        blocks, slots = np.divmod(np.asarray(sequences, np.int64), MIXTURE_BLOCK)
        owners, numbers = np.empty_like(slots), np.empty_like(slots)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            of_slot = np.searchsorted(self.counts.cumsum(), self._order(block), side="right")  # (1000,) source
            before = np.stack([np.cumsum(of_slot == source) - 1 for source in range(len(self.sources))])  # (S, 1000)
            owners[here] = of_slot[slots[here]]
            numbers[here] = block * self.counts[owners[here]] + before[owners[here], slots[here]]
        return owners, numbers

    def _order(self, block: int) -> Indices:
        return permute(np.arange(MIXTURE_BLOCK), MIXTURE_BLOCK, f"{self.seed}/mixture/{block}")

    def batch(self, first: int, count: int) -> Indices:
        """Sequences first ... first + count - 1 of the run, (count, block_size + 1)."""
        owners, numbers = self.places(np.arange(first, first + count))
        batch = np.empty((count, self.block_size + 1), np.int64)
        for index, source in enumerate(self.sources):
            if (here := owners == index).any():
                batch[here] = source.source.gather(source.starts(numbers[here]), self.block_size + 1)
        return batch


def evaluation_windows(tokens: Tokens, block_size: int, n_tokens: int, seed: int) -> Indices:
    """Positions of windows of block_size + 1 tokens to evaluate on: drawn without replacement, ascending.

    Args:
        n_tokens: number of targets, rounded down to whole windows, but at least one window and at most all.
        seed: chooses the windows.

    Raises:
        DataError: the split is shorter than one window.
    """
    windows = Windows(tokens, block_size, "sequential", seed).windows_per_epoch
    wanted = max(1, n_tokens // block_size)
    if wanted >= windows:
        return np.arange(windows, dtype=np.int64) * block_size
    return np.sort(permute(np.arange(wanted), windows, f"{seed}/evaluation")) * block_size

"""The order of sequences: bijections, epochs, shares, and independence of how a run is cut into batches."""

import hashlib
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlab.data.containers import read_shard, write_shard
from gptlab.data.sampler import MIXTURE_BLOCK, Mixture, Windows, evaluation_windows, permute
from gptlab.data.shards import Tokens
from gptlab.errors import DataError

MASK = 2**64 - 1


def stream(folder: Path, tokens: int, name: str = "train.bin") -> Tokens:
    """A split whose token at position p is p, so that a batch shows where it was taken from."""
    write_shard(folder / name, np.arange(tokens), "llmc", np.uint32)
    return Tokens([read_shard(folder / name)])


def permute_by_hand(index: int, n: int, key: str) -> int:
    """The same network in Python's unbounded integers, one index at a time."""
    a = math.isqrt(n)
    a += a * a < n
    b = (n + a - 1) // a
    keys = [int.from_bytes(hashlib.blake2b(f"{key}/{r}".encode(), digest_size=8).digest(), "little") for r in range(12)]

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
        x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
        return x ^ x >> 31

    while True:
        left, right = divmod(index, b)
        for number, k in enumerate(keys):
            if number % 2 == 0:
                left = (left + ((mix(right + k & MASK) >> 32) * a >> 32)) % a
            else:
                right = (right + ((mix(left + k & MASK) >> 32) * b >> 32)) % b
        index = left * b + right
        if index < n:
            return index


@given(n=st.integers(1, 3000), key=st.text(max_size=8))
@settings(max_examples=40, deadline=None)
def test_permute_is_a_bijection(n: int, key: str) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@given(n=st.integers(1, 2**63 - 1), data=st.data())
@settings(max_examples=60, deadline=None)
def test_permute_agrees_with_unbounded_integers(n: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=4))
    expected = [permute_by_hand(index, n, "7/3") for index in indices]
    assert permute(np.array(indices), n, "7/3").tolist() == expected


def test_permute_sends_every_position_everywhere_equally_often() -> None:
    n, keys = 11, 1200
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permute(np.arange(n), n, f"{key}/0")] += 1
    chi2 = ((counts - keys / n) ** 2 / (keys / n)).sum()  # (n-1)^2 = 100 degrees of freedom, standard deviation 14.1
    assert 100 - 5 * 14.2 < chi2 < 100 + 5 * 14.2


def test_permute_leaves_no_trace_of_neighbourhood() -> None:
    n = 100_003
    image = permute(np.arange(n), n, "1337/0").astype(np.float64)
    for lag in (1, 2, math.isqrt(n), math.isqrt(n) + 1):  # a period of the radix would show at its square root
        assert abs(np.corrcoef(image[lag:], image[:-lag])[0, 1]) < 5 / math.sqrt(n)
    assert abs(np.corrcoef(image, np.arange(n))[0, 1]) < 5 / math.sqrt(n)
    other = permute(np.arange(n), n, "1337/1")
    assert (image == other).sum() < 8  # two random orders agree in one place on average


def test_permute_needs_no_memory_for_a_huge_set() -> None:
    n = 10**13
    image = permute(np.arange(n - 1000, n), n, "0/0")
    assert len(set(image.tolist())) == 1000
    assert image.min() >= 0
    assert image.max() < n


# -- windows


def test_windows_hold_inputs_and_shifted_targets(tmp_path: Path) -> None:
    windows = Windows(stream(tmp_path, 103), block_size=10, sampling="sequential", seed=0)
    assert windows.windows_per_epoch == 10  # (103 - 1) // 10
    batch = windows.batch(0, 11)
    assert batch.shape == (11, 11)
    assert batch.dtype == np.int64
    assert np.array_equal(batch[:10], np.arange(10)[:, None] * 10 + np.arange(11))
    assert np.array_equal(batch[10], batch[0])  # the next epoch


def test_shuffled_visits_every_window_once_an_epoch_and_reshuffles(tmp_path: Path) -> None:
    windows = Windows(stream(tmp_path, 1000), block_size=8, sampling="shuffled", seed=5)
    n = windows.windows_per_epoch
    assert n == 124
    first, second = windows.batch(0, n), windows.batch(n, n)
    for epoch in (first, second):
        assert np.array_equal(np.sort(epoch[:, 0]), np.arange(n) * 8)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first[:, 0], np.sort(first[:, 0]))
    other_seed = Windows(windows.source, 8, "shuffled", 6).batch(0, n)
    assert (other_seed[:, 0] == first[:, 0]).mean() < 0.1


@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 9),
    block_size=st.integers(1, 9),
    batch=st.integers(1, 17),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_two_epochs_see_each_window_twice_across_shards(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], block_size: int, batch: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    first = 0
    for index, size in enumerate(sizes):
        write_shard(folder / f"{index}.bin", np.arange(first, first + size), "llmc", np.uint32)
        first += size
    source = Tokens([read_shard(folder / f"{index}.bin") for index in range(len(sizes))])
    windows = Windows(source, block_size, "shuffled", seed)
    n = windows.windows_per_epoch
    steps = -(-2 * n // batch)
    seen = np.concatenate([windows.batch(step * batch, batch) for step in range(steps)])[: 2 * n]
    assert np.array_equal(seen, seen[:, :1] + np.arange(block_size + 1))  # whole windows, whatever shards they are in
    for epoch in (seen[:n], seen[n:]):
        assert np.array_equal(np.sort(epoch[:, 0]), np.arange(n) * block_size)
    if n > 12:  # of so few, two orders may be the same
        assert not np.array_equal(seen[:n], seen[n:])
    again = Windows(source, block_size, "shuffled", seed)  # as a resumed run has it: nothing but the number of the step
    middle = steps // 2
    rest = np.concatenate([again.batch(step * batch, batch) for step in range(middle, steps)])
    assert np.array_equal(rest[: max(0, 2 * n - middle * batch)], seen[middle * batch :])


def test_the_shuffle_is_over_all_shards(tmp_path: Path) -> None:
    for index in range(10):
        write_shard(tmp_path / f"{index}.bin", np.arange(index * 1000, (index + 1) * 1000), "llmc", np.uint32)
    windows = Windows(Tokens([read_shard(tmp_path / f"{index}.bin") for index in range(10)]), 10, "shuffled", 1)
    n = windows.windows_per_epoch
    for epoch in range(2):
        shards = windows.batch(epoch * n, n)[:, 0] // 1000
        counts = np.stack([np.bincount(hundred, minlength=10) for hundred in np.array_split(shards, 10)])
        chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()  # 81 degrees of freedom, standard deviation 12.7
        assert 81 - 5 * 12.8 < chi2 < 81 + 5 * 12.8  # every tenth of an epoch comes from every shard


@pytest.mark.parametrize("sampling", ["shuffled", "random", "sequential"])
def test_the_order_does_not_depend_on_how_it_is_cut(tmp_path: Path, sampling: str) -> None:
    source = stream(tmp_path, 500)
    whole = Windows(source, 7, sampling, 3).batch(0, 200)  # crosses two epochs
    cuts = [0, 1, 2, 70, 71, 72, 73, 140, 199, 200]
    parts = [Windows(source, 7, sampling, 3).batch(a, b - a) for a, b in itertools.pairwise(cuts)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_random_draws_every_offset_equally_often(tmp_path: Path) -> None:
    windows = Windows(stream(tmp_path, 30), block_size=9, sampling="random", seed=1)
    starts = windows.batch(0, 21_000)[:, 0]
    counts = np.bincount(starts, minlength=21)
    assert len(counts) == 21  # offsets 0 ... 20, as nanoGPT's randint(len - block_size)
    chi2 = ((counts - 1000) ** 2 / 1000).sum()  # 20 degrees of freedom, standard deviation 6.3
    assert chi2 < 20 + 5 * 6.4
    assert abs(np.corrcoef(starts[1:], starts[:-1])[0, 1]) < 5 / math.sqrt(21_000)


def test_a_split_of_one_window_will_do_and_a_shorter_one_not(tmp_path: Path) -> None:
    for sampling in ("shuffled", "random", "sequential"):
        assert np.array_equal(Windows(stream(tmp_path, 17), 16, sampling, 0).batch(3, 1)[0], np.arange(17))
        with pytest.raises(DataError, match="the split has 16 tokens, less than one window of block_size"):
            Windows(stream(tmp_path, 16), 16, sampling, 0)


# -- mixtures


def mixture_of(folder: Path, weights: list[float], sampling: str = "shuffled") -> Mixture:
    sources = [stream(folder, 60 + 30 * index, f"{index}.bin") for index in range(len(weights))]
    return Mixture([Windows(source, 5, sampling, 11) for source in sources], weights)


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([1, 1, 1], [334, 333, 333]),  # the remainders tie: the earlier source
        ([5, 3, 2], [500, 300, 200]),
        ([0.6666, 0.3334], [667, 333]),
        ([2, 1], [667, 333]),
    ],
)
def test_shares_are_exact_in_every_block(tmp_path: Path, weights: list[float], counts: list[int]) -> None:
    mixture = mixture_of(tmp_path, weights)
    owners, _ = mixture.places(np.arange(5 * MIXTURE_BLOCK))
    blocks = owners.reshape(5, MIXTURE_BLOCK)
    assert all(np.bincount(block).tolist() == counts for block in blocks)
    assert not np.array_equal(blocks[0], blocks[1])
    assert (blocks[0] != np.sort(blocks[0])).mean() > 0.3  # interleaved, not one source after another


def test_a_source_gives_its_own_sequences_in_order(tmp_path: Path) -> None:
    mixture = mixture_of(tmp_path, [0.55, 0.3, 0.15])
    owners, _ = mixture.places(np.arange(2500))
    batch = mixture.batch(0, 2500)
    for index, source in enumerate(mixture.sources):
        mine = batch[owners == index]
        assert np.array_equal(mine, source.batch(0, len(mine)))
    assert np.array_equal(batch[990:1020], mixture_of(tmp_path, [0.55, 0.3, 0.15]).batch(990, 30))


def test_a_share_too_small_to_appear_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="less than one sequence in 1000"):
        mixture_of(tmp_path, [1, 1e-5])
    with pytest.raises(DataError, match="must be positive"):
        mixture_of(tmp_path, [1, 0])


# -- evaluation


def test_evaluation_windows_are_drawn_without_replacement(tmp_path: Path) -> None:
    tokens = stream(tmp_path, 1001)
    starts = evaluation_windows(tokens, 10, n_tokens=305, seed=0)
    assert len(starts) == 30
    assert len(np.unique(starts)) == 30
    assert (starts % 10 == 0).all()
    assert starts.max() <= 990
    assert np.array_equal(starts, evaluation_windows(tokens, 10, 305, 0))
    assert not np.array_equal(starts, evaluation_windows(tokens, 10, 305, 1))
    assert starts.max() - starts.min() > 500  # over the whole split
    assert np.array_equal(evaluation_windows(tokens, 10, 10**9, 0), np.arange(100) * 10)
    assert len(evaluation_windows(tokens, 10, 3, 0)) == 1

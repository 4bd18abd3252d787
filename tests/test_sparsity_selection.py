"""Ramps, packed masks, scores and exact selection, against closed forms, numpy and cases computed by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptlab.config import Sparsity
from gptlab.sparsity import scores, selection
from gptlab.sparsity.masks import pack, unpack
from gptlab.sparsity.schedule import is_change, ramp, rigl_fraction, sparsity_at
from gptlab.sparsity.selection import ordered, smallest, two_of_four

some = settings(max_examples=60, deadline=None)
shapes = st.sampled_from(["cubic", "linear", "late"])
shares = st.floats(0, 1)


def ramped(schedule: str = "cubic", begin: float = 0.25, end: float = 0.75, **rest: Any) -> Sparsity:
    return Sparsity(method="magnitude", schedule=schedule, begin=begin, end=end, **rest)


# -- the ramp


@some
@given(shapes, st.floats(0, 0.99), shares, st.floats(0.01, 0.99), st.integers(1, 3000))
def test_ramp(shape: str, begin: float, length: float, target: float, steps: int) -> None:
    """0 until it begins, never falling, exactly the target from its end on, whatever the length of the run."""
    sparsity = ramped(shape, begin, max(0.01, begin + length * (1 - begin)), target=target)
    first, last = ramp(sparsity, steps)
    found = [sparsity_at(step, sparsity, steps) for step in range(steps + 2)]
    assert all(s == 0 for s in found[: min(first + 1, last)])
    assert all(s == target for s in found[last:]) and last <= steps
    assert found == sorted(found)


def test_ramp_has_the_published_curvature() -> None:
    for step in range(101):
        p = min(1, max(0, (step - 20) / 60))
        # Zhu and Gupta: s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3 with s_i = 0
        assert sparsity_at(step, ramped("cubic", 0.2, 0.8), 100) == pytest.approx(0.5 - 0.5 * (1 - p) ** 3, abs=1e-15)
        assert sparsity_at(step, ramped("linear", 0.2, 0.8), 100) == pytest.approx(0.5 * p, abs=1e-15)
        assert sparsity_at(step, ramped("late", 0.2, 0.8), 100) == pytest.approx(0.5 * p**3, abs=1e-15)
    halfway = [sparsity_at(50, ramped(shape, 0.2, 0.8), 100) for shape in ("late", "linear", "cubic")]
    assert halfway == pytest.approx([0.0625, 0.25, 0.4375])


@pytest.mark.parametrize(
    "begin, end, every, steps, expected",
    [
        (0.25, 0.75, 20, 100, [40, 60, 75]),  # inside the ramp, not at its beginning, and at its end whatever
        (0.2, 0.6, 20, 100, [40, 60]),
        (0.25, 0.75, 50, 10, [8]),  # shorter than `every`; round(7.5) is 8
        (0.5, 0.51, 50, 100, [51]),
        (0.4, 0.41, 1, 10, [4]),  # of no length
        (0.0, 0.01, 1, 10, [1]),  # it would end before anything is trained
    ],
)
def test_steps_of_change(begin: float, end: float, every: int, steps: int, expected: list[int]) -> None:
    sparsity = ramped(begin=begin, end=end, every=every)
    assert [step for step in range(1, steps + 1) if is_change(step, sparsity, steps)] == expected


def test_rigl_fraction() -> None:
    sparsity = Sparsity(method="rigl", every=10, end=0.8, rigl_alpha=0.4)
    found = {step: f for step in range(101) if (f := rigl_fraction(step, sparsity, 100))}
    assert list(found) == [10, 20, 30, 40, 50, 60, 70]
    assert found[40] == pytest.approx(0.2) and found[20] == pytest.approx(0.2 * (1 + math.sqrt(0.5)))


# -- masks


@pytest.mark.parametrize("n", [*range(1, 35), 1000, 4099])
def test_packing(n: int) -> None:
    mask = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.5
    packed = pack(mask)
    assert packed.dtype is torch.uint8 and packed.nbytes == math.ceil(n / 8)
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy(), bitorder="little"))
    assert torch.equal(unpack(packed, (n,)), mask)


def test_packed_rows_are_rows_of_the_packed() -> None:
    for rows, cols in itertools.product((0, 1, 5), (1, 7, 8, 12, 24, 31)):
        mask = torch.rand(rows, cols, generator=torch.Generator().manual_seed(rows)) < 0.5
        packed = pack(mask)
        assert np.array_equal(packed.numpy(), np.packbits(mask.numpy(), axis=1, bitorder="little"))
        assert torch.equal(unpack(packed, mask.shape), mask) and unpack(packed, mask.shape).is_contiguous()
        assert torch.equal(pack(mask[1:3]), packed[1:3]) and torch.equal(unpack(packed[1:], mask[1:].shape), mask[1:])
        if cols % 8 == 0:
            assert torch.equal(packed.flatten(), pack(mask.flatten()))


# -- selection


def by_sorting(matrices: list[Tensor], k: int) -> list[Tensor]:
    together = np.concatenate([m.numpy().ravel() for m in matrices]) + np.float32(0)
    mask = np.zeros(len(together), dtype=bool)
    mask[np.argsort(together, kind="stable")[:k]] = True
    parts = np.split(mask, np.cumsum([m.numel() for m in matrices])[:-1])
    return [torch.from_numpy(part).view(m.shape) for part, m in zip(parts, matrices, strict=True)]


def agrees(matrices: list[Tensor], k: int) -> None:
    found = list(smallest([m.clone for m in matrices], k))
    assert sum(int(mask.sum()) for mask in found) == k
    assert all(torch.equal(a, b) for a, b in zip(found, by_sorting(matrices, k), strict=True))


few_values = st.sampled_from([-math.inf, -1e30, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1e-8, 0.5, 1.0, math.inf])
any_values = st.floats(width=32, allow_nan=False)
one_matrix = st.one_of(st.lists(few_values, min_size=1, max_size=40), st.lists(any_values, min_size=1, max_size=40))


@settings(max_examples=150, deadline=None)
@given(st.lists(one_matrix, min_size=1, max_size=4), shares, st.integers(1, 50))
def test_selection_is_that_of_a_stable_sort(lists: list[list[float]], share: float, part: int) -> None:
    matrices = [torch.tensor(values, dtype=torch.float32) for values in lists]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "PART", part)
        agrees(matrices, int(share * sum(len(m) for m in matrices)))


@pytest.mark.parametrize("k", [0, 1, 5, 6, 7, 17, 29, 30])
def test_equal_scores(k: int) -> None:
    matrices = [torch.zeros(2, 3), -torch.zeros(3, 4), torch.zeros(12)]
    agrees(matrices, k)
    flat = torch.cat([mask.flatten() for mask in smallest([m.clone for m in matrices], k)])
    assert flat[:k].all() and not flat[k:].any()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e-42])
def test_selection_of_many(scale: float) -> None:
    """Several parts of a matrix, duplicates by rounding to bf16, neighbours in the lower 16 bits, denormals."""
    draw = torch.Generator().manual_seed(3)
    matrices = [torch.randn(1200, 1000, generator=draw) * scale, torch.randn(999, generator=draw).bfloat16().float()]
    matrices += [1 + torch.randint(0, 99, (50, 50), generator=draw) * 2**-23, torch.randn(77, 3, generator=draw).abs()]
    n = sum(m.numel() for m in matrices)
    for k in (1, n // 3, n - n // 7, n - 1, n):
        agrees(matrices, k)


def test_no_number_is_read_on_the_way() -> None:
    """Tensors without values refuse to be read: so a GPU, too, is nowhere waited for."""
    matrices = [torch.empty(3, 5, device="meta"), torch.empty(70, 2, device="meta")]
    assert [mask.shape for mask in smallest([m.clone for m in matrices], 9)] == [(3, 5), (70, 2)]


@some
@given(st.lists(any_values, min_size=2, max_size=20))
def test_keys_have_the_order_of_their_numbers(values: list[float]) -> None:
    x = torch.tensor(values)
    keys = ordered(x)
    assert torch.equal(keys[:, None] < keys, x[:, None] < x)


def test_two_of_four() -> None:
    weight = torch.tensor([[3.0, -1, 2, -4, 0, 0, 0, 0], [1.0, -1, 1, -1, 9, 1, 1, -0.5]])
    expected = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 1, 0, 1]], dtype=torch.bool)
    assert torch.equal(two_of_four(weight), expected)
    assert torch.equal(two_of_four(weight.half()), expected)
    mask = two_of_four(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))
    assert (mask.view(-1, 4).sum(1) == 2).all()


# -- scores


def test_scores_by_hand() -> None:
    w, m, v = torch.tensor([2.0, -0.5, 3.0, 0.0]), torch.tensor([-0.25, 4.0, 0.0, 1.0]), torch.tensor([4.0, 1, 0, 16])

    def is_near(found: Tensor, expected: list[float]) -> None:
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)

    is_near(scores.state("bitter0", w, m, v), [0.5, 1.0, 0.0, 0.0])  # 0.5 * 2 / 2, 2 * 0.5 / 1
    is_near(scores.state("bitter1", w, m, v), [2.0, 0.5, 3.0, 0.0])
    is_near(scores.state("bitter3", w, m, v), [1.0, 1.0, 3e-4, 0.0])
    is_near(scores.state("bitter7", w, m, v), [2 * math.sqrt(2), 0.5, 3e-2, 0.0])
    is_near(scores.distance(w, torch.tensor([1.0, -1.0, 3.0, 1.0])), [2.0, -0.25, 0.0, 0.0])
    score = torch.tensor([1.0, 1.0, 1.0, 1.0])
    scores.accumulate_movement(score, w, torch.tensor([1.0, 1.0, -2.0, 5.0]), torch.tensor(True))
    is_near(score, [-1.0, 1.5, 7.0, 1.0])
    scores.accumulate_movement(score, w, torch.full((4,), math.inf), torch.tensor(False))
    is_near(score, [-1.0, 1.5, 7.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_float32(dtype: torch.dtype) -> None:
    """In 16 bits, products of small numbers are 0, or many are equal."""
    draw = torch.Generator().manual_seed(1)
    w, m, v = (torch.randn(400, generator=draw).mul(scale).to(dtype) for scale in (2e-2, 1e-3, 1e-3))
    for variant in ("bitter0", "bitter3", "bitter7"):
        found = scores.state(variant, w, m, v.abs())
        assert found.dtype is torch.float32 and len(found.unique()) > 390
        assert torch.equal(found, scores.state(variant, w.float(), m.float(), v.abs().float()))
    assert scores.magnitude(w).dtype is scores.distance(w, w.float()).dtype is torch.float32

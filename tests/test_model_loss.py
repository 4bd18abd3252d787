"""The head's loss on a CPU, some rows at a time, against float64 and against PyTorch's operations on whole chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.model import loss
from gptlab.model.loss import cross_entropy_, cross_entropy_by_rows, linear_cross_entropy

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ROUNDING = {BF16: 2**-8, FP16: 2**-11, FP32: 2**-20, FP64: 1e-12}  # of the gradient, relative


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of 65 logits at once, and one of more, with any number of threads."""
    monkeypatch.setattr(loss, "rows_at_once", lambda vocab_size, itemsize: max(1, 130 // vocab_size))


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("vocab_size", [1, 65, 5003])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_loss_largest_logit_and_gradient_are_float64s(dtype: torch.dtype, vocab_size: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(5, vocab_size, generator=draw) * scale).clamp(-6e4, 6e4).to(dtype)
    targets = torch.randint(vocab_size, (5,), generator=draw)
    targets[2], targets[3], targets[4] = -1, logits[3].argmax(), vocab_size - 1
    factor = torch.tensor(0.37, dtype=torch.promote_types(dtype, FP32))
    exact = logits.double().clone().requires_grad_()
    losses = F.cross_entropy(exact, targets, ignore_index=-1, reduction="none")
    [grad] = torch.autograd.grad(losses.sum() * float(factor), exact)

    given = logits.clone()
    found, largest = cross_entropy_by_rows(given, targets, factor, False)
    assert torch.equal(given, logits)  # unless the gradient is asked for
    torch.testing.assert_close(found.double(), losses.detach(), rtol=5e-7, atol=5e-7)
    assert torch.equal(largest, logits.to(factor.dtype).abs().amax(1))
    again, _ = cross_entropy_by_rows(given, targets, factor, True)
    assert torch.equal(again, found) and not given[2].any() and found[2] == 0
    smallest = 2**-24 if dtype is FP16 else 3e-8  # 1 - p of the target, in float32
    torch.testing.assert_close(given.double(), grad, rtol=ROUNDING[dtype], atol=smallest)


def test_logits_that_are_not_finite_have_no_loss_and_ids_beyond_the_vocabulary_are_refused() -> None:
    logits = torch.randn(3, 70)
    logits[1, 7] = float("nan")
    losses, largest = cross_entropy_by_rows(logits, torch.tensor([3, 1, 2]), torch.tensor(1.0), True)
    assert losses.isnan().tolist() == largest.isnan().tolist() == [False, True, False]
    with pytest.raises(RuntimeError, match="index 70 is out of bounds"):
        cross_entropy_by_rows(logits, torch.tensor([70, 1, 2]), torch.tensor(1.0), True)


@pytest.mark.parametrize("tokens_in_chunk", [4, 1000])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_the_head_is_that_of_whole_chunks(
    dtype: torch.dtype, tokens_in_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(11, 16, generator=draw).to(dtype).requires_grad_()
    weight = (torch.randn(65, 16, generator=draw) * 0.3).to(torch.promote_types(dtype, FP32)).requires_grad_()
    targets = torch.randint(65, (11,), generator=draw)
    targets[::5] = -1
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 65 * dtype.itemsize * tokens_in_chunk)
    found: dict[str, list[Tensor]] = {}
    for how in ("rows", "chunks"):
        if how == "chunks":
            monkeypatch.setattr(loss, "in_place_dtype", lambda *given: None)
            monkeypatch.setattr(loss, "cross_entropy_by_rows", None)
        out = linear_cross_entropy(x, weight, targets, torch.tensor(8.0))
        with torch.no_grad():
            evaluated = linear_cross_entropy(x, weight, targets, torch.tensor(8.0))
        assert torch.equal(evaluated.train, out.train) and evaluated.largest_logit == out.largest_logit
        found[how] = [*out, *torch.autograd.grad(out.train / 3, (x, weight))]
    assert found["rows"][2] == found["chunks"][2] and not found["rows"][3][::5].any()
    for one, other in zip(found["rows"], found["chunks"], strict=True):
        assert one.dtype == other.dtype
        assert (one - other).double().norm() <= ROUNDING[dtype] * other.double().norm()


def test_the_operation_for_the_compiler_is_the_same() -> None:
    logits, targets, factor = torch.randn(5, 65).to(BF16), torch.tensor([3, -1, 64, 0, 7]), torch.tensor(0.1)
    one, other = logits.clone(), logits.clone()
    pairs = zip(
        cross_entropy_(one, targets, factor, True), cross_entropy_by_rows(other, targets, factor, True), strict=True
    )
    assert all(torch.equal(*pair) for pair in pairs) and torch.equal(one, other) and not torch.equal(one, logits)


def test_a_loss_in_less_than_float32_takes_whole_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "cross_entropy_by_rows", None)
    x, weight = torch.randn(8, 16).to(BF16).requires_grad_(), torch.randn(65, 16)
    linear_cross_entropy(x, weight, torch.arange(8), loss_dtype=BF16).train.backward()
    assert x.grad is not None
    with pytest.raises(TypeError):
        linear_cross_entropy(x, weight, torch.arange(8))

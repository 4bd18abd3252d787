"""Products by oneDNN, and the rotation's own gradient, each against the plain form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.config import Model
from gptlab.model import matmul
from gptlab.model.gpt import GPT, build_model, rotary_tables, rotate

pytestmark = pytest.mark.skipif(not matmul.has_onednn(), reason="PyTorch has no oneDNN here")
MODEL = Model(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=61, position="rope", bias=True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """oneDNN for products of every size, on any processor; the shapes that it has multiplied."""
    shapes: list[tuple[int, ...]] = []
    multiply = matmul._onednn

    def noted(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.append((*a.shape, len(weight)))
        return multiply(a, weight, bias)

    monkeypatch.setattr(matmul, "ONEDNN", True)
    monkeypatch.setattr(matmul, "SMALLEST", 1)
    monkeypatch.setattr(matmul, "_onednn", noted)
    return shapes


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
def test_a_product_is_the_product(calls: list[tuple[int, ...]], turned: tuple[bool, bool]) -> None:
    a = drawn(7, 33).t() if turned[0] else drawn(33, 7)
    b = drawn(19, 7, seed=1).t() if turned[1] else drawn(7, 19, seed=1)
    assert error(matmul.product(a, b), a.double() @ b.double()) < 1e-6
    assert calls == [(33, 7, 19)]


def test_onednn_is_given_dense_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """It multiplies part of the columns of a matrix by its reference code."""
    given: list[bool] = []
    multiply = matmul.onednn

    def noted(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        given.append(weight.is_contiguous() or weight.t().is_contiguous())
        return multiply(a, weight, bias)

    monkeypatch.setattr(matmul, "ONEDNN", True)
    monkeypatch.setattr(matmul, "SMALLEST", 1)
    monkeypatch.setattr(matmul, "onednn", noted)
    a, b = drawn(33, 7), drawn(19, 40, seed=1)[:, 3:10]
    assert error(matmul.product(a, b.t()), a.double() @ b.t().double()) < 1e-6
    assert error(matmul.product(a.t(), a[:, 2:4]), a.t().double() @ a[:, 2:4].double()) < 1e-6
    assert error(matmul.linear(a, b), a.double() @ b.t().double()) < 1e-6
    assert given == [True] * 3


def test_a_product_is_added_in_parts(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "ROWS", 10)
    total, a, b = drawn(33, 19), drawn(7, 33, seed=1).t(), drawn(7, 19, seed=2)
    exact = total.double() + a.double() @ b.double()
    matmul.add_product(total, a, b)
    assert error(total, exact) < 1e-6
    assert [shape[0] for shape in calls] == [10, 10, 10, 3]


@pytest.mark.parametrize(("bias", "n"), [(False, 12), (True, 12), (True, 6)])
def test_a_linear_layer_has_its_gradients(calls: list[tuple[int, ...]], bias: bool, n: int) -> None:
    given = [drawn(3, 5, 8), drawn(n, 8, seed=1), *([drawn(n, seed=2)] if bias else [])]

    def gradients(call: Any, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.detach().clone().to(dtype).requires_grad_() for x in given]
        y = call(*inputs)
        (y * y.detach().sin()).sum().backward()
        return [y.detach(), *(x.grad for x in inputs if x.grad is not None)]

    found, exact = gradients(matmul.linear, torch.float32), gradients(F.linear, torch.float64)
    assert len(found) == len(exact) == 3 + bias
    assert all(error(*pair) < 1e-5 for pair in zip(found, exact, strict=True))
    assert sorted(calls) == sorted([(15, 8, n), (15, n, 8), (8, 15, n) if n > 8 else (n, 15, 8)])
    assert all(x.is_contiguous() for x in found)


def test_other_dtypes_small_products_and_autocast_are_left_alone(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = drawn(4, 8), drawn(12, 8)
    for dtype in (torch.float64, torch.bfloat16):
        matmul.linear(x.to(dtype), weight.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert matmul.linear(x, weight).dtype is torch.bfloat16
    with matmul.mkl():
        matmul.linear(x, weight)
    monkeypatch.setattr(matmul, "SMALLEST", 4 * 8 * 12 + 1)
    matmul.linear(x, weight)
    assert calls == []
    monkeypatch.setattr(matmul, "SMALLEST", 4 * 8 * 12)
    matmul.linear(x, weight)
    assert calls == [(4, 8, 12)]


def test_a_model_has_the_same_loss_and_gradients(calls: list[tuple[int, ...]]) -> None:
    tokens = torch.randint(61, (3, 25), generator=torch.Generator().manual_seed(0))

    def step(model: GPT) -> list[Tensor]:
        model.zero_grad()
        factor = torch.tensor(1 / 72, dtype=model.wte.weight.dtype)
        out = model(tokens[:, :-1], tokens[:, 1:], None, factor)
        out.train.backward()
        return [out.value, *(p.grad for p in model.parameters() if p.grad is not None)]

    found, count = step(build_model(MODEL)), len(calls)
    exact = step(build_model(MODEL).double())
    assert count == 3 * (2 * 4 + 1)  # forward, and two gradients, of four matrices a layer and the head
    assert len(calls) == count
    assert all(error(*pair) < 1e-5 for pair in zip(found, exact, strict=True))


@pytest.mark.slow
def test_a_compiled_layer_is_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "ONEDNN", True)
    monkeypatch.setattr(matmul, "SMALLEST", 1)
    torch._dynamo.reset()
    results = []
    for call in (matmul.linear, torch.compile(matmul.linear, fullgraph=True, dynamic=False)):
        x, weight, bias = (drawn(*shape).requires_grad_() for shape in ((3, 5, 8), (12, 8), (12,)))
        call(x, weight, bias).square().sum().backward()
        results.append([x.grad, weight.grad, bias.grad])
    assert all(error(found, exact.double()) < 1e-6 for exact, found in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("vendor", "capability", "faster"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        (None, "AVX512", False),
    ],
)
def test_onednn_is_for_avx_512_that_mkl_leaves_unused(
    monkeypatch: pytest.MonkeyPatch, vendor: str | None, capability: str, faster: bool
) -> None:
    monkeypatch.setattr(matmul, "cpu_facts", lambda: {"vendor_id": vendor} if vendor else {})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert matmul.onednn_is_faster() is faster


# -- rotation -------------------------------------------------------------------------------------------------------


def test_a_rotation_has_its_gradient() -> None:
    cos, sin = rotary_tables(MODEL, "cpu")
    given, above = drawn(2, 3, 24, 16).double(), drawn(2, 3, 24, 16, seed=1).double()

    def plain(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

    gradients, values = [], []
    for call in (plain, lambda x: rotate(x, cos, sin)):
        x = given.clone().requires_grad_()
        y = call(x)
        y.backward(above)
        assert x.grad is not None
        gradients.append(x.grad)
        values.append(y.detach())
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-14)

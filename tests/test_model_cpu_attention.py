"""Attention by products of matrices against PyTorch's in float64: values, gradients, causality, memory, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.config import Model, Precision
from gptlab.model import cpu_attention, matmul
from gptlab.model.cpu_attention import attention
from gptlab.model.gpt import build_model
from gptlab.planning.activations import saved_bytes
from gptlab.precision.regimes import apply_regime, make_regime

pytestmark = pytest.mark.skipif(not matmul.has_onednn(), reason="PyTorch has no oneDNN here")
MODEL = Model(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=61, position="rope", bias=True)
KINDS = [("whole", torch.bfloat16), ("blocks", torch.bfloat16), ("blocks", torch.float32)]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}-{str(kind[1])[6:]}")
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Attention by products on any processor, here by whole ones or by blocks of queries, the last of them smaller."""
    how, found = request.param
    monkeypatch.setattr(matmul, "ONEDNN", True)
    monkeypatch.setattr(matmul, "SMALLEST", 1)
    monkeypatch.setattr(cpu_attention, "SHORT", 1 if how == "blocks" else 10**6)
    monkeypatch.setattr(cpu_attention, "FEW", 10**6)
    monkeypatch.setattr(cpu_attention, "ROWS", 16)
    monkeypatch.setattr(cpu_attention, "HEADS", 3)
    return found


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def attended(attend: Any, dtype: torch.dtype, scale: float | None = None) -> list[Tensor]:
    """Output and gradients for views of one tensor, as the model has them."""
    packed = drawn(2, 40, 3 * 4 * 16).to(torch.bfloat16).to(dtype).requires_grad_()
    q, k, v = (x.unflatten(2, (4, 16)).transpose(1, 2) for x in packed.split(64, dim=2))
    y = attend(q, k, v, scale)
    y.backward(drawn(2, 40, 4, 16, seed=1).transpose(1, 2).to(dtype))
    assert packed.grad is not None
    return [y.detach(), *packed.grad.split(64, dim=2)]


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_by_products_is_attention(
    dtype: torch.dtype, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = attended(plain, torch.float64, scale)
    with monkeypatch.context() as without:  # it does not call PyTorch's kernel
        without.setattr(F, "scaled_dot_product_attention", None)
        found = attended(attention, dtype, scale)
    assert all(y.dtype is dtype for y in found)
    bound = 16 * torch.finfo(dtype).eps if dtype is torch.float32 else 1.5 * torch.finfo(dtype).eps
    assert max(error(*pair) for pair in zip(found, exact, strict=True)) < bound


def test_it_does_not_see_the_future(dtype: torch.dtype) -> None:
    q, k, v = (drawn(1, 5, 40, 8, seed=seed).to(dtype) for seed in range(3))
    before = attention(q, k, v)
    k[:, :, 23:], v[:, :, 23:] = 9.0, -9.0
    after = attention(q, k, v)
    assert torch.equal(after[:, :, :23], before[:, :, :23]) and not torch.equal(after, before)


def test_autocast_leaves_the_products_in_their_dtype(dtype: torch.dtype) -> None:
    alone = attended(attention, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(*pair) for pair in zip(attended(attention, dtype), alone, strict=True))


def test_the_scores_of_blocks_are_not_kept(dtype: torch.dtype) -> None:
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attended(attention, dtype)
    scores, operand = 2 * 4 * 40 * 40, 2 * 4 * 40 * 16
    assert (scores in kept) is (cpu_attention.SHORT > 1)
    assert scores in kept or kept.count(operand) == len(kept) == 3


@pytest.mark.slow
@pytest.mark.compiles
def test_it_is_one_graph_when_compiled(dtype: torch.dtype) -> None:
    found = attended(torch.compile(attention, fullgraph=True), dtype)
    eps = torch.finfo(dtype).eps
    assert all(
        error(one, other.double()) < 4 * eps for one, other in zip(found, attended(attention, dtype), strict=True)
    )


def test_other_lengths_dtypes_and_processors_take_pytorchs_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    float32, float64, bf16 = torch.float32, torch.float64, torch.bfloat16
    for on, few, short, dtype in (
        (True, 10**6, 41, float32),
        (True, 0, 1, float32),
        (True, 10**6, 1, float64),
        (False, 10**6, 1, bf16),
    ):
        monkeypatch.setattr(matmul, "ONEDNN", on)
        monkeypatch.setattr(cpu_attention, "FEW", few)
        monkeypatch.setattr(cpu_attention, "SHORT", short)
        pairs = zip(attended(attention, dtype), attended(plain, dtype), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


def test_a_plan_counts_the_scores_on_a_cpu_and_not_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    regime = make_regime(Precision(regime="bf16_master"))
    model = build_model(MODEL, on_meta=lambda model: apply_regime(model, regime))
    sizes = {}
    for on in (False, True):
        monkeypatch.setattr(matmul, "ONEDNN", on)
        sizes[on] = [saved_bytes(model, regime, batch=3, gpu=gpu) for gpu in (True, False)]
    assert sizes[True][0] == sizes[False][0]
    assert sizes[True][1] != sizes[False][1]

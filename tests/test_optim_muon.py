"""Muon: against the singular value decomposition, PyTorch's, itself one by one and after a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe
from test_training_resume import assert_same_run, train_until
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gptlab.config import Model, Optim, build_recipe
from gptlab.errors import ConfigError
from gptlab.model.encoder import build_encoder
from gptlab.model.gpt import build_model
from gptlab.optim import muon
from gptlab.optim.muon import Muon, muon_groups, orthogonalize
from gptlab.optim.optimizers import describe, make_optimizer, set_lr
from gptlab.seeding import address
from gptlab.training.loop import train

SHAPE = Model(n_layer=2, n_head=2, n_embd=8, block_size=6, vocab_size=11)
OPTIM = Optim(name="muon", lr=3e-3, muon_lr=0.05, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-6, muon_momentum=0.9)


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def quintic(s: Tensor) -> Tensor:
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def by_svd(x: Tensor) -> Tensor:
    """What the iteration amounts to: the polynomial of each singular value, of x divided by its Frobenius norm."""
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    return u @ torch.diag(quintic(s / s.square().sum().sqrt())) @ v


def gradient(p: Tensor, step: int, i: int) -> Tensor:
    return (drawn(*p.shape, seed=address(step, i)) * 1e-2 + 0.1 * p.detach().double()).to(p.dtype)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        set_lr(optimizer, OPTIM.lr / (1 + 0.1 * step))
        for i, p in enumerate(model.parameters()):
            p.grad = gradient(p, step, i)
        optimizer.step()


# -- the iteration


def test_orthogonalize_is_the_polynomial_of_singular_values() -> None:
    x = drawn(3, 12, 40, seed=1)
    for ours, matrix in zip(orthogonalize(x, torch.float64), x, strict=True):
        assert torch.allclose(ours, by_svd(matrix), rtol=0, atol=1e-12)
    assert torch.allclose(orthogonalize(1e-4 * x, torch.float64), orthogonalize(x, torch.float64), atol=1e-12)
    assert not orthogonalize(torch.zeros(2, 3, 4), torch.float32).any()


def direct(x: Tensor) -> Tensor:
    """The iteration as its authors write it, on the matrices themselves."""
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("largest_over_smallest", [1.0, 1e3, 1e8])
def test_iterating_on_the_small_side_is_the_same(largest_over_smallest: float) -> None:
    """Wide matrices go through their Gram matrices, which square the condition number: float32 bears it.

    The Gram matrix sums 256 products, so it is off by at most 256 epsilons of its norm; a small singular value is then
    multiplied by up to a^5. In float32 that is 1.5%, where the quintic itself leaves singular values 30% apart.
    """
    bound = {dtype: 256 * torch.finfo(dtype).eps * 3.4445**5 for dtype in (torch.float32, torch.float64)}
    u, _, v = torch.linalg.svd(drawn(2, 64, 256, seed=3), full_matrices=False)
    x = u @ torch.diag(torch.logspace(0, -math.log10(largest_over_smallest), 64, dtype=torch.float64)) @ v
    exact = direct(x)
    assert (orthogonalize(x, torch.float64) - exact).norm() < bound[torch.float64] * exact.norm()
    assert (orthogonalize(x.float(), torch.float32) - exact).norm() < bound[torch.float32] * exact.norm()
    low_rank = drawn(1, 64, 3, seed=4) @ drawn(1, 3, 256, seed=5)
    assert (orthogonalize(low_rank.float(), torch.float32) - direct(low_rank)).norm() < bound[torch.float32] * 3**0.5


def test_multiplications_of_the_small_side() -> None:
    """2 n m^2 numbers are multiplied 2 r + 17 times m^3 for n = r m, where the direct form takes 5 (2 r + 1)."""
    for n, products in ((32, 15), (64, 21), (128, 25)):
        with FlopCounterMode(display=False) as counter:
            orthogonalize(torch.ones(2, 32, n), torch.float32)
        assert counter.get_total_flops() == 2 * 2 * 32**3 * products
        with FlopCounterMode(display=False) as counter:
            orthogonalize(torch.ones(2, 32, n), torch.bfloat16)
        assert counter.get_total_flops() == 2 * 2 * 32**3 * 5 * (2 * n // 32 + 1)


@pytest.mark.parametrize("dtype, low, high", [(torch.float32, 0.68, 1.14), (torch.bfloat16, 0.65, 1.18)])
def test_singular_values_end_near_one(dtype: torch.dtype, low: float, high: float) -> None:
    """Of all from 0.01 on the quintic makes 0.682 to 1.134."""
    u, _, v = torch.linalg.svd(drawn(24, 48, seed=2, dtype=torch.float32), full_matrices=False)
    s = torch.logspace(-1.7, 0, 24)  # over the norm: from 0.01 on
    s /= s.square().sum().sqrt()
    assert s.min() > 0.008
    ends = torch.linalg.svdvals(orthogonalize((u @ torch.diag(s) @ v)[None], dtype)[0].float())
    assert low < ends.min() and ends.max() < high


# -- the optimizer


def per_neuron(x: Tensor, square: Tensor) -> Tensor:
    """NorMuon (arXiv 2510.05491) as its authors' code has it: each row over its root mean square, at x's own norm."""
    square.copy_(0.7 * square + 0.3 * x.square().mean(1))
    scaled = x / square.sqrt()[:, None]
    return scaled * x.norm() / scaled.norm()


class Preconditioner:
    """SOAP's, on one of Muon's matrices, as pull request 278 of KellerJordan/modded-nanogpt has it, in float64."""

    def __init__(self, largest_side: int, every: int) -> None:
        self.largest_side, self.every, self.calls = largest_side, every, 0

    def __call__(self, update: Tensor, grad: Tensor) -> Tensor:
        products, self.calls = [grad @ grad.T, grad.T @ grad], self.calls + 1
        if self.calls == 1:
            self.grams, self.square = [0.3 * product for product in products], torch.zeros_like(grad)
            self.bases = [
                torch.linalg.eigh(product)[1].flip(1)
                if len(product) <= self.largest_side
                else torch.eye(len(product)).double()
                for product in products
            ]
            return update
        turned = self.bases[0].T @ update @ self.bases[1]
        self.square = 0.7 * self.square + 0.3 * turned**2
        back = self.bases[0] @ (turned / (self.square.sqrt() + 1e-6)) @ self.bases[1].T
        for side, product in enumerate(products):
            self.grams[side] = 0.7 * self.grams[side] + 0.3 * product
            if (self.calls - 1) % self.every == 0 and len(product) <= self.largest_side:
                eigenvalues = (self.bases[side].T @ self.grams[side] @ self.bases[side]).diagonal()
                order = eigenvalues.argsort(descending=True)
                self.bases[side] = torch.linalg.qr(self.grams[side] @ self.bases[side][:, order])[0]
                self.square = self.square.index_select(side, order)
        return back * update.norm() / back.norm()


def reference(
    model: nn.Module,
    steps: int,
    neurons: bool = False,
    cautious: bool = False,
    soap: Callable[[], Preconditioner] | None = None,
) -> dict[str, Tensor]:
    """Muon matrix by matrix and AdamW by the papers' rules, in float64; which is which stands here by hand."""
    rows = {
        name: torch.zeros(3, len(p) // 3 if "c_attn" in name else len(p)).double()
        for name, p in model.named_parameters()
    }
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    preconditioners = {name: [soap() for _ in range(3)] for name in weights} if soap else {}
    mean, square = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    hidden = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    for step in range(steps):
        factor = 1 / (1 + 0.1 * step)
        for i, (name, w) in enumerate(weights.items()):
            g = gradient(w, step, i)
            decay = 0.0 if w.dim() == 1 else 0.3
            if name.endswith(hidden):
                lr, mean[name] = 0.05 * factor, 0.9 * mean[name] + g  # not averaged: the norm is divided out
                nesterov = g + 0.9 * mean[name]
                n = 3 if name.endswith("c_attn.weight") else 1
                parts = nesterov.chunk(n)
                if soap:
                    each = zip(preconditioners[name], parts, g.chunk(n), strict=False)
                    parts = tuple(by(0.1 * part, grad) for by, part, grad in each)
                scale = math.sqrt(max(1, parts[0].shape[0] / parts[0].shape[1]))
                found = [by_svd(part) for part in parts]
                if neurons:
                    found = [per_neuron(x, square_of) for x, square_of in zip(found, rows[name], strict=False)]
                step_of = scale * torch.cat(found)
            else:
                lr = 3e-3 * factor
                mean[name] = 0.8 * mean[name] + 0.2 * g
                square[name] = 0.9 * square[name] + 0.1 * g * g
                corrected = mean[name] / (1 - 0.8 ** (step + 1)), square[name] / (1 - 0.9 ** (step + 1))
                step_of = corrected[0] / (corrected[1].sqrt() + 1e-6)
            agree = step_of * w >= 0 if cautious else 1.0
            weights[name] = w - lr * decay * agree * w - lr * step_of
    return weights


@pytest.mark.parametrize("neurons, cautious", [(False, False), (True, False), (False, True)])
def test_200_steps_against_the_reference(neurons: bool, cautious: bool) -> None:
    model = build_model(SHAPE.model_copy(update={"n_layer": 1}), "cpu", torch.float64, 3)
    expected = reference(model, 200, neurons, cautious)
    name = "normuon" if neurons else "muon"
    changes = {"name": name, "normuon_beta2": 0.7, "cautious_decay": cautious}
    run(model, make_optimizer(model, OPTIM.model_copy(update=changes)), 200)
    for name, p in model.named_parameters():
        assert (p - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


@pytest.mark.parametrize(
    "largest_side, every", [(10000, 10), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((10000, 1), (8, 10)))]
)
def test_200_steps_of_soap_muon_against_the_reference(largest_side: int, every: int) -> None:
    """The MLP has one row more than columns, or fewer: the eigenvectors of the first gradient are then all given."""
    model = build_model(SHAPE.model_copy(update={"n_layer": 1, "mlp_width": 9}), "cpu", torch.float64, 3)
    expected = reference(model, 200, soap=lambda: Preconditioner(largest_side, every))
    changes = {"name": "soap-muon", "soap_muon_beta2": 0.7, "soap_every": every, "soap_largest_side": largest_side}
    run(model, make_optimizer(model, OPTIM.model_copy(update=changes)), 200)
    for name, p in model.named_parameters():
        assert (p - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
def test_one_matrix_of_normuon_against_another_library(shape: tuple[int, int]) -> None:
    """Theirs iterates in bf16 wherever it is: the same up to that."""
    others = pytest.importorskip("pytorch_optimizer")
    ours, theirs = (nn.Parameter(drawn(*shape, seed=1, dtype=torch.float32)) for _ in range(2))
    a = Muon([{"params": [ours], "muon": True}], lr=0.1, weight_decay=0.2, neuron_beta=0.9)
    b = others.NorMuon([{"params": [theirs], "use_muon": True}], lr=0.1, weight_decay=0.2, momentum=0.95, beta2=0.9)
    for step in range(5):
        before = ours.detach().clone()
        with torch.no_grad():
            theirs.copy_(ours)
        ours.grad = gradient(ours, step, 0)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
        assert (ours - theirs).norm() < 0.03 * (ours - before).norm()


def test_batched_is_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    batched, single = (build_model(SHAPE, "cpu", torch.float32, 3) for _ in range(2))
    sizes: list[int] = []
    original = muon.orthogonalize

    def counted(x: Tensor, dtype: torch.dtype) -> Tensor:
        sizes.append(len(x))
        return original(x, dtype)

    monkeypatch.setattr(muon, "orthogonalize", counted)
    run(batched, make_optimizer(batched, OPTIM), 5)
    assert sizes == 5 * [8, 4]  # q, k, v and c_proj of two layers; c_fc and the other c_proj of two
    monkeypatch.setattr(muon, "AT_ONCE", 1)
    sizes.clear()
    run(single, make_optimizer(single, OPTIM), 5)
    assert sorted(sizes[:8]) == [1, 1, 1, 1, 1, 1, 3, 3]
    for p, q in zip(batched.parameters(), single.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has none")
@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (16, 16)])
def test_one_matrix_against_pytorch(shape: tuple[int, int]) -> None:
    """PyTorch's iterates in bf16 wherever it is: the same up to that."""
    ours, theirs = (nn.Parameter(drawn(*shape, seed=1, dtype=torch.float32)) for _ in range(2))
    a = Muon([{"params": [ours], "muon": True}], lr=0.1, weight_decay=0.2)
    b = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.2, momentum=0.95)
    for step in range(5):
        before = ours.detach().clone()
        with torch.no_grad():
            theirs.copy_(ours)
        ours.grad = theirs.grad = gradient(ours, step, 0)
        a.step()
        b.step()
        assert (ours - theirs).norm() < 0.03 * (ours - before).norm()
        assert torch.allclose(a.state[ours]["momentum_buffer"], b.state[theirs]["momentum_buffer"])


def test_the_rest_is_pytorchs_adamw() -> None:
    ours, theirs = (build_model(SHAPE, "cpu", torch.float32, 3) for _ in range(2))
    a, b = make_optimizer(ours, OPTIM), make_optimizer(theirs, OPTIM.model_copy(update={"name": "adamw"}))
    run(ours, a, 5)
    run(theirs, b, 5)
    same = {n for (n, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True) if torch.equal(p, q)}
    assert {n for n, _ in ours.named_parameters()} - same == {
        f"h.{i}.{part}.weight" for i in range(2) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_bf16_weights_are_rounded_once() -> None:
    """Decay of 1 - 0.05 x 0.01 alone is less than half a step of bf16, and yet not lost beside an update."""
    p = nn.Parameter(drawn(64, 64, seed=1).bfloat16())
    optimizer = Muon([{"params": [p], "muon": True, "lr": 0.05, "weight_decay": 0.01}])
    p.grad = drawn(64, 64, seed=2).bfloat16()
    before, direction = p.detach().float(), orthogonalize(p.grad[None].float() * 0.0975, torch.float32)[0]
    optimizer.step()
    exact = before * (1 - 0.05 * 0.01) - 0.05 * direction
    # Rounding goes either way and averages out over 4,096 weights; a decay that is lost would not.
    decay = 0.05 * 0.01 * before.abs()
    assert ((p.float() - exact) * before.sign()).mean().abs() < 0.2 * decay.mean()
    # one rounding is 2^-9 of a weight, and that of the momentum at most as much of its direction
    assert ((p.float() - exact).abs() <= 2**-8 * exact.abs() + 0.05 * 2**-7 * direction.abs().max()).all()


# -- groups and learning rates


def test_groups_of_both_models() -> None:
    encoder = Model(**SHAPE.model_dump() | {"mlp": "gelu_erf", "bias": True})
    gated = Model(**SHAPE.model_dump() | {"mlp": "swiglu", "tied": False, "position": "rope", "qk_norm": True})
    for model in (build_model(SHAPE), build_model(gated), build_encoder(encoder, 5)):
        names = {id(p): name for name, p in model.named_parameters()}
        groups = [[names[id(p)] for p in group["params"]] for group in muon_groups(model, OPTIM)]
        assert sorted(name for group in groups for name in group) == sorted(names.values())
        assert all(name.endswith("c_attn.weight") for name in groups[1]) and len(groups[1]) == 2
        assert not any(key in name for name in groups[0] + groups[1] for key in ("wte", "wpe", "head", "ln", "bias"))
        assert any("wte" in name for name in groups[2])
    with pytest.raises(AssertionError, match="c_attn"):
        muon_groups(nn.Linear(3, 3), OPTIM)


def test_the_schedule_scales_both_rates_and_never_compounds() -> None:
    optimizer = make_optimizer(build_model(SHAPE), OPTIM)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05, 3e-3, 3e-3]
    for factor in (0.5, 0.5, 0.1, 1.0):
        set_lr(optimizer, 3e-3 * factor)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [0.05 * factor] * 2 + [3e-3 * factor] * 2, rel=1e-12
        )


# -- training


def test_resumes_bit_for_bit_under_autocast(dataset: Path, tmp_path: Path) -> None:
    """24 steps of a ragged accumulation, and 10 and then 14; it learns, too."""
    changes = {"optim__name": "muon", "schedule__decay_steps": 24, "precision__regime": "amp_bf16"}
    recipe = tiny_recipe(dataset, **changes)
    whole = train(recipe, tmp_path / "whole", quiet=True)
    assert whole.status == "completed"
    train(tiny_recipe(dataset, **changes, train__max_steps=10), tmp_path / "pieces", quiet=True)
    assert train(recipe, tmp_path / "pieces", quiet=True).final_val_loss == whole.final_val_loss
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    told = json.loads((tmp_path / "pieces/environment.json").read_text(encoding="utf-8"))["optimizer"]  # as it went on
    assert told["optimizer"].startswith("gptlab.optim.muon.Muon")
    assert 4 < told["bytes_per_parameter"] < 8 and told["muon_share"] == pytest.approx(
        2 - told["bytes_per_parameter"] / 4
    )
    # another limit on the way adds an evaluation: compared are the losses
    pieces = [json.loads(line) for line in (tmp_path / "pieces/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert losses == [line["loss"] for line in pieces if "loss" in line]


def test_killed_and_resumed(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    recipe = tiny_recipe(dataset, optim__name="muon", train__max_steps=12)
    train(recipe, tmp_path / "whole", quiet=True)
    assert train_until(recipe, tmp_path / "pieces", 6).status == "interrupted"
    assert train(recipe, tmp_path / "pieces", quiet=True).status == "completed"
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")


def test_says_what_it_is() -> None:
    told = describe(make_optimizer(build_model(SHAPE), OPTIM))
    assert (told["kernel"], told["rounding"], told["bytes_per_parameter"]) == ("fused", "nearest", None)
    assert "muon_share" not in describe(make_optimizer(build_model(SHAPE), Optim()))


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (
            {"optim.rounding": "kahan", "precision.regime": "bf16_pure"},
            "optim.rounding = kahan: works only with optim.name",
        ),
        ({"optim.kernel": "foreach"}, "optim.kernel = foreach: works only with optim.name = adamw, "),
        ({"precision.regime": "fp16_pure"}, "optim.name = muon: .*underflow"),
        ({"optim.muon_lr": 0}, "optim.muon_lr = 0: must be greater than 0"),
        ({"optim.muon_momentum": 1}, "optim.muon_momentum = 1: must be less than 1"),
    ],
)
def test_bad_settings(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build_recipe({"train": {"max_steps": 1}}, {"optim.name": "muon", **settings})


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_a_processor_that_multiplies_bf16_iterates_in_it_if_the_regime_rounds(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    weights: dict[bool, Tensor] = {}
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    for low in (False, True):
        monkeypatch.setattr(muon, "cpu_multiplies_bf16", lambda low=low: low)
        p = nn.Parameter(torch.zeros(24, 16))
        p.grad = drawn(24, 16, seed=1, dtype=torch.float32)
        Muon([{"params": [p], "muon": True, "parts": 3}], lr=1.0, weight_decay=0.0).step()
        weights[low] = p.detach()
    exact = orthogonalize(drawn(24, 16, seed=1, dtype=torch.float32).unflatten(0, (3, 8)), torch.float32).flatten(0, 1)
    torch.testing.assert_close(weights[False], -exact, rtol=0, atol=1e-6)
    difference = (weights[True] - weights[False]).norm() / exact.norm()
    assert (0 < difference < 0.03) == (precision == "high")  # bf16 has eps = 0.4%

"""The encoder: what a score depends on, losses in the configured dtypes, initial weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gptlab.config import PRESETS, Model
from gptlab.model.encoder import Encoder, build_encoder, summed_loss
from gptlab.seeding import address

V, T, L = 61, 20, 7
SMALL = Model(n_layer=2, n_head=2, n_embd=32, block_size=T, vocab_size=V, mlp="gelu_erf", tied=False)
LENGTHS = torch.tensor([20, 7, 1, 13])


def shaken(model: torch.nn.Module, seed: int = 7) -> Any:
    """The model with noise on every parameter, because norms of 1 and biases of 0 would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make(**changes: Any) -> Encoder:
    return shaken(build_encoder(SMALL.model_copy(update=changes), L, init=3))


def documents(lengths: Tensor = LENGTHS, padding: int = 1, width: int = T, seed: int = 0) -> Tensor:
    """(B, width) ids from 4 on, padded at the end."""
    tokens = torch.randint(4, V, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    return tokens.masked_fill(torch.arange(width) >= lengths[:, None], padding)


def multi_labels(seed: int = 0) -> Tensor:
    return torch.randint(2, (len(LENGTHS), L), generator=torch.Generator().manual_seed(seed)).float()


def single_labels() -> Tensor:
    return torch.tensor([3, 0, 6, 6])


TARGETS = {"multi": multi_labels(), "single": single_labels()}


def by_torch(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of the documents' losses, computed by torch's modules one document at a time."""
    pairs = list(zip(logits, targets, strict=True))
    if targets.is_floating_point():
        return torch.stack([torch.nn.BCEWithLogitsLoss()(row, target) for row, target in pairs]).sum()
    return torch.stack([torch.nn.CrossEntropyLoss()(row, target) for row, target in pairs]).sum()


def gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_preset_has_the_size_of_the_released_model():
    # RobertaModel's 124,645,632 without its pooler's 590,592
    config = Model(**PRESETS["roberta-base"], mlp="gelu_erf", tied=False)
    with torch.device("meta"):
        model = Encoder(config, n_labels=10)
    assert model.parameter_count() == 124_055_040 + 10 * 769
    assert model.flops_per_token() == 6 * 12 * 12 * 768**2 + 12 * 12 * 768 * 512


# -- what a document's scores depend on -----------------------------------------------------------------------------


def test_padding_changes_no_logit_and_gets_no_gradient():
    model = make().double()
    tight = documents(width=20)
    logits = model(tight, LENGTHS)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(model(documents(padding=9), LENGTHS), logits, atol=1e-12, rtol=0)  # any padding id
    for i, length in enumerate(LENGTHS.tolist()):  # the other documents of a batch do not matter
        alone = model(tight[i : i + 1, :length], LENGTHS[i : i + 1])
        torch.testing.assert_close(alone[0], logits[i], atol=1e-12, rtol=0)
    short = torch.tensor([5, 3])
    narrow, wide = documents(short, width=5), documents(short, width=5)
    wide = F.pad(wide, (0, 10), value=1)
    torch.testing.assert_close(model(wide, short), model(narrow, short), atol=1e-12, rtol=0)
    grads = gradients(model(wide, short, torch.tensor([1, 2])).train, model)
    assert not grads["wte.weight"][1].any()  # the padding's id
    assert not grads["wpe.weight"][:2].any() and not grads["wpe.weight"][7:].any()
    assert grads["wpe.weight"][2:7].any(dim=1).all()


def test_every_token_sees_every_other():
    model, tokens = make(), documents()
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] - 4 + 1) % (V - 4) + 4
    difference = (model.hidden(tokens, LENGTHS) - model.hidden(changed, LENGTHS)).abs().amax(2)
    assert (difference[0] > 0).all() and not difference[1:].any()


def test_a_document_that_is_too_long_is_refused():
    with pytest.raises(AssertionError, match="longer than block_size"):
        make()(torch.ones(1, T + 1, dtype=torch.long), torch.tensor([T + 1]))


@pytest.mark.parametrize(
    "part", [{"mlp": "gelu"}, {"norm": "rmsnorm"}, {"bias": False}, {"position": "rope"}, {"qk_norm": True}]
)
def test_other_parts_are_refused(part):
    with pytest.raises(AssertionError, match="BERT's parts"):
        Encoder(SMALL.model_copy(update=part), L)


def test_dropout_is_where_it_belongs_and_repeats():
    model, tokens = make(dropout=0.3), documents()
    assert torch.equal(model(tokens, LENGTHS), model(tokens, LENGTHS))  # no dropout in evaluation mode
    model.train()

    class Dropped(TorchFunctionMode):
        rates: list[float]

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is F.dropout:
                self.rates.append(kwargs["p"])
            if func is F.scaled_dot_product_attention:
                self.rates.append(kwargs["dropout_p"])
            return func(*args, **kwargs)

    with Dropped() as dropped:
        dropped.rates = []
        model(tokens, LENGTHS)
    assert dropped.rates == [0.3] * (1 + 3 * 2 + 1)  # embeddings; probabilities and two outputs per block; head

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(tokens, LENGTHS)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


def test_checkpointing_changes_no_gradient():
    model, tokens = make(dropout=0.2).train(), documents()
    results = []
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(0)
        results.append(gradients(model(tokens, LENGTHS, multi_labels()).train, model))
    assert results[0].keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# -- losses and their precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TARGETS)
def test_the_loss_is_torchs_summed_over_documents(kind):
    model, tokens, targets = make(), documents(), TARGETS[kind]
    expected = by_torch(model(tokens, LENGTHS), targets)
    plain = model(tokens, LENGTHS, targets)
    torch.testing.assert_close(plain.train, expected, rtol=1e-6, atol=0)
    assert torch.equal(plain.value, plain.train.detach())
    assert plain.largest_logit == model(tokens, LENGTHS).abs().max()
    assert not plain.value.requires_grad and not plain.largest_logit.requires_grad

    grads = gradients(expected, model)
    for factor in (0.125, torch.tensor(0.125)):
        train, value, _ = model(tokens, LENGTHS, targets, factor)
        torch.testing.assert_close(train, 0.125 * expected, rtol=1e-6, atol=0)
        assert torch.equal(value, plain.value)
        for name, gradient in gradients(train, model).items():
            torch.testing.assert_close(gradient, 0.125 * grads[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", TARGETS)
def test_documents_add_up(kind):
    model, tokens, targets = make().double(), documents(), TARGETS[kind]
    parts = [model(tokens[i], LENGTHS[i], targets[i]).value for i in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(parts), model(tokens, LENGTHS, targets).value, rtol=1e-6, atol=0)


def test_worked_losses():
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]])
    # -log 1/2 for three scores of 0; sigmoid(log 3) is 3/4
    assert summed_loss(logits, torch.tensor([[1.0, 0.0], [0.0, 1.0]])).item() == pytest.approx(
        math.log(2) + (math.log(2) + math.log(4 / 3)) / 2
    )
    assert summed_loss(logits, torch.tensor([0, 1])).item() == pytest.approx(math.log(2) + math.log(4 / 3))


class Computed(TorchFunctionMode):
    """Records the dtypes of the head's matmul and of the loss, and whether autocast was on."""

    def __init__(self, n_labels: int) -> None:
        super().__init__()
        self.n_labels, self.heads, self.losses, self.autocast = n_labels, [], [], []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear and args[1].shape[0] == self.n_labels:
            self.heads.append((*(a.dtype for a in args), result.dtype))
            self.autocast.append(torch.is_autocast_enabled("cpu"))
        if func in (F.binary_cross_entropy_with_logits, F.cross_entropy):
            self.losses.append(args[0].dtype)
            self.autocast.append(torch.is_autocast_enabled("cpu"))
        return result


F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize(
    ("weights", "autocast", "head_dtype", "loss_dtype", "head", "losses"),
    [
        (F32, None, None, None, F32, [F32]),
        (F32, BF16, None, None, BF16, [F32]),
        (F32, F16, None, F32, F16, [F32]),
        (F32, BF16, F32, None, F32, [F32]),
        (F32, BF16, F32, BF16, F32, [BF16, F32]),
        (BF16, None, None, BF16, BF16, [BF16, F32]),
        (BF16, None, None, F32, BF16, [F32]),
        (BF16, None, F32, F32, F32, [F32]),
        (F16, None, None, F16, F16, [F16, F32]),
    ],
)
def test_head_and_loss_are_computed_in_what_is_said(kind, weights, autocast, head_dtype, loss_dtype, head, losses):
    model, tokens, targets = make().to(weights), documents(), TARGETS[kind]
    model.head_dtype, model.loss_dtype = head_dtype, loss_dtype
    with Computed(L) as seen, torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
        result = model(tokens, LENGTHS, targets, torch.tensor(0.5))
    assert seen.heads == [(head,) * 4]
    assert seen.losses == losses  # a low-precision loss is computed again in float32 for the logs
    assert not any(seen.autocast)
    assert result.train.dtype == (loss_dtype or F32)
    assert result.value.dtype == result.largest_logit.dtype == F32
    assert result.value.item() == pytest.approx(make()(tokens, LENGTHS, targets).value.item(), rel=0.05)
    grads = gradients(result.train, model)
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert all(torch.isfinite(g).all() and g.dtype == weights for g in grads.values())


@pytest.mark.parametrize("kind", TARGETS)
def test_the_gradient_of_a_bf16_loss_is_torchs_own_in_bf16(kind):
    model, tokens, targets = make().bfloat16(), documents(), TARGETS[kind]
    model.loss_dtype = BF16
    logits = model(tokens, LENGTHS).detach().requires_grad_()
    if kind == "multi":
        losses = F.binary_cross_entropy_with_logits(logits, targets.bfloat16(), reduction="none").mean(1)
    else:
        losses = F.cross_entropy(logits, targets, reduction="none")
    expected = losses.sum() * torch.tensor(0.3).bfloat16()
    expected.backward()
    train, value, _ = model(tokens, LENGTHS, targets, 0.3)
    torch.testing.assert_close(train, expected, rtol=2**-7, atol=0)
    bias = gradients(train, model)["head.bias"]
    torch.testing.assert_close(bias, logits.grad.sum(0), rtol=2**-6, atol=2**-8)
    torch.testing.assert_close(value, by_torch(logits.detach().float(), targets), rtol=1e-6, atol=0)


def test_a_float16_loss_loses_what_one_over_labels_and_documents_makes_too_small():
    logits, targets = torch.full((1, 4000), -8.0, dtype=F16), torch.zeros(1, 4000)  # probabilities of 3e-4

    def grad(factor: float) -> Tensor:
        leaf = logits.clone().requires_grad_()
        (summed_loss(leaf, targets) * factor).backward()
        return leaf.grad

    assert not grad(1 / 32).any() and grad(1024.0).all()


def test_float32_norms_in_a_bf16_body():
    model, tokens = make().bfloat16(), documents()
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Norm"):
            module.float()
            assert "ln_" in name
    states = model.hidden(tokens, LENGTHS)
    assert states.dtype == BF16
    exact = make().hidden(tokens, LENGTHS)
    real = torch.arange(T) < LENGTHS[:, None]
    assert (states.float() - exact)[real].norm() / exact[real].norm() < 0.03
    grads = gradients(model(tokens, LENGTHS, multi_labels()).train, model)
    assert grads["h.0.ln_2.weight"].dtype == F32 and grads["h.0.mlp.c_fc.weight"].dtype == BF16


def test_the_stream_has_the_dtype_that_is_set():
    model, tokens = make().bfloat16(), documents()
    model.wte.float()  # embeddings in a wider dtype than the blocks
    model.stream_dtype = BF16
    assert model.hidden(tokens, LENGTHS).dtype == BF16


# -- weights --------------------------------------------------------------------------------------------------------


def test_initial_weights_are_addressed_by_name():
    model = build_encoder(SMALL, L, init=11)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        else:  # no special scale for residual projections
            generator = torch.Generator().manual_seed(address(11, "init", name))
            assert torch.equal(parameter, torch.empty(parameter.shape).normal_(0, 0.02, generator=generator)), name
    torch.manual_seed(99)
    again, other = build_encoder(SMALL, L, init=11).state_dict(), build_encoder(SMALL, L, init=12).state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())
    assert not torch.equal(other["head.weight"], model.head.weight)
    deeper = build_encoder(SMALL.model_copy(update={"n_layer": 3}), L + 1, init=11).state_dict()
    assert torch.equal(deeper["h.1.mlp.c_fc.weight"], again["h.1.mlp.c_fc.weight"])


def test_on_meta_changes_the_model_before_it_has_memory():
    def widen_head(model: Encoder) -> None:
        assert model.device.type == "meta"
        model.head.float()

    model = build_encoder(SMALL, L, dtype=BF16, init=1, position_offset=0, on_meta=widen_head)
    assert (model.wte.weight.dtype, model.head.weight.dtype) == (BF16, F32)
    assert model.wpe.weight.shape == (T, 32)
    assert torch.equal(model.head.weight, build_encoder(SMALL, L, init=1).head.weight)

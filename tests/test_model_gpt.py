"""The GPT: sizes, initialisation, attention masks, the cache, activation checkpointing, the loss in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptlab.config import PRESETS, Model, load_recipe
from gptlab.model import loss as loss_module
from gptlab.model.gpt import GPT, KVCache, build_model, rotary_tables, rotate
from gptlab.model.loss import chunk_length, linear_cross_entropy

V, T = 61, 20
SMALL = Model(n_layer=2, n_head=2, n_embd=32, block_size=T, vocab_size=V)
PARTS: dict[str, dict[str, Any]] = {
    "classic": {},
    "modern": {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False},
    "qk_norm": {"position": "rope", "qk_norm": True, "mlp": "relu2", "tied": False},
}


def make(parts: str, **changes: Any) -> GPT:
    """A model with noise on every weight, so that attention is not uniform."""
    model = build_model(SMALL.model_copy(update=PARTS[parts] | changes), init=3)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens_of(seed: int = 0, B: int = 2) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=list(PARTS))
def model(request) -> GPT:
    return make(request.param)


# -- sizes ----------------------------------------------------------------------------------------------------------


def count(**settings: Any) -> int:
    with torch.device("meta"):
        return GPT(Model(**settings)).parameter_count()


def test_gpt2_counts():
    # Published numbers of all parameters of the released models, with 50257 ids and 1024 positions.
    released = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    for name, size in released.items():
        assert count(**PRESETS[name], vocab_size=50257) == size
    assert count(vocab_size=50304) == 124_439_808 + 47 * 768 == 124_475_904


def test_counts_by_formula():
    L, C, W = 12, 768, 2048
    assert Model(mlp="swiglu").mlp_hidden == W
    assert 3 * C * W == 2 * C * 4 * C  # the three matrices of swiglu have as many weights as the two of gelu
    modern = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}
    block = 4 * C * C + 3 * C * W + 2 * C
    assert count(vocab_size=50304, **modern) == 50304 * C + L * block + C == 123_587_328
    assert count(vocab_size=50304, **modern, tied=False, qk_norm=True) == 2 * 50304 * C + L * (block + 2 * 64) + C
    assert count(vocab_size=50304, bias=False) == 124_475_904 - L * (3 * C + C + 4 * C + C + 2 * C) - C


def test_the_fast_shakespeare_recipe_has_half_the_parameters():
    fast, cpu = (load_recipe(f"shakespeare-char-{name}", {"model.vocab_size": 65}).model for name in ("fast", "cpu"))
    assert (count(**fast.model_dump()), count(**cpu.model_dump())) == (402_432, 804_096)
    assert fast.block_size == cpu.block_size  # both models have the same context


# -- initialisation -------------------------------------------------------------------------------------------------


def test_init_statistics():
    config = Model(n_layer=3, n_head=2, n_embd=128, block_size=64, vocab_size=512, tied=False, mlp="swiglu")
    for name, parameter in build_model(config, init=0).named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name
            continue
        std = 0.02 / math.sqrt(2 * 3) if name.endswith("c_proj.weight") else 0.02
        spread = std / math.sqrt(2 * parameter.numel())  # standard error of the estimated standard deviation
        assert abs(parameter.std() - std) < 5 * spread, name
        assert abs(parameter.mean()) < 5 * std / math.sqrt(parameter.numel()), name


@pytest.mark.parametrize("parts", list(PARTS))
def test_zero_init_begins_with_blocks_that_are_the_identity(parts: str):
    config = SMALL.model_copy(update=PARTS[parts])
    plain, model = build_model(config, init=1), build_model(config.model_copy(update={"zero_init": True}), init=1)
    for (name, ours), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert not ours.any() if name.endswith("c_proj.weight") else torch.equal(ours, other), name
    tokens = tokens_of()
    embedded = model.wte(tokens) if model.wpe is None else model.wte(tokens) + model.wpe.weight
    assert torch.equal(model.hidden(tokens), model.ln_f(embedded))
    model(tokens, tokens.roll(-1, 1)).backward()
    moves = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {f"h.{i}.{part}.c_proj.weight" for i in range(2) for part in ("attn", "mlp")} <= moves
    assert "h.0.attn.c_attn.weight" not in moves  # weights before a zero matrix get gradients after the first update


def test_each_tensor_is_drawn_by_its_name_alone():
    small = build_model(SMALL, init=1).state_dict()
    torch.manual_seed(99)
    torch.randn(5)
    # other depth (which scales c_proj), other context, more parts: tensors of the same name and size stay the same
    changed = SMALL.model_copy(update={"n_layer": 3, "block_size": 7, "tied": False, "qk_norm": True})
    other = build_model(changed, init=1).state_dict()
    for name in small:
        if name.endswith("c_proj.weight"):
            torch.testing.assert_close(small[name] * math.sqrt(4), other[name] * math.sqrt(6))
        elif name != "wpe.weight":
            assert torch.equal(small[name], other[name]), name
    assert not torch.equal(small["wte.weight"], build_model(SMALL, init=2).wte.weight)
    assert not torch.equal(small["h.0.attn.c_attn.weight"], small["h.1.attn.c_attn.weight"])
    half = build_model(SMALL, dtype=torch.bfloat16, init=1).state_dict()
    assert all(torch.equal(small[name].bfloat16(), half[name]) for name in small)


def test_building_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    build_model(SMALL, init=1)
    assert torch.equal(before, torch.get_rng_state())


def test_rotary_tables_are_float32_in_every_model():
    model = build_model(SMALL.model_copy(update=PARTS["modern"]), dtype=torch.bfloat16)
    assert model.rope_cos.dtype == model.rope_sin.dtype == torch.float32
    assert not any("rope" in name for name in model.state_dict())


# -- what may see what ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_causality(model):
    tokens = tokens_of()
    before = model(tokens)
    for t in (0, 7, T - 1):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        after = model(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert (before[:, t:] != after[:, t:]).any(-1).all()  # every later token attends to token t


@torch.no_grad()
@pytest.mark.parametrize("parts", list(PARTS))
def test_document_attention_is_running_the_documents_apart(parts):
    model = make(parts)
    tokens = tokens_of()
    lengths = [[5, 1, 14], [20]]
    documents = torch.tensor([[n for n, length in enumerate(row) for _ in range(length)] for row in lengths])
    together = model(tokens, documents=documents)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for length in row_lengths:
            alone = tokens[row : row + 1, start : start + length]
            if model.wpe is None:  # rotary attention depends on distances only
                expected = model(alone)[0]
            else:  # learned positions depend on the place in the window
                shifted = make(parts)
                shifted.wpe.weight[:length] = model.wpe.weight[start : start + length]
                expected = shifted(alone)[0]
            torch.testing.assert_close(together[row, start : start + length], expected, atol=1e-5, rtol=1e-4)
            start += length
    assert not torch.allclose(together[0], model(tokens)[0], atol=1e-3)
    torch.testing.assert_close(together[1], model(tokens)[1], atol=1e-5, rtol=1e-4)


def test_rotation_keeps_lengths_and_depends_on_distance():
    config = SMALL.model_copy(update=PARTS["modern"])
    cos, sin = rotary_tables(config, "cpu")
    q, k = torch.randn(2, 1, 1, 1, config.head_size, generator=torch.Generator().manual_seed(0))

    def score(i: int, j: int) -> Tensor:
        return (rotate(q, cos[i : i + 1], sin[i : i + 1]) * rotate(k, cos[j : j + 1], sin[j : j + 1])).sum()

    torch.testing.assert_close(score(9, 5), score(4, 0))
    torch.testing.assert_close(score(3, 3), (q * k).sum())
    assert torch.stack([score(9, j) for j in range(10)]).std() > 0.1
    torch.testing.assert_close(rotate(q, cos[9:10], sin[9:10]).norm(), q.norm())


@torch.no_grad()
def test_qk_norm_makes_attention_blind_to_the_size_of_queries_and_keys():
    model = make("qk_norm", bias=False)
    before = model(tokens_of())
    for block in model.h:
        block.attn.c_attn.weight[: 2 * 32] *= 7.0
    # the norm adds eps = 1e-5 to squares of about 0.04, which changes a query by about 1e-4
    torch.testing.assert_close(model(tokens_of()), before, atol=1e-3, rtol=1e-3)
    for block in model.h:
        block.attn.q_norm.weight *= 3.0
    assert not torch.allclose(model(tokens_of()), before, atol=1e-2)


def test_dropout_is_for_training_only():
    model = make("classic", dropout=0.3)
    tokens = tokens_of()
    assert torch.equal(model(tokens), model(tokens))
    torch.testing.assert_close(model(tokens), make("classic")(tokens))
    model.train()
    assert not torch.allclose(model(tokens), model(tokens), atol=1e-2)


# -- the cache ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * T, [T], [7, 1, 1, 5, 6], [1, 19]], ids=str)
def test_cache_equals_the_full_forward(model, pieces):
    tokens = tokens_of()
    cache = KVCache(model, batch=2, room=T, dtype=torch.float32)
    hidden = [model.hidden(part, cache=cache) for part in tokens.split(pieces, dim=1)]
    assert cache.length == T
    torch.testing.assert_close(torch.cat(hidden, dim=1), model.hidden(tokens), atol=1e-5, rtol=1e-5)


# -- recomputation --------------------------------------------------------------------------------------------------


def test_activation_checkpointing_changes_no_gradient(model):
    tokens, grads = tokens_of(), []
    model = (make("classic", dropout=0.2) if model.wpe is not None else model).double()
    for recompute in (False, True):
        model.train().zero_grad()
        model.activation_checkpointing = recompute
        torch.manual_seed(5)  # the recomputation must draw the same dropout
        model(tokens, tokens.roll(-1, 1)).backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-12)
        assert plain.any()


# -- the loss -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch) -> Callable[[int], None]:
    def set_bytes(n: int) -> None:
        monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", n)

    return set_bytes


def head(N: int, C: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(N, C, generator=generator).requires_grad_()
    weight = (torch.randn(vocab_size, C, generator=generator) * 0.3).requires_grad_()
    targets = torch.randint(vocab_size, (N,), generator=generator)
    targets[::5] = -1
    return x, weight, targets


def grads_of(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("tokens_in_chunk", [1, 10, 37, 1000])
def test_loss_and_gradients_are_cross_entropy(tokens_in_chunk, small_chunks):
    small_chunks(4 * V * tokens_in_chunk)
    x, weight, targets = head(37, 16, V)
    expected = F.cross_entropy(x @ weight.t(), targets, ignore_index=-1, reduction="sum")
    got = linear_cross_entropy(x, weight, targets).train
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    # dividing the loss scales the incoming gradient, as a mean over tokens or a loss scale does
    for left, right in zip(grads_of(got / 29, x, weight), grads_of(expected / 29, x, weight), strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)
    [dx] = grads_of(linear_cross_entropy(x, weight, targets).train, x)
    assert not dx[::5].any()  # ignored targets have no gradient


def test_loss_of_ignored_targets_alone_is_nothing():
    x, weight, targets = head(8, 16, V)
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, -1)).train
    assert loss.item() == 0.0
    assert not any(grad.any() for grad in grads_of(loss, x, weight))


def test_loss_without_gradients_makes_none():
    x, weight, targets = head(8, 16, V)
    with torch.no_grad():
        evaluated = linear_cross_entropy(x, weight, targets).train
    assert not evaluated.requires_grad
    torch.testing.assert_close(evaluated, linear_cross_entropy(x, weight, targets).train.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_loss_and_gradients_are_near(dtype, small_chunks):
    small_chunks(4 * V * 10)
    x, weight, targets = head(37, 16, V)
    exact = linear_cross_entropy(x, weight, targets).train
    with torch.autocast("cpu", dtype):
        rounded = linear_cross_entropy(x, weight, targets).train
    bound = 2**-8 if dtype == torch.bfloat16 else 2**-11  # one rounding; the errors of many numbers average out
    assert rounded.dtype == torch.float32
    assert abs(rounded - exact) / exact < bound
    for left, right in zip(grads_of(rounded, x, weight), grads_of(exact, x, weight), strict=True):
        assert left.dtype == torch.float32
        assert (left - right).norm() / right.norm() < 2 * bound


def test_float16_keeps_a_small_gradient_if_the_factor_scales_it():
    weight = torch.eye(16).requires_grad_()
    x = torch.zeros(1, 16).index_fill(1, torch.tensor([3]), 17.0).requires_grad_()  # probabilities of 4e-8
    target = torch.tensor([3])
    [exact] = grads_of(linear_cross_entropy(x, weight, target).train, x)
    others = torch.arange(16) != 3  # the target's own gradient is a difference of nearly equal numbers
    with torch.autocast("cpu", torch.float16):
        [scaled] = grads_of(linear_cross_entropy(x, weight, target, factor=1024.0).train, x)
        [lost] = grads_of(linear_cross_entropy(x, weight, target, factor=0.5).train, x)
    torch.testing.assert_close(scaled[0, others] / 1024, exact[0, others], rtol=0.01, atol=0)
    assert not lost[0, others].any()  # 2e-8 underflows in float16


@pytest.mark.parametrize(("dtype", "eps"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
def test_the_loss_dtype_is_that_of_torchs_own_operations(dtype, eps):
    """With logits, log softmax, gradient and factor in one dtype, the result is that of F.cross_entropy."""
    x, weight, targets = head(37, 16, V)
    x, weight = x.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()
    factor = torch.tensor(1 / 30)
    ours = linear_cross_entropy(x, weight, targets, factor, loss_dtype=dtype)
    logits = x @ weight.t()
    logits.retain_grad()
    theirs = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum") * factor.to(dtype)
    assert ours.train.dtype == theirs.dtype == dtype and ours.value.dtype == torch.float32
    exact = F.cross_entropy(x.double() @ weight.double().t(), targets, ignore_index=-1, reduction="sum")
    assert abs(ours.value - exact) / exact < eps / 4  # the logged loss is float32; only the logits are rounded
    assert ours.largest_logit == logits.abs().max().float()
    mine = grads_of(ours.train, x, weight)
    for left, right in zip(mine, grads_of(theirs, x, weight), strict=True):
        assert left.dtype == dtype
        assert (left - right).float().norm() / right.float().norm() < 2 * eps
    # the float32 loss of the same logits differs
    wide = grads_of(linear_cross_entropy(x, weight, targets, factor).train, x, weight)
    assert not torch.equal(wide[0], mine[0])


def test_a_float16_loss_loses_what_one_over_tokens_makes_too_small():
    x, weight, targets = head(37, 16, V)
    x, weight = x.detach().half().requires_grad_(), weight.detach().half().requires_grad_()
    with_scale = linear_cross_entropy(x, weight, targets, 65536.0 / 61440, loss_dtype=torch.float16)
    without = linear_cross_entropy(x, weight, targets, 1.0 / (61440 * 1024), loss_dtype=torch.float16)
    assert grads_of(with_scale.train, x)[0].count_nonzero() > 0.7 * x.numel()
    assert not grads_of(without.train, x)[0].any()


def test_float16_does_not_overflow_where_many_tokens_have_one_target():
    weight = torch.eye(16).requires_grad_()
    x, targets = torch.full((2048, 16), 2.0), torch.zeros(2048, dtype=torch.long)
    [exact] = grads_of(linear_cross_entropy(x, weight, targets).train, weight)
    with torch.autocast("cpu", torch.float16):
        [grad] = grads_of(linear_cross_entropy(x, weight, targets).train, weight)
    torch.testing.assert_close(grad, exact, rtol=0.01, atol=0)  # sums up to 3840 do not overflow in float16


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation creates."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.bytes = max(self.bytes, value.numel() * value.element_size())
        return result


def test_logits_are_never_made_whole(small_chunks):
    N, C, vocab_size = 256, 8, 512
    small_chunks(4 * vocab_size * 16)
    x, weight, targets = head(N, C, vocab_size)
    with LargestTensor() as largest:
        linear_cross_entropy(x, weight, targets).train.backward()
    assert largest.bytes <= 4 * vocab_size * 16  # logits of 16 tokens; the gradient of the weight is smaller
    small_chunks(4 * vocab_size * N)
    with LargestTensor() as largest:
        linear_cross_entropy(x, weight, targets).train.backward()
    assert largest.bytes == 4 * vocab_size * N


def test_chunks_are_equal_and_within_the_bound(small_chunks):
    small_chunks(4 * 100 * 10)
    assert chunk_length(10, 100, "cpu") == 10
    assert chunk_length(11, 100, "cpu") == 6
    assert chunk_length(95, 100, "cpu") == 10
    assert chunk_length(5, 10**6, "cpu") == 1


def test_model_loss_is_the_loss_of_its_logits(model, small_chunks):
    small_chunks(4 * V * 7)
    tokens = tokens_of()
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -1
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    torch.testing.assert_close(model(tokens, targets), expected, atol=1e-5, rtol=1e-5)
    parameters = list(model.parameters())
    for left, right in zip(grads_of(model(tokens, targets), *parameters), grads_of(expected, *parameters), strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)

"""Our models against transformers' with the same weights: logits, loss, every gradient and ten AdamW losses.

The shape of llm.c's test_gpt2.c, on small models made here, so that nothing is downloaded.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.config import Model
from gptlab.interop.hf import export_hf
from gptlab.interop.source import read_source
from gptlab.model.gpt import GPT, build_model

transformers = pytest.importorskip("transformers")

V, BLOCK = 96, 48


def classic() -> torch.nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=V,
            n_positions=BLOCK,
            n_embd=48,
            n_layer=3,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def modern() -> torch.nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V,
            max_position_embeddings=BLOCK,
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


@pytest.fixture(params=[classic, modern], ids=["gpt2", "llama"])
def pair(request, tmp_path) -> tuple[torch.nn.Module, GPT]:
    """A Hugging Face model with noise on every parameter, and our model with the weights of its files."""
    torch.manual_seed(0)
    theirs = request.param()
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms of 1 and biases of 0 would hide errors
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    config, init = read_source(tmp_path)
    return theirs.eval(), build_model(config, init=init)


def batch(step: int = 0, length: int = BLOCK) -> Tensor:
    return torch.randint(V, (3, length), generator=torch.Generator().manual_seed(step))


def shifted(tokens: Tensor) -> Tensor:
    """The targets that transformers makes from labels: the last position has none."""
    return F.pad(tokens[:, 1:], (0, 1), value=-1)


def mean_loss(model: GPT, tokens: Tensor) -> Tensor:
    targets = shifted(tokens)
    return model(tokens, targets) / (targets >= 0).sum()


LLAMA_NAMES = {  # ours -> theirs, deliberately independent of the package's table
    "wte": "embed_tokens",
    "ln_f": "norm",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_gate": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def gradients(model: GPT) -> dict[str, Tensor]:
    """Our gradients with transformers' names and layout."""
    result = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        if model.wpe is not None:  # GPT-2 has our names; its Conv1D weights are transposed
            result[f"transformer.{name}"] = grad.t() if name.startswith("h.") and grad.dim() == 2 else grad
            continue
        part = name.removesuffix(".weight")
        where = "model."
        if name.startswith("h."):
            _, layer, part = part.split(".", 2)
            where = f"model.layers.{layer}."
        if part == "attn.c_attn":
            for letter, piece in zip("qkv", grad.chunk(3), strict=True):
                result[f"{where}self_attn.{letter}_proj.weight"] = piece
        else:
            result[f"{where}{LLAMA_NAMES[part]}.weight"] = grad
    return result


def test_logits(pair):
    theirs, ours = pair
    for length in (1, 7, BLOCK):
        with torch.no_grad():
            expected, got = theirs(batch(length=length)).logits, ours(batch(length=length))
        assert expected.std() > 0.5  # the logits are not all alike
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_logits_in_float64(pair):
    theirs, ours = (copy.deepcopy(model).double() for model in pair)
    with torch.no_grad():
        difference = (theirs(batch()).logits - ours(batch())).abs().max()
    # The rotary tables are float32 on both sides, and their last bit depends on the vector length of the sines. Three
    # layers amplify this to some tens of eps. Everything else is exact.
    assert difference < (1e-12 if ours.wpe is not None else 100 * torch.finfo(torch.float32).eps)


def test_loss_and_every_gradient(pair):
    theirs, ours = pair
    tokens = batch()
    expected = theirs(tokens, labels=tokens).loss
    got = mean_loss(ours, tokens)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    expected.backward()
    got.backward()
    grads = gradients(ours)
    reference = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert grads.keys() == reference.keys()
    for name, grad in grads.items():
        error = (grad - reference[name]).norm() / reference[name].norm()
        if name.endswith("c_attn.bias"):  # softmax ignores a shift of all keys: a third is rounding noise
            error = (grad - reference[name]).abs().max() / reference[name].abs().max()
        assert error < 2e-5, f"{name}: {error:.1e}"


def test_ten_adamw_losses(pair):
    theirs, ours = (copy.deepcopy(model).double() for model in pair)
    settings = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    reference = torch.optim.AdamW(theirs.parameters(), **settings, foreach=False, fused=False)
    optimizer = torch.optim.AdamW(ours.parameters(), **settings, fused=True)
    expected, got = [], []
    for step in range(10):
        tokens = batch(step % 2)  # two alternating batches, on which the loss must fall
        logits = theirs(tokens).logits  # transformers' own loss would round them to float32
        reference_loss = F.cross_entropy(logits.flatten(0, 1), shifted(tokens).flatten(), ignore_index=-1)
        losses = reference_loss, mean_loss(ours, tokens)
        for loss, optim, log in zip(losses, (reference, optimizer), (expected, got), strict=True):
            optim.zero_grad()
            loss.backward()
            optim.step()
            log.append(loss.item())
    assert expected[-1] < expected[0] - 0.3
    assert got == pytest.approx(expected, abs=1e-9 if ours.wpe is not None else 2e-5)  # rotary tables are float32


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotary_tables_at_the_end_of_a_long_context(theta, tmp_path):
    """The error of a rounded frequency grows with the position."""
    config = Model(
        n_layer=1,
        n_head=1,
        n_embd=64,
        block_size=1024,
        vocab_size=V,
        position="rope",
        norm="rmsnorm",
        mlp="swiglu",
        bias=False,
        rope_theta=theta,
    )
    ours = build_model(config, init=1)
    with torch.no_grad():
        for parameter in ours.parameters():  # noise, so that attention is not uniform
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    export_hf(ours, None, tmp_path / "out")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.randint(V, (1, 1024), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)

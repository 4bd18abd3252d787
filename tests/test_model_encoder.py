"""The encoder: transformers' hidden states and gradients, its losses in the precision that is said, its files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gptlab.config import PRESETS, Model
from gptlab.errors import HubError
from gptlab.interop.hf_encoder import read_encoder
from gptlab.model.encoder import Encoder, _hf_names, build_encoder, summed_loss
from gptlab.seeding import address

V, T, L = 61, 20, 7
SMALL = Model(n_layer=2, n_head=2, n_embd=32, block_size=T, vocab_size=V, mlp="gelu_erf", tied=False)
LENGTHS = torch.tensor([20, 7, 1, 13])


def shaken(model: torch.nn.Module, seed: int = 7) -> Any:
    """The model with every parameter off its initial value: unit norms and zero biases would hide a mistake."""
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
    """The sum over documents by torch's modules, document for document."""
    pairs = list(zip(logits, targets, strict=True))
    if targets.is_floating_point():
        return torch.stack([torch.nn.BCEWithLogitsLoss()(row, target) for row, target in pairs]).sum()
    return torch.stack([torch.nn.CrossEntropyLoss()(row, target) for row, target in pairs]).sum()


def gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- the same network as transformers' ------------------------------------------------------------------------------


def theirs(model_type: str, **changes: Any) -> torch.nn.Module:
    """A small RobertaModel or BertModel of transformers, in float64, off its initial weights."""
    transformers = pytest.importorskip("transformers")
    settings: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": T,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    }
    if model_type != "bert":
        settings |= {"max_position_embeddings": T + 2, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    names = {"roberta": "Roberta", "bert": "Bert", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}
    config = getattr(transformers, names[model_type] + "Config")(**settings | changes)
    torch.manual_seed(5)
    return shaken(getattr(transformers, names[model_type] + "Model")(config).double())


def imported(folder: Path, dtype: torch.dtype = torch.float64, seed: int = 0) -> Encoder:
    config, position_offset, fill = read_encoder(folder, seed)
    return build_encoder(config, L, dtype=dtype, init=fill, position_offset=position_offset).eval()


def their_states(model: torch.nn.Module, tokens: Tensor, lengths: Tensor = LENGTHS) -> Tensor:
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    return model(input_ids=tokens, attention_mask=mask).last_hidden_state


@pytest.mark.parametrize("model_type", ["roberta", "bert", "xlm-roberta", "camembert"])
@pytest.mark.parametrize("shape", [{}, {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 24}])
def test_hidden_states_logits_and_gradients_are_transformers(model_type, shape, tmp_path):
    reference = theirs(model_type, **shape)
    reference.save_pretrained(tmp_path)
    ours = imported(tmp_path)
    tokens = documents(padding=reference.config.pad_token_id)
    states, expected = ours.hidden(tokens, LENGTHS), their_states(reference, tokens)
    real = torch.arange(T) < LENGTHS[:, None]
    torch.testing.assert_close(states[real], expected[real], atol=1e-10, rtol=0)

    head = torch.nn.Linear(states.shape[2], L).double()
    head.load_state_dict(ours.head.state_dict())
    logits = head(expected[:, 0])
    torch.testing.assert_close(ours(tokens, LENGTHS), logits, atol=1e-10, rtol=0)

    result = ours(tokens, LENGTHS, multi_labels().double())
    their_grads = gradients(by_torch(logits, multi_labels().double()), reference)
    our_grads = gradients(result.train, ours)
    assert our_grads.keys() == dict(ours.named_parameters()).keys()
    for name, gradient in our_grads.items():
        if not name.startswith("head."):
            expected = torch.cat([their_grads[piece] for piece in _hf_names(name)])[: len(gradient)]
            torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("model_type", ["roberta", "bert"])
def test_float32_is_near_too(model_type, tmp_path):
    reference = theirs(model_type).float()
    reference.save_pretrained(tmp_path)
    tokens = documents(padding=reference.config.pad_token_id)
    states = imported(tmp_path, torch.float32).hidden(tokens, LENGTHS)
    real = torch.arange(T) < LENGTHS[:, None]
    torch.testing.assert_close(states[real], their_states(reference, tokens)[real], atol=1e-5, rtol=0)


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
    torch.testing.assert_close(model(documents(padding=9), LENGTHS), logits, atol=1e-12, rtol=0)  # any id will do
    for i, length in enumerate(LENGTHS.tolist()):  # nor what a document is batched with
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
    assert torch.equal(model(tokens, LENGTHS), model(tokens, LENGTHS))  # none in evaluation
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
    assert dropped.rates == [0.3] * (1 + 3 * 2 + 1)  # embeddings; probabilities and two outputs a block; the head

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
    """In which dtypes the head is multiplied and the loss computed, and whether autocast was on."""

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
    assert seen.losses == losses  # a narrow loss is taken once more in float32, for the logs
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
    model.wte.float()  # embeddings stored wider than the body
    model.stream_dtype = BF16
    assert model.hidden(tokens, LENGTHS).dtype == BF16


# -- weights --------------------------------------------------------------------------------------------------------


def test_initial_weights_are_addressed_by_name():
    model = build_encoder(SMALL, L, init=11)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        else:  # residual projections as all others
            generator = torch.Generator().manual_seed(address(11, "init", name))
            assert torch.equal(parameter, torch.empty(parameter.shape).normal_(0, 0.02, generator=generator)), name
    torch.manual_seed(99)
    again, other = build_encoder(SMALL, L, init=11).state_dict(), build_encoder(SMALL, L, init=12).state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())
    assert not torch.equal(other["head.weight"], model.head.weight)
    deeper = build_encoder(SMALL.model_copy(update={"n_layer": 3}), L + 1, init=11).state_dict()
    assert torch.equal(deeper["h.1.mlp.c_fc.weight"], again["h.1.mlp.c_fc.weight"])


def test_a_model_is_laid_out_before_it_has_memory():
    def lay_out(model: Encoder) -> None:
        assert model.device.type == "meta"
        model.head.float()

    model = build_encoder(SMALL, L, dtype=BF16, init=1, position_offset=0, on_meta=lay_out)
    assert (model.wte.weight.dtype, model.head.weight.dtype) == (BF16, F32)
    assert model.wpe.weight.shape == (T, 32)
    assert torch.equal(model.head.weight, build_encoder(SMALL, L, init=1).head.weight)


# -- files ----------------------------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def rewrite(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    (folder / "model.safetensors").unlink()
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    theirs("roberta").float().save_pretrained(tmp_path)
    return tmp_path


def test_the_shape_of_a_folder(folder, tmp_path_factory):
    config, position_offset, _ = read_encoder(folder, 0)
    assert config == SMALL.model_copy(update={"mlp_width": 48, "dropout": 0.1})
    assert position_offset == 2
    other = tmp_path_factory.mktemp("bert")
    theirs("bert").save_pretrained(other)
    config, position_offset, _ = read_encoder(str(other), 0)
    assert (config.block_size, position_offset, config.norm_eps) == (T, 0, 1e-12)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["", "roberta."])
def test_both_kinds_of_files_with_and_without_a_head(file, prefix, folder):
    expected = imported(folder, F32).state_dict()
    tensors = {prefix + name: tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors[f"{prefix}embeddings.position_ids"] = torch.arange(T + 2)[None]
    tensors |= {"lm_head.bias": torch.zeros(V), "classifier.out_proj.weight": torch.ones(3, 32)}
    rewrite(folder, file, tensors)
    got = imported(folder, F32).state_dict()
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("task", ["SequenceClassification", "MaskedLM"])
@pytest.mark.parametrize("house", ["Roberta", "Bert"])
def test_models_with_heads_as_transformers_saves_them(house, task, tmp_path):
    transformers = pytest.importorskip("transformers")
    reference = theirs(house.lower())
    model = shaken(getattr(transformers, f"{house}For{task}")(reference.config).double())
    model.save_pretrained(tmp_path)
    tokens = documents(padding=reference.config.pad_token_id)
    expected = their_states(getattr(model, house.lower()), tokens)
    torch.testing.assert_close(imported(tmp_path).hidden(tokens, LENGTHS)[:, 0], expected[:, 0], atol=1e-10, rtol=0)


def test_the_names_of_2018(tmp_path):
    """bert-base-uncased as it is still offered: gamma and beta in the norms, and a head for pretraining."""
    theirs("bert").save_pretrained(tmp_path)
    expected = imported(tmp_path).state_dict()
    tensors = {"cls.seq_relationship.bias": torch.zeros(2)}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        tensors[f"bert.{name}"] = tensor
    rewrite(tmp_path, "pytorch_model.bin", tensors)
    got = imported(tmp_path).state_dict()
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())


def test_the_head_is_that_of_the_seed(folder):
    fresh = build_encoder(SMALL, L, init=5)
    model = imported(folder, F32, seed=5)
    assert torch.equal(model.head.weight, fresh.head.weight) and not model.head.bias.any()
    assert not torch.equal(model.wte.weight, fresh.wte.weight)
    assert not torch.equal(imported(folder, F32, seed=6).head.weight, fresh.head.weight)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gpt2"}, "model_type = gpt2: only roberta, xlm-roberta, camembert, bert"),
        ({"hidden_act": "gelu_new"}, "hidden_act = gelu_new: gptlab's encoder has no such form, only gelu"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = relative_key"),
        ({"is_decoder": True}, "is_decoder = True"),
        ({"num_attention_heads": 5}, "must be divisible"),
        ({"max_position_embeddings": 2}, "model.block_size = 0"),
    ],
)
def test_what_the_encoder_cannot_be_is_refused(changes, sentence, folder):
    edit_config(folder, **changes)
    with pytest.raises(HubError, match=sentence):
        read_encoder(folder, 0)


def test_weights_of_another_model_are_refused(folder):
    stored = load_file(folder / "model.safetensors")
    lost = "encoder.layer.1.output.dense.bias"
    for tensors, sentence in (
        ({name: tensor for name, tensor in stored.items() if name != lost}, f"lacks {lost}"),
        (stored | {"encoder.layer.2.output.dense.bias": torch.zeros(32)}, "no place .* encoder.layer.2"),
        (stored | {lost: torch.zeros(31)}, r"has shape \[31\], not \[32\]"),
        (stored | {lost: torch.zeros(32, dtype=torch.int8)}, "quantised"),
        (stored | {f"roberta.{lost}": torch.zeros(32)}, "stored twice"),
    ):
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(HubError, match=sentence):
            imported(folder)


def test_nothing_there(tmp_path, monkeypatch):
    with pytest.raises(HubError, match="has no config.json"):
        read_encoder(tmp_path, 0)
    with pytest.raises(HubError, match="no Hugging Face id either"):
        read_encoder("no/such/folder", 0)

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(HubError, match="could not be fetched .* no route to host"):
        read_encoder("roberta-base", 0)


def test_an_id_is_downloaded_and_its_form_looked_at_first(folder, monkeypatch):
    asked: list[list[str]] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    config, _, _ = read_encoder("roberta-base", 0)
    assert config.n_layer == 2 and asked[0] == ["config.json"] and "model.safetensors" in asked[1]
    asked.clear()
    edit_config(folder, model_type="t5")
    with pytest.raises(HubError, match="model_type = t5"):
        read_encoder("t5-small", 0)
    assert asked == [["config.json"]]

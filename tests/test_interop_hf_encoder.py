"""Import of encoders from Hugging Face: transformers' hidden states and gradients, files of all kinds, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model_encoder import F32, LENGTHS, SMALL, L, T, V, by_torch, documents, gradients, multi_labels, shaken
from torch import Tensor

from gptlab.errors import HubError
from gptlab.interop.hf_encoder import encoder_names, read_encoder
from gptlab.model.encoder import Encoder, build_encoder

# -- the same network as transformers' ------------------------------------------------------------------------------


def theirs(model_type: str, **changes: Any) -> torch.nn.Module:
    """A small RobertaModel or BertModel of transformers, in float64, with noise on every parameter."""
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
    config, position_offset, init = read_encoder(folder, seed)
    return build_encoder(config, L, dtype=dtype, init=init, position_offset=position_offset).eval()


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
            expected = torch.cat([their_grads[piece] for piece in encoder_names(name)])[: len(gradient)]
            torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("model_type", ["roberta", "bert"])
def test_float32_is_near_too(model_type, tmp_path):
    reference = theirs(model_type).float()
    reference.save_pretrained(tmp_path)
    tokens = documents(padding=reference.config.pad_token_id)
    states = imported(tmp_path, torch.float32).hidden(tokens, LENGTHS)
    real = torch.arange(T) < LENGTHS[:, None]
    torch.testing.assert_close(states[real], their_states(reference, tokens)[real], atol=1e-5, rtol=0)


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
    """The names in bert-base-uncased's files: gamma and beta in the norms, and a pretraining head."""
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
        ({"hidden_act": "gelu_new"}, "hidden_act = gelu_new: gptlab's encoder supports only gelu"),
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
        (
            stored | {"encoder.layer.2.output.dense.bias": torch.zeros(32)},
            "our encoder lacks: encoder.layer.2",
        ),
        (stored | {lost: torch.zeros(31)}, r"has shape \[31\], not \[32\]"),
        (stored | {lost: torch.zeros(32, dtype=torch.int8)}, "quantised"),
        (stored | {f"roberta.{lost}": torch.zeros(32)}, "stored twice"),
    ):
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(HubError, match=sentence):
            imported(folder)


def test_nothing_there(tmp_path, monkeypatch):
    with pytest.raises(HubError, match="config.json is missing"):
        read_encoder(tmp_path, 0)
    with pytest.raises(HubError, match="not a Hugging Face id"):
        read_encoder("no/such/folder", 0)

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(HubError, match="could not be downloaded .* no route to host"):
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

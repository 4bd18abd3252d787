"""Encoders of RoBERTa's and BERT's form from Hugging Face, as a shape and a function that copies weights in.

>>> config, position_offset, init = read_encoder("FacebookAI/roberta-base", seed=0)
>>> model = build_encoder(config, 4271, "cuda", init=init, position_offset=position_offset)
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from gptlab.config import Model
from gptlab.errors import HubError
from gptlab.interop.hf import Stored, copy_stored, download, model_shape, read_json, refuse_others, stored_tensors
from gptlab.model.encoder import Encoder, EncoderInit, initialise

# What files of these types, with or without a head, put before the names of the encoder's own parts.
_PREFIX = {"roberta": "roberta.", "xlm-roberta": "roberta.", "camembert": "roberta.", "bert": "bert."}

_PARTS = {
    "wte": ["word_embeddings"],
    "wpe": ["position_embeddings"],
    "token_type": ["token_type_embeddings"],
    "ln_emb": ["LayerNorm"],
    "attn.c_attn": ["attention.self.query", "attention.self.key", "attention.self.value"],
    "attn.c_proj": ["attention.output.dense"],
    "ln_1": ["attention.output.LayerNorm"],
    "mlp.c_fc": ["intermediate.dense"],
    "mlp.c_proj": ["output.dense"],
    "ln_2": ["output.LayerNorm"],
}

# What transformers takes for a setting that config.json leaves out, in all four types alike save the vocabulary.
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 1,
}

# Settings that change what is computed and that our encoder has in one form only; absent or null means this form.
_REQUIRED: dict[str, Any] = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
}


def _hf_names(name: str) -> list[str]:
    """Hugging Face's name of our parameter, without prefix; several are its equal pieces, first rows first."""
    layer = re.match(r"h\.(\d+)\.", name)
    part, kind = name.removeprefix(layer[0] if layer else "").rsplit(".", 1)
    where = f"encoder.layer.{layer[1]}." if layer else "embeddings."
    return [f"{where}{piece}.{kind}" for piece in _PARTS[part]]


def _encoder_config(folder: Path) -> tuple[Model, int, str]:
    """The shape of the encoder in a Hugging Face folder, its position offset and its prefix, from its config.json."""
    file = folder / "config.json"
    given = read_json(file)
    model_type = given.get("model_type")
    if model_type not in _PREFIX:
        raise HubError(f"{file}: model_type = {model_type}: only {', '.join(_PREFIX)} can be imported as encoders")
    for key, needed in _REQUIRED.items():
        value = needed if given.get(key) is None else given[key]
        if value != needed:
            raise HubError(f"{file}: {key} = {value}: gptlab's encoder has no such form, only {needed}")
    vocab_size = 50265 if model_type == "roberta" else 30522
    hf = _DEFAULTS | {"vocab_size": vocab_size} | {key: value for key, value in given.items() if value is not None}
    position_offset = 0 if model_type == "bert" else hf["pad_token_id"] + 1
    config = model_shape(
        file,
        hf["intermediate_size"],
        n_layer=hf["num_hidden_layers"],
        n_head=hf["num_attention_heads"],
        n_embd=hf["hidden_size"],
        block_size=hf["max_position_embeddings"] - position_offset,
        vocab_size=hf["vocab_size"],
        norm_eps=hf["layer_norm_eps"],
        mlp="gelu_erf",
        tied=False,
        dropout=hf["hidden_dropout_prob"],
    )
    return config, position_offset, _PREFIX[model_type]


def _encoder_filler(source: Path, stored: Stored, prefix: str, seed: int) -> EncoderInit:
    """A function that copies stored tensors into an encoder's body, each once, and initialises its head."""
    tensors: Stored = {}
    for name, read in stored.items():
        name = name.removeprefix(prefix)  # a file of the bare encoder has none
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")  # 2018's
        if not name.startswith(("embeddings.", "encoder.")) or name.endswith("_ids"):
            continue  # poolers and heads of other tasks, and the buffers of older files
        if name in tensors:
            raise HubError(f"{source}: {name} is stored twice")
        tensors[name] = read

    @torch.no_grad()
    def fill(model: Encoder) -> None:
        names = {name: _hf_names(name) for name, _ in model.named_parameters() if not name.startswith("head.")}
        expected = {piece for pieces in names.values() for piece in pieces}
        foreign, missing = tensors.keys() - expected, expected - tensors.keys()
        refuse_others(source, missing, foreign, "encoder")
        for name, parameter in model.named_parameters():
            if name not in names:
                initialise(name, parameter, seed)
                continue
            for part, piece in zip(parameter.chunk(len(names[name])), names[name], strict=True):
                tensor = tensors[piece]()
                if name == "token_type.weight":
                    tensor = tensor[:1]
                copy_stored(source, piece, tensor, part)

    return fill


def read_encoder(source: str | Path, seed: int) -> tuple[Model, int, EncoderInit]:
    """The encoder of a Hugging Face folder or id, of RoBERTa's, XLM-RoBERTa's, CamemBERT's or BERT's form.

    Its dropout is the file's `hidden_dropout_prob`, in attention too. Of token types the first one is kept; the pooler
    and the head, whatever they were trained for, stay behind.

    Args:
        source: a folder with a config.json, or an id such as `FacebookAI/roberta-base`.
        seed: initialises the head, as `Encoder.init_weights` would.

    Returns:
        The shape, the position offset, and the function that `build_encoder` takes as `fill`.

    Raises:
        HubError: nothing there, or nothing that can be imported, now; weights that are not that model's, when filling.
    """
    folder = Path(source).expanduser()
    if not folder.exists():
        folder = download(str(source), _encoder_config)
    config, position_offset, prefix = _encoder_config(folder)
    return config, position_offset, _encoder_filler(folder, stored_tensors(folder), prefix, seed)

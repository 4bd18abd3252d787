"""Import of RoBERTa and BERT encoders from Hugging Face: a shape, and a function that copies the weights.

>>> config, position_offset, init = read_encoder("FacebookAI/roberta-base", seed=0)
>>> model = build_encoder(config, 4271, "cuda", init=init, position_offset=position_offset)
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from gptlab.config import Model
from gptlab.data.tokenizer_files import read_folder
from gptlab.data.tokenizers import Tokenizer
from gptlab.errors import HubError
from gptlab.files import damaged
from gptlab.interop import files
from gptlab.model.encoder import Encoder, EncoderInit, initialise

# model_type -> prefix of the encoder's tensors in files of models with a head.
ENCODER_PREFIX = {
    "roberta": "roberta.",
    "xlm-roberta": "roberta.",
    "camembert": "roberta.",
    "bert": "bert.",
    "gptlab_classifier": "bert.",  # `export_classifier` writes it
}

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

# Defaults of transformers for settings that config.json leaves out. All four types share them, except vocab_size.
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

# Settings that change the computation. Our encoder has exactly these values; absent or null means the same.
_REQUIRED: dict[str, Any] = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
}


def encoder_names(name: str) -> list[str]:
    """Hugging Face's names of our parameter, without prefix. Several are slices of equal size along the rows."""
    layer = re.match(r"h\.(\d+)\.", name)
    part, kind = name.removeprefix(layer[0] if layer else "").rsplit(".", 1)
    where = f"encoder.layer.{layer[1]}." if layer else "embeddings."
    return [f"{where}{piece}.{kind}" for piece in _PARTS[part]]


def _encoder_config(folder: Path) -> tuple[Model, int, str]:
    """Shape, position offset and tensor prefix of the encoder in a Hugging Face folder, from its config.json."""
    file = folder / "config.json"
    given = files.read_hub_json(file)
    with damaged(file, HubError):
        return _shape_offset_prefix(file, given)


def _shape_offset_prefix(file: Path, given: dict[str, Any]) -> tuple[Model, int, str]:
    model_type = given.get("model_type")
    if not isinstance(model_type, str) or model_type not in ENCODER_PREFIX:
        known = ", ".join(ENCODER_PREFIX)
        raise HubError(f"{file}: model_type = {model_type}: only {known} can be imported as encoders")
    for key, needed in _REQUIRED.items():
        value = needed if given.get(key) is None else given[key]
        if value != needed:
            raise HubError(f"{file}: {key} = {value}: gptlab's encoder supports only {needed}")
    vocab_size = 50265 if model_type == "roberta" else 30522
    hf = _DEFAULTS | {"vocab_size": vocab_size} | {key: value for key, value in given.items() if value is not None}
    position_offset = 0 if model_type == "bert" else hf["pad_token_id"] + 1
    if model_type == "gptlab_classifier":
        position_offset = hf["position_offset"]
    config = files.imported_shape(
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
    return config, position_offset, ENCODER_PREFIX[model_type]


def _encoder_init(source: Path, stored: files.Stored, prefix: str, seed: int) -> EncoderInit:
    """A function that copies stored tensors into an encoder's body and initialises its head from a seed."""
    tensors: files.Stored = {}
    for name, read in files.unwrapped(source, stored).items():
        name = name.removeprefix(prefix)  # absent in files of an encoder without a head
        # names in the files of 2018
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if not name.startswith(("embeddings.", "encoder.")) or name.endswith("_ids"):
            continue  # poolers, heads of other tasks, and buffers of older files
        if name in tensors:
            raise HubError(f"{source}: {name} is stored twice")
        tensors[name] = read

    @torch.no_grad()
    def init(model: Encoder) -> None:
        names = {name: encoder_names(name) for name, _ in model.named_parameters() if not name.startswith("head.")}
        expected = {piece for pieces in names.values() for piece in pieces}
        foreign, missing = tensors.keys() - expected, expected - tensors.keys()
        files.check_tensor_names(source, missing, foreign, "encoder")
        for name, parameter in model.named_parameters():
            if name not in names:
                initialise(name, parameter, seed)
                continue
            for part, piece in zip(parameter.chunk(len(names[name])), names[name], strict=True):
                tensor = tensors[piece]()
                if name == "token_type.weight" and tensor.dim():
                    tensor = tensor[:1]
                files.copy_stored(source, piece, tensor, part)

    return init


def _locate(source: str | Path) -> Path:
    """The folder of a Hugging Face folder or id, which is downloaded."""
    folder = Path(os.path.expanduser(source))
    return folder if os.path.exists(folder) else files.download(str(source), _encoder_config)


def encoder_tokenizer(source: str | Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder or id; None if it has no tokenizer.json, nor vocab.json and merges.txt."""
    return read_folder(_locate(source), Path(os.path.abspath(source)).name)


def read_encoder(source: str | Path, seed: int) -> tuple[Model, int, EncoderInit]:
    """The encoder of a Hugging Face folder or id: RoBERTa, XLM-RoBERTa, CamemBERT or BERT.

    Dropout is the file's `hidden_dropout_prob` everywhere, also in attention. Only the first token type is imported.
    The pooler and the head are not imported.

    Args:
        source: a folder with a config.json, or an id such as `FacebookAI/roberta-base`.
        seed: initialises the head, as in `Encoder.init_weights`.

    Returns:
        The shape, the position offset, and the function that `build_encoder` takes as `init`.

    Raises:
        HubError: there is no model, or one that cannot be imported. The returned function also raises it, for weights
            that do not belong to the model.
    """
    folder = _locate(source)
    config, position_offset, prefix = _encoder_config(folder)
    return config, position_offset, _encoder_init(folder, files.stored_weights(folder), prefix, seed)

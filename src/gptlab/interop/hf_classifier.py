"""Export of a classifier as a Hugging Face folder: the model, and a tokenizer that adds its special tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gptlab.data.tokenizer_files import special_ids
from gptlab.data.tokenizers import Tokenizer
from gptlab.interop import files
from gptlab.interop.hf import REMOTE
from gptlab.interop.hf_encoder import encoder_names
from gptlab.model.encoder import Encoder
from gptlab.progress import Count, tell_nobody


def export_classifier(
    model: Encoder,
    tokenizer: Tokenizer,
    folder: str | Path,
    labels: Sequence[str] | None = None,
    multi: bool | None = None,
    more: Mapping[str, bytes] | None = None,
    written: Count = tell_nobody,
) -> None:
    """Write a classifier as a folder that `AutoModelForSequenceClassification` loads with `trust_remote_code`.

    Args:
        model: the parameters are written in their own dtype, or in the widest of several.
        tokenizer: as in the run; the special tokens around a document are added.
        folder: new or empty; it appears complete or not at all.
        labels: names of the model's outputs, in order; None numbers them.
        multi: whether a document has several labels; None if that is not known.
        more: further files by name, such as README.md.
        written: called with the bytes of weights that are written, of all.

    Raises:
        HubError: the folder is not empty.
    """
    config, n_labels = model.config, model.head.weight.shape[0]
    dtype = functools.reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()})
    names = list(labels or (f"LABEL_{i}" for i in range(n_labels)))[:n_labels]
    specials = special_ids(tokenizer)
    problem = "multi_label_classification" if multi or n_labels == 1 else "single_label_classification"
    code = REMOTE / "modeling_gptlab_classifier.py"
    settings = {
        "architectures": ["GPTLabForSequenceClassification"],
        "model_type": "gptlab_classifier",
        "auto_map": {
            "AutoConfig": f"{code.stem}.GPTLabClassifierConfig",
            "AutoModelForSequenceClassification": f"{code.stem}.GPTLabForSequenceClassification",
        },
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "intermediate_size": config.mlp_hidden,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "max_position_embeddings": config.block_size + model.position_offset,
        "position_offset": model.position_offset,
        "type_vocab_size": 1,
        "layer_norm_eps": config.norm_eps,
        "pad_token_id": specials["pad"] if specials["pad"] < config.vocab_size else None,
        "problem_type": None if multi is None else problem,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        head = name.startswith("head.")
        pieces = [name.replace("head.", "classifier.")] if head else [f"bert.{n}" for n in encoder_names(name)]
        for hf_name, piece in zip(pieces, parameter.detach().to(dtype).chunk(len(pieces)), strict=True):
            tensors[hf_name] = piece.contiguous()
    with files.export_folder(folder) as temporary:
        files.write_hub_json(temporary / "config.json", settings)
        _write_tokenizer(tokenizer, specials, config.block_size, temporary)
        (temporary / code.name).write_bytes(code.read_bytes())
        files.write_more(temporary, more)
        files.write_safetensors(temporary / "model.safetensors", tensors, {"format": "pt"}, written)


def _write_tokenizer(tokenizer: Tokenizer, specials: Mapping[str, int], block_size: int, folder: Path) -> None:
    """tokenizer.json with the special tokens at both ends of a document, and the settings of AutoTokenizer."""
    described: dict[str, Any] = tokenizer.hf_json()
    added = {token["id"]: token["content"] for token in described.get("added_tokens") or []}
    for kind in ("cls", "sep", "pad"):
        if specials[kind] not in added:
            added[specials[kind]] = f"<|{kind}|>"
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            token = {"id": specials[kind], "content": f"<|{kind}|>", **flags, "special": True}
            described["added_tokens"] = [*(described.get("added_tokens") or []), token]
    cls, sep = added[specials["cls"]], added[specials["sep"]]

    def special(token: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": 0}}

    def text(name: str) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": 0}}

    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special(cls), text("A"), special(sep)],
        "pair": [special(cls), text("A"), special(sep), text("B"), special(sep)],
        "special_tokens": {
            token: {"id": token, "ids": [specials[kind]], "tokens": [token]}
            for token, kind in ((cls, "cls"), (sep, "sep"))
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "padding_side": "right",
        "model_input_names": ["input_ids", "attention_mask"],
        "cls_token": cls,
        "sep_token": sep,
        "pad_token": added[specials["pad"]],
    }
    files.write_hub_json(folder / "tokenizer.json", described)
    files.write_hub_json(folder / "tokenizer_config.json", settings)

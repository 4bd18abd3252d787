"""Import of a model from a Hugging Face folder or id, or a nanoGPT checkpoint: the format is detected."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptlab.config import Model
from gptlab.errors import HubError
from gptlab.interop.files import download, read_hub_json
from gptlab.interop.hf import Init, hf_config, hf_shape_and_type, import_hf
from gptlab.interop.nanogpt import import_nanogpt

# Ids without an owner. A local folder of the same name that is not a model, such as gptlab's gpt2/, is ignored.
GPT2_IDS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def _locate(source: str | Path) -> Path:
    """The path of a nanoGPT checkpoint file or a Hugging Face folder. A Hugging Face id is downloaded."""
    path = Path(os.path.expanduser(source))
    if not os.path.exists(path) or (str(source) in GPT2_IDS and not (path / "config.json").is_file()):
        return download(str(source), hf_config)
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "ckpt.pt").is_file():  # nanoGPT's out_dir
            return path / "ckpt.pt"
        for file in sorted([*path.glob("model_*.pt"), *path.glob("*.ckpt")])[-1:]:
            raise HubError(f"{path} is a folder of checkpoints: name one of them, such as {file}")
        raise HubError(f"{path} is neither a Hugging Face model (config.json) nor nanoGPT's output (ckpt.pt)")
    return path


def read_source(source: str | Path) -> tuple[Model, Init]:
    """The model of a Hugging Face folder or id, or of a nanoGPT checkpoint.

    Args:
        source: a folder with a config.json, a folder with a ckpt.pt, a nanoGPT checkpoint file, or a Hugging Face id.

    Returns:
        The shape, and the function that `build_model` takes as `init`.

    Raises:
        HubError: there is no model, or one that cannot be imported.
    """
    path = _locate(source)
    return import_hf(path) if path.is_dir() else import_nanogpt(path)


# sha256 of GPT-2's 50257 tokens, ordered by id, in the byte-level alphabet, joined by line feeds.
_GPT2_VOCABULARY = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"


def _is_gpt2(described: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json gives GPT-2's ids for every text: same vocabulary, same splitting into words."""
    try:
        vocabulary = dict(described["model"].get("vocab", {})) if described["model"].get("type") == "BPE" else {}
        vocabulary |= {token["content"]: token["id"] for token in described.get("added_tokens", [])}
        tokens = "\n".join(sorted(vocabulary, key=vocabulary.__getitem__))
        cutting = dict(described.get("pre_tokenizer") or {})
    except (LookupError, TypeError, AttributeError, ValueError):
        return False  # the tokenizer is refused, in a sentence, when it is made
    return (
        hashlib.sha256(tokens.encode()).hexdigest() == _GPT2_VOCABULARY
        and sorted(vocabulary.values()) == list(range(len(vocabulary)))
        and described.get("normalizer") is None
        and (cutting.get("type"), cutting.get("add_prefix_space")) == ("ByteLevel", False)
        and cutting.get("use_regex", True)
    )


def tokenizer_spec(source: str | Path) -> dict[str, Any] | None:
    """The specification of a model's tokenizer, for `load_tokenizer`; None if the model comes without a tokenizer.

    Args:
        source: see `read_source`. nanoGPT's checkpoints hold no tokenizer; a vocabulary of 50257 or 50304 (padded)
            means GPT-2's.
    """
    path = _locate(source)
    if path.is_file():
        return {"kind": "gpt2"} if import_nanogpt(path)[0].vocab_size in (50257, 50304) else None
    file = path / "tokenizer.json"
    if not file.is_file():
        config, model_type = hf_shape_and_type(path)
        return {"kind": "gpt2"} if model_type == "gpt2" and config.vocab_size == 50257 else None
    described = read_hub_json(file)
    return {"kind": "gpt2"} if _is_gpt2(described) else {"kind": "hf", "name": Path(source).name, "json": described}

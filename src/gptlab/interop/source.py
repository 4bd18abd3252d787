"""Import of a model from a Hugging Face folder or id, or a nanoGPT checkpoint: the format is detected."""

from __future__ import annotations

import os
from pathlib import Path

from gptlab.config import Model
from gptlab.data.tokenizer_files import read_folder
from gptlab.data.tokenizers import Tokenizer, load_tokenizer
from gptlab.errors import HubError
from gptlab.interop.files import download
from gptlab.interop.hf import Init, hf_config, hf_shape_and_type, import_hf
from gptlab.interop.nanogpt import import_nanogpt

# Files of tokenizers that are not read, and of half of one.
_OTHER_TOKENIZERS = ("vocab.*", "merges.txt", "*.model", "*.tiktoken")

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


def source_tokenizer(source: str | Path) -> Tokenizer | None:
    """The tokenizer of a model; None if nothing tells what its ids stand for.

    Args:
        source: see `read_source`. nanoGPT's checkpoints hold no tokenizer; a vocabulary of 50257 or 50304 (padded)
            means GPT-2's. So does a GPT-2 of 50257 ids in a folder that says nothing else.

    Raises:
        DataError: the folder has a tokenizer that cannot be read.
    """
    path = _locate(source)
    if path.is_file():
        return load_tokenizer({"kind": "gpt2"}) if import_nanogpt(path)[0].vocab_size in (50257, 50304) else None
    if tokenizer := read_folder(path, Path(os.path.abspath(source)).name):
        return tokenizer
    shape, model_type = hf_shape_and_type(path)
    silent = not [file for pattern in _OTHER_TOKENIZERS for file in path.glob(pattern)]
    return load_tokenizer({"kind": "gpt2"}) if model_type == "gpt2" and shape.vocab_size == 50257 and silent else None

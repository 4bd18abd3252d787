"""Import of the checkpoints of nanoGPT and build-nanogpt, also within one of Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gptlab.config import Model
from gptlab.errors import HubError
from gptlab.interop import files
from gptlab.interop.hf import Init, gpt_names, make_init

_SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def import_nanogpt(file: str | Path) -> tuple[Model, Init]:
    """The model of nanoGPT's `ckpt.pt` or build-nanogpt's `model_05000.pt`, as a shape and an init for `build_model`.

    The MLP uses the exact GELU, as nanoGPT has since February 2023, where the settings have a `bias`. The models of
    nanoGPT before 2023 and of build-nanogpt have no such setting, all biases and GELU's tanh form. Optimizer state and
    other settings are not imported, and dropout is 0 (see `hf_config`).

    Raises:
        HubError: another file, or one that holds Python objects which only a full unpickling would load.
    """
    file = Path(file, "ckpt.pt") if Path(file).is_dir() else Path(file)  # nanoGPT's out_dir
    checkpoint = files.safe_torch_load(file)
    shape = _shape(file, checkpoint)
    stored = gpt_names(file, files.stored_state_dict(file, checkpoint), "gpt2")
    settings = {"bias": shape["bias"], "mlp": "gelu_erf"} if "bias" in shape else {"bias": True, "mlp": "gelu"}
    head, embedding = (stored.get(name) for name in ("lm_head.weight", "transformer.wte.weight"))
    if head is not None and embedding is not None:  # nanoGPT tied them in January 2023
        settings["tied"] = head().dtype == embedding().dtype and torch.equal(head(), embedding())
    config = files.imported_shape(file, 0, **settings, **{key: shape[key] for key in _SHAPE})
    return config, make_init(file, stored, "gpt2", conv1d=False)


def _shape(file: Path, checkpoint: Any) -> Mapping[str, Any]:
    """The settings of a checkpoint that describe the model: nanoGPT's, build-nanogpt's, or those Lightning recorded."""
    if not isinstance(checkpoint, dict) or not ("model" in checkpoint or "state_dict" in checkpoint):
        raise HubError(
            f"{file} is not a nanoGPT checkpoint: it has neither 'model' and 'model_args' (nanoGPT), nor 'model' and "
            "'config' (build-nanogpt), nor 'state_dict' and 'hyper_parameters' (Lightning)"
        )
    found = [checkpoint.get(key) for key in ("model_args", "config", "hyper_parameters")]
    found += [inner for outer in found[2:] if isinstance(outer, dict) for inner in outer.values()]
    shapes = [settings for settings in found if isinstance(settings, dict) and set(_SHAPE) & settings.keys()]
    if not shapes:
        raise HubError(
            f"{file} does not say the shape of its model ({', '.join(_SHAPE)}): save its weights as pytorch_model.bin "
            "beside a config.json of model_type gpt2, and import that folder with `gptlab import hf`"
        )
    if absent := [key for key in _SHAPE if key not in shapes[0]]:
        raise HubError(f"{file}: its settings lack {', '.join(absent)}")
    return shapes[0]

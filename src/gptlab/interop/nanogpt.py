"""Import of nanoGPT's checkpoints."""

from __future__ import annotations

from pathlib import Path

from gptlab.config import Model
from gptlab.errors import HubError
from gptlab.interop import files
from gptlab.interop.hf import Init, make_init


def import_nanogpt(file: str | Path) -> tuple[Model, Init]:
    """The model of a nanoGPT checkpoint (`ckpt.pt`), as a shape and a function for `build_model`.

    The MLP uses the exact GELU, as nanoGPT has since February 2023. Optimizer state and settings are not imported, and
    dropout is 0 (see `hf_config`).

    Raises:
        HubError: not a nanoGPT checkpoint, or one that holds Python objects which only a full unpickling would load.
    """
    file = Path(file)
    checkpoint = files.safe_torch_load(file)
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise HubError(f"{file} is not a nanoGPT checkpoint: 'model' or 'model_args' is missing")
    arguments = checkpoint["model_args"]
    if not isinstance(arguments, dict):
        raise HubError(f"{file}: its model_args are no dictionary")
    shape = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
    absent = [key for key in shape if key not in arguments]
    if absent:
        raise HubError(f"{file}: its model_args lack {', '.join(absent)}")
    config = files.imported_shape(file, 0, mlp="gelu_erf", **{key: arguments[key] for key in shape})
    return config, make_init(file, files.stored_state_dict(file, checkpoint["model"]), "gpt2", conv1d=False)

"""Models of nanoGPT's checkpoints."""

from __future__ import annotations

from pathlib import Path

from gptlab.config import Model
from gptlab.errors import HubError
from gptlab.interop.hf import Init, make_init, model_shape, plain_tensors, torch_load


def import_nanogpt(file: str | Path) -> tuple[Model, Init]:
    """The model of a nanoGPT checkpoint (`ckpt.pt`), as a shape and a function for `build_model`.

    Its MLP is the exact GELU, as in nanoGPT since February 2023. Optimizer state and settings stay behind, and
    dropout is 0 (see `hf_config`).

    Raises:
        HubError: not nanoGPT's, or holding what only a full unpickling would load.
    """
    file = Path(file)
    checkpoint = torch_load(file)
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise HubError(f"{file} is no nanoGPT checkpoint: it has no 'model' and 'model_args'")
    arguments = checkpoint["model_args"]
    shape = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
    absent = [key for key in shape if key not in arguments]
    if absent:
        raise HubError(f"{file}: its model_args lack {', '.join(absent)}")
    config = model_shape(file, 0, mlp="gelu_erf", **{key: arguments[key] for key in shape})
    return config, make_init(file, plain_tensors(file, checkpoint["model"]), "gpt2", conv1d=False)

"""Weights from and to other houses: Hugging Face's GPT-2 and Llama, and nanoGPT's checkpoints.

A model has one Hugging Face form, by its parts: learned positions, LayerNorm and a plain MLP are `GPT2LMHeadModel`;
rotary positions, RMSNorm and SwiGLU are `LlamaForCausalLM`. Both directions go through one table of names
(`_hf_names`), and none of it needs transformers: a model folder is JSON and safetensors.

Reading gives a shape and a function that copies weights in, one tensor at a time, as `build_model` takes them:

    >>> config, fill = read_source("openai-community/gpt2")
    >>> model = build_model(config, "cuda", init=init)
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping, Set
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptlab.config import Model
from gptlab.errors import HubError
from gptlab.model.gpt import GPT

Init = Callable[[GPT], None]
Stored = dict[str, Callable[[], Tensor]]  # name of a stored tensor -> a function that reads it


# -- names and shapes on both sides ---------------------------------------------------------------------------------

_PREFIX = {"gpt2": "transformer.", "llama": "model."}

_LLAMA_PARTS = {
    "wte": ["embed_tokens"],
    "ln_f": ["norm"],
    "ln_1": ["input_layernorm"],
    "ln_2": ["post_attention_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.c_proj": ["self_attn.o_proj"],
    "mlp.c_gate": ["mlp.gate_proj"],
    "mlp.c_fc": ["mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}

# Buffers that older files carry beside the parameters: causal masks and rotary frequencies.
_BUFFER = re.compile(r"\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")


def _hf_names(name: str, model_type: str) -> list[str]:
    """What Hugging Face calls our parameter; several names are its equal pieces, from the first rows to the last."""
    if name.startswith("lm_head."):
        return [name]
    if model_type == "gpt2":  # our names are GPT-2's
        return [f"transformer.{name}"]
    layer = re.match(r"h\.(\d+)\.", name)
    part, kind = name.removeprefix(layer[0] if layer else "").rsplit(".", 1)
    where = f"model.layers.{layer[1]}." if layer else "model."
    return [f"{where}{piece}.{kind}" for piece in _LLAMA_PARTS[part]]


def _is_conv1d(hf_name: str, model_type: str) -> bool:
    """GPT-2's linear layers are stored input first (its `Conv1D`), everyone else's output first."""
    return model_type == "gpt2" and re.search(r"\.(c_attn|c_fc|c_proj)\.weight$", hf_name) is not None


# -- export ---------------------------------------------------------------------------------------------------------

_GPT2_ACTIVATIONS = {"gelu": "gelu_new", "gelu_erf": "gelu", "relu2": "relu2"}


def _form(config: Model) -> str:
    """The `model_type` that holds exactly this model. Raises HubError naming the settings that none has."""
    if config.position == "learned":
        model_type, norm, mlps = "gpt2", "layernorm", list(_GPT2_ACTIVATIONS)
    else:
        model_type, norm, mlps = "llama", "rmsnorm", ["swiglu"]
    fits = {"norm": config.norm == norm, "mlp": config.mlp in mlps, "qk_norm": not config.qk_norm}
    misfits = [f"model.{key} = {str(getattr(config, key)).lower()}" for key, fit in fits.items() if not fit]
    if misfits:
        raise HubError(
            f"{' and '.join(misfits)} with model.position = {config.position}: no Hugging Face form. There are two: "
            "learned with layernorm and gelu, gelu_erf or relu2 (GPT-2), and rope with rmsnorm and swiglu (Llama); "
            "neither has qk_norm"
        )
    return model_type


def _config_json(config: Model, model_type: str, dtype: torch.dtype, eot: int | None) -> dict[str, Any]:
    shared = {
        "architectures": ["GPT2LMHeadModel" if model_type == "gpt2" else "LlamaForCausalLM"],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "initializer_range": 0.02,
        "bos_token_id": eot,  # null where there is none: absent would mean 50256 (GPT-2) or 1 and 2 (Llama)
        "eos_token_id": eot,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),  # its name before transformers 5
    }
    if model_type == "gpt2":
        return shared | {
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "n_positions": config.block_size,
            "n_inner": config.mlp_hidden,
            "activation_function": _GPT2_ACTIVATIONS[config.mlp],
            "layer_norm_epsilon": config.norm_eps,
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
        }
    return shared | {
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head,
        "hidden_size": config.n_embd,
        "head_dim": config.head_size,
        "max_position_embeddings": config.block_size,
        "intermediate_size": config.mlp_hidden,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": config.dropout,
        "rope_theta": config.rope_theta,  # transformers 4 reads this, 5 the next
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


def _hf_tensors(model: GPT, model_type: str) -> dict[str, Tensor]:
    """The weights under Hugging Face's names, in the dtype they have; what is tied is left out, as its own files do."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        pieces = _hf_names(name, model_type)
        for hf_name, piece in zip(pieces, parameter.detach().chunk(len(pieces)), strict=True):
            tensors[hf_name] = (piece.t() if _is_conv1d(hf_name, model_type) else piece).contiguous()
        if model_type == "gpt2" and not model.config.bias and name.startswith(("h.", "ln_f.")):
            tensors[pieces[0].replace(".weight", ".bias")] = parameter.new_zeros(parameter.shape[0]).detach()
    return tensors


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tokenizer(tokenizer: Any, block_size: int, folder: Path) -> None:
    """tokenizer.json and the tokenizer_config.json that makes AutoTokenizer take it as it is."""
    described = tokenizer.hf_json()
    added = {token["id"]: token["content"] for token in described.get("added_tokens", [])}
    # A class named after the model would rebuild the tokenizer from its vocabulary and drop the rest of the file.
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
    settings |= {"clean_up_tokenization_spaces": False, "add_prefix_space": False}
    if tokenizer.eot in added:
        settings |= {"bos_token": added[tokenizer.eot], "eos_token": added[tokenizer.eot]}
    _write_json(folder / "tokenizer.json", described)
    _write_json(folder / "tokenizer_config.json", settings)


def export_hf(model: GPT, tokenizer: Any, folder: str | Path) -> None:
    """Write a model as a Hugging Face folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    The logits are the same. What Hugging Face has no place for is left behind: `document_attention`, which is how
    the data was read, and in Llama the dropout outside attention. GPT-2 always has biases: a model without gets zeros.

    Args:
        model: its parameters are written in the dtype they have.
        tokenizer: a gptlab tokenizer (`eot`, `hf_json()`), or None to write the model alone.
        folder: new or empty; it appears complete or not at all.

    Raises:
        HubError: the model has no such form, or the folder has something in it.
    """
    folder = Path(folder).absolute()
    model_type = _form(model.config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise HubError(f"{folder} exists and is not empty: export into a new folder")
    eot = None if tokenizer is None else tokenizer.eot
    settings = _config_json(model.config, model_type, model.wte.weight.dtype, eot)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
    temporary.mkdir(parents=True)
    try:
        _write_json(temporary / "config.json", settings)
        _write_json(temporary / "generation_config.json", {"bos_token_id": eot, "eos_token_id": eot})
        if tokenizer is not None:
            _write_tokenizer(tokenizer, model.config.block_size, temporary)
        save_file(_hf_tensors(model, model_type), temporary / "model.safetensors", metadata={"format": "pt"})
        temporary.replace(folder)  # an empty folder gives way to it
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# -- import from Hugging Face ---------------------------------------------------------------------------------------

# What transformers takes for a setting that config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    "llama": {
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
}

# Settings that change what is computed and that our model has in one form only.
_REQUIRED: dict[str, dict[str, Any]] = {
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "quantization_config": None,
    },
    "llama": {
        "hidden_act": "silu",
        "partial_rotary_factor": 1.0,
        "sliding_window": None,
        "quantization_config": None,
    },
}

# gelu_pytorch_tanh is another implementation of gelu_new's formula; the other tanh forms round its constants.
_ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf", "relu2": "relu2"}


def model_shape(file: Path, mlp_width: int, **settings: Any) -> Model:
    """A validated shape, with the width left at 0 where that means the same."""
    try:
        config = Model(mlp_width=mlp_width, **settings)
    except ValidationError as error:
        problem = error.errors()[0]
        what = f"model.{problem['loc'][0]} = {problem['input']}: " if problem["loc"] else ""
        raise HubError(f"{file}: no shape that gptlab can build: {what}{problem['msg']}") from None
    default = config.model_copy(update={"mlp_width": 0})
    return default if default.mlp_hidden == config.mlp_hidden else config


def read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HubError(f"{file.parent} is no Hugging Face model: it has no {file.name}") from None
    except (OSError, ValueError) as error:
        raise HubError(f"{file} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise HubError(f"{file} cannot be read: it holds no JSON object")
    return value


def hf_config(folder: str | Path) -> Model:
    """The shape of the model in a Hugging Face folder, from its config.json.

    Dropout is a matter of training and not of shape: it is 0 here, whatever the file says.

    Raises:
        HubError: a type other than GPT-2 and Llama, or a setting that our model cannot represent exactly.
    """
    return _hf_config(Path(folder))[0]


def _hf_config(folder: Path) -> tuple[Model, str]:
    file = folder / "config.json"
    given = read_json(file)
    model_type = given.get("model_type")
    if model_type not in _DEFAULTS:
        raise HubError(f"{file}: model_type = {model_type}: only gpt2 and llama can be imported")

    def refuse(key: str, value: Any, needed: Any) -> None:
        if value != needed:
            raise HubError(f"{file}: {key} = {value}: gptlab's model has no such form, only {needed}")

    for key, needed in _REQUIRED[model_type].items():
        refuse(key, needed if given.get(key) is None else given[key], needed)
    hf = _DEFAULTS[model_type] | given
    if model_type == "gpt2":
        if hf["activation_function"] not in _ACTIVATIONS:
            refuse("activation_function", hf["activation_function"], ", ".join(_ACTIVATIONS))
        return model_shape(
            file,
            hf["n_inner"] or 0,
            n_layer=hf["n_layer"],
            n_head=hf["n_head"],
            n_embd=hf["n_embd"],
            block_size=hf["n_positions"],
            vocab_size=hf["vocab_size"],
            mlp=_ACTIVATIONS[hf["activation_function"]],
            norm_eps=hf["layer_norm_epsilon"],
            tied=hf["tie_word_embeddings"],
        ), model_type
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    refuse("num_key_value_heads", hf.get("num_key_value_heads") or heads, heads)
    refuse("head_dim", hf.get("head_dim") or width // heads, width // heads)
    refuse("mlp_bias", hf["mlp_bias"], hf["attention_bias"])  # ours has all biases or none
    refuse("rope_type", rope.get("rope_type", rope.get("type", "default")), "default")
    refuse("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0)
    return model_shape(
        file,
        hf["intermediate_size"],
        n_layer=hf["num_hidden_layers"],
        n_head=heads,
        n_embd=width,
        block_size=hf["max_position_embeddings"],
        vocab_size=hf["vocab_size"],
        position="rope",
        norm="rmsnorm",
        norm_eps=hf["rms_norm_eps"],
        mlp="swiglu",
        bias=hf["attention_bias"],
        tied=hf["tie_word_embeddings"],
        rope_theta=rope.get("rope_theta") or hf.get("rope_theta") or 10000.0,
    ), model_type


def _stored_safetensors(files: Iterable[Path]) -> Stored:
    stored: Stored = {}
    for file in files:
        try:
            handle = safe_open(file, framework="pt")
        except FileNotFoundError:
            raise HubError(f"{file} is missing: the index names it") from None
        except (SafetensorError, OSError) as error:
            raise HubError(f"{file} cannot be read: {error}") from None
        for name in handle.keys():  # noqa: SIM118  (no dictionary)
            if name in stored:
                raise HubError(f"{file}: {name} is stored in another file too")
            stored[name] = partial(handle.get_tensor, name)
    return stored


def torch_load(file: Path) -> Any:
    """A file of torch.save, of tensors and plain values only. Nothing is unpickled that could run code."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise HubError(
            f"{file} is not loaded: it is damaged or a pickle of Python objects besides tensors and plain values, that "
            f"could run code. torch says: {str(error).splitlines()[0]}"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise HubError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None


def stored_tensors(folder: Path) -> Stored:
    """The weights of a folder: model.safetensors, its shards, or else pytorch_model.bin."""
    if (folder / "model.safetensors").is_file():
        return _stored_safetensors([folder / "model.safetensors"])
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        if any(Path(shard).name != shard for shard in shards):
            raise HubError(f"{index} names files outside its folder")
        return _stored_safetensors(folder / shard for shard in shards)
    if (folder / "pytorch_model.bin").is_file():
        return plain_tensors(folder / "pytorch_model.bin", torch_load(folder / "pytorch_model.bin"))
    raise HubError(f"{folder} has no weights: neither model.safetensors, nor an index of shards, nor pytorch_model.bin")


def plain_tensors(file: Path, state: Any) -> Stored:
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise HubError(f"{file} holds no dictionary of tensors")
    return {name: partial(state.__getitem__, name) for name in state}


def make_init(source: Path, stored: Stored, model_type: str, conv1d: bool) -> Init:
    """A function that copies stored tensors into a model, each parameter once and from everything that is stored."""
    prefix = _PREFIX[model_type]
    tensors: Stored = {}
    for name, read in stored.items():
        name = name.removeprefix("_orig_mod.")  # torch.compile's
        # A file of the bare trunk, such as GPT-2's original upload, has no prefix.
        name = name if name.startswith((prefix, "lm_head.")) else prefix + name
        if name in tensors:
            raise HubError(f"{source}: {name} is stored twice")
        if not _BUFFER.search(name):
            tensors[name] = read

    @torch.no_grad()
    def fill(model: GPT) -> None:
        names = {name: _hf_names(name, model_type) for name, _ in model.named_parameters()}
        expected = {piece for pieces in names.values() for piece in pieces}
        foreign, missing = tensors.keys() - expected, expected - tensors.keys()
        if model.config.tied and "lm_head.weight" in foreign:
            [embedding] = names["wte.weight"]
            if embedding in tensors and not torch.equal(tensors["lm_head.weight"](), tensors[embedding]()):
                raise HubError(f"{source}: lm_head.weight differs from {embedding}, though the two are said to be tied")
            foreign.discard("lm_head.weight")
        refuse_others(source, missing, foreign, "model")
        for name, parameter in model.named_parameters():
            for part, piece in zip(parameter.chunk(len(names[name])), names[name], strict=True):
                tensor = tensors[piece]()
                if conv1d and _is_conv1d(piece, model_type):
                    part = part.t()
                copy_stored(source, piece, tensor, part)

    return fill


def refuse_others(source: Path, missing: Set[str], foreign: Set[str], ours: str) -> None:
    """Raise HubError where tensors are missing from a source, or it has others than our model does."""
    for problem, found in (("lacks", missing), (f"has no place in our {ours} for", foreign)):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise HubError(f"{source} {problem} {', '.join(sorted(found)[:3])}{more}")


def copy_stored(source: Path, name: str, tensor: Tensor, part: Tensor) -> None:
    """Copy a stored tensor into a parameter, or a part of one. Raises HubError where dtype or shape do not fit."""
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise HubError(f"{source}: {name} is stored as {tensor.dtype}: quantised weights are not imported")
    if tensor.shape != part.shape:
        raise HubError(f"{source}: {name} has shape {list(tensor.shape)}, not {list(part.shape)}")
    part.copy_(tensor)


def import_hf(folder: str | Path) -> tuple[Model, Init]:
    """The model of a Hugging Face folder, as a shape and a function for `build_model`.

    Raises:
        HubError: a model that is no GPT-2 or Llama as ours, now, or weights that are not that model's, when filling.
    """
    folder = Path(folder)
    config, model_type = _hf_config(folder)
    return config, make_init(folder, stored_tensors(folder), model_type, conv1d=True)


_TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"]
_WEIGHT_FILES = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]


def download(name: str, check: Callable[[Path], object] | None = None) -> Path:
    """The folder of a Hugging Face id such as `openai-community/gpt2`, downloaded to the hub's cache.

    `check` is given the folder with config.json alone; by default it is `hf_config`.

    Raises HubError where the id is not found or the network does not answer, and before the weights are fetched where
    the model cannot be imported.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.endswith((".pt", ".bin", ".safetensors")):
        raise HubError(f"{name}: no such file or folder, and no Hugging Face id either")
    from huggingface_hub import snapshot_download  # half a second, for those who download

    def fetch(*patterns: str) -> Path:
        try:
            return Path(snapshot_download(name, allow_patterns=list(patterns)))
        except Exception as error:  # its own errors, the network's and the disk's have no common base
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise HubError(
                f"{name} is no local folder, and could not be fetched from the Hugging Face hub. Check the id, the "
                f"network, and for a gated model your token (hf auth login). The hub says: {reason}"
            ) from None

    (check or hf_config)(fetch("config.json"))
    folder = fetch("config.json", *_TOKENIZER_FILES, *_WEIGHT_FILES)
    if any(folder.glob("*.safetensors")):
        return folder
    return fetch("config.json", *_TOKENIZER_FILES, "pytorch_model.bin")

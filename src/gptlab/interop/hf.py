"""Import and export of GPTs in Hugging Face's format.

A GPT with learned positions, LayerNorm and an MLP without a gate becomes a `GPT2LMHeadModel`; a GPT with rotary
positions, RMSNorm and SwiGLU becomes a `LlamaForCausalLM`, or a `Qwen3ForCausalLM` with QK norm. Every other GPT
becomes a `GPTLabForCausalLM`, whose code (`interop/remote/`) goes into the folder and is loaded with
`trust_remote_code=True`. Import and export share one table of names (`_hf_names`).

An import returns the model's shape and a function that copies the weights, one tensor at a time, for `build_model`:

    >>> config, init = import_hf("models/gpt2")
    >>> model = build_model(config, "cuda", init=init)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab.config import Model, Sample
from gptlab.errors import HubError
from gptlab.files import damaged
from gptlab.interop import files
from gptlab.model.gpt import GPT
from gptlab.model.parametrization import folded
from gptlab.progress import Count, tell_nobody

Init = Callable[[GPT], None]


# -- names and shapes -----------------------------------------------------------------------------------------------

GPT_PREFIX = {"gpt2": "transformer.", "llama": "model.", "qwen3": "model.", "gptlab": ""}

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
    "attn.q_norm": ["self_attn.q_norm"],  # Qwen3's
    "attn.k_norm": ["self_attn.k_norm"],
}

# Buffers that older files store beside the parameters: causal masks and rotary frequencies.
_BUFFER = re.compile(r"\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")


def _hf_names(name: str, model_type: str) -> list[str]:
    """Hugging Face's names of our parameter. Several names are slices of equal size along the rows, in order."""
    if name.startswith("lm_head.") or model_type == "gptlab":
        return [name]
    if model_type == "gpt2":  # our names are those of GPT-2
        return [f"transformer.{name}"]
    layer = re.match(r"h\.(\d+)\.", name)
    part, kind = name.removeprefix(layer[0] if layer else "").rsplit(".", 1)
    where = f"model.layers.{layer[1]}." if layer else "model."
    return [f"{where}{piece}.{kind}" for piece in _LLAMA_PARTS[part]]


def _is_conv1d(hf_name: str, model_type: str) -> bool:
    """Whether a weight is stored as (inputs, outputs): GPT-2's `Conv1D` layers are, all other linear layers are not."""
    return model_type == "gpt2" and re.search(r"\.(c_attn|c_fc|c_proj)\.weight$", hf_name) is not None


# -- export ---------------------------------------------------------------------------------------------------------

_GPT2_ACTIVATIONS = {"gelu": "gelu_new", "gelu_erf": "gelu", "relu2": "relu2"}


def hf_model_type(config: Model) -> str:
    """The Hugging Face `model_type` that represents this model exactly: a standard one, or else our own."""
    if config.position == "learned" and config.norm == "layernorm" and config.mlp in _GPT2_ACTIVATIONS:
        return "gptlab" if config.qk_norm else "gpt2"
    if config.position == "rope" and config.norm == "rmsnorm" and config.mlp == "swiglu":
        if config.qk_norm:
            return "gptlab" if config.bias else "qwen3"
        return "llama"
    return "gptlab"


_CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
REMOTE = Path(__file__).parent / "remote"  # the code of GPTLabForCausalLM


def _config_json(config: Model, model_type: str, dtype: torch.dtype, eot: int | None) -> dict[str, Any]:
    shared = {
        "architectures": [_CLASSES.get(model_type, "GPTLabForCausalLM")],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "initializer_range": 0.02,
        "bos_token_id": eot,  # null if there is no such token; an absent key means 50256 (GPT-2) or 1 and 2 (Llama)
        "eos_token_id": eot,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),  # the key that transformers 4 reads
    }
    if model_type == "gptlab":
        return shared | {
            "tie_word_embeddings": False,  # a tied model has no head that transformers could tie
            "auto_map": {
                "AutoConfig": "configuration_gptlab.GPTLabConfig",
                "AutoModelForCausalLM": "modeling_gptlab.GPTLabForCausalLM",
            },
            "mlp_hidden": config.mlp_hidden,
            **{key: getattr(config, key) for key in _OWN},
            "dropout": config.dropout,
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
        "rope_theta": config.rope_theta,  # transformers 4 reads this key, transformers 5 the next
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


def _generation_json(config: Model, eot: int | None, n_ids: int, sample: Sample | None) -> dict[str, Any]:
    """How `generate()` draws if it is not told: as `gptlab sample` does, within the context."""
    settings: dict[str, Any] = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}
    if n_ids < config.vocab_size:  # rows of the embedding that stand for no token
        settings["suppress_tokens"] = list(range(n_ids, config.vocab_size))
    if sample is None:
        return settings
    settings["max_new_tokens"] = max(1, min(sample.max_tokens, config.block_size // 2))
    if sample.temperature == 0:
        return settings | {"do_sample": False}
    drawn = {"do_sample": True, "temperature": sample.temperature, "top_k": sample.top_k, "top_p": sample.top_p}
    return settings | drawn


def hf_parameters(model: GPT, model_type: str) -> Iterator[tuple[str, Tensor]]:
    """The weights under Hugging Face's names, linear weights as (outputs, inputs). A tied head is left out.

    They are those of a standard model: multipliers of another parametrization are folded into them.
    """
    for name, parameter in model.named_parameters():
        pieces, weight = _hf_names(name, model_type), folded(model.config, name, parameter.detach())
        yield from zip(pieces, weight.chunk(len(pieces)), strict=True)
        if model_type == "gpt2" and not model.config.bias and name.startswith(("h.", "ln_f.")):
            yield pieces[0].replace(".weight", ".bias"), parameter.detach().new_zeros(parameter.shape[0])


def _hf_tensors(model: GPT, model_type: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights as Hugging Face's files have them."""
    tensors = ((name, tensor.to(dtype)) for name, tensor in hf_parameters(model, model_type))
    return {name: (t.t() if _is_conv1d(name, model_type) else t).contiguous() for name, t in tensors}


def hf_gpt2(model: GPT) -> Any:
    """transformers' `GPT2LMHeadModel` with this GPT's shape, dropout and weights, for training.

    Raises:
        ImportError: transformers is missing.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    described = _config_json(model.config, "gpt2", torch.float32, None)
    left_out = ("architectures", "model_type", "dtype", "torch_dtype")
    shape = {key: value for key, value in described.items() if key not in left_out}
    shape |= {"use_cache": False, "attn_implementation": "sdpa"}
    hf = GPT2LMHeadModel(GPT2Config(**shape))
    hf.loss_type = "ForCausalLM"  # its default, without a warning
    unknown = hf.load_state_dict(_hf_tensors(model, "gpt2", torch.float32), strict=False)
    assert not unknown.unexpected_keys and set(unknown.missing_keys) <= {"lm_head.weight"}, unknown
    return hf.train()


def _write_tokenizer(tokenizer: Any, block_size: int, folder: Path) -> None:
    """Write tokenizer.json, and the tokenizer_config.json that makes AutoTokenizer load it unchanged."""
    described = tokenizer.hf_json()
    added = {token["id"]: token["content"] for token in described.get("added_tokens", [])}
    # The tokenizer classes of single models rebuild the tokenizer from its vocabulary and ignore the rest of the file.
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
    settings |= {"clean_up_tokenization_spaces": False, "add_prefix_space": False, "padding_side": "left"}
    if tokenizer.eot in added:
        settings |= {"bos_token": added[tokenizer.eot], "eos_token": added[tokenizer.eot]}
    files.write_hub_json(folder / "tokenizer.json", described)
    files.write_hub_json(folder / "tokenizer_config.json", settings)


def export_hf(
    model: GPT,
    tokenizer: Any,
    folder: str | Path,
    sample: Sample | None = None,
    more: Mapping[str, bytes] | None = None,
    written: Count = tell_nobody,
) -> str:
    """Write a model as a Hugging Face folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    The logits are equal to ours. `document_attention` has no counterpart and is lost, and in Llama and Qwen3 the
    dropout outside attention. GPT-2 always has biases; a model without biases is written with zeros.

    Args:
        model: the parameters are written in their own dtype, or in the widest of several.
        tokenizer: a gptlab tokenizer (`eot`, `vocab_size`, `hf_json()`), or None to write the model alone.
        folder: new or empty; it appears complete or not at all.
        sample: how `generate()` draws if it is not told.
        more: further files by name, such as README.md.
        written: called with the bytes of weights that are written, of all.

    Returns:
        The `model_type`; "gptlab" needs `trust_remote_code=True`.

    Raises:
        HubError: the folder is not empty.
    """
    config, model_type = model.config, hf_model_type(model.config)
    eot = None if tokenizer is None else tokenizer.eot
    n_ids = config.vocab_size if tokenizer is None else tokenizer.vocab_size
    dtype = functools.reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()})
    with files.export_folder(folder) as temporary:
        files.write_hub_json(temporary / "config.json", _config_json(config, model_type, dtype, eot))
        generation = _generation_json(config, eot, n_ids, sample)
        files.write_hub_json(temporary / "generation_config.json", generation)
        if tokenizer is not None:
            _write_tokenizer(tokenizer, config.block_size, temporary)
        if model_type == "gptlab":
            for code in sorted(REMOTE.glob("*_gptlab.py")):
                (temporary / code.name).write_bytes(code.read_bytes())
        files.write_more(temporary, more)
        tensors = _hf_tensors(model, model_type, dtype)
        files.write_safetensors(temporary / "model.safetensors", tensors, {"format": "pt"}, written)
    return model_type


# -- import ---------------------------------------------------------------------------------------------------------

# Defaults of transformers for settings that config.json leaves out.
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
    "qwen3": {
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "intermediate_size": 22016,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "gptlab": {},  # config.json has them all
}

# Settings that change the computation. Our model has exactly these values.
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
    "qwen3": {
        "hidden_act": "silu",
        "use_sliding_window": False,
        "attention_bias": False,  # its MLP has none
        "quantization_config": None,
    },
    "gptlab": {"quantization_config": None},
}

# Names that configurations of GPT-2 also use: the first is of 2019, the others are those of other types.
_GPT2_ALIASES = {
    "n_ctx": "n_positions",
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
}
# Settings of ours that config.json of a GPTLabForCausalLM has under their own names.
_OWN = (
    "n_layer",
    "n_head",
    "n_embd",
    "block_size",
    "vocab_size",
    "position",
    "rope_theta",
    "norm",
    "norm_eps",
    "mlp",
    "bias",
    "tied",
    "qk_norm",
)

# gelu_pytorch_tanh is the same formula as gelu_new. Other tanh approximations round its constants and are refused.
_ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf", "relu2": "relu2"}


def hf_config(folder: str | Path) -> Model:
    """The shape of the model in a Hugging Face folder, from its config.json.

    Dropout is a setting of training, not of the shape: it is 0 here, whatever the file says.

    Raises:
        HubError: another type than those of `_DEFAULTS`, or a setting that our model cannot represent exactly.
    """
    return hf_shape_and_type(Path(folder))[0]


def hf_shape_and_type(folder: Path) -> tuple[Model, str]:
    """`hf_config` and the `model_type`, a key of `_DEFAULTS`."""
    file = folder / "config.json"
    given = files.read_hub_json(file)
    with damaged(file, HubError):
        return _shape_and_type(file, given)


def _shape_and_type(file: Path, given: dict[str, Any]) -> tuple[Model, str]:
    model_type = given.get("model_type")
    if not isinstance(model_type, str) or model_type not in _DEFAULTS:
        raise HubError(f"{file}: model_type = {model_type}: only {', '.join(_DEFAULTS)} can be imported")

    def refuse(key: str, value: Any, needed: Any) -> None:
        if value != needed:
            raise HubError(f"{file}: {key} = {value}: gptlab's model supports only {needed}")

    for key, needed in _REQUIRED[model_type].items():
        refuse(key, needed if given.get(key) is None else given[key], needed)
    if model_type == "gpt2":
        given = {_GPT2_ALIASES[key]: given[key] for key in _GPT2_ALIASES if given.get(key) is not None} | given
    hf = _DEFAULTS[model_type] | given
    if model_type == "gpt2":
        if hf["activation_function"] not in _ACTIVATIONS:
            refuse("activation_function", hf["activation_function"], ", ".join(_ACTIVATIONS))
        return files.imported_shape(
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
    if model_type == "gptlab":
        return files.imported_shape(file, hf["mlp_hidden"], **{key: hf[key] for key in _OWN}), model_type
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    refuse("num_key_value_heads", hf.get("num_key_value_heads") or heads, heads)
    refuse("head_dim", hf.get("head_dim") or width // heads, width // heads)
    refuse("mlp_bias", hf["mlp_bias"], hf["attention_bias"])  # our model has all biases or none
    refuse("rope_type", rope.get("rope_type", rope.get("type", "default")), "default")
    refuse("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0)
    return files.imported_shape(
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
        qk_norm=model_type == "qwen3",
        rope_theta=rope.get("rope_theta") or hf.get("rope_theta") or 10000.0,
    ), model_type


def gpt_names(source: Path, stored: files.Stored, model_type: str) -> files.Stored:
    """Stored tensors by their full names in a GPT-2 or Llama with a head, without buffers."""
    prefix = GPT_PREFIX[model_type]
    tensors: files.Stored = {}
    for name, read in files.unwrapped(source, stored).items():
        # Files of a model without its head, such as GPT-2's first upload, have no prefix.
        name = name if name.startswith((prefix, "lm_head.")) else prefix + name
        if name in tensors:
            raise HubError(f"{source}: {name} is stored twice")
        if not _BUFFER.search(name):
            tensors[name] = read
    return tensors


def make_init(source: Path, stored: files.Stored, model_type: str, conv1d: bool) -> Init:
    """A function that copies stored tensors into a model and refuses missing, unknown and duplicate tensors.

    Args:
        source: file or folder, for error messages.
        stored: the tensors.
        model_type: gpt2, llama, qwen3 or gptlab, whose names the tensors have.
        conv1d: whether GPT-2's linear weights are stored as (inputs, outputs).
    """
    tensors = gpt_names(source, stored, model_type)

    @torch.no_grad()
    def init(model: GPT) -> None:
        names = {name: _hf_names(name, model_type) for name, _ in model.named_parameters()}
        expected = {piece for pieces in names.values() for piece in pieces}
        foreign, missing = tensors.keys() - expected, expected - tensors.keys()
        if model.config.tied and "lm_head.weight" in foreign:
            [embedding] = names["wte.weight"]
            if embedding in tensors and not torch.equal(tensors["lm_head.weight"](), tensors[embedding]()):
                raise HubError(f"{source}: lm_head.weight differs from {embedding}, but config.json says they are tied")
            foreign.discard("lm_head.weight")
        files.check_tensor_names(source, missing, foreign, "model")
        for name, parameter in model.named_parameters():
            for part, piece in zip(parameter.chunk(len(names[name])), names[name], strict=True):
                tensor = tensors[piece]()
                if conv1d and _is_conv1d(piece, model_type):
                    part = part.t()
                files.copy_stored(source, piece, tensor, part)

    return init


def import_hf(folder: str | Path) -> tuple[Model, Init]:
    """The model of a Hugging Face folder, as a shape and a function for `build_model`.

    Raises:
        HubError: a model that ours cannot represent. The returned function also raises it,
            for weights that do not belong to the model.
    """
    folder = Path(folder)
    config, model_type = hf_shape_and_type(folder)
    return config, make_init(folder, files.stored_weights(folder), model_type, conv1d=True)

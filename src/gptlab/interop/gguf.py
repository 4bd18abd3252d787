"""Export to GGUF, the file that llama.cpp and its many users read: GPT-2, Llama and Qwen3, with byte-level BPE.

The layouts are those of llama.cpp's own converter: tensors as in Hugging Face's files, but linear weights always
(outputs, inputs); Llama's rotary pairs are neighbours (2 i, 2 i + 1); vectors and positions are float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab.data.tokenizers import Tokenizer
from gptlab.errors import HubError
from gptlab.interop import files
from gptlab.interop.hf import hf_model_type, hf_parameters
from gptlab.model.gpt import GPT
from gptlab.progress import Count, tell_nobody

NORMAL, CONTROL, UNUSED = 1, 3, 5  # gguf.TokenType


def export_gguf(
    model: GPT,
    tokenizer: Tokenizer,
    file: str | Path,
    name: str,
    license: str = "",
    written: Count = tell_nobody,
) -> None:
    """Write a model and its tokenizer as one GGUF file.

    Args:
        model: matrices are written in their own dtype: float32, float16 or bfloat16.
        tokenizer: byte-level, with end-of-text.
        file: a new file; it appears complete or not at all.
        name: of the model, for people.
        license: an id such as mit.
        written: called with the bytes of weights that are written, of all.

    Raises:
        HubError: llama.cpp has no such model or tokenizer, the package gguf is missing, or the file exists.
    """
    architecture = _architecture(model)
    tokens, types, merges = _vocabulary(tokenizer, model.config.vocab_size)
    try:
        import gguf
    except ImportError:
        raise HubError("--to gguf needs the package gguf: pip install 'gptlab[gguf]'") from None

    with files.export_file(file) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        config = model.config
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        if license:
            writer.add_license(license)
        writer.add_block_count(config.n_layer)
        writer.add_context_length(config.block_size)
        writer.add_embedding_length(config.n_embd)
        writer.add_feed_forward_length(config.mlp_hidden)
        writer.add_head_count(config.n_head)
        writer.add_vocab_size(config.vocab_size)
        if architecture == "gpt2":
            writer.add_layer_norm_eps(config.norm_eps)
        else:
            writer.add_head_count_kv(config.n_head)
            writer.add_key_length(config.head_size)
            writer.add_value_length(config.head_size)
            writer.add_layer_norm_rms_eps(config.norm_eps)
            writer.add_rope_dimension_count(config.head_size)
            writer.add_rope_freq_base(config.rope_theta)
        kinds = gguf.LlamaFileType
        mostly = {torch.float16: kinds.MOSTLY_F16, torch.bfloat16: kinds.MOSTLY_BF16}
        writer.add_file_type(mostly.get(model.wte.weight.dtype, kinds.ALL_F32))

        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        assert tokenizer.eot is not None
        writer.add_bos_token_id(tokenizer.eot)
        writer.add_eos_token_id(tokenizer.eot)
        writer.add_add_bos_token(False)

        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.n_layer)
        arrays = []
        for hf_name, tensor in hf_parameters(model, architecture):
            if architecture == "llama" and (".q_proj." in hf_name or ".k_proj." in hf_name):
                tensor = _neighbours(tensor, config.n_head)
            gguf_name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
            assert gguf_name is not None, "llama.cpp knows all names of these three"
            if tensor.dim() == 1 or gguf_name == "position_embd.weight" or tensor.dtype == torch.float64:
                tensor = tensor.float()
            tensor = tensor.contiguous()
            if tensor.dtype == torch.bfloat16:  # NumPy has no such dtype
                array, kind = tensor.view(torch.uint8).numpy(), gguf.GGMLQuantizationType.BF16
            else:
                array, kind = tensor.numpy(), None
            writer.add_tensor_info(gguf_name, array.shape, array.dtype, array.nbytes, raw_dtype=kind)
            arrays.append(array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(array.nbytes for array in arrays)
        for array in arrays:
            written(done, total)
            writer.write_tensor_data(array)
            done += array.nbytes
        writer.close()


def _architecture(model: GPT) -> str:
    config = model.config
    model_type = hf_model_type(config)
    if model_type == "gptlab" or config.mlp not in ("gelu", "swiglu"):
        keys = ("position", "norm", "mlp", "bias", "qk_norm")
        settings = ", ".join(f"{key} = {str(getattr(config, key)).lower()}" for key in keys)
        raise HubError(
            f"this model ({settings}) cannot be exported to GGUF: llama.cpp has GPT-2 (learned, layernorm, gelu), "
            "Llama (rope, rmsnorm, swiglu) and Qwen3 (Llama with qk_norm, without biases); --to hf takes every model"
        )
    return model_type


def _neighbours(tensor: Tensor, n_head: int) -> Tensor:
    """Reorder the rows of each head from pairs (i, i + D/2) to pairs (2 i, 2 i + 1)."""
    heads = tensor.unflatten(0, (n_head, 2, -1))  # (H, 2, D / 2, ...)
    return heads.transpose(1, 2).flatten(0, 2)


def _vocabulary(tokenizer: Tokenizer, rows: int) -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types and the merges, if llama.cpp's "gpt-2" tokenizer gives the same ids for every text."""

    def refuse(why: str) -> HubError:
        return HubError(f"the tokenizer {tokenizer.name} cannot be exported to GGUF: {why}")

    described = tokenizer.hf_json()
    model: dict[str, Any] = described["model"]
    cutting = described.get("pre_tokenizer") or {}
    plain = model.get("type") == "BPE" and not any(
        model.get(key)
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    )
    byte_level = cutting.get("type") == "ByteLevel" and not cutting.get("add_prefix_space")
    if not plain or not byte_level or described.get("normalizer") or not (cutting["use_regex"] or not model["merges"]):
        raise refuse(
            "llama.cpp has byte-level BPE with GPT-2's words (gpt2, bpe-N and byte), and no exact form of this"
        )
    if tokenizer.eot is None:
        raise refuse("it has no end-of-text, for which llama.cpp would take another token")
    if tokenizer.vocab_size > rows:
        raise refuse(f"it has {tokenizer.vocab_size} ids, and the model {rows}")
    ids: dict[str, int] = model["vocab"]
    added = {token["id"]: token["content"] for token in described.get("added_tokens", [])}
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for token, index in ids.items():
        tokens[index], types[index] = token, NORMAL
    for index, token in added.items():
        tokens[index], types[index] = token, CONTROL
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    # The format has no empty list. A text is never cut into end-of-text, so this pair is never met.
    return tokens, types, merges or [f"{added[tokenizer.eot]} {added[tokenizer.eot]}"]

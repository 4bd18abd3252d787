"""An encoder that reads a document and says its labels: BERT's, as RoBERTa trains it, with a linear head.

BERT (Devlin et al. 2018, arXiv 1810.04805) puts its norms after the residual sums; RoBERTa (Liu et al. 2019, arXiv
1907.11692) is the same network trained longer on more. The head is one matrix on the last hidden state of the first
token, <s> or [CLS]; there is no pooler.

Shapes are written with B documents, T tokens, C = n_embd, L = n_labels.

Weights come from a Hugging Face folder or id, as a shape and a function that copies them in:

    >>> config, position_offset, fill = read_encoder("FacebookAI/roberta-base", seed=0)
    >>> model = build_encoder(config, 4271, "cuda", fill=fill, position_offset=position_offset)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gptlab.config import Model
from gptlab.model.gpt import MLP, Attention, LayerNorm, address, linear_weights
from gptlab.model.hub import (
    HubError,
    Stored,
    _model,
    _read_json,
    _stored_tensors,
    copy_stored,
    download,
    refuse_others,
)
from gptlab.model.loss import HeadLoss
from gptlab.parallel import fill_weights


class EncoderBlock(nn.Module):
    """Post-norm transformer block: each norm stands after the residual sum (Vaswani et al. 2017, arXiv 1706.03762)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.attn, self.ln_1 = Attention(config), LayerNorm(config)
        self.mlp, self.ln_2 = MLP(config), LayerNorm(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # (B, T, C), (B, 1, 1, T)
        x = self.ln_1(x + self.attn(x, None, mask, None))
        return self.ln_2(x + self.mlp(x))


class Encoder(nn.Module):
    """The document classifier. Build it with `build_encoder`, which gives it weights.

    Args:
        config: its shape; vocab_size must be set, and block_size counts the two special tokens of a document.
        n_labels: rows of the head.
        position_offset: row of the position table that the first token takes; RoBERTa's positions start after its
            padding id, at 2, BERT's at 0.
    """

    def __init__(self, config: Model, n_labels: int, position_offset: int = 2) -> None:
        super().__init__()
        assert config.vocab_size > 0, "vocab_size is resolved before the model is built"
        parts = config.position, config.norm, config.mlp, config.bias, config.qk_norm
        assert parts == ("learned", "layernorm", "gelu_erf", True, False), "an encoder has BERT's parts"
        self.config, self.position_offset = config, position_offset
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size + position_offset, config.n_embd)
        self.token_type = nn.Embedding(1, config.n_embd)  # a document is of one type; BERT's pairs have two
        self.ln_emb = LayerNorm(config)
        self.h = nn.ModuleList(EncoderBlock(config) for _ in range(config.n_layer))
        self.head = nn.Linear(config.n_embd, n_labels)
        self.activation_checkpointing = False
        # what a precision regime sets: dtype of the residual stream where it is not the embedding's, of the head's
        # matmul where it is not the body's, and of the training loss
        self.stream_dtype: torch.dtype | None = None
        self.head_dtype: torch.dtype | None = None
        self.loss_dtype: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def hidden(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The last hidden states (B, T, C); those of the padding mean nothing and reach no other.

        Args:
            tokens: (B, T) ids, padded at the end with any id.
            lengths: (B,) tokens that are no padding, at least 1.
        """
        T, start = tokens.shape[1], self.position_offset
        assert tokens.shape[1] <= self.config.block_size, "the document is longer than block_size"
        x = self.wte(tokens) + self.token_type.weight + self.wpe.weight[start : start + T]  # (B, T, C)
        if self.stream_dtype is not None:
            x = x.to(self.stream_dtype)
        x = F.dropout(self.ln_emb(x), self.config.dropout, self.training)
        mask = torch.arange(T, device=x.device) < lengths[:, None]  # (B, T)
        mask = mask[:, None, None]
        for block in self.h:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """The head: hidden states (B, C) to logits (B, L), multiplied in exactly the dtype that is said."""
        device, dtype = x.device.type, self.head_dtype
        if dtype is None:
            autocast = torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if autocast else self.head.weight.dtype
        with torch.autocast(device, enabled=False):
            return F.linear(x.to(dtype), self.head.weight.to(dtype), self.head.bias.to(dtype))

    def forward(
        self, tokens: Tensor, lengths: Tensor, targets: Tensor | None = None, factor: Tensor | float = 1.0
    ) -> Tensor | HeadLoss:
        """Logits (B, L), or with targets the losses of the documents, summed.

        Args:
            tokens: see `hidden`.
            lengths: see `hidden`.
            targets: (B, L) floats, 1 for each label a document has: binary cross-entropy, averaged over labels.
                (B,) ids of the one label: cross-entropy.
            factor: multiplies the loss that is differentiated: 1 / documents of a step, times the loss scale.
        """
        first = self.hidden(tokens, lengths)[:, 0]  # (B, C)
        logits = self.logits(F.dropout(first, self.config.dropout, self.training))  # (B, L)
        if targets is None:
            return logits
        wide = torch.promote_types(logits.dtype, torch.float32)
        dtype = self.loss_dtype or wide
        with torch.autocast(logits.device.type, enabled=False):
            train = summed_loss(logits.to(dtype), targets)
            value = train.detach() if dtype == wide else summed_loss(logits.detach().to(wide), targets)
            train = train * torch.as_tensor(factor, dtype=dtype, device=train.device)
        return HeadLoss(train, value.float(), logits.detach().abs().max().float())

    # -- facts

    def parameter_count(self) -> int:
        """Every parameter once, embeddings and head among them."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Training FLOPs a token of a document of block_size: 6 N + 12 n_layer n_embd block_size.

        The formula is that of `GPT.flops_per_token`. N is the weights of the blocks' linear layers: the embeddings are
        looked up, and the head sees one token a document.
        """
        return 6 * linear_weights(self.h) + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    # -- weights

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """BERT's initialisation: N(0, 0.02), biases 0, norms 1, residual projections as all others.

        Each tensor is drawn on the CPU from a generator of its own, addressed by its name: the same weights on every
        device, and the same head on an initialised body as on an imported one.
        """
        for name, parameter in self.named_parameters():
            _initialise(name, parameter, seed)


def _initialise(name: str, parameter: Tensor, seed: int) -> None:
    if parameter.dim() < 2:
        parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        return
    generator = torch.Generator().manual_seed(address(seed, "init", name))
    parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.02, generator=generator))


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over documents of their losses in nats, in the logits' dtype, ().

    Args:
        logits: (B, L).
        targets: (B, L) floats or (B,) ids, see `Encoder.forward`.
    """
    if targets.is_floating_point():
        losses = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")  # (B, L)
        return losses.mean(dim=1).sum()
    return F.cross_entropy(logits, targets, reduction="sum")


EncoderFill = Callable[[Encoder], None]


def build_encoder(
    config: Model,
    n_labels: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    fill: int | EncoderFill = 0,
    position_offset: int = 2,
    lay_out: Callable[[Encoder], None] | None = None,
) -> Encoder:
    """An encoder that is laid out without memory and given it where it will live.

    Args:
        config: its shape, vocab_size set.
        n_labels: rows of the head.
        device: where the weights go.
        dtype: of the parameters.
        fill: a seed to initialise from, or a function that copies weights in.
        position_offset: see `Encoder`.
        lay_out: changes the model before it has memory, such as the dtypes of its parts.
    """
    with torch.device("meta"):
        model = Encoder(config, n_labels, position_offset).to(dtype)
        if lay_out is not None:
            lay_out(model)
    model = model.to_empty(device=device)
    fill_weights(model, fill)
    return model


# -- import from Hugging Face ---------------------------------------------------------------------------------------

# What files of these types, with or without a head, put before the names of the encoder's own parts.
_PREFIX = {"roberta": "roberta.", "xlm-roberta": "roberta.", "camembert": "roberta.", "bert": "bert."}

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

# What transformers takes for a setting that config.json leaves out, in all four types alike save the vocabulary.
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

# Settings that change what is computed and that our encoder has in one form only; absent or null means this form.
_REQUIRED: dict[str, Any] = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
}


def _hf_names(name: str) -> list[str]:
    """Hugging Face's name of our parameter, without prefix; several are its equal pieces, first rows first."""
    layer = re.match(r"h\.(\d+)\.", name)
    part, kind = name.removeprefix(layer[0] if layer else "").rsplit(".", 1)
    where = f"encoder.layer.{layer[1]}." if layer else "embeddings."
    return [f"{where}{piece}.{kind}" for piece in _PARTS[part]]


def _encoder_config(folder: Path) -> tuple[Model, int, str]:
    """The shape of the encoder in a Hugging Face folder, its position offset and its prefix, from its config.json."""
    file = folder / "config.json"
    given = _read_json(file)
    model_type = given.get("model_type")
    if model_type not in _PREFIX:
        raise HubError(f"{file}: model_type = {model_type}: only {', '.join(_PREFIX)} can be imported as encoders")
    for key, needed in _REQUIRED.items():
        value = needed if given.get(key) is None else given[key]
        if value != needed:
            raise HubError(f"{file}: {key} = {value}: gptlab's encoder has no such form, only {needed}")
    vocab_size = 50265 if model_type == "roberta" else 30522
    hf = _DEFAULTS | {"vocab_size": vocab_size} | {key: value for key, value in given.items() if value is not None}
    position_offset = 0 if model_type == "bert" else hf["pad_token_id"] + 1
    config = _model(
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
    return config, position_offset, _PREFIX[model_type]


def _encoder_filler(source: Path, stored: Stored, prefix: str, seed: int) -> EncoderFill:
    """A function that copies stored tensors into an encoder's body, each once, and initialises its head."""
    tensors: Stored = {}
    for name, read in stored.items():
        name = name.removeprefix(prefix)  # a file of the bare encoder has none
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")  # 2018's
        if not name.startswith(("embeddings.", "encoder.")) or name.endswith("_ids"):
            continue  # poolers and heads of other tasks, and the buffers of older files
        if name in tensors:
            raise HubError(f"{source}: {name} is stored twice")
        tensors[name] = read

    @torch.no_grad()
    def fill(model: Encoder) -> None:
        names = {name: _hf_names(name) for name, _ in model.named_parameters() if not name.startswith("head.")}
        expected = {piece for pieces in names.values() for piece in pieces}
        foreign, missing = tensors.keys() - expected, expected - tensors.keys()
        refuse_others(source, missing, foreign, "encoder")
        for name, parameter in model.named_parameters():
            if name not in names:
                _initialise(name, parameter, seed)
                continue
            for part, piece in zip(parameter.chunk(len(names[name])), names[name], strict=True):
                tensor = tensors[piece]()
                if name == "token_type.weight":
                    tensor = tensor[:1]
                copy_stored(source, piece, tensor, part)

    return fill


def read_encoder(source: str | Path, seed: int) -> tuple[Model, int, EncoderFill]:
    """The encoder of a Hugging Face folder or id, of RoBERTa's, XLM-RoBERTa's, CamemBERT's or BERT's form.

    Its dropout is the file's `hidden_dropout_prob`, in attention too. Of token types the first one is kept; the pooler
    and the head, whatever they were trained for, stay behind.

    Args:
        source: a folder with a config.json, or an id such as `FacebookAI/roberta-base`.
        seed: initialises the head, as `Encoder.init_weights` would.

    Returns:
        The shape, the position offset, and the function that `build_encoder` takes as `fill`.

    Raises:
        HubError: nothing there, or nothing that can be imported, now; weights that are not that model's, when filling.
    """
    folder = Path(source).expanduser()
    if not folder.exists():
        folder = download(str(source), _encoder_config)
    config, position_offset, prefix = _encoder_config(folder)
    return config, position_offset, _encoder_filler(folder, _stored_tensors(folder), prefix, seed)

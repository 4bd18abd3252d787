"""A GPT with configurable parts, from GPT-2 as released to a modern model with RoPE, SwiGLU and RMSNorm.

Shapes: B sequences, T tokens, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from gptlab.config import Model
from gptlab.model.cpu_attention import attention
from gptlab.model.loss import HeadLoss, linear_cross_entropy
from gptlab.model.matmul import linear
from gptlab.model.parametrization import attention_multiplier, initial_std, logit_multiplier, residual_multiplier
from gptlab.seeding import address


def embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding without values. PyTorch would draw some, even without memory, for which it imports its compiler."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def allocate(model: nn.Module, device: torch.device | str) -> None:
    """Memory on a device for a model on the meta device, as `to_empty` does, which imports sympy for plain tensors."""

    def memory(t: Tensor) -> Tensor:
        plain = type(t) in (Tensor, nn.Parameter)  # others are FSDP's
        return torch.empty(t.shape, dtype=t.dtype, device=device) if plain else torch.empty_like(t, device=device)

    model._apply(memory)


class LayerNorm(nn.Module):
    """LayerNorm with a weight and an optional bias, times a number that is not trained."""

    def __init__(self, config: Model, multiplier: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.eps, self.multiplier = config.norm_eps, multiplier

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)  # float32 norms in a bf16 model
        bias = None if self.bias is None else self.bias.to(dtype)
        y = F.layer_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), bias, self.eps).to(x.dtype)
        return y if self.multiplier == 1 else y * self.multiplier


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019, arXiv 1910.07467), times a number that is not trained."""

    def __init__(self, width: int, eps: float, multiplier: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.multiplier = eps, multiplier

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        y = F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps).to(x.dtype)
        return y if self.multiplier == 1 else y * self.multiplier


class Linear(nn.Linear):
    """A linear layer that casts its weights to the dtype of its input, without autocast, which keeps its casts."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is self.weight.dtype or torch.is_autocast_enabled(x.device.type):
            return linear(x, self.weight, self.bias)
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def make_norm(config: Model, multiplier: float = 1.0) -> nn.Module:
    if config.norm == "layernorm":
        return LayerNorm(config, multiplier)
    return RMSNorm(config.n_embd, config.norm_eps, multiplier)


def rotary_tables(config: Model, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, each (block_size, D / 2) float32 (Su et al. 2021, arXiv 2104.09864).

    Computed on the CPU, so that all devices have the same values, and rounded in the same order as in transformers;
    another order is visible in the logits at position 1,000.
    """
    channels = torch.arange(0, config.head_size, 2, device="cpu", dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (channels / config.head_size)
    angles = torch.outer(torch.arange(config.block_size, device="cpu", dtype=torch.float32), frequencies)
    return angles.cos().to(device), angles.sin().to(device)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    turned = torch.empty(wide.shape, dtype=wide.dtype, device=wide.device)
    (low, high), (new_low, new_high) = wide.chunk(2, dim=-1), turned.chunk(2, dim=-1)
    torch.mul(low, cos, out=new_low).sub_(high * sin)  # rounded as by transformers; addcmul_ rounds once
    torch.mul(high, cos, out=new_high).add_(low * sin)
    return turned.to(x.dtype)


class _Rotation(torch.autograd.Function):
    """The gradient is rotated back, in half of the operations that autograd makes of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x (B, H, T, D) by the angles of their positions, paired as in Llama."""
    if not torch.compiler.is_compiling():
        turned: Tensor = _Rotation.apply(x, cos, sin)
        return turned
    low, high = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)  # a compiler fuses all of it
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


class KVCache:
    """Keys and values of the tokens read so far, each (n_layer, B, H, room, D) and filled up to `length`.

    Sequences may differ in length. `at`, (B,), then says where the next token of each goes, attention is to the slots
    up to there among the first `end`, and who set `at` moves it on. Shapes do not change if `end` does not.
    """

    def __init__(self, model: GPT, batch: int, room: int, dtype: torch.dtype) -> None:
        config = model.config
        shape = (config.n_layer, batch, config.n_head, room, config.head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=model.device)  # NaN would pass a mask
        self.values = torch.zeros(shape, dtype=dtype, device=model.device)
        self.length, self.room = 0, room
        self.at: Tensor | None = None
        self.end = room

    def like(self, batch: int, room: int) -> KVCache:
        """An empty cache of the same model."""
        made = copy.copy(self)
        shape = (len(self.keys), batch, self.keys.shape[2], room, self.keys.shape[4])
        made.keys, made.values = self.keys.new_zeros(shape), self.values.new_zeros(shape)
        made.length, made.room, made.at, made.end = 0, room, None, room
        return made

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, H, T, D) to a layer's cache.

        Returns:
            What to attend to: the layer's keys and values (B, H, length + T, D).
        """
        keys, values = self.keys[layer], self.values[layer]
        if self.at is not None:
            rows = torch.arange(len(self.at), device=keys.device)
            keys[rows, :, self.at] = k[:, :, 0].to(keys.dtype)
            values[rows, :, self.at] = v[:, :, 0].to(values.dtype)
            return keys[:, :, : self.end], values[:, :, : self.end]
        end = self.length + k.shape[2]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return (keys[:, :, :end], values[:, :, :end]) if self.length else (k, v)


class Attention(nn.Module):
    """Multi-head self-attention, causal unless a mask is given."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else None
        multiplier = attention_multiplier(config)
        self.scale = None if multiplier == 1 else multiplier * config.head_size**-0.5  # None is PyTorch's D^-0.5

    def forward(
        self,
        x: Tensor,  # (B, T, C)
        rope: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,  # (B or 1, 1, T, S), true where a query attends to a key; None: causal
        cache: tuple[KVCache, int] | None,
    ) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in (q, k, v))  # (B, H, T, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        dtype = v.dtype
        if cache is not None:
            k, v = cache[0].append(cache[1], k, v)  # the cache may have another dtype
        causal = mask is None and T > 1
        dropout = self.dropout if self.training else 0.0
        q = q.to(k.dtype)
        if causal and not dropout:
            y = attention(q, k, v, self.scale)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=self.scale
            )
        y = self.c_proj(y.to(dtype).transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Two matrices with an activation between them, or three matrices (SwiGLU, Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.activation, self.dropout = config.mlp, config.dropout
        self.c_fc = Linear(config.n_embd, config.mlp_hidden, bias=config.bias)
        self.c_gate = Linear(config.n_embd, config.mlp_hidden, bias=config.bias) if config.mlp == "swiglu" else None
        self.c_proj = Linear(config.mlp_hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        h = self.c_fc(x)  # (B, T, mlp_hidden)
        if self.c_gate is not None:
            h = F.silu(self.c_gate(x)) * h
        elif self.activation == "relu2":
            h = F.relu(h).square()
        else:
            h = F.gelu(h, approximate="tanh" if self.activation == "gelu" else "none")
        return F.dropout(self.c_proj(h), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.ln_1, self.attn = make_norm(config), Attention(config)
        self.ln_2, self.mlp = make_norm(config), MLP(config)
        self.multiplier = residual_multiplier(config)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: tuple[KVCache, int] | None = None,
    ) -> Tensor:
        x = torch.add(x, self.attn(self.ln_1(x), rope, mask, cache), alpha=self.multiplier)
        return torch.add(x, self.mlp(self.ln_2(x)), alpha=self.multiplier)


def linear_weights(module: nn.Module) -> int:
    """Number of weights in the linear layers, without biases."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


class GPT(nn.Module):
    """The language model. `build_model` creates one with weights.

    Args:
        config: the shape, with vocab_size set.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: Model) -> None:
        super().__init__()
        assert config.vocab_size > 0, "vocab_size is resolved before the model is built"
        self.config = config
        self.wte = embedding(config.vocab_size, config.n_embd)
        self.wpe = embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config, logit_multiplier(config))
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.position == "rope":
            cos, sin = rotary_tables(config, "cpu")  # real values also if the weights are on the meta device
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        self.activation_checkpointing = False
        # Set by a precision regime: dtypes of the residual stream (None: the embedding's dtype), of the head's matmul
        # (None: as in the blocks) and of the training loss.
        self.stream_dtype: torch.dtype | None = None
        self.head_dtype: torch.dtype | None = None
        self.loss_dtype: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    @property
    def head_weight(self) -> Tensor:
        """(V, C). If tied, this is the embedding."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def hidden(self, tokens: Tensor, documents: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """The last hidden states (B, T, C), after the final norm.

        Args:
            tokens: (B, T) ids. With a cache: the ids after the cached ones.
            documents: (B, T) document numbers. Tokens attend only to tokens of their own document.
            cache: keys and values of these tokens are appended to it; one token of each sequence if it has `at`.
        """
        T, start = tokens.shape[1], cache.length if cache and cache.at is None else 0
        assert start + T <= self.config.block_size, "the context is longer than block_size"
        assert documents is None or cache is None, "document attention does not work with a cache"
        where: slice | Tensor = slice(start, start + T)  # positions
        mask = None
        if cache and cache.at is not None:
            where = cache.at[:, None]  # (B, 1)
            mask = (torch.arange(cache.end, device=where.device) <= where)[:, None, None]  # (B, 1, 1, end)
        elif documents is not None or (start and T > 1):
            mask = torch.ones(T, start + T, dtype=torch.bool, device=tokens.device).tril(start)  # (T, start + T)
            if documents is not None:
                mask = mask & (documents[:, :, None] == documents[:, None, :])  # (B, T, T)
                mask = mask[:, None]
        x = self.wte(tokens)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe.weight[where]
        if self.stream_dtype is not None:
            x = x.to(self.stream_dtype)
        x = F.dropout(x, self.config.dropout, self.training)
        rope = None
        if self.wpe is None:
            rope = self.rope_cos[where], self.rope_sin[where]  # (T, D / 2), or (B, 1, D / 2)
            if isinstance(where, Tensor):
                rope = rope[0][:, None], rope[1][:, None]  # for all heads
        for layer, block in enumerate(self.h):
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(x, rope, mask, (cache, layer) if cache else None)
        if cache and cache.at is None:
            cache.length += T
        return self.ln_f(x)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C)."""
        if self.head_dtype is None:
            weight = self.head_weight
            return linear(x, weight if torch.is_autocast_enabled(x.device.type) else weight.to(x.dtype))
        with torch.autocast(x.device.type, enabled=False):
            return linear(x.to(self.head_dtype), self.head_weight.to(self.head_dtype))

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> Tensor | HeadLoss:
        """Logits (B, T, V); with targets the *sum* of the token losses in nats, float32, (); with factor a HeadLoss.

        Args:
            tokens: (B, T) ids.
            targets: (B, T) ids. The loss ignores tokens with target -1.
            documents: see `hidden`.
            factor: for training; multiplies the loss to differentiate, see `linear_cross_entropy`.
        """
        x = self.hidden(tokens, documents)
        if targets is None:
            return self.logits(x)
        flat = x.flatten(0, 1), self.head_weight, targets.flatten()
        if factor is None:
            return linear_cross_entropy(*flat, dtype=self.head_dtype).train
        return linear_cross_entropy(*flat, factor, self.head_dtype, self.loss_dtype)

    # -- facts

    def parameter_count(self) -> int:
        """Number of parameters, each counted once, including the position embedding (nanoGPT excludes it)."""
        return sum(p.numel() for p in self.parameters())

    def size(self) -> dict[str, int]:
        """Parameters without embeddings and head, of which laws of scale are, and training FLOPs per token."""
        outer = [m.weight for m in (self.wte, self.wpe, self.lm_head) if m is not None]
        inner = self.parameter_count() - sum(p.numel() for p in dict.fromkeys(outer))
        return {"non_embedding_parameters": inner, "flops_per_token": self.flops_per_token()}

    def flops_per_token(self) -> int:
        """Training FLOPs per token: 6 N + 12 n_layer n_embd block_size (PaLM, arXiv 2204.02311, appendix B).

        N is the number of weights in matrix multiplications: those of the linear layers and the head. Embeddings are
        only looked up and do not count, so a tied and an untied model of one shape have the same FLOPs. PaLM and
        nanoGPT also count norms and biases, less than 0.1% of GPT-2; like here, nanoGPT does not count the position
        embedding. The second term is for attention to the whole context, as if it were not causal.
        """
        weights = linear_weights(self) + (self.wte.weight.numel() if self.lm_head is None else 0)
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    # -- weights

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """GPT-2's initialisation: N(0, 0.02), residual projections scaled by (2 n_layer)^-0.5, biases 0, norms 1.

        Other parametrizations multiply it, see `initial_std`. With zero_init the residual projections are 0, so each
        block is the identity until the first update. Each tensor is drawn on the CPU from its own generator, seeded by
        the tensor's name. The weights are thus the same on every device and for every sharding, and at most one tensor
        is in host memory.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            generator = torch.Generator().manual_seed(address(seed, "init", name))
            std = initial_std(self.config, name)
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


def build_model(
    config: Model,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    init: int | Callable[[GPT], None] = 0,
    on_meta: Callable[[GPT], None] | None = None,
) -> GPT:
    """Build a GPT on the meta device, then allocate its memory on `device` and set the weights.

    Args:
        config: the shape, with vocab_size set.
        device: where the weights go.
        dtype: of the parameters. Rotary tables stay float32.
        init: a seed, or a function that sets the weights.
        on_meta: changes the model before memory is allocated, such as the dtypes of its parts.
    """
    with torch.device("meta"):
        model = GPT(config).to(dtype)
        if on_meta is not None:
            on_meta(model)
    allocate(model, device)
    if config.position == "rope":
        model.rope_cos, model.rope_sin = rotary_tables(config, device)
    with torch.no_grad():
        model.init_weights(init) if isinstance(init, int) else init(model)
    return model

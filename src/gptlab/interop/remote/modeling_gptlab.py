"""A GPT that gptlab trained, for `transformers`: the same arithmetic in the same order as gptlab's own model.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Shapes: B sequences, T tokens, S tokens with the cached ones before, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_gptlab import GPTLabConfig

Rope = tuple[Tensor, Tensor]  # cos and sin of the positions' angles, each (B or 1, 1, T, D / 2)


class LayerNorm(nn.Module):
    def __init__(self, config: GPTLabConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.layer_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps).to(x.dtype)


def make_norm(config: GPTLabConfig) -> nn.Module:
    return LayerNorm(config) if config.norm == "layernorm" else RMSNorm(config.n_embd, config.norm_eps)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x (B, H, T, D) by the angles of their positions, in float32 or wider."""
    cos, sin = rope
    low, high = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: GPTLabConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        width = config.n_embd // config.n_head
        self.q_norm = RMSNorm(width, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(width, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | None, cache: Any) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in (q, k, v))  # (B, H, T, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)  # (B, H, S, D)
        dropout = self.dropout if self.training else 0.0
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTLabConfig) -> None:
        super().__init__()
        self.activation, self.dropout = config.mlp, config.dropout
        self.c_fc = nn.Linear(config.n_embd, config.mlp_hidden, bias=config.bias)
        self.c_gate = nn.Linear(config.n_embd, config.mlp_hidden, bias=config.bias) if config.mlp == "swiglu" else None
        self.c_proj = nn.Linear(config.mlp_hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)  # (B, T, mlp_hidden)
        if self.c_gate is not None:
            h = F.silu(self.c_gate(x)) * h
        elif self.activation == "relu2":
            h = F.relu(h).square()
        else:
            h = F.gelu(h, approximate="tanh" if self.activation == "gelu" else "none")
        return F.dropout(self.c_proj(h), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTLabConfig, layer: int) -> None:
        super().__init__()
        self.ln_1, self.attn = make_norm(config), Attention(config, layer)
        self.ln_2, self.mlp = make_norm(config), MLP(config)

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | None, cache: Any) -> Tensor:
        x = x + self.attn(self.ln_1(x), rope, mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPTLabForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. Attention is PyTorch's own, whatever `attn_implementation` says."""

    config_class = GPTLabConfig
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: GPTLabConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = make_norm(config)
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: Any) -> None:
        self.wte = value

    def get_output_embeddings(self) -> nn.Linear | None:
        return self.lm_head

    def set_output_embeddings(self, value: Any) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Any = None,
        **ignored: Any,
    ) -> Any:
        """
        Args:
            input_ids: (B, T) ids, those after the cached ones.
            attention_mask: (B, S), 0 for padding, on any side.
            position_ids: (B, T); default: the number of tokens before that are no padding.
            past_key_values: a `DynamicCache`; with use_cache one is made and returned.
            labels: (B, T) ids, shifted here; -100 is ignored. The loss is their mean, or sum / num_items_in_batch.
            logits_to_keep: logits of the last tokens alone; 0: of all.
        """
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        T = x.shape[1]
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if getattr(past_key_values, "is_compileable", False):
            raise ValueError("this model takes a DynamicCache, which grows, and not a cache of fixed size")
        start = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            if attention_mask is None:
                position_ids = torch.arange(start, start + T, device=x.device)[None]
            else:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        rope = None
        if self.wpe is None:
            rope = self._angles(position_ids)
        elif int(position_ids.max()) >= self.config.block_size:
            raise ValueError(f"the text is longer than this model's context of {self.config.block_size} tokens")
        else:
            x = x + self.wpe(position_ids)
        x = F.dropout(x, self.config.dropout, self.training)
        mask = self._mask(attention_mask, start, T, x.device)
        for block in self.h:
            x = block(x, rope, mask, past_key_values)
        x = self.ln_f(x)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        x = x if isinstance(kept, int) else x[:, kept]
        logits = F.linear(x, self.wte.weight) if self.lm_head is None else self.lm_head(x)
        loss = None
        if labels is not None:
            flat = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device)
            loss = F.cross_entropy(*flat, reduction="mean" if num_items_in_batch is None else "sum")
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        cache = past_key_values if use_cache else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def _angles(self, position_ids: Tensor) -> Rope:
        """Rounded in the same order as in gptlab; another order is visible in the logits at position 1,000."""
        width = self.config.n_embd // self.config.n_head
        channels = torch.arange(0, width, 2, device="cpu", dtype=torch.float32)
        frequencies = (1.0 / self.config.rope_theta ** (channels / width)).to(position_ids.device)
        angles = position_ids[:, None, :, None].float() * frequencies
        return angles.cos(), angles.sin()

    @staticmethod
    def _mask(attention_mask: Tensor | None, start: int, T: int, device: torch.device) -> Tensor | None:
        """(B or 1, 1, T, S), true where a query attends to a key; None: causal. A padded query sees itself alone."""
        padded = attention_mask is not None and not bool(attention_mask.all())
        if not padded and (start == 0 or T == 1):
            return None
        causal = torch.ones(T, start + T, dtype=torch.bool, device=device).tril(start)
        if attention_mask is None or not padded:
            return causal[None, None]
        itself = torch.eye(T, dtype=torch.bool, device=device)
        itself = F.pad(itself, (start, 0))  # (T, S)
        return (causal & attention_mask[:, None, None, :].to(device).bool()) | itself

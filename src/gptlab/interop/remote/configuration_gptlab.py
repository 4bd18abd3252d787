"""Shape of a GPT that gptlab trained, as `transformers` reads it from config.json."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class GPTLabConfig(PretrainedConfig):
    """
    Args:
        position: "learned" or "rope".
        norm: "layernorm" or "rmsnorm"; norm_eps is added to the variance.
        mlp: "gelu" (tanh), "gelu_erf", "swiglu" or "relu2"; mlp_hidden is its width.
        bias: whether linear layers and LayerNorm have biases.
        tied: whether the head is the token embedding. The head has then no weight of its own, and transformers has
            nothing to tie: tie_word_embeddings is always false.
        qk_norm: whether queries and keys go through an RMSNorm per head.
    """

    model_type = "gptlab"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "hidden_size": "n_embd",
        "intermediate_size": "mlp_hidden",
        "max_position_embeddings": "block_size",
    }

    def __init__(
        self,
        n_layer: int = 12,
        n_head: int = 12,
        n_embd: int = 768,
        block_size: int = 1024,
        vocab_size: int = 50257,
        position: str = "learned",
        rope_theta: float = 10000.0,
        norm: str = "layernorm",
        norm_eps: float = 1e-5,
        mlp: str = "gelu",
        mlp_hidden: int = 3072,
        bias: bool = True,
        tied: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.n_layer, self.n_head, self.n_embd = n_layer, n_head, n_embd
        self.block_size, self.vocab_size = block_size, vocab_size
        self.position, self.rope_theta = position, rope_theta
        self.norm, self.norm_eps = norm, norm_eps
        self.mlp, self.mlp_hidden = mlp, mlp_hidden
        self.bias, self.tied, self.qk_norm, self.dropout = bias, tied, qk_norm, dropout
        self.use_cache = use_cache
        super().__init__(**{**kwargs, "tie_word_embeddings": False})

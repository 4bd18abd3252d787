"""A document classifier: BERT's encoder with a linear head.

In BERT (Devlin et al. 2018, arXiv 1810.04805), norms follow the residual sums. RoBERTa (Liu et al. 2019, arXiv
1907.11692) is the same network, trained longer on more data. The head is a linear layer on the last hidden state of
the first token, <s> or [CLS], without a pooler.

Shapes: B documents, T tokens, C = n_embd, L = n_labels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gptlab.config import Model
from gptlab.model.gpt import MLP, Attention, LayerNorm, allocate, embedding, linear_weights
from gptlab.model.loss import HeadLoss
from gptlab.seeding import address


class EncoderBlock(nn.Module):
    """Post-norm transformer block: each norm follows the residual sum (Vaswani et al. 2017, arXiv 1706.03762)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.attn, self.ln_1 = Attention(config), LayerNorm(config)
        self.mlp, self.ln_2 = MLP(config), LayerNorm(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # (B, T, C), (B, 1, 1, T)
        x = self.ln_1(x + self.attn(x, None, mask, None))
        return self.ln_2(x + self.mlp(x))


class Encoder(nn.Module):
    """The document classifier. `build_encoder` creates one with weights.

    Args:
        config: the shape, with vocab_size set; block_size includes the two special tokens of a document.
        n_labels: number of labels.
        position_offset: row of the position embedding for the first token: 2 in RoBERTa (after the padding id), 0 in
            BERT.
    """

    def __init__(self, config: Model, n_labels: int, position_offset: int = 2) -> None:
        super().__init__()
        assert config.vocab_size > 0, "vocab_size is resolved before the model is built"
        parts = config.position, config.norm, config.mlp, config.bias, config.qk_norm
        assert parts == ("learned", "layernorm", "gelu_erf", True, False), "an encoder has BERT's parts"
        self.config, self.position_offset = config, position_offset
        self.wte = embedding(config.vocab_size, config.n_embd)
        self.wpe = embedding(config.block_size + position_offset, config.n_embd)
        self.token_type = embedding(1, config.n_embd)  # BERT's second type is for the second text of a pair
        self.ln_emb = LayerNorm(config)
        self.h = nn.ModuleList(EncoderBlock(config) for _ in range(config.n_layer))
        self.head = nn.Linear(config.n_embd, n_labels)
        self.activation_checkpointing = False
        # Set by a precision regime: dtypes of the residual stream (None: the embedding's dtype), of the head's matmul
        # (None: as in the blocks) and of the training loss.
        self.stream_dtype: torch.dtype | None = None
        self.head_dtype: torch.dtype | None = None
        self.loss_dtype: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def hidden(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The last hidden states (B, T, C). Those of padding tokens are meaningless and do not affect the others.

        Args:
            tokens: (B, T) ids, padded at the end with any id.
            lengths: (B,) numbers of tokens without padding, at least 1.
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
        """Logits (B, L) of hidden states (B, C), computed in `head_dtype`, autocast's dtype, or the weight's dtype."""
        device, dtype = x.device.type, self.head_dtype
        if dtype is None:
            autocast = torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if autocast else self.stream_dtype or self.head.weight.dtype
        with torch.autocast(device, enabled=False):
            return F.linear(x.to(dtype), self.head.weight.to(dtype), self.head.bias.to(dtype))

    def forward(
        self, tokens: Tensor, lengths: Tensor, targets: Tensor | None = None, factor: Tensor | float = 1.0
    ) -> Tensor | HeadLoss:
        """Logits (B, L), or with targets the sum of the documents' losses.

        Args:
            tokens: see `hidden`.
            lengths: see `hidden`.
            targets: (B, L) floats, 1 for each label of a document: binary cross-entropy, averaged over labels; or (B,)
                label ids: cross-entropy.
            factor: multiplies the loss to differentiate: the loss scale / documents of the step.
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
        """Number of parameters, each counted once, including embeddings and head."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Training FLOPs per token of a document of block_size tokens: 6 N + 12 n_layer n_embd block_size.

        As in `GPT.flops_per_token`. N is the number of weights in the linear layers of the blocks: embeddings are only
        looked up, and the head is applied to one token per document.
        """
        return 6 * linear_weights(self.h) + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    # -- weights

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """BERT's initialisation: N(0, 0.02) for all matrices, biases 0, norms 1.

        Each tensor is drawn on the CPU from its own generator, seeded by the tensor's name. The weights are thus the
        same on every device, and the head is the same whether the body is initialised or imported.
        """
        for name, parameter in self.named_parameters():
            initialise(name, parameter, seed)


def initialise(name: str, parameter: Tensor, seed: int) -> None:
    """Initialise one parameter of an encoder, see `Encoder.init_weights`."""
    if parameter.dim() < 2:
        parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        return
    generator = torch.Generator().manual_seed(address(seed, "init", name))
    parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.02, generator=generator))


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the documents' losses in nats, in the logits' dtype, ().

    Args:
        logits: (B, L).
        targets: (B, L) floats or (B,) ids, see `Encoder.forward`.
    """
    if targets.is_floating_point():
        losses = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")  # (B, L)
        return losses.mean(dim=1).sum()
    return F.cross_entropy(logits, targets, reduction="sum")


EncoderInit = Callable[[Encoder], None]


def build_encoder(
    config: Model,
    n_labels: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    init: int | EncoderInit = 0,
    position_offset: int = 2,
    on_meta: Callable[[Encoder], None] | None = None,
) -> Encoder:
    """Build an encoder on the meta device, then allocate its memory on `device` and set the weights.

    Args:
        config: the shape, with vocab_size set.
        n_labels: number of labels.
        device: where the weights go.
        dtype: of the parameters.
        init: a seed, or a function that sets the weights.
        position_offset: see `Encoder`.
        on_meta: changes the model before memory is allocated, such as the dtypes of its parts.
    """
    with torch.device("meta"):
        model = Encoder(config, n_labels, position_offset).to(dtype)
        if on_meta is not None:
            on_meta(model)
    allocate(model, device)
    with torch.no_grad():
        model.init_weights(init) if isinstance(init, int) else init(model)
    return model

"""How initial scales, learning rates and multipliers follow from a model's width and depth.

With m = n_embd / base_width, d = n_embd / n_head, l = n_layer / base_depth, relative to the standard parametrization:

                              initial std    lr     decay   eps      forward multiplier
    embeddings, head          1              1      1       1/m      1/m, of the logits
    final norm                1              1      -       1/m
    matrices of the blocks    m^-0.5         1/m    m       1/(m l)  (base_head_size / d)^0.5, of attention's scores
      of these, c_proj        (l / m)^0.5    1/m    m       1/(m l)  1/l, of what the blocks add to the stream
    norms and biases there    1              1      -       1/(m l)

CompleteP (Dey et al. 2025, arXiv 2505.01618, table 1, alpha = 1) is all of it, muP (Yang et al. 2022, arXiv
2203.03466, table 8) is the table with l = 1. In muP each activation changes in a step by an amount that does not depend
on the width, in CompleteP also not on the depth, so a learning rate that is best at one size is nearly best at others.
At base_width, base_depth and base_head_size the model is the standard one.

- Attention is scaled by 1 / d instead of d^-0.5, d = head size. Where heads grow in number and not in size that is a
  constant.
- The head has the embedding's scale and learning rate, so the two may be tied.
- lr times weight decay is constant, so weights forget as fast in every matrix (CompleteP's table; it holds for muP).
- The rules of lr are those of Adam, whose update has the same size in every weight, and of Lion. Muon's update has the
  spectral norm lr max(1, rows / cols)^0.5, whatever the width: what Yang et al. 2023 (arXiv 2310.17813) ask for. Its
  lr and weight decay have no multiplier. (With the 0.2 max(rows, cols)^0.5 of arXiv 2502.16982 they would have one.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gptlab.config import Model


class Multipliers(NamedTuple):
    """What a parameter's settings in the optimizer are multiplied by."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


def width_ratio(config: Model) -> float:
    """m of the table; 1 in the standard parametrization."""
    return 1.0 if config.parametrization == "standard" else config.n_embd / config.base_width


def depth_ratio(config: Model) -> float:
    """l of the table; 1 in the others than CompleteP."""
    return config.n_layer / config.base_depth if config.parametrization == "completep" else 1.0


def initial_std(config: Model, name: str) -> float:
    """Standard deviation of a matrix's initial weights: GPT-2's, times the table's multiplier.

    Args:
        name: the parameter's, such as h.0.mlp.c_fc.weight.
    """
    std = 0.02
    if name.endswith("c_proj.weight"):
        depth = config.base_depth if config.parametrization == "completep" else config.n_layer
        std = 0.0 if config.zero_init else 0.02 * (2 * depth) ** -0.5
    return std * width_ratio(config) ** -0.5 if name.startswith("h.") else std


def optimizer_multipliers(config: Model, name: str, matrix: bool, muon: bool = False) -> Multipliers:
    """Multipliers of a parameter.

    Args:
        name: the parameter's.
        matrix: whether it has two dimensions.
        muon: whether Muon updates it.
    """
    m, block = width_ratio(config), name.startswith("h.")
    eps = 1 / (m * depth_ratio(config)) if block else 1 / m
    return Multipliers(1 / m, m, eps) if block and matrix and not muon else Multipliers(eps=eps)


def attention_multiplier(config: Model) -> float:
    """Multiplies attention's scale d^-0.5."""
    return 1.0 if config.parametrization == "standard" else (config.base_head_size / config.head_size) ** 0.5


def residual_multiplier(config: Model) -> float:
    """Multiplies what attention and MLP add to the residual stream."""
    return 1 / depth_ratio(config)


def logit_multiplier(config: Model) -> float:
    """Multiplies the last hidden states, and thus the logits."""
    return 1 / width_ratio(config)


def folded(config: Model, name: str, weight: Tensor) -> Tensor:
    """What a parameter is in the standard model that computes the same, which `plain` describes.

    The multiplier of attention goes into the queries, or their norm; those of the residual stream into what writes to
    it; that of the logits into the final norm, as a tied head's weight is the embedding too.
    """
    attention = attention_multiplier(config)
    if name.startswith("ln_f."):
        return weight if (by := logit_multiplier(config)) == 1 else weight * by
    if ".c_proj." in name:
        return weight if (by := residual_multiplier(config)) == 1 else weight * by
    if attention == 1:
        return weight
    if ".q_norm." in name:
        return weight * attention
    if ".c_attn." in name and not config.qk_norm:
        q, rest = weight.split([config.n_embd, 2 * config.n_embd])
        return torch.cat((q * attention, rest))
    return weight


def plain(config: Model) -> Model:
    """The standard model of this shape."""
    return config.model_copy(update={"parametrization": "standard"})

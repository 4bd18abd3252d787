"""What a training step is compared with: other GPT-2s of the same shape, dtype and first weights, in a plain loop.

Shapes: B sequences, T tokens, C = n_embd, H heads, V = vocab_size.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gptlab.config import Model, Precision, Recipe
from gptlab.errors import UserError
from gptlab.interop.hf import hf_gpt2, hf_model_type
from gptlab.optim.optimizers import parameter_groups
from gptlab.optim.schedule import learning_rate
from gptlab.precision.libraries import load_library
from gptlab.precision.regimes import Regime, make_regime
from gptlab.progress import tell_nobody
from gptlab.tasks.base import Init, Task
from gptlab.training.trainer import due

PEERS = ("hf", "nanogpt-loop", "litgpt")


def telling(did: Callable[[str], None], call: Callable[..., Any], part: str, before: str = "") -> Callable[..., Any]:
    """A function that says when a part ends, and with `before` that another one has ended when it is called."""

    def inner(*args: Any, **kwargs: Any) -> Any:
        if before:
            did(before)
        result = call(*args, **kwargs)
        did(part)
        return result

    return inner


class Block(nn.Module):
    """A block as a user would write it. The parameters have the names of GPT-2's, which are gptlab's too."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        width, wide, bias = config.n_embd, config.mlp_hidden, config.bias
        self.n_head, self.dropout, self.mlp_kind = config.n_head, config.dropout, config.mlp
        self.ln_1 = nn.LayerNorm(width, config.norm_eps, bias=bias)
        self.ln_2 = nn.LayerNorm(width, config.norm_eps, bias=bias)
        linear = {"c_attn": (width, 3 * width), "c_proj": (width, width)}
        self.attn = nn.ModuleDict({name: nn.Linear(*shape, bias=bias) for name, shape in linear.items()})
        linear = {"c_fc": (width, wide), "c_proj": (wide, width)}
        self.mlp = nn.ModuleDict({name: nn.Linear(*shape, bias=bias) for name, shape in linear.items()})

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        B, T, C = x.shape
        parts = self.attn["c_attn"](self.ln_1(x)).split(C, dim=2)
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in parts)  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        x = x + F.dropout(self.attn["c_proj"](y), self.dropout)
        h = self.mlp["c_fc"](self.ln_2(x))
        if self.mlp_kind == "relu2":
            h = F.relu(h).square()
        else:
            h = F.gelu(h, approximate="tanh" if self.mlp_kind == "gelu" else "none")
        return x + F.dropout(self.mlp["c_proj"](h), self.dropout)


class Plain(nn.Module):
    """GPT-2 in the style of nanoGPT: the logits of all tokens at once, and cross-entropy over them."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.wte.weight

    def hidden(self, x: Tensor) -> Tensor:  # (B, T)
        h = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))
        h = F.dropout(h, self.dropout)
        for block in self.h:
            h = block(h)
        return self.ln_f(h)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # (B, T) each
        logits = self.lm_head(self.hidden(x))  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


class HuggingFace(nn.Module):
    """transformers' GPT2LMHeadModel with its own loss. The targets are given: the data has one for the last token."""

    def __init__(self, hf: nn.Module) -> None:
        super().__init__()
        self.hf = hf

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # (B, T) each
        loss: Tensor = self.hf(input_ids=x, labels=y, shift_labels=y).loss
        return loss


class LitGPT(nn.Module):
    """litgpt's GPT, and the cross-entropy of its `pretrain`, which takes 128 tokens at a time."""

    lit: Any

    def __init__(self, config: Model) -> None:
        super().__init__()
        litgpt = load_library("litgpt", "--vs litgpt")
        self.loss = load_library("litgpt.utils", "--vs litgpt").chunked_cross_entropy
        self.lit = litgpt.GPT(
            litgpt.Config(
                block_size=config.block_size,
                n_layer=config.n_layer,
                n_embd=config.n_embd,
                n_head=config.n_head,
                vocab_size=config.vocab_size,
                padded_vocab_size=config.vocab_size,
                norm_class_name="LayerNorm" if config.norm == "layernorm" else "RMSNorm",
                norm_eps=config.norm_eps,
                norm_qk=config.qk_norm,
                parallel_residual=False,
                rope_base=config.rope_theta,
                rotary_percentage=1.0,
                intermediate_size=config.mlp_hidden,
                bias=config.bias,
                mlp_class_name="LLaMAMLP" if config.mlp == "swiglu" else "GptNeoxMLP",
                gelu_approximate="none" if config.mlp == "gelu_erf" else "tanh",
            )
        )
        if config.tied:
            self.lit.transformer.wte.weight = self.lit.lm_head.weight

    def load(self, ours: dict[str, Tensor], swiglu: bool) -> None:
        """The weights, from gptlab's names; litgpt calls SwiGLU's gate fc_1."""
        names = {"c_attn": "qkv", "c_proj": "proj", "c_fc": "fc_2" if swiglu else "fc", "c_gate": "fc_1"}
        names |= {"ln_1": "norm_1", "ln_2": "norm_2", "q_norm": "norm_q", "k_norm": "norm_k"}
        theirs = {}
        for name, weight in ours.items():
            new = ".".join(names.get(part, part) for part in name.split("."))
            theirs[new if new.startswith("lm_head.") else f"transformer.{new}"] = weight
        self.lit.load_state_dict(theirs)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # (B, T) each
        loss: Tensor = self.loss(self.lit(x), y)
        return loss


def _unlike_litgpt(model: Model) -> str:
    """What of a model litgpt does not have."""
    if model.position != "rope":
        return f"model.position = {model.position}, and it has rotary positions alone"
    if model.mlp == "relu2":
        return "model.mlp = relu2, and it has SwiGLU and GELU"
    if model.norm == "layernorm" and (model.qk_norm or not model.bias):
        return "model.norm = layernorm without biases or with QK norm, and it has neither"
    if model.dropout:
        return f"model.dropout = {model.dropout:g}, and it has none"
    return ""


def refuse(name: str, recipe: Recipe) -> None:
    """Raises UserError, which says why, where a peer cannot take the same step as a resolved recipe."""
    model, regime = recipe.model, make_regime(recipe.precision)
    because = ""
    if recipe.task != "lm":
        because = f"task = {recipe.task}, and it is a language model"
    elif name == "litgpt" and (unlike := _unlike_litgpt(model)):
        because = unlike
    elif name != "litgpt" and hf_model_type(model) != "gpt2":
        because = (
            f"model.position = {model.position}, norm = {model.norm}, mlp = {model.mlp}, qk_norm = {model.qk_norm}, "
            "and it has the classic shape alone (learned, layernorm, gelu, no QK norm)"
        )
    elif model.parametrization != "standard":
        because = f"model.parametrization = {model.parametrization}, and it has the standard one alone"
    elif model.document_attention:
        because = "model.document_attention is on, and it attends across documents"
    elif regime.loss_scaling or regime.float8 or regime.head or regime.norms:
        because = f"precision.regime = {regime.name}, or its head or norms, and it has one dtype and no loss scaling"
    if because:
        raise UserError(f"--vs {name} cannot train {recipe.name}: {because}")
    package = {"hf": "transformers", "litgpt": "litgpt"}.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"--vs {name} needs {package}, which is not installed: `pip install {package}`")


class Peer:
    """Another model in a plain loop: autocast or its dtype, torch's AdamW and clipping.

    AdamW is fused where its users have it so: always in the Hugging Face Trainer, on a GPU in nanoGPT and litgpt.

    Args:
        name: one of `PEERS`.
        recipe: resolved.
        task: gives the batches.
        regime: entered.
        init: of the first weights, as `resolve` returns it.
        device: to train on.
        micro_batch: sequences.

    Attributes:
        losses: of the steps so far, on the device.
    """

    def __init__(
        self, name: str, recipe: Recipe, task: Task, regime: Regime, init: Init, device: torch.device, micro_batch: int
    ) -> None:
        self.recipe, self.task, self.device, self.micro_batch = recipe, task, device, micro_batch
        self.autocast = regime.autocast or regime.stream  # the peers' way to a bf16 stream
        ours = task.build(make_regime(Precision(regime="fp32")), init)
        if name == "hf":
            load_library("transformers.models.gpt2.modeling_gpt2", "--vs hf")  # without what it logs of others
            model: Any = HuggingFace(hf_gpt2(ours))
            self.body: tuple[Any, str] = model.hf.transformer, "forward"  # ends where the head begins
        elif name == "litgpt":
            with device:
                model = LitGPT(recipe.model)
            model.load(ours.state_dict() | {"lm_head.weight": ours.head_weight}, recipe.model.mlp == "swiglu")
            self.body = model.lit.transformer.ln_f, "forward"
        else:
            with device:
                model = Plain(recipe.model)
            self.body = model, "hidden"
            head = {"lm_head.weight": ours.head_weight}
            model.load_state_dict(ours.state_dict() | head)
        del ours
        self.model = model.to(device, regime.weights).train()
        optim = recipe.optim
        groups = parameter_groups(self.model, optim.weight_decay)
        fused = name == "hf" or device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)
        self.call: Callable[[Tensor, Tensor], Tensor] = self.model
        if recipe.compile.enabled:
            self.call = torch.compile(self.model, dynamic=False)
        self.losses: list[Tensor] = []

    def update(self, did: Callable[[str], None] = tell_nobody) -> None:
        """One optimizer step; `did` as in `training.loop.update`."""
        step, recipe, (body, name) = len(self.losses), self.recipe, self.body
        told = telling(did, getattr(body, name), "forward")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.optim.lr, recipe.schedule)
        total = torch.zeros((), device=self.device)
        for x, y, *_ in self.task.micro_batches(step, self.micro_batch):
            x, y = x.contiguous(), y.contiguous()
            did("data")
            inside = contextlib.nullcontext() if recipe.compile.enabled else patch.object(body, name, told)
            with inside, torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                loss = self.call(x, y) * (y.numel() / self.task.per_step)
            did("forward" if recipe.compile.enabled else "head")
            loss.backward()
            total += loss.detach()
            did("backward")
        if recipe.optim.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.optim.grad_clip)
        did("clipping")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        did("optimizer")
        self.losses.append(total)
        if due(step + 1, recipe.log.every):
            total.item()
        did("logging")

    def loss(self) -> float:
        """Of the last step."""
        return float(self.losses[-1])

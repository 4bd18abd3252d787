"""Small recipes, and what a real step of theirs takes, for the tests of gptlab.planning."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gptlab.config import Recipe, build_recipe
from gptlab.model.encoder import build_encoder
from gptlab.model.gpt import build_model
from gptlab.planning.shape import Shape
from gptlab.precision.regimes import apply_regime

CPU = torch.device("cpu")
LABELS = 50
MODERN = {"model__mlp": "swiglu", "model__norm": "rmsnorm", "model__position": "rope", "model__qk_norm": True}


def small(**changes: Any) -> Recipe:
    """A model of 3 layers, which is one more than the planner looks at; keys have __ for the dot."""
    base: dict[str, Any] = {
        "model": {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 64, "vocab_size": 700},
        "batch": {"micro_batch": 5, "tokens_per_step": 64 * 10},
        "train": {"max_steps": 100},
    }
    return build_recipe(base, {key.replace("__", "."): value for key, value in changes.items()})


def shape_of(recipe: Recipe) -> Shape:
    return Shape(recipe.model, recipe.precision, LABELS if recipe.task == "classify" else 0)


def real(recipe: Recipe) -> Any:
    regime = shape_of(recipe).regime
    if recipe.task == "classify":
        model: Any = build_encoder(recipe.model, LABELS, on_meta=lambda m: apply_regime(m, regime))
    else:
        model = build_model(recipe.model, on_meta=lambda m: apply_regime(m, regime))
    model.activation_checkpointing = recipe.train.activation_checkpointing
    return model


def batches(recipe: Recipe) -> list[tuple[Any, ...]]:
    """What a step of the recipe gives its model."""
    n, T, B = recipe.sequences_per_step, recipe.model.block_size, recipe.batch.micro_batch
    assert isinstance(B, int)
    draw = torch.Generator().manual_seed(0)
    found: list[tuple[Any, ...]] = []
    for _ in range(n // B):
        tokens = torch.randint(recipe.model.vocab_size, (B, T), generator=draw)
        factor = torch.tensor(1 / n)
        if recipe.task == "classify":
            found.append((tokens, torch.full((B,), T), torch.zeros(B, LABELS), factor))
        else:
            documents = (tokens % 50 == 0).cumsum(1) if recipe.model.document_attention else None
            found.append((tokens, tokens, documents, factor))
    return found


def stored(tensors: list[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def allocated(run: Callable[[], Any]) -> tuple[int, int, Any]:
    """Bytes that PyTorch's CPU allocator gave while something ran: the most at once, and those not taken back."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, now, kept


def updates(recipe: Recipe, model: Any, optimizer: torch.optim.Optimizer) -> None:
    for batch in batches(recipe):
        with shape_of(recipe).regime.context(CPU):
            out = model(*batch)
        out.train.backward()
        del out
    optimizer.step()


def few(cases: list[dict[str, Any]], *quick: int) -> list[Any]:
    """The cases, of which all but a few are slow together."""
    return [case if i in quick else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(cases)]

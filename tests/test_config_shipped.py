"""Shipped recipes: every number as its source has it."""

import pytest

from gptlab.config import PRESETS, Recipe, load_recipe, shipped


def value(recipe: Recipe, name: str) -> object:
    section, key = name.split(".")
    return getattr(getattr(recipe, section), key)


FINEWEB = {
    "model.n_layer": 12,
    "model.n_head": 12,
    "model.n_embd": 768,
    "model.block_size": 1024,
    "model.vocab_size": 50304,
    "model.tied": True,
    "model.dropout": 0.0,
    "data.corpus": "fineweb-edu",
    "data.tokenizer": "gpt2",
    "data.sampling": "shuffled",
    "batch.tokens_per_step": 524288,
    "optim.name": "adamw",
    "optim.betas": (0.9, 0.95),
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.1,
    "optim.grad_clip": 1.0,
    "schedule.shape": "cosine",
    "train.eval_every": 250,
    "eval.tokens": 20 * 32 * 1024,
    "hellaswag.every": 250,
    "checkpoint.every": 5000,
    "precision.regime": "amp_bf16",
    "sample.seed": 42,
}
CLASSIC = {
    **FINEWEB,
    "model.position": "learned",
    "model.norm": "layernorm",
    "model.mlp": "gelu",
    "optim.lr": 6e-4,
    "schedule.min_lr": 6e-5,
    "schedule.warmup_steps": 715,
    "train.max_steps": 19073,
}
MODERN = {
    **FINEWEB,
    "model.position": "rope",
    "model.norm": "rmsnorm",
    "model.mlp": "swiglu",
    "model.mlp_width": 2048,
    "batch.micro_batch": 32,
    "optim.lr": 1.8e-3,
    "schedule.min_lr": 1.8e-4,
    "schedule.warmup_steps": 285,
    "train.max_steps": 38146,
    "compile.enabled": True,
}
NANOGPT = {
    "model.bias": False,
    "model.mlp": "gelu_erf",
    "data.corpus": "shakespeare",
    "data.tokenizer": "char",
    "data.sampling": "random",
    "optim.lr": 1e-3,
    "optim.betas": (0.9, 0.99),
    "optim.weight_decay": 0.1,
    "optim.grad_clip": 1.0,
    "schedule.min_lr": 1e-4,
    "schedule.warmup_steps": 100,
    "schedule.shape": "cosine",
    "train.eval_every": 250,
    "eval.train": True,
}
NUMBERS = {
    "gpt2-124m-openwebtext": {
        "model.n_layer": 12,
        "model.n_head": 12,
        "model.n_embd": 768,
        "model.block_size": 1024,
        "model.vocab_size": 50304,
        "data.corpus": "openwebtext",
        "data.tokenizer": "gpt2",
        "data.sampling": "random",
        "batch.micro_batch": 12,
        "batch.tokens_per_step": 12 * 1024 * 5,
        "train.max_steps": 10000,
        "train.eval_every": 500,
        "eval.tokens": 200 * 12 * 1024,
        "eval.train": True,
        "optim.lr": 6e-4,
        "optim.weight_decay": 0.1,
        "schedule.warmup_steps": 1000,
        "schedule.shape": "cosine",
        "schedule.min_lr": 6e-5,
        "optim.grad_clip": 1.0,
        "checkpoint.every": 500,
    },
    "gpt2-124m-fineweb-edu": {**CLASSIC, "batch.micro_batch": 64},
    "gpt2-124m-fineweb-edu-230126": {**CLASSIC, "batch.micro_batch": 16},
    "gpt2-124m-fineweb-edu-modern": MODERN,
    "shakespeare-char-cpu": {
        **NANOGPT,
        "model.n_layer": 4,
        "model.n_head": 4,
        "model.n_embd": 128,
        "model.block_size": 64,
        "model.dropout": 0.0,
        "batch.micro_batch": 12,
        "batch.tokens_per_step": 768,
        "train.max_steps": 2000,
        "eval.tokens": 20 * 12 * 64,
    },
    "shakespeare-char": {
        **NANOGPT,
        "model.n_layer": 6,
        "model.n_head": 6,
        "model.n_embd": 384,
        "model.block_size": 256,
        "model.dropout": 0.2,
        "batch.micro_batch": 64,
        "batch.tokens_per_step": 64 * 256,
        "train.max_steps": 5000,
        "eval.tokens": 200 * 64 * 256,
    },
    "finetune-shakespeare": {
        "train.init_from": "openai-community/gpt2-xl",
        "batch.micro_batch": 1,
        "batch.tokens_per_step": 32 * 1024,
        "train.max_steps": 20,
        "train.eval_every": 5,
        "eval.tokens": 40 * 1024,
        "optim.lr": 3e-5,
        "schedule.shape": "constant",
    },
}


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_shipped_recipes_have_their_sources_numbers(name: str) -> None:
    recipe = load_recipe(name)
    assert {key: value(recipe, key) for key in NUMBERS[name]} == NUMBERS[name]
    assert recipe.seed == 1337
    assert recipe.description


def test_every_shipped_recipe_loads() -> None:
    assert set(NUMBERS) < set(shipped())
    for name in shipped():
        assert load_recipe(name).name == name


def test_steps_rule_over_epochs_in_the_modern_fineweb_run() -> None:
    recipe = load_recipe("gpt2-124m-fineweb-edu-modern")
    two_epochs = 2 * 9_900_000_000 // recipe.batch.tokens_per_step
    assert recipe.step_limit(train_tokens=9_900_000_000) == 38146
    assert 38146 - two_epochs == 381


def test_presets_are_the_sizes_they_are_named_after() -> None:
    def millions(name: str) -> float:
        p = PRESETS[name]
        n, c = p["n_layer"], p["n_embd"]
        return (n * (12 * c * c + 13 * c) + 2 * c + (50257 + 1024) * c) / 1e6

    assert [round(millions(name)) for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")] == [124, 355, 774, 1558]

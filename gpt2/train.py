"""Train GPT-2 by the flags of the published commands. docs/make-front.md says which settings they stand for.

cd gpt2 && python3 train.py --batch-size 32 --gradient-accumulation 4 --num-epochs 2 --optimizer adamw --device cuda
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import checkout

if TYPE_CHECKING:
    from gptlab.config import Recipe

RECIPES = {
    "shakespeare": "gpt2-shakespeare-w7900",
    "finewebedu": "gpt2-124m-fineweb-edu",
    "openwebtext": "gpt2-124m-openwebtext",
}
OPTIMIZERS = {
    "adamw": "adamw",
    "adamwspam": "adamw-spam",
    "adamwprune": "adamw-prune",
    "muon": "muon",
    "sgd": "sgd",
    "adam8bit": "adamw_8bit",
}
LONGER = 1.21  # bitter2 is bitter1 with the iterations that its shorter training time would pay for


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="train.py",
        description="Train GPT-2.",
        allow_abbrev=False,
        epilog="All settings that `gptlab train --help` lists are flags too (--optim.lr 3e-4), and win. "
        "--seed and --resume are passed on.",
    )
    add = top.add_argument
    add("--dataset", choices=list(RECIPES), default="shakespeare", help="chooses the recipe to start from")
    add("--model-size", choices=["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"], help="default: the recipe's, gpt2")
    add("--batch-size", type=int, metavar="N", help="sequences per forward pass")
    help = "forward passes per step; without --batch-size or this flag, the other keeps the recipe's sequences per step"
    add("--gradient-accumulation", type=int, metavar="N", help=help)
    help = "length of the run, instead of the recipe's; a shorter run has a shorter warm-up"
    add("--num-epochs", type=float, metavar="X", help=help)
    add("--optimizer", choices=list(OPTIMIZERS), default="adamwspam", help="default: adamwspam")
    add("--pruning-method", choices=["none", "magnitude", "movement", "state"], default="none", help="default: none")
    help = "score of state pruning (default: bitter1); bitter2 is bitter1 with 21%% more iterations"
    add("--adamwprune-variant", choices=["bitter0", "bitter1", "bitter2", "bitter3", "bitter7"], help=help)
    add("--target-sparsity", type=float, metavar="X", help="share of the weights to prune (default: 0.5)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: auto")
    add("--out", metavar="DIR", help="run directory (default: runs/, named after the method)")
    return top


def settings_of(options: argparse.Namespace, own: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The recipe's name and the settings that flags stand for.

    Args:
        options: what `parser` returned.
        own: settings given as --section.key, which beat the flags.

    Raises:
        UserError: flags that exclude one another, or a value out of bounds.
    """
    from gptlab.config import load_recipe
    from gptlab.errors import UserError

    state = options.pruning_method == "state"
    if state != (options.optimizer == "adamwprune"):
        raise UserError(
            "--optimizer adamwprune and --pruning-method state are for each other: give both, or neither; for AdamW "
            "without pruning, type --optimizer adamw"
        )
    if options.adamwprune_variant and not state:
        raise UserError(
            "--adamwprune-variant is a score of --optimizer adamwprune --pruning-method state: give these too"
        )
    if options.target_sparsity is not None and options.pruning_method == "none":
        raise UserError("--target-sparsity needs a --pruning-method: magnitude, movement or state")
    name = RECIPES[options.dataset]
    base = load_recipe(name)
    chosen: dict[str, Any] = {
        "optim.name": OPTIMIZERS[options.optimizer],
        "sparsity.method": options.pruning_method,
        "train.device": options.device,
    }
    if options.model_size:
        chosen["model.preset"] = options.model_size
    if options.target_sparsity is not None:
        chosen["sparsity.target"] = options.target_sparsity
    if state:
        chosen["sparsity.variant"] = (options.adamwprune_variant or "bitter1").replace("bitter2", "bitter1")
    if options.batch_size is not None or options.gradient_accumulation is not None:
        rows, passes = options.batch_size, options.gradient_accumulation
        if min(1 if rows is None else rows, 1 if passes is None else passes) < 1:
            raise UserError("--batch-size and --gradient-accumulation must be whole numbers from 1 on")
        rows = rows or max(1, base.sequences_per_step // passes)  # without the other flag, the recipe's step
        passes = passes or max(1, base.sequences_per_step // rows)
        block = own.get("model.block_size", base.model.block_size)
        chosen |= {"batch.micro_batch": rows, "batch.tokens_per_step": rows * passes * block}
    if options.num_epochs is not None:
        chosen |= {"train.max_epochs": options.num_epochs, "train.max_steps": 0, "train.max_tokens": 0}
    chosen |= own
    recipe = load_recipe(name, chosen)
    train = recipe.train
    if options.adamwprune_variant == "bitter2":
        limits = {"max_steps": round(train.max_steps * LONGER), "max_tokens": round(train.max_tokens * LONGER)}
        limits |= {"max_epochs": train.max_epochs * LONGER} if train.max_epochs else {}
        longer = {f"train.{limit}": value for limit, value in limits.items() if value}
        print(f"bitter2 is bitter1 with 21% more iterations: {', '.join(f'{k} = {v}' for k, v in longer.items())}")
        chosen |= longer
        recipe = recipe.replace(longer)
    if "schedule.warmup_steps" not in own and (warmup := fitting_warmup(recipe, base)) < base.schedule.warmup_steps:
        chosen["schedule.warmup_steps"] = warmup
    return name, chosen


def fitting_warmup(recipe: Recipe, base: Recipe) -> int:
    """Steps of warm-up: the base recipe's, or the same share of a run that is shorter than the base recipe's."""
    from gptlab.data.shards import Dataset

    tokens = 0
    if recipe.train.max_epochs:
        if not (data := checkout.folder() / recipe.data.folder).is_dir() or recipe.data.mixture:
            return base.schedule.warmup_steps  # `gptlab train` says what is missing
        tokens = len(Dataset(data).train)
    steps, planned = recipe.step_limit(tokens), base.step_limit(0)
    return base.schedule.warmup_steps * min(steps, planned) // planned


def call_of(words: Sequence[str]) -> list[str]:
    """The `gptlab train` that a command line stands for."""
    from gptlab.cli import lift_settings
    from gptlab.kconfig import as_text

    left, own = lift_settings(checkout.from_folder(words))
    options, rest = parser().parse_known_args(left)
    name, chosen = settings_of(options, own)
    out = options.out
    if not out:
        variant = (options.adamwprune_variant or "bitter1") if options.pruning_method == "state" else ""
        pruning = options.pruning_method.replace("none", "")
        method = "-".join(filter(None, (options.optimizer, pruning, variant)))
        out = f"runs/{options.model_size or 'gpt2'}-{options.dataset}-{method}"
    return ["train", name, *rest, *(f"--{key}={as_text(value)}" for key, value in chosen.items()), "--out", out]


if __name__ == "__main__":
    checkout.run(call_of)

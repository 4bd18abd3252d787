"""Train GPT-2 by the flags of the published commands, which are settings of a shipped recipe: see docs/make-front.md.

cd gpt2 && python3 train.py --batch-size 32 --gradient-accumulation 4 --num-epochs 2 --optimizer adamw --device cuda
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkout

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
LONGER = 1.21  # bitter2 has bitter1's score and the iterations that the time it saves would pay for


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="train.py",
        description="Train GPT-2.",
        allow_abbrev=False,
        epilog="Every setting of `gptlab train --help` is a flag too (--optim.lr 3e-4) and beats those above; --seed "
        "and --resume are passed on.",
    )
    add = top.add_argument
    add("--dataset", choices=list(RECIPES), default="shakespeare", help="which recipe is the base")
    add("--model-size", choices=["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"], help="default: the recipe's, gpt2")
    add("--batch-size", type=int, metavar="N", help="sequences in one pass")
    add(
        "--gradient-accumulation",
        type=int,
        metavar="N",
        help="passes in one step; of the two, one alone keeps the step",
    )
    add("--num-epochs", type=float, metavar="X", help="instead of the recipe's limit")
    add("--optimizer", choices=list(OPTIMIZERS), default="adamwspam", help="default: adamwspam")
    add("--pruning-method", choices=["none", "magnitude", "movement", "state"], default="none", help="default: none")
    add(
        "--adamwprune-variant",
        choices=["bitter0", "bitter1", "bitter2", "bitter3", "bitter7"],
        help="score of state pruning (default: bitter1); bitter2 is bitter1 with 21%% more iterations",
    )
    add("--target-sparsity", type=float, metavar="X", help="share of the weights that is pruned (default: 0.5)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: auto")
    add("--out", metavar="DIR", help="run directory (default: runs/ and a name that says the method)")
    return top


def settings_of(options: argparse.Namespace, own: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The recipe and the settings that flags stand for.

    Args:
        options: of `parser`.
        own: settings given as --section.key, which win.

    Raises:
        UserError: flags that exclude one another, or a value out of bounds.
    """
    from gptlab.config import load_recipe
    from gptlab.errors import UserError

    state = options.pruning_method == "state"
    if state != (options.optimizer == "adamwprune"):
        raise UserError(
            "--optimizer adamwprune and --pruning-method state are for each other: give both, or neither "
            "(adamwprune without pruning is --optimizer adamw)"
        )
    if options.adamwprune_variant and not state:
        raise UserError("--adamwprune-variant is a score of --optimizer adamwprune --pruning-method state")
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
            raise UserError("--batch-size and --gradient-accumulation are whole numbers from 1 on")
        rows = rows or max(1, base.sequences_per_step // passes)  # one alone keeps the recipe's step
        passes = passes or max(1, base.sequences_per_step // rows)
        block = own.get("model.block_size", base.model.block_size)
        chosen |= {"batch.micro_batch": rows, "batch.tokens_per_step": rows * passes * block}
    if options.num_epochs is not None:
        chosen |= {"train.max_epochs": options.num_epochs, "train.max_steps": 0, "train.max_tokens": 0}
    chosen |= own
    train = load_recipe(name, chosen).train
    if options.adamwprune_variant == "bitter2":
        limits = {"max_steps": round(train.max_steps * LONGER), "max_tokens": round(train.max_tokens * LONGER)}
        limits |= {"max_epochs": train.max_epochs * LONGER} if train.max_epochs else {}
        longer = {f"train.{limit}": value for limit, value in limits.items() if value}
        print(f"bitter2 is bitter1 with 21% more iterations: {', '.join(f'{k} = {v}' for k, v in longer.items())}")
        chosen |= longer
    return name, chosen


def call_of(words: Sequence[str]) -> list[str]:
    """The `gptlab train` that a command line stands for."""
    from gptlab.cli import lift_settings
    from gptlab.kconfig import as_text

    left, own = lift_settings(list(words))
    options, rest = parser().parse_known_args(left)
    for key in {"data.path", "hellaswag.path", "train.init_from"} & set(own):
        own[key] = checkout.from_root(own[key]) if Path(own[key]).exists() else own[key]
    name, chosen = settings_of(options, own)
    if options.out:
        out = checkout.from_root(options.out)
    else:
        variant = (options.adamwprune_variant or "bitter1") if options.pruning_method == "state" else ""
        pruning = options.pruning_method.replace("none", "")
        method = "-".join(filter(None, (options.optimizer, pruning, variant)))
        out = f"runs/{options.model_size or 'gpt2'}-{options.dataset}-{method}"
    return ["train", name, *rest, *(f"--{key}={as_text(value)}" for key, value in chosen.items()), "--out", out]


def main() -> None:
    checkout.enter()
    from gptlab import cli
    from gptlab.errors import UserError

    try:
        call = call_of(sys.argv[1:])
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(shlex.join(["gptlab", *call]), flush=True)
    checkout.go_to_root()
    cli.main(call)


if __name__ == "__main__":
    main()

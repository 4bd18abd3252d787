"""gptlab train"""

import argparse
import json
import os
import textwrap
from pathlib import Path
from typing import Any

from gptlab.cli.common import add_verb, named, recipe_or_study
from gptlab.config import build_recipe, flag_sections, run_folder
from gptlab.errors import UserError
from gptlab.files import printable
from gptlab.status import EXIT_CODES
from gptlab.streams import best_effort


def add_to(verbs: Any) -> None:
    layout: dict[str, Any] = {"epilog": settings_help(), "formatter_class": argparse.RawDescriptionHelpFormatter}
    help = "Train a recipe, or resume a run that was stopped."
    v = add_verb(verbs, "train", do_train, help, settings=True, **layout)
    v.add_argument("name", metavar="RECIPE", help="a name that `gptlab recipes` lists, a TOML file, or a run directory")
    v.add_argument(
        "--out", type=named, metavar="DIR", help="run directory (default: runs/<recipe>[+setting=value...]_seed<k>)"
    )
    v.add_argument("--seed", type=int, metavar="N", help="seed of initialisation, dropout and data order")
    help = "whether to resume a run that is in DIR (default: auto)"
    v.add_argument("--resume", choices=["auto", "never"], default="auto", help=help)


def settings_help() -> str:
    """Every setting of a recipe that is a flag, by section and at most 100 columns wide, for `gptlab train --help`."""
    lines = ["settings (the values of a recipe replace the defaults):"]
    for title, rows in flag_sections().values():
        lines += ["", title] if title else []
        for row in rows:
            if row.name in ("name", "description", "seed"):
                continue
            default = row.default if row.default in row.choices else json.dumps(row.default)
            text = row.description if row.default in ("", {}) else f"{row.description} (default: {default})"
            head, text = f"  {row.flag} {row.accepts}", " ".join(text.split())
            wrapped = textwrap.wrap(text, 100, initial_indent=" " * 36, subsequent_indent=" " * 36)
            if len(head) < 36:
                wrapped[0] = f"{head:36}{wrapped[0].lstrip()}"
            else:
                lines.append(head)
            lines += wrapped
    return "\n".join(lines)


@best_effort()
def do_train(options: argparse.Namespace) -> int:
    layer, is_study = recipe_or_study(options)
    if is_study:
        raise UserError(f"{options.name} is a study; did you mean `gptlab study run {options.name}`?")
    seed = {} if options.seed is None else {"seed": options.seed}
    recipe = build_recipe(layer, options.overrides, seed)
    out = options.out or run_folder(recipe, options.name, layer, options.overrides)
    from gptlab.machine import spin_less

    spin_less(os.environ)  # before PyTorch is loaded
    from gptlab.data.prepare.missing import prepare_missing
    from gptlab.distributed.world import world_from_env
    from gptlab.rundir import FAILURE
    from gptlab.training.loop import train

    prepare_missing([recipe.data], world_from_env().first)
    result = train(recipe, out, resume=options.resume)
    # torchrun takes every status but 0 for a failure, and would restart a run that ended in an orderly way
    orderly = "TORCHELASTIC_RUN_ID" in os.environ and result.status != "failed"
    status = 0 if orderly else EXIT_CODES[result.status]
    if not world_from_env().first:
        return status
    draw_run(out)
    says = f"{result.status} after {result.steps} steps"
    if result.final_val_loss is not None:
        says += f", val_loss {result.final_val_loss:.4f}"
    if result.reason:
        at = f" at step {result.failed_at_step}" if result.failed_at_step and "at step" not in result.reason else ""
        says += f": {result.reason}{at}"
    print(printable(f"{says}\nrun: {out}"))
    evidence = out / {"diverged": "divergence.json", "out_of_memory": FAILURE}.get(result.status, "")
    if evidence.is_file():
        print(printable(f"evidence: {evidence}"))
    if result.status == "interrupted":
        print("to resume, run the same command again")
    return status


def draw_run(out: Path) -> None:
    """Draw the plots and write the card of a run that has measured something."""
    from gptlab.report.card import write_card
    from gptlab.report.plots import draw
    from gptlab.rundir import RunDir

    run = RunDir(out)
    if run.read_json("result.json").get("status") in ("completed", "diverged", "interrupted"):
        draw([run], run.plots)
        write_card(run)

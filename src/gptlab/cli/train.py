"""gptlab train"""

import argparse
import json
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gptlab.cli.common import add_verb, named, recipe_or_study
from gptlab.config import build_recipe, flag_sections, run_folder
from gptlab.errors import UserError
from gptlab.files import printable
from gptlab.progress import Progress
from gptlab.status import EXIT_CODES
from gptlab.streams import best_effort

COMMON = {
    "model": "preset n_layer n_head n_embd block_size position norm mlp dropout",
    "data": "path corpus tokenizer",
    "batch": "micro_batch tokens_per_step",
    "optim": "name lr betas weight_decay grad_clip",
    "sparsity": "method target",
    "schedule": "shape warmup_steps min_lr",
    "train": "max_steps eval_every init_from device",
    "checkpoint": "every",
    "precision": "regime",
    "compile": "enabled",
    "distributed": "strategy",
    "hellaswag": "every",
    "sample": "prompt",
    "log": "every",
}
"""The settings that `gptlab train --help` shows, by section."""

NARROW, WIDE = 60, 120  # columns of the help, at least and at most


def add_to(verbs: Any) -> None:
    help = "Train a recipe, or resume a run that was stopped."
    raw: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "add_help": False}
    v = add_verb(verbs, "train", do_train, help, settings=True, **raw)
    v.add_argument("name", metavar="RECIPE", help="a name that `gptlab recipes` lists, a TOML file, or a run directory")
    help = "run directory (default: runs/<recipe>[+setting=value...]_seed<k>)"
    v.add_argument("--out", type=named, metavar="DIR", help=help)
    v.add_argument("--seed", type=int, metavar="N", help="seed of initialisation, dropout and data order")
    help = "whether to resume a run that is in DIR (default: auto)"
    v.add_argument("--resume", choices=["auto", "never"], default="auto", help=help)
    sections = ", ".join(name for name in flag_sections() if name)
    help = f"show this help, or the settings of one section: {sections}"
    v.add_argument("-h", "--help", action=Help, nargs="?", metavar="SECTION", help=help)
    v.add_argument("--help-all", action=Help, nargs=0, help="show this help with every setting")


class Help(argparse.Action):
    """Print the help of `gptlab train` with the common settings, those of one section, or all."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        every = option_string == "--help-all"
        if values and values not in flag_sections():
            names = ", ".join(name for name in flag_sections() if name)
            raise UserError(f"--help {values}: no section of that name; there are {names}")
        width = min(max(shutil.get_terminal_size().columns, NARROW), WIDE)
        if values:
            print(settings_help([name for name in every_flag() if name.startswith(f"{values}.")], width))
        else:
            print(parser.format_help())
            print(settings_help(every_flag() if every else common_flags(), width))
            if not every:
                print("\n--help SECTION shows the settings of one section, --help-all shows all of them.")
        sys.exit(0)


def common_flags() -> list[str]:
    return [f"{section}.{leaf}" for section, leaves in COMMON.items() for leaf in leaves.split()]


def every_flag() -> list[str]:
    """Names of the settings that are flags."""
    hidden = ("name", "description", "seed")
    return [row.name for _, rows in flag_sections().values() for row in rows if row.name not in hidden]


def settings_help(names: Collection[str], width: int) -> str:
    """Settings by section, with what may be typed for each, in lines of at most `width` columns."""
    lines = ["settings (the values of a recipe replace the defaults):"]
    column = 36 if width >= 100 else 8
    for title, rows in flag_sections().values():
        shown = [row for row in rows if row.name in names]
        lines += ["", *textwrap.wrap(title, width)] if shown else []
        for row in shown:
            default = row.default if row.default in row.choices else json.dumps(row.default)
            default = str(default).lower() if isinstance(default, bool) else default
            text = row.description if row.default in ("", {}) else f"{row.description} (default: {default})"
            head, text = f"  {row.flag} {row.accepts}", " ".join(text.split())
            wrapped = textwrap.wrap(text, width, initial_indent=" " * column, subsequent_indent=" " * column)
            if len(head) < column:
                wrapped[0] = f"{head:{column}}{wrapped[0].lstrip()}"
            else:
                lines += folded(head, width)
            lines += wrapped
    return "\n".join(lines)


def folded(head: str, width: int) -> list[str]:
    """A flag and its choices, broken after a |."""
    lines = [""]
    for piece in re.findall(r"[^|]*\|?", head):
        if lines[-1].strip() and len(lines[-1] + piece) > width:
            lines.append(" " * 6)
        lines[-1] += piece
    return lines


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
    with Progress("loading PyTorch"):
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
    with Progress("drawing the plots and writing the card"):
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
        print(printable(f"to go on: {again(options)}"))
    elif result.status == "completed":
        if sys.stdout.isatty():
            print("\n".join(loss_curve(out)))
        verb = "eval" if recipe.task == "classify" else "sample"
        print(printable(f"next: gptlab {verb} {shlex.quote(str(out))}"))
    return status


def again(options: argparse.Namespace) -> str:
    """The command line that resumes an interrupted run."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "the same torchrun command"
    return str(options.command).replace(" --resume never", "").replace(" --resume=never", "")


def loss_curve(out: Path) -> list[str]:
    """The training loss of a run in a few rows of blocks, where the terminal can show them."""
    from gptlab.rundir import RunDir
    from gptlab.training.terminal import small_curve

    if "utf" not in (sys.stdout.encoding or "").lower():
        return []
    losses = [line["loss"] for line in RunDir(out).read_metrics() if isinstance(line.get("loss"), int | float)]
    return small_curve(losses, min(shutil.get_terminal_size().columns, 80) - 1)


def draw_run(out: Path) -> None:
    """Draw the plots and write the card and the page of a run that has measured something."""
    from gptlab.report.plots import draw
    from gptlab.report.run_page import MEASURED, write_pages
    from gptlab.rundir import RunDir

    run = RunDir(out)
    if run.read_json("result.json").get("status") in MEASURED:
        draw([run], run.plots)
    write_pages(run)

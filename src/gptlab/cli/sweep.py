"""gptlab study sweep"""

import argparse
import shlex
from pathlib import Path
from typing import Any

from gptlab.cli.common import add_verb, named, recipe_or_study, wide_console
from gptlab.config import sweep_study
from gptlab.errors import UserError
from gptlab.files import printable
from gptlab.progress import Progress
from gptlab.status import EXIT_CODES
from gptlab.streams import best_effort


def add_to(parts: Any) -> None:
    help = (
        "Train a recipe with every combination of some values, each with several seeds, and compare them. The values "
        "become the arms of a study, whose folder has the study's file."
    )
    v = add_verb(parts, "sweep", do_sweep, help, settings=True)
    v.add_argument("name", metavar="RECIPE", help="a name that `gptlab recipes` lists, a TOML file, or a run directory")
    help = "optim.lr=1e-3,3e-3: a setting and its values; several settings make a grid"
    v.add_argument("changes", nargs="+", metavar="SETTING=VALUES", help=help)
    v.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds of every arm (default: 3)")
    v.add_argument("--jobs", type=int, metavar="N", help="runs at the same time (default: one per GPU, or one)")
    help = "the study's folder (default: results/RECIPE+SETTING=VALUES)"
    v.add_argument("--out", type=named, metavar="DIR", help=help)


@best_effort()
def do_sweep(options: argparse.Namespace) -> int:
    with Progress(f"opening {options.name}"):
        from gptlab.study.runner import run_study
        from gptlab.study.runs import MOST_SEEDS

    layer, is_study = recipe_or_study(options)
    if is_study:
        raise UserError(f"{options.name} is a study; a sweep is of a recipe")
    if not 1 <= options.seeds <= MOST_SEEDS:
        raise UserError(f"--seeds {options.seeds}: must be at least 1 and at most {MOST_SEEDS}")
    study = sweep_study(layer, options.changes, options.overrides, options.seeds)
    folder = options.out or Path("results") / study.name
    runs = f"{len(study.arms)} arms x {options.seeds} seeds; the baseline is {study.baseline}"
    print(printable(f"study: {folder / 'study.toml'}, {runs}"), flush=True)
    return told(run_study(study, folder, jobs=options.jobs), folder, options.command)


def told(status: int, folder: Path, command: str) -> int:
    """Print how a study stands: its arms beside its baseline as `gptlab study report` has them, and what to type next.

    Args:
        status: of `run_study`, which is returned.
        command: the command line that ran the study.
    """
    if status == EXIT_CODES["interrupted"]:
        print(printable(f"to go on: {command}"))
        return status
    with Progress("opening the study") as shown:
        from gptlab.report.analysis import analyse
        from gptlab.report.ledger import record
        from gptlab.report.studies import read_study_folder
        from gptlab.report.tables import print_report

        read = read_study_folder(folder, shown.tell)
        shown.tell("analysing the runs")
        payload = analyse([read])
        record(folder, payload, command)
    print_report(payload, wide_console(160))
    print(printable(f"next: gptlab study report {shlex.quote(str(folder))}"))
    return status

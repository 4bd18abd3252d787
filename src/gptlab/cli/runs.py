"""gptlab runs"""

import argparse
from typing import Any

from gptlab.cli.common import add_json, add_verb, json_too, named, wide_console
from gptlab.errors import UserError
from gptlab.progress import Progress


def add_to(verbs: Any) -> None:
    help = "List runs: status, step, best validation loss, speed, age, and what differs from the recipe."
    v = add_verb(verbs, "runs", do_runs, help)
    v.add_argument("folders", type=named, nargs="*", metavar="DIR", help="folders of runs (default: runs and results)")
    add_json(v)


def do_runs(options: argparse.Namespace) -> None:
    for folder in options.folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: `gptlab runs` looks in runs and results")
    with Progress("looking for runs") as shown:
        from gptlab.report.listing import FOLDERS, find_runs, list_runs, runs_table

        paths, remarks = find_runs(options.folders or [folder for folder in FOLDERS if folder.is_dir()])
        rows = list_runs(shown.each("reading the runs", paths, len(paths)))
    with json_too(options.json) as tell:
        tell([row.to_json() for row in rows])
        console = wide_console(200)
        if not rows:
            looked = " and ".join(map(str, options.folders or FOLDERS))
            print(f"no run in {looked}: `gptlab train RECIPE` makes one")
        for line in runs_table(rows, console.width) if rows else ():
            console.print(line, highlight=False)
        for remark in remarks:
            console.print(remark, markup=False, highlight=False, soft_wrap=True)

"""gptlab plot, gptlab export, gptlab import"""

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from gptlab.cli.common import Parser, add_reading, add_trained_run, add_verb, how_of, named
from gptlab.errors import UserError
from gptlab.files import printable
from gptlab.progress import Progress


def add_to(verbs: Any) -> None:
    v = add_verb(verbs, "plot", do_plot, "Draw the curves of a run, or of several runs in the same plots.")
    v.add_argument("folders", type=named, nargs="+", metavar="RUN|DIR", help="runs, or folders of runs")
    v.add_argument("--out", type=named, metavar="DIR", help="default: RUN/plots, or plots for several runs")
    v.add_argument(
        "--compare", type=named, metavar="RUN", help="rewrite card.md with the differences from this earlier run"
    )

    add_trained_run(v := add_verb(verbs, "export", do_export, "Write a run's model in another library's format."))
    help = "hf: a Hugging Face folder; gguf: llama.cpp's file; sparse24: 2:4 matrices without their zeros"
    v.add_argument("--to", choices=["hf", "gguf", "sparse24"], required=True, help=help)
    v.add_argument("target", type=named, metavar="DIR|FILE", help="folder, or file for gguf, to write")
    v.add_argument("--license", type=license_id, metavar="ID", help="for the model card, such as mit")
    help = "also upload the hf folder to this repository of the Hugging Face hub; a new one is private"
    v.add_argument("--push", metavar="USER/NAME", help=help)

    v = add_verb(verbs, "import", None, "Make a run of a model, or a study of logs, that come from elsewhere.")
    kinds = v.add_subparsers(dest="kind", required=True, metavar="hf|nanogpt|log", parser_class=Parser)
    for kind, source in (("hf", "a Hugging Face folder or id"), ("nanogpt", "a ckpt.pt; build-nanogpt's model_*.pt")):
        v = add_verb(kinds, kind, do_import, f"Make a run of {source}.", settings=True)
        v.add_argument("source", metavar="SRC", help=source)
        v.add_argument("--out", type=named, required=True, metavar="RUN", help="run directory to write")
    v = add_verb(kinds, "log", do_import_log, "Make a study of runs that something else trained, to add arms to.")
    add_reading(v)
    v.add_argument("--out", type=named, required=True, metavar="DIR", help="the study's folder, to write")
    v.add_argument("--baseline", default="", metavar="NAME", help="default: one called so, or that with the most runs")
    v.add_argument("--better", choices=["lower", "higher"], default="", help="default: by the metric's name")
    help = "a recipe's name or path: the settings of arms that are added (default: gptlab's own)"
    v.add_argument("--recipe", default="", metavar="NAME", help=help)


def do_plot(options: argparse.Namespace) -> None:
    with Progress("looking for runs") as shown:
        from gptlab.report.listing import runs_in
        from gptlab.report.plots import draw
        from gptlab.rundir import RunDir

        runs = runs_in(options.folders)
        earlier = RunDir.open(options.compare) if options.compare else None
        out = options.out or (runs[0].plots if len(runs) == 1 else Path("plots"))
        drawn = draw(runs, out, shown.tell)
    for file in drawn:
        print(file)
    for run in runs:
        if run.damaged_lines:
            print(f"{run.metrics_file}: {run.damaged_lines} damaged lines are left out", file=sys.stderr)
    if earlier is not None:
        from gptlab.report.card import write_card

        for run in runs:
            print(write_card(run, earlier))


def license_id(text: str) -> str:
    """The type of --license: an id as in https://huggingface.co/docs/hub/repositories-licenses."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", text):
        raise argparse.ArgumentTypeError(f"{text}: an id of a licence is like mit, apache-2.0 or cc-by-4.0")
    return text


def do_export(options: argparse.Namespace) -> None:
    for flag, kinds in (("push", ["hf"]), ("license", ["hf", "gguf"])):
        if getattr(options, flag) and options.to not in kinds:
            raise UserError(f"--{flag} is for --to {' and '.join(kinds)}")
    with Progress(f"opening {options.folder}") as shown:
        from gptlab.api import export_run
        from gptlab.interop.push import upload
        from gptlab.training.load import load_run

        run = load_run(options.folder, options.checkpoint, device="cpu")
        asked = options.license or "", options.push or ""
        remarks = export_run(run, options.to, options.target, *asked, tell=shown.tell)
    for remark in remarks:
        print(remark, file=sys.stderr)
    print(f"{options.to} model: {options.target}")
    if options.push:
        with Progress(f"uploading to {options.push}"):
            address = upload(options.target, options.push)
        print(f"pushed: {address}")


def do_import_log(options: argparse.Namespace) -> None:
    with Progress("reading the logs") as shown:
        from gptlab.logs.read import read_logs
        from gptlab.study.importing import import_logs

        logs = read_logs(options.paths, how_of(options), shown.tell)
        asked = (options.recipe, options.baseline, options.better)
        study, remarks = import_logs(logs, options.out, *asked, tell=shown.tell)
    for remark in [*logs.remarks, *remarks]:
        print(printable(remark), file=sys.stderr)
    folder = shlex.quote(str(options.out))
    print(f"study: {options.out}: {len(logs.runs)} runs of {len(study.arms)} arms, the baseline is {study.baseline}")
    print(f"next: gptlab study report {folder}, or gptlab study new-from {folder} to add arms")


def do_import(options: argparse.Namespace) -> None:
    with Progress(f"importing {options.source}"):
        from gptlab.training.importing import import_run

        run = import_run(options.kind, options.source, options.out, options.overrides)
    print(f"run: {run}")

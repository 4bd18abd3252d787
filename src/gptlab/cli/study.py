"""gptlab study run, sweep, status, report, power, new-from"""

import argparse
from pathlib import Path
from typing import Any

from gptlab.cli import sweep
from gptlab.cli.common import Parser, add_family, add_json, add_verb, json_too, named, tell_report, wide_console
from gptlab.config import Study, load_study
from gptlab.errors import UserError
from gptlab.progress import Progress
from gptlab.streams import best_effort
from gptlab.version import VERSION

PARTS = "run|sweep|status|report|power|new-from"


def add_to(verbs: Any) -> None:
    v = add_verb(verbs, "study", None, "Train every arm of a study with every seed, and answer the study's questions.")
    parts = v.add_subparsers(dest="part", required=True, metavar=PARTS, parser_class=Parser)

    v = add_verb(parts, "run", do_study_run, "Train the runs of a study. Finished runs are kept.", settings=True)
    v.add_argument(
        "study", metavar="STUDY", help="a name that `gptlab studies` lists, a TOML file, or a study's folder"
    )
    v.add_argument(
        "--arm",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="run only these arms, or those like muon@* (the sanity gate needs all core arms)",
    )
    add_seeds(v, "run only this seed")
    v.add_argument("--jobs", type=int, metavar="N", help="runs at the same time (default: one per GPU, or one)")
    help = "add seeds where a comparison is open, and pay for a look after each; the study's folder keeps this rule"
    v.add_argument("--until-decided", action="store_true", help=help)
    v.add_argument("--most-seeds", type=int, metavar="N", help="seeds of an arm until decided, at most (default: 12)")
    help = "until decided: start no seed that would bring the hours of training, summed over all runs, above this"
    v.add_argument("--budget", type=float, metavar="HOURS", help=help)
    v.add_argument("--out", type=named, metavar="DIR", help="the study's folder (default: results/<study>)")

    sweep.add_to(parts)

    v = add_verb(parts, "status", do_study_status, "Show the runs of a study and their results so far.")
    v.add_argument("folder", type=named, metavar="DIR", help="the study's folder")
    add_json(v)

    v = add_verb(parts, "report", do_study_report, "Answer the questions of studies: tables, figures and a web page.")
    v.add_argument("folders", type=named, nargs="+", metavar="DIR", help="folders of studies, finished or not")
    v.add_argument("--compare", metavar="NAME", help="a comparison of two studies: precision, or a TOML file")
    v.add_argument("--out", type=named, metavar="DIR", help="default: the study's folder, or results/A-and-B")
    add_json(v)
    add_family(v)
    v.add_argument("--figures", nargs="+", choices=["png", "svg"], default=["png"], help="formats (default: png)")

    v = add_verb(parts, "power", do_study_power, "Estimate how many seeds a study needs to detect a difference.")
    v.add_argument("study", metavar="STUDY", help="a name that `gptlab studies` lists, or a TOML file")
    v.add_argument(
        "--effect", type=float, required=True, metavar="X", help="difference to detect, in the metric's unit"
    )
    which = v.add_mutually_exclusive_group()
    which.add_argument(
        "--pilot", type=named, metavar="DIR", help="estimate the noise from the runs in a study's folder"
    )
    which.add_argument(
        "--noise",
        type=float,
        metavar="SD",
        help="standard deviation over seeds of the difference (default: of the nearest setting that was measured)",
    )
    add_json(v)

    v = add_verb(parts, "new-from", do_study_new_from, "Write the study file of a study's folder, to be edited.")
    v.add_argument("folder", type=named, metavar="DIR", help="the study's folder, such as one of `gptlab import log`")
    v.add_argument(
        "--out", type=named, metavar="FILE", help="study file to write; it must not exist (default: print it)"
    )


def add_seeds(parser: argparse.ArgumentParser, seed_help: str) -> None:
    """The flags --seed and --seeds, of which a call has at most one."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seeds", type=int, metavar="N", help="run the first N seeds of a study (default: its own)")
    which.add_argument("--seed", type=int, metavar="K", help=seed_help)


def requested_study(options: argparse.Namespace, name: str) -> tuple[Study, Path, list[int] | None]:
    """The study a call names, its folder, and the seeds asked for (None: the study's)."""
    from gptlab.study.runs import find_study, first_seeds

    if "name" in options.overrides or "description" in options.overrides:
        raise UserError("--name and --description are for a recipe; the runs of a study have its name")
    name, begun = find_study(name)
    study = load_study(name, options.overrides)
    seeds = None if options.seed is None else [options.seed]
    if options.seeds is not None:
        seeds = first_seeds(study, options.seeds)
    return study, Path(options.out or begun or f"results/{study.name}"), seeds


@best_effort()
def do_study_run(options: argparse.Namespace) -> int:
    if options.until_decided and options.seed is not None:
        raise UserError("--seed trains one seed, and --until-decided chooses the seeds: leave one of them out")
    with Progress(f"opening {options.study}"):
        from gptlab.study.runner import run_study

        study, folder, seeds = requested_study(options, options.study)
    decided = (options.until_decided, options.most_seeds, options.budget)
    status = run_study(study, folder, options.arm, seeds, options.jobs, False, *decided)
    return sweep.told(status, folder, options.command)


def do_study_status(options: argparse.Namespace) -> None:
    from gptlab.rundir import open_study, read_plan
    from gptlab.study.table import read_study, study_table

    states, study = read_study(options.folder), open_study(options.folder)
    lines = []
    if study.until_decided:
        from gptlab.study.deciding import standing

        lines = standing(options.folder)
    plan = read_plan(options.folder, study)
    remarks = plan.remarks if plan is not None else []
    with json_too(options.json) as tell:
        tell({"study": study.name, "runs": [vars(state) for state in states], "standing": lines, "remarks": remarks})
        console = wide_console(200)
        console.print(study_table(states, jobs=sum(state.status == "running" for state in states)))
        for line in [*lines, *remarks]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def do_study_report(options: argparse.Namespace) -> None:
    with Progress("opening the studies") as shown:
        from gptlab.report.write import write_report

        how = (options.figures, None, options.command, VERSION, shown.tell, options.family)
        report = write_report(options.folders, options.compare, options.out, *how)
    tell_report(report, options.json)


def do_study_new_from(options: argparse.Namespace) -> None:
    from gptlab.cli.init import refuse_existing
    from gptlab.study.importing import study_file_of

    if options.out is not None:
        refuse_existing(options.out)
    text = study_file_of(options.folder, options.out)
    if options.out is None:
        print(text, end="")
        return
    options.out.write_text(text, encoding="utf-8")
    print(f"study file: {options.out}")


def do_study_power(options: argparse.Namespace) -> None:
    with Progress(f"opening {options.study}") as shown:
        from gptlab.report.power import Noise, pilot_noise, power_data, precedent_noise
        from gptlab.report.studies import read_study_folder

        study = load_study(options.study)
        if options.pilot is not None:
            noise = pilot_noise(read_study_folder(options.pilot, shown.tell), study.metric.name)
        elif options.noise is not None:
            noise = Noise(options.noise)
        else:
            from gptlab.planning.study import size_of  # it loads torch

            noise = precedent_noise(study, *size_of(study))
        found = power_data(study, options.effect, noise)
    with json_too(options.json) as tell:
        tell(found)
        print("\n".join(found["text"]))

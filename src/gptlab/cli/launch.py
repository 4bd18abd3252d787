"""gptlab launch, gptlab stop"""

import argparse
from pathlib import Path
from typing import Any

from gptlab.cli.common import add_json, add_verb, json_too, named, recipe_or_study, wide_console
from gptlab.cli.study import add_seeds, requested_study
from gptlab.cli.train import draw_run
from gptlab.config import build_recipe, run_folder
from gptlab.errors import UserError
from gptlab.progress import Progress
from gptlab.streams import best_effort


def add_to(verbs: Any) -> None:
    help = (
        "Submit a recipe or a study to SLURM, or start it in the background on this machine. A job that is preempted "
        "or near its time limit saves a checkpoint, requeues itself and resumes."
    )
    v = add_verb(verbs, "launch", do_launch, help, settings=True)
    v.add_argument("name", nargs="?", metavar="RECIPE|STUDY", help="a shipped name, a TOML file, or a study's folder")
    v.add_argument("--on", choices=["slurm", "local"], help="where to run")
    v.add_argument("--print", action="store_true", help="show the batch script and submit nothing")
    help = "show the jobs of a run or a study (default: of all in runs/ and results/)"
    v.add_argument("--status", nargs="?", type=named, const=Path(), metavar="DIR", help=help)
    add_json(v)
    v.add_argument("--profile", type=named, metavar="FILE", help="TOML file with the flags below as keys, and `extra`")
    v.add_argument("--partition", metavar="NAME", help="SLURM partition")
    v.add_argument("--time", metavar="LIMIT", help="time limit: minutes, H:M:S or D-H:M:S")
    v.add_argument("--gpus", type=int, metavar="N", help="GPUs per node")
    v.add_argument("--nodes", type=int, metavar="N", help="number of nodes")
    v.add_argument("--tasks", type=int, metavar="N", help="processes per node (default: one per GPU, or one)")
    v.add_argument("--cpus", type=int, metavar="N", help="cores per process")
    v.add_argument("--mem", metavar="SIZE", help="memory per node, such as 64G")
    v.add_argument("--account", metavar="NAME", help="SLURM account")
    v.add_argument("--qos", metavar="NAME", help="SLURM quality of service")
    v.add_argument("--signal-delay", type=int, metavar="S", help="save S seconds before the time limit (default: 120)")
    v.add_argument("--out", type=named, metavar="DIR", help="run directory, or the study's folder")
    add_seeds(v, "seed of the run; of a study, run only this seed")
    v.add_argument(
        "--arm", nargs="+", action="extend", metavar="NAME", help="run only these arms of a study, or those like muon@*"
    )
    v.add_argument("--jobs", type=int, metavar="N", help="runs of a study at the same time (default: all that fit)")
    v.add_argument("--job", type=named, help=argparse.SUPPRESS)  # the job itself passes this and --part
    v.add_argument("--part", help=argparse.SUPPRESS)

    v = add_verb(verbs, "stop", do_stop, "Ask a run or a study to save a checkpoint and end.")
    v.add_argument("folder", type=named, metavar="RUN|STUDY", help="run directory, or a study's folder")
    v.add_argument("--no-wait", action="store_true", help="return at once, before the run has ended")


def do_launch(options: argparse.Namespace) -> int | None:
    with Progress("opening"):
        from gptlab.study.launch.job import run_job
        from gptlab.study.launch.record import FILES
        from gptlab.study.launch.resources import FLAGS, read_resources
        from gptlab.study.launch.script import printed_script
        from gptlab.study.launch.status import find_launches, launched_jobs, launches_table
        from gptlab.study.launch.submit import launch_recipe, launch_study

    if options.job is not None:
        with best_effort():
            return run_job(options.job, options.part, draw_run)
    if options.status is not None:
        jobs = launched_jobs(find_launches(options.status))
        with json_too(options.json) as tell:
            tell(jobs)
            wide_console(200).print(launches_table(jobs))
        return None
    if options.json is not None:
        raise UserError("--json writes what `gptlab launch --status` shows")
    if options.name is None or options.on is None:
        raise UserError(
            "`gptlab launch RECIPE|STUDY --on slurm|local` starts jobs; `gptlab launch --status` shows them"
        )
    flags = {key: getattr(options, key) for key in FLAGS if getattr(options, key) is not None}
    resources = read_resources(options.profile, flags)
    layer, is_study = recipe_or_study(options)
    if is_study:
        study, folder, seeds = requested_study(options, options.name)
        started = launch_study(
            study, folder, options.arm, seeds, options.jobs, options.on, resources, options.command, options.print
        )
    else:
        if options.arm or options.seeds is not None or options.jobs is not None:
            raise UserError("--arm, --seeds and --jobs are for a study, not for a recipe")
        recipe = build_recipe(layer, options.overrides, {} if options.seed is None else {"seed": options.seed})
        out = options.out or run_folder(recipe, options.name, layer, options.overrides)
        started = launch_recipe(recipe, out, options.on, resources, options.command, options.print)
    if options.print:
        print(printed_script(started), end="")
        return None
    for part in started.parts:
        print(f"{part.name}: job {part.job}" + f" of {len(part.runs)} runs" * bool(part.runs))
    folder = started.folder
    print(f"{folder}: logs are in {folder / FILES}; `gptlab launch --status {folder}` shows the jobs")
    return None


def do_stop(options: argparse.Namespace) -> None:
    from gptlab.study.launch.stop import stop_run_or_study

    stop_run_or_study(options.folder, not options.no_wait, print)

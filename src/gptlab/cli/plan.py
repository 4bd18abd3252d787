"""gptlab plan"""

import argparse
import os
from typing import Any

from gptlab.cli.common import add_json, add_verb, json_too, recipe_or_study, wide_console
from gptlab.config import build_recipe, load_study
from gptlab.errors import UserError
from gptlab.progress import Progress, Tell
from gptlab.status import EXIT_CODES


def add_to(verbs: Any) -> None:
    help = (
        "Estimate what a recipe or a study needs: GPU memory, time, cost, host memory and disk. The exit status is 3 "
        "if it does not fit."
    )
    v = add_verb(verbs, "plan", do_plan, help, settings=True)
    v.add_argument("name", metavar="RECIPE|STUDY", help="a shipped name, a TOML file, or a study's folder")
    v.add_argument("--gpu", metavar="NAME", help="H100, A100-80, RTX4090, ... (default: this machine's device)")
    v.add_argument("--memory", type=float, metavar="GB", help="GPU memory; without --gpu no time is estimated")
    v.add_argument("--gpus", type=int, default=1, metavar="N", help="number of GPUs, one process per GPU (default: 1)")
    help = "share of peak FLOP/s reached (default: that of an earlier run here, or 0.4)"
    v.add_argument("--mfu", type=float, metavar="X", help=help)
    v.add_argument("--price", type=float, default=0.0, metavar="P", help="per GPU hour (default: train.price_per_hour)")
    v.add_argument("--sizes", nargs="+", default=[], metavar="PRESET", help="plan each of these model.preset values")
    v.add_argument("--micro-batches", nargs="+", type=int, default=[], metavar="N", help="plan each of these sizes")
    add_json(v)


def do_plan(options: argparse.Namespace) -> int:
    console = wide_console(200)
    with Progress(f"opening {options.name}") as shown:
        table, detects, facts, fits = _planned(options, console.width, shown.tell)
    with json_too(options.json) as tell:
        tell(facts)
        console.print(table)
        if detects:
            console.print(detects, markup=False, highlight=False)
    return 0 if fits else EXIT_CODES["out_of_memory"]


def _planned(options: argparse.Namespace, width: int, tell: Tell) -> tuple[Any, str, Any, bool]:
    """(the plan as a table, a line on what a study detects, the plan as JSON, whether it fits)."""
    from gptlab.machine import spin_less

    spin_less(os.environ)  # as training does, before PyTorch is loaded
    from gptlab.planning.device import Device
    from gptlab.planning.plan import plan_recipe
    from gptlab.planning.study import plan_study, plan_sweep
    from gptlab.planning.tables import plan_table, study_plan_table, sweep_table
    from gptlab.report.power import plan_line
    from gptlab.study.runs import find_study

    layer, is_study = recipe_or_study(options)
    cost: dict[str, Any] = {"price": options.price, "processes": options.gpus}
    cost |= {} if options.mfu is None else {"mfu": options.mfu}
    if options.gpu is not None or options.memory is not None:
        device = Device.named(options.gpu, options.memory)
    else:
        device, measure = this_machine(options.gpus)
        if device.kind == "cpu" or options.mfu is None:
            cost["measure"] = measure
    tell(f"planning {options.name}", 0, 0)
    if is_study:
        if options.sizes or options.micro_batches:
            raise UserError("--sizes and --micro-batches are for a recipe, not for a study")
        asked = load_study(find_study(options.name)[0], options.overrides)
        study = plan_study(asked, device, **cost)
        detects = plan_line(asked, study.arms[asked.baseline].parameters, study.arms[asked.baseline].tokens)
        return study_plan_table(study, width), detects, study.to_json(), not study.refused
    if options.sizes or options.micro_batches:
        rows = plan_sweep([layer, options.overrides], device, options.sizes, options.micro_batches, **cost)
        facts = {name: row.to_json() for name, row in rows.items()}
        table = sweep_table(rows, f"{layer['name']} on {device.name}", width)
        return table, "", facts, not all(row.refused for row in rows.values())
    plan = plan_recipe(build_recipe(layer, options.overrides), device, **cost)
    return plan_table(plan), "", plan.to_json(), not plan.refused


def this_machine(processes: int = 1) -> tuple[Any, Any]:
    """The device of this machine, and what measures the speed of a recipe on it (None: nothing does).

    That is an earlier run in runs/ or results/ with the same steps. Without one, the steps are timed on a CPU, and a
    GPU is taken to reach the MFU of the earlier run on it whose model is nearest in size.
    """
    from gptlab.planning.device import local_device
    from gptlab.planning.measure import earlier_runs, measure_speed, speed_by_mfu, speed_of_a_run
    from gptlab.report.listing import FOLDERS, find_runs
    from gptlab.training.setup import pick_device

    here = pick_device("auto")
    device = local_device(here, max(1, processes))
    if processes != 1:
        return device, None
    runs, _ = find_runs(folder for folder in FOLDERS if folder.is_dir())
    earlier = list(earlier_runs(here, runs))

    def measure(recipe: Any, shape: Any, micro_batch: int, seconds: float = 3.0) -> Any:
        if found := speed_of_a_run(recipe, micro_batch, here, earlier):
            return found
        if here.type == "cpu":
            return measure_speed(recipe, shape, micro_batch, seconds)
        peak = device.gpu.peak(shape.regime.matmul_format) if device.gpu else None
        return speed_by_mfu(recipe, shape, peak, earlier)

    return device, measure

"""gptlab plan"""

import argparse
import os
from pathlib import Path
from typing import Any

from gptlab.cli.common import add_verb, output_file, recipe_or_study, wide_console, write_json
from gptlab.config import build_recipe, load_study
from gptlab.errors import UserError
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
    v.add_argument("--mfu", type=float, default=0.4, metavar="X", help="share of peak FLOP/s reached (default: 0.4)")
    v.add_argument("--price", type=float, default=0.0, metavar="P", help="per GPU hour (default: train.price_per_hour)")
    v.add_argument("--sizes", nargs="+", default=[], metavar="PRESET", help="plan each of these model.preset values")
    v.add_argument("--micro-batches", nargs="+", type=int, default=[], metavar="N", help="plan each of these sizes")
    v.add_argument("--json", type=output_file, metavar="FILE", help="also write the plan to this file")


def do_plan(options: argparse.Namespace) -> int:
    from gptlab.machine import spin_less

    spin_less(os.environ)  # as training does, before PyTorch is loaded
    from gptlab.planning.device import Device
    from gptlab.planning.plan import plan_recipe
    from gptlab.planning.study import plan_study, plan_sweep
    from gptlab.planning.tables import plan_table, study_plan_table, sweep_table
    from gptlab.report.power import plan_line
    from gptlab.study.runs import find_study

    layer, is_study = recipe_or_study(options)
    cost: dict[str, Any] = {"mfu": options.mfu, "price": options.price, "processes": options.gpus}
    if options.gpu is not None or options.memory is not None:
        device = Device.named(options.gpu, options.memory)
    else:
        device, measure = this_machine(options.gpus)
        cost["measure"] = measure
    console = wide_console(200)
    shown: Any
    facts: Any
    detects = ""
    if is_study:
        if options.sizes or options.micro_batches:
            raise UserError("--sizes and --micro-batches are for a recipe, not for a study")
        asked = load_study(find_study(options.name)[0], options.overrides)
        study = plan_study(asked, device, **cost)
        shown, facts, fits = study_plan_table(study, console.width), study.to_json(), not study.refused
        detects = plan_line(asked, study.arms[asked.baseline].parameters, study.arms[asked.baseline].tokens)
    elif options.sizes or options.micro_batches:
        rows = plan_sweep([layer, options.overrides], device, options.sizes, options.micro_batches, **cost)
        shown = sweep_table(rows, f"{layer['name']} on {device.name}", console.width)
        facts = {name: row.to_json() for name, row in rows.items()}
        fits = not all(row.refused for row in rows.values())
    else:
        one = plan_recipe(build_recipe(layer, options.overrides), device, **cost)
        shown, facts, fits = plan_table(one), one.to_json(), not one.refused
    if options.json:
        write_json(options.json, facts)
    console.print(shown)
    if detects:
        console.print(detects, markup=False, highlight=False)
    return 0 if fits else EXIT_CODES["out_of_memory"]


def this_machine(processes: int = 1) -> tuple[Any, Any]:
    """The device of this machine, and what measures the speed of a recipe on it (None: nothing does).

    That is an earlier run in runs/ or results/ with the same steps; on a CPU without one, the steps are timed.
    """
    from gptlab.planning.device import local_device
    from gptlab.planning.measure import measure_speed, speed_of_a_run
    from gptlab.report.listing import find_runs
    from gptlab.training.setup import pick_device

    here = pick_device("auto")
    device = local_device(here, max(1, processes))
    if processes != 1:
        return device, None
    runs, _ = find_runs(folder for name in ("runs", "results") if (folder := Path(name)).is_dir())

    def measure(recipe: Any, shape: Any, micro_batch: int, seconds: float = 3.0) -> Any:
        if found := speed_of_a_run(recipe, micro_batch, here, runs):
            return found
        return measure_speed(recipe, shape, micro_batch, seconds) if here.type == "cpu" else None

    return device, measure

"""gptlab plan"""

import argparse
from typing import Any

from gptlab.cli.common import add_verb, output_file, recipe_or_study, wide_console, write_json
from gptlab.config import build_recipe, load_study
from gptlab.errors import UserError


def add_to(verbs: Any) -> None:
    help = "Estimate what a recipe or a study needs: GPU memory, time, cost, host memory and disk."
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


def do_plan(options: argparse.Namespace) -> None:
    from gptlab.planning.device import Device, local_device
    from gptlab.planning.measure import measure_speed
    from gptlab.planning.plan import plan_recipe
    from gptlab.planning.study import plan_study, plan_sweep
    from gptlab.planning.tables import plan_table, plans_table, study_plan_table
    from gptlab.report.power import plan_line
    from gptlab.study.runs import find_study
    from gptlab.training.setup import pick_device

    layer, is_study = recipe_or_study(options)
    cost: dict[str, Any] = {"mfu": options.mfu, "price": options.price, "processes": options.gpus}
    if options.gpu is not None or options.memory is not None:
        device = Device.named(options.gpu, options.memory)
    else:
        here = pick_device("auto")
        device = local_device(here, max(1, options.gpus))
        if here.type == "cpu" and options.gpus == 1:
            cost["measure"] = measure_speed
    shown: Any
    facts: Any
    detects = ""
    if is_study:
        if options.sizes or options.micro_batches:
            raise UserError("--sizes and --micro-batches are for a recipe, not for a study")
        asked = load_study(find_study(options.name)[0], options.overrides)
        study = plan_study(asked, device, **cost)
        shown, facts = study_plan_table(study), study.to_json()
        detects = plan_line(asked, study.arms[asked.baseline].parameters, study.arms[asked.baseline].tokens)
    elif options.sizes or options.micro_batches:
        rows = plan_sweep([layer, options.overrides], device, options.sizes, options.micro_batches, **cost)
        shown = plans_table(rows, f"{layer['name']} on {device.name}")
        facts = {name: row.to_json() for name, row in rows.items()}
    else:
        one = plan_recipe(build_recipe(layer, options.overrides), device, **cost)
        shown, facts = plan_table(one), one.to_json()
    if options.json:
        write_json(options.json, facts)
    console = wide_console(200)
    console.print(shown)
    if detects:
        console.print(detects, markup=False, highlight=False)

"""The precision study of language modelling: GPT-2 124M on OpenWebText. Train one arm, the published ten, or all.

    python experiments/lm/run.py --config amp_bf16 --seed 0
    python experiments/lm/run.py --config published --seeds 3
    python experiments/lm/run.py --config all --seeds 3
    python experiments/lm/run.py --config amp_bf16 --max_iters 100     # a quick test

Any `--section.key value` applies to every run. Results are written to results/lm/{config}_seed{seed}.json, and the runs
beside them; `gptlab study status results/lm` shows the progress. A quick test is a study of its own, in
results/lm/quick-100, because its learning rate decays within its 100 steps and a full run cannot continue from it. Its
results stand in results/lm until the full ones replace them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import checkout

if TYPE_CHECKING:
    from gptlab.config import Study

PUBLISHED = ["fp32_baseline", "amp_fp16", "amp_bf16", "bf16_pure", "fp16_naive", "bf16_naive"]
PUBLISHED += ["amp_fp16_8bit_adam", "amp_bf16_8bit_adam", "bf16_no_compile", "fp32_tf32_matmul"]


def main(study: str, out: str, published: list[str]) -> int:
    from gptlab.cli import lift_settings
    from gptlab.config import load_study
    from gptlab.rundir import run_name, write_atomically
    from gptlab.study.runner import run_study
    from gptlab.study.runs import first_seeds
    from gptlab.study.table import read_summary

    parser = argparse.ArgumentParser(description=f"Train arms of the study {study}.")
    several = f"published (the {len(published)} published configurations) or all"
    parser.add_argument("--config", required=True, metavar="NAME", help=f"an arm of the study, {several}")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seed", type=int, metavar="K", help="run only this seed (default: the study's first)")
    which.add_argument("--seeds", type=int, metavar="N", help="run the first N seeds")
    parser.add_argument("--max_iters", type=int, metavar="N", help="a quick test of N steps")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at the same time (default: one per GPU, or one)")
    parser.add_argument("--study", default=study, metavar="NAME", help=f"default: {study}")
    parser.add_argument("--out", type=Path, default=Path(out), metavar="DIR", help=f"default: {out}")
    words, settings = lift_settings(checkout.from_folder(sys.argv[1:]))
    options = parser.parse_args(words)
    os.chdir(checkout.folder())

    if options.max_iters is not None:
        settings["train.max_steps"] = options.max_iters
    wanted = load_study(options.study, settings)
    arms = {"all": None, "published": published}.get(options.config, [options.config])
    seeds = first_seeds(wanted, 1 if options.seeds is None else options.seeds)
    if options.seed is not None:
        seeds = [options.seed]
    print_hours(wanted, arms or list(wanted.arms), seeds)
    if options.max_iters is None:
        return run_study(wanted, options.out, arms, seeds, options.jobs)

    quick = f"quick-{options.max_iters}"
    test = wanted.model_copy(update={"name": f"{wanted.name}-{quick}"})
    status = run_study(test, options.out / quick, arms, seeds, options.jobs)
    for arm in arms or wanted.arms:
        for seed in seeds:
            summary = read_summary(options.out / quick, test, arm, seed)
            if summary and not read_summary(options.out, wanted, arm, seed):  # a full result stays
                write_atomically(options.out / f"{run_name(arm, seed)}.json", json.dumps(summary, indent=2) + "\n")
    return status


def print_hours(study: Study, arms: list[str], seeds: list[int]) -> None:
    """Print how long the runs take, if there are several and they can begin."""
    if len(arms) * len(seeds) < 2 or not set(arms) <= set(study.arms):
        return
    if not all(Path(study.build(arm, 0).data.folder).is_dir() for arm in arms):
        return
    import torch

    from gptlab.planning.device import Device, local_device
    from gptlab.planning.study import plan_study

    gpu = torch.cuda.is_available()
    device = local_device(torch.device("cuda")) if gpu else Device.named("A100-80")
    asked = study.model_copy(update={"arms": {arm: study.arms[arm] for arm in arms}, "seeds": seeds})
    hours = plan_study(asked, device).hours
    estimate = "unknown hours" if hours is None else f"about {hours:,.1f} hours" if hours >= 0.1 else "under 0.1 hours"
    runs = f"{len(arms)} arms x {len(seeds)} seeds = {len(arms) * len(seeds)} runs"
    name = device.name if gpu else f"{device.name} (this machine has no GPU)"
    print(f"{runs}: {estimate} on one {name} at 40% of its peak FLOP/s", flush=True)


def call(study: str, out: str, published: list[str]) -> None:
    """Run and exit. A mistake of the caller's is printed in one sentence."""
    checkout.enter()
    from gptlab.errors import UserError

    try:
        sys.exit(main(study, out, published))
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    call("precision-lm", "results/lm", PUBLISHED)

"""The precision study of language modelling: GPT-2 124M on OpenWebText, one arm or all.

    python experiments/lm/run.py --config amp_bf16 --seed 0
    python experiments/lm/run.py --config all --seeds 3
    python experiments/lm/run.py --config amp_bf16 --max_iters 100     # a quick test

Any `--section.key value` goes to every run. Results are in results/lm/{config}_seed{seed}.json, the runs beside them;
`gptlab study status results/lm` shows how far they are. A quick test is a study of its own, in results/lm/quick-100:
its learning rate decays within its 100 steps, so a full run cannot go on from it. Its results stand in results/lm until
the full ones replace them.
"""

import argparse
import json
import sys
from pathlib import Path

from gptlab.cli import lift_settings
from gptlab.config import load_study
from gptlab.errors import UserError
from gptlab.rundir import run_name, write_atomically
from gptlab.study.runner import first_seeds, run_study
from gptlab.study.table import read_summary


def main(study: str = "precision-lm", out: str = "results/lm") -> int:
    parser = argparse.ArgumentParser(description=f"Train arms of the study {study}.")
    parser.add_argument("--config", required=True, metavar="NAME", help="an arm of the study, or all")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seed", type=int, metavar="K", help="default: the study's first")
    which.add_argument("--seeds", type=int, metavar="N", help="the first N seeds")
    parser.add_argument("--max_iters", type=int, metavar="N", help="a quick test of N steps")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at the same time (default: one a GPU, or one)")
    parser.add_argument("--study", default=study, metavar="NAME", help=f"default: {study}")
    parser.add_argument("--out", type=Path, default=Path(out), metavar="DIR", help=f"default: {out}")
    words, settings = lift_settings(sys.argv[1:])
    options = parser.parse_args(words)

    if options.max_iters is not None:
        settings["train.max_steps"] = options.max_iters
    wanted = load_study(options.study, settings)
    arms = None if options.config == "all" else [options.config]
    seeds = first_seeds(wanted, 1 if options.seeds is None else options.seeds)
    if options.seed is not None:
        seeds = [options.seed]
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


def call(study: str, out: str) -> None:
    """Run and exit; what the caller got wrong is said in a sentence."""
    try:
        sys.exit(main(study, out))
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    call("precision-lm", "results/lm")

"""The classic 124M for some minutes on one GPU: tokens a second, MFU, memory and the loss.

    gptlab prepare novels/ --out data/novels-gpt2          # a folder of text files, in GPT-2's tokens
    python benchmarks/minutes.py --data data/novels-gpt2 --minutes 6 --out minutes.json
    python benchmarks/hellaswag.py hellaswag_val.jsonl --rows 2000 --device cuda --dtypes fp32 bf16    # rows a second
    python benchmarks/minutes.py --data data/novels-gpt2 --tiny --minutes 0.2      # proves the script, on a CPU too

The recipe is gpt2-124m-fineweb-edu (B = 64, T = 1,024, 524,288 tokens a step, compiled) on the data given. A first
short run measures the step; the second has as many steps as fit into the minutes, 5% of them warm-up, its decay to the
end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from common import machine, say, write_json

from gptlab.config import Recipe, load_recipe

RECIPE = "gpt2-124m-fineweb-edu"
PILOT = 30  # steps, of which the first ten are not timed
TINY = {
    "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 32, "model.block_size": 128, "batch.micro_batch": 4,
    "batch.tokens_per_step": 1024, "train.threads": 1, "precision.regime": "fp32",
}  # fmt: skip


def recipe_of(options: argparse.Namespace, steps: int) -> Recipe:
    """The recipe for so many steps."""
    recipe = load_recipe(RECIPE, {
        "data.path": str(options.data), "train.max_steps": steps, "schedule.warmup_steps": max(1, round(0.05 * steps)),
        "train.eval_every": max(1, steps // 10), "hellaswag.every": 0, "sample.every": 0, "checkpoint.every": 0,
        "checkpoint.keep_best": False, "log.every": 5, **(TINY if options.tiny else {}),
    })  # fmt: skip
    return recipe.replace({"eval.tokens": 65536 if not options.tiny else 1024})


def run(options: argparse.Namespace, steps: int, name: str) -> dict[str, Any]:
    from gptlab.rundir import RunDir
    from gptlab.training.loop import train

    folder = options.work / name
    shutil.rmtree(folder, ignore_errors=True)
    result = train(recipe_of(options, steps), folder, quiet=True)
    lines = RunDir(folder).read_metrics()
    told = {key: [[line["step"], line[key]] for line in lines if key in line] for key in ("loss", "val_loss", "mfu")}
    return {**result.to_json(), **told, "environment": RunDir(folder).read_json("environment.json")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a dataset in GPT-2's tokens")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--work", type=Path, default=Path("runs/minutes"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a CPU")
    options = parser.parse_args()
    pilot = run(options, PILOT, "pilot")
    assert pilot["status"] == "completed", pilot.get("reason")
    steps = max(20, int(options.minutes * 60_000 / pilot["time_per_iter_ms"]))
    say(f"{pilot['time_per_iter_ms']:.0f} ms a step: {steps} steps in {options.minutes:g} minutes")
    measured = {"machine": machine(), "pilot": pilot, "run": run(options, steps, "run")}
    write_json(options.out, measured)
    shown = {
        key: measured["run"].get(key) for key in ("steps", "final_val_loss", "tokens_per_second", "peak_memory_gb")
    }
    mfu = [value for _, value in measured["run"]["mfu"]]
    shown |= {"mfu": statistics.median(mfu) if mfu else None}
    print(json.dumps(shown, indent=2))


if __name__ == "__main__":
    main()

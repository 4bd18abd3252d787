"""The loss curve of the classic 124M, trained on a few million tokens in the remaining time.

The recipe is gpt2-124m-fineweb-edu (B = 64, T = 1,024, 524,288 tokens per step, compiled) on the stage's data. A short
first run measures the time of a step. The second run has as many steps as fit, with 5% warm-up and decay to the end.
"""

from __future__ import annotations

import shutil
import statistics

from gptlab.config import Recipe, load_recipe
from gptlab.rundir import RunDir
from gptlab.training.loop import train
from gpu_stages.stage import Row, Stage, pick, run
from gpu_stages.trained import TINY

RECIPE = "gpt2-124m-fineweb-edu"
PILOT = 6  # steps of the first run; half of them are timed
SHARE = 0.75  # share of the remaining time for the steps of the second run; the rest is for evaluations and start-up
LEAST = 20  # fewest steps of the second run


def recipe_of(stage: Stage, steps: int, evaluations: int) -> Recipe:
    return load_recipe(
        RECIPE,
        {
            "data.path": str(stage.data),
            "train.max_steps": steps,
            "schedule.warmup_steps": max(1, round(0.05 * steps)),
            "train.eval_every": max(1, steps // evaluations),
            "hellaswag.every": 0,
            "sample.every": 0,
            "checkpoint.every": 0,
            "checkpoint.keep_best": False,
            "log.every": 1,
            "eval.train": False,
            **(TINY if stage.tiny else {"compile.enabled": True}),
            "eval.tokens": 1024 if stage.tiny else 65536,
        },
    )


def run_of(stage: Stage, steps: int, evaluations: int) -> Row:
    folder = stage.work / "train"
    shutil.rmtree(folder, ignore_errors=True)
    result = train(recipe_of(stage, steps, evaluations), folder, quiet=True).to_json()
    lines = RunDir(folder).read_metrics()
    told = {
        key: [[line["step"], line[key]] for line in lines if key in line]
        for key in ("loss", "val_loss", "mfu", "grad_norm", "largest_logit")
    }
    shutil.rmtree(folder, ignore_errors=True)  # 1.5 GB of checkpoint
    return {"result": result, **told}


def pilot(stage: Stage) -> Row:
    row = run_of(stage, PILOT, 1)
    if row["result"]["status"] != "completed":
        raise RuntimeError(f"{row['result']['status']}: {row['result'].get('reason')}")
    return row | {"says": f"{row['result']['time_per_iter_ms']:.0f} ms a step"}


def curve(stage: Stage) -> Row:
    before = stage.rows["pilot"]
    # The start-up takes at most as long as that of the pilot, which also compiled.
    step = before["result"]["time_per_iter_ms"] / 1000
    start = before["seconds"] - PILOT * step
    time = min(stage.left(), 20.0) if stage.tiny else stage.left()
    steps = int(SHARE * max(0.0, time - (0 if stage.tiny else start)) / step)
    if steps < LEAST:
        raise RuntimeError(f"{stage.left():.0f} s are enough for {steps} steps only; at least {LEAST} are needed")
    steps = min(steps, 200) if stage.tiny else steps
    row = run_of(stage, steps, 10)
    mfu = [value for _, value in row["mfu"]]
    row["median_mfu"] = statistics.median(mfu) if mfu else None
    first, last = row["loss"][0][1], row["loss"][-1][1]
    got = row["result"]
    says = f"{got['status']}, {steps} steps, {got.get('tokens_per_second') or 0:,.0f} tokens/s, loss {first:.3f} to "
    return row | {"says": f"{says}{last:.3f}, held out {got.get('final_val_loss')}, MFU {row['median_mfu']}"}


def main(stage: Stage) -> None:
    pick(stage)
    stage.all({"pilot": lambda: pilot(stage)}, expects=5.0 if stage.tiny else 60.0, most=200.0)
    if stage.rows["pilot"]["status"] == "done":
        stage.all({"curve": lambda: curve(stage)}, expects=5.0 if stage.tiny else 40.0, most=3600.0)
    else:
        stage.todo(["curve"])


if __name__ == "__main__":
    run(main)
